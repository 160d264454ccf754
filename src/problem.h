/*
 * A call after its arguments were checked. Everything below check.c takes these structs: what is in them is
 * known to be right, so no backend checks it again.
 */
#ifndef FKDA_PROBLEM_H
#define FKDA_PROBLEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "flash_kda.h"

enum { FKDA_DIM = 128 }; /* K and V */

typedef struct fkda_kernel fkda_kernel;

/* Everything that decides what a call runs: shapes, options and the device, but no pointer. A plan is made
 * from a shape alone, and two calls with equal shapes have equal plans. Compared byte by byte, so a shape is
 * zeroed before it is filled in. */
typedef struct fkda_shape {
    const fkda_kernel *kernel;
    flash_kda_device device;
    int64_t batch;      /* B */
    int64_t tokens;     /* T, of one batch row */
    int64_t heads;      /* H */
    int64_t sequences;  /* N */
    int64_t max_seqlen; /* tokens of the longest sequence; 0: not known */
    int32_t threads;    /* of the CPU backend, at least 1; 0 on a GPU */
    int32_t cut;        /* flash_kda_cut */
    int32_t batch_invariant;
    int32_t has_cu_seqlens;
    int32_t kernel_is_asked_for; /* by its name; else it is the device's default */
    int32_t zero;                /* no padding, whose bytes would be compared */
} fkda_shape;

/* Whether all sequences have the length T: the host then knows every length. A single sequence counts too,
 * though its length on the device may be shorter than T. */
static inline bool fkda_equal_lengths(const fkda_shape *s)
{
    return s->sequences == s->batch;
}

/* A tensor [B, T, H, 128], or [B, T, H] for beta, of which the elements of a row of 128 are neighbours.
 * Strides count elements. */
typedef struct fkda_token_view {
    void *data;
    int64_t batch_stride, token_stride, head_stride;
    int64_t heads;
    int32_t dtype; /* flash_kda_dtype */
} fkda_token_view;

/* A tensor [N, H, V, K] of states, each of them contiguous. `data` is NULL if the tensor is absent. */
typedef struct fkda_state_view {
    void *data;
    int64_t sequence_stride, head_stride;
    int64_t heads;
    int32_t dtype; /* flash_kda_dtype */
} fkda_state_view;

typedef struct fkda_problem {
    fkda_shape shape;
    void *stream;
    fkda_token_view q, k, v, g, beta, out;
    const float *A_log;   /* [H] */
    const float *dt_bias; /* [H, K] */
    fkda_state_view initial_state, final_state;
    const void *cu_seqlens; /* [N + 1], or NULL */
    bool cu_seqlens_is_i32; /* else int64 */
    float scale, lower_bound;
    void *workspace;
    size_t workspace_size;             /* bytes */
    const volatile int32_t *interrupt; /* or NULL */
    flash_kda_nonfinite *nonfinite;    /* [FLASH_KDA_CHECKED_TENSORS], or NULL: nothing is counted */
} fkda_problem;

/* Whether the caller wants the call to stop. The CPU backend asks at every chunk. */
static inline bool fkda_interrupted(const fkda_problem *p)
{
    return p->interrupt && __atomic_load_n(p->interrupt, __ATOMIC_RELAXED) != 0;
}

/* Where a sequence is: tokens `begin` to `end` - 1 of a batch row. */
typedef struct fkda_sequence {
    int64_t row, begin, end;
} fkda_sequence;

/* cu_seqlens[n], for a cu_seqlens that the host may read. Another thread may write to the tensor meanwhile,
 * so two calls may return different values: the caller reads a border once and uses that value. */
static inline int64_t fkda_border(const fkda_problem *p, int64_t n)
{
    if (p->cu_seqlens_is_i32) return __atomic_load_n((const int32_t *)p->cu_seqlens + n, __ATOMIC_RELAXED);
    return __atomic_load_n((const int64_t *)p->cu_seqlens + n, __ATOMIC_RELAXED);
}

static inline int64_t fkda_clamp(int64_t x, int64_t least, int64_t most)
{
    return x < least ? least : x > most ? most : x;
}

/* Sequence n, for a cu_seqlens that the host may read. The check has seen right values. If they have changed
 * since, the sequence is a wrong one and still lies inside the tensors. */
static inline fkda_sequence fkda_sequence_at(const fkda_problem *p, int64_t n)
{
    if (!p->cu_seqlens) return (fkda_sequence){n, 0, p->shape.tokens};
    const int64_t begin = fkda_clamp(fkda_border(p, n), 0, p->shape.tokens);
    return (fkda_sequence){0, begin, fkda_clamp(fkda_border(p, n + 1), begin, p->shape.tokens)};
}

/* The element offset of a token's row of one head, and of a sequence's state of one head. */
static inline int64_t fkda_row_offset(const fkda_token_view *t, int64_t row, int64_t token, int64_t head)
{
    return row * t->batch_stride + token * t->token_stride + head * t->head_stride;
}

static inline int64_t fkda_state_offset(const fkda_state_view *s, int64_t sequence, int64_t head)
{
    return sequence * s->sequence_stride + head * s->head_stride;
}

#endif
