/* What the pieces of the host library share: a checked problem, the table of kernels, errors. */
#ifndef FKDA_INTERNAL_H
#define FKDA_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "flash_kda.h"

enum { FKDA_DIM = 128 }; /* K and V */

typedef struct fkda_kernel fkda_kernel;

/* The arguments of one call after every check: contiguous tensors, K = V = FKDA_DIM. */
typedef struct fkda_problem {
    flash_kda_device device;
    void *stream;
    const fkda_kernel *kernel;
    bool kernel_is_asked; /* for by its name, else the default */
    int64_t batch;        /* B */
    int64_t tokens;       /* T, of one batch row */
    int64_t heads;        /* H */
    int64_t sequences;    /* N */
    const uint16_t *q, *k, *v, *g, *beta;
    uint16_t *out;
    const float *A_log, *dt_bias;
    const void *initial_state; /* or NULL */
    void *final_state;         /* or NULL */
    bool state_is_bf16;        /* of both states, else f32 */
    const void *cu_seqlens;    /* or NULL */
    bool cu_seqlens_is_i32;    /* else i64 */
    float scale, lower_bound;
    void *workspace;
    size_t workspace_size;
    int threads; /* of the CPU, at least 1 */
    bool batch_invariant;
    int64_t max_seqlen; /* 0: not known */
    flash_kda_cut cut;
} fkda_problem;

/* One way to run the forward pass. */
struct fkda_kernel {
    flash_kda_kernel_info info;
    int min_compute_capability; /* 10 * major + minor; 0 on the CPU */
    int max_compute_capability; /* 0: no limit */
    size_t (*workspace_size)(const fkda_problem *);
    flash_kda_status (*fwd)(const fkda_problem *);
    /* Writes how the work is laid out: a few sentences, no newline at the end, in 512 bytes at most. Depends on shapes,
     * max_seqlen and the device only. May be NULL. */
    void (*explain)(const fkda_problem *, char *text, size_t size);
};

/* errors.c: stores the calling thread's sentence and returns status. */
flash_kda_status fkda_fail(flash_kda_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* check.c */
typedef enum fkda_purpose {
    FKDA_FOR_FWD,
    FKDA_FOR_REFERENCE,
    FKDA_FOR_SHAPES, /* nothing is read or written: pointers may be missing */
} fkda_purpose;
flash_kda_status fkda_check(const flash_kda_fwd_params *params, fkda_purpose purpose, fkda_problem *problem);

/* kernels.c: the kernel called name, or the default for the device if name is NULL. */
flash_kda_status fkda_find_kernel(flash_kda_device device, const char *name, const fkda_kernel **kernel);

/* kernels.c: why the problem's kernel runs, in a sentence. */
void fkda_explain_choice(const fkda_problem *problem, char *text, size_t size);

/* Token range of sequence n, for cu_seqlens that the host may read. */
static inline void fkda_sequence_range(const fkda_problem *p, int64_t n, int64_t *begin, int64_t *end)
{
    if (!p->cu_seqlens) {
        *begin = n * p->tokens;
        *end = *begin + p->tokens;
    } else if (p->cu_seqlens_is_i32) {
        *begin = ((const int32_t *)p->cu_seqlens)[n];
        *end = ((const int32_t *)p->cu_seqlens)[n + 1];
    } else {
        *begin = ((const int64_t *)p->cu_seqlens)[n];
        *end = ((const int64_t *)p->cu_seqlens)[n + 1];
    }
}

#endif
