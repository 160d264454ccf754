/* A problem on a device, ready to run: buffers with guard bands, poisoned outputs, read back and checked. */
#ifndef SUPPORT_CALL_H
#define SUPPORT_CALL_H

#include "problem.h"

/* Memory on a device with a band on either side. */
typedef struct buffer {
    flash_kda_device device;
    unsigned char *base;
    size_t bytes;       /* of the interior; 0 and base NULL: no buffer */
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
    bool tells_longest; /* max_seqlen is set */
    flash_kda_cut cut;
} call_options;

typedef struct call {
    flash_kda_fwd_params params;
    call_options options;
    int64_t rows, states;
    const float *initial_state; /* of the problem, which must outlive the call */
    buffer q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial, final, out, workspace;
} call;

/* Puts everything in place; ends the program if there is no memory. The status is that of
 * flash_kda_fwd_workspace_size(), and on anything but FLASH_KDA_OK there is nothing to close. */
flash_kda_status call_open(call *c, const problem *p, call_options options);
void call_close(call *c);

/* Fills out, the final state and the workspace with NaN, and an in-place state with the initial one. */
void call_poison(call *c);

/* flash_kda_fwd() on what call_poison() left, and waits for it. */
flash_kda_status call_run(call *c);

/* Bits of bf16 [B, T, H, DIM] and bf16 or f32 [N, H, DIM, DIM], to be freed by the caller. */
uint16_t *call_read_out(const call *c);
void *call_read_state(const call *c);

/* The name of the first buffer whose band was written to, or whose input changed; NULL if none. */
const char *call_damage(const call *c, const problem *p);

/* True if out and the final state are still as call_poison() left them. */
bool call_untouched(const call *c);

#endif
