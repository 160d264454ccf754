/* A problem on a device, ready to run: buffers have guard bands, outputs are poisoned, and results are read
 * back and checked. */
#ifndef SUPPORT_CALL_H
#define SUPPORT_CALL_H

#include "problem.h"

/* Memory on a device with a band on either side. */
typedef struct buffer {
    flash_kda_device device;
    unsigned char *base;
    size_t bytes;       /* between the bands; 0 with base NULL: there is no buffer */
    unsigned char band; /* the byte that the bands hold */
} buffer;

typedef enum state_mode { STATE_NONE, STATE_IN, STATE_OUT, STATE_BOTH, STATE_IN_PLACE } state_mode;
enum { STATE_MODES = 5 };
extern const char *const state_mode_names[STATE_MODES];

static inline bool mode_reads(state_mode mode)
{
    return mode == STATE_IN || mode == STATE_BOTH || mode == STATE_IN_PLACE;
}

static inline bool mode_writes(state_mode mode)
{
    return mode == STATE_OUT || mode == STATE_BOTH || mode == STATE_IN_PLACE;
}

typedef struct call_options {
    flash_kda_device device;
    const char *kernel;
    int threads;
    state_mode mode;
    bool bf16_state;
    bool i32_seqlens;
    bool batch_invariant;
    bool tells_longest; /* sets max_seqlen */
    flash_kda_cut cut;
    bool counts_nonfinite; /* sets nonfinite */
} call_options;

typedef struct call {
    flash_kda_fwd_params params;
    call_options options;
    int64_t rows, states;
    const float *initial_state; /* of the problem, which must outlive the call */
    buffer q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial, final, out, workspace, nonfinite;
} call;

/* Puts everything in place, and ends the program if there is no memory. Returns the status of
 * flash_kda_fwd_workspace_size(). On anything but FLASH_KDA_OK there is nothing to close. */
flash_kda_status call_open(call *c, const problem *p, call_options options);
void call_close(call *c);

/* Fills out, the final state and the workspace with NaN, an in-place state with the initial one, and the
 * records of nonfinite with what no call writes. */
void call_poison(call *c);

/* Calls flash_kda_fwd() on what call_poison() left, and waits until it is done. */
flash_kda_status call_run(call *c);

/* The bits of out, bf16 [B, T, H, DIM], and of the final state, bf16 or f32 [N, H, DIM, DIM]. The caller
 * frees them. */
uint16_t *call_read_out(const call *c);
void *call_read_state(const call *c);

/* What a call with counts_nonfinite has counted. */
void call_read_nonfinite(const call *c, flash_kda_nonfinite records[FLASH_KDA_CHECKED_TENSORS]);

/* The name of the first buffer of which a band was written to or an input changed; NULL if there is none. */
const char *call_damage(const call *c, const problem *p);

/* Whether out, the final state and the records are still as call_poison() left them. */
bool call_untouched(const call *c);

#endif
