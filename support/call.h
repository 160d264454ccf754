/* A problem on a device, ready to run: buffers have guard bands, outputs and the gaps between the elements of
 * tensors are poisoned, and results are read back and checked. */
#ifndef SUPPORT_CALL_H
#define SUPPORT_CALL_H

#include "buffer.h"
#include "problem.h"

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

/* The arguments of a call that are tensors. Those that may have strides come first. */
typedef enum call_tensor {
    ARG_Q,
    ARG_K,
    ARG_V,
    ARG_G,
    ARG_BETA,
    ARG_OUT,
    STRIDED_ARGS,
    ARG_A_LOG = STRIDED_ARGS,
    ARG_DT_BIAS,
    ARG_INITIAL_STATE,
    ARG_FINAL_STATE,
    ARG_CU_SEQLENS,
    ARG_NONFINITE,
    ARG_STATE_INDICES,
    ARG_HAS_INITIAL_STATE,
    ARG_CHECKPOINT_STATES,
    ARG_CHECKPOINT_OFFSETS,
    ARG_CHECKPOINT_INDICES,
    ARG_CHECKPOINT_STARTS,
    ARGS,
} call_tensor;
extern const char *const argument_names[ARGS];

/* How q, k, v, g, beta or out lies in memory. */
typedef enum layout {
    LAYOUT_CONTIGUOUS,
    LAYOUT_PADDED,      /* gaps after each head, token and batch row; between elements of beta too */
    LAYOUT_HEAD_MAJOR,  /* [B, H, T, D] in memory */
    LAYOUT_TOKEN_MAJOR, /* [T, B, H, D] in memory */
    LAYOUT_FUSED,    /* A slice: token after token of one buffer has all tensors of one type side by side. */
    LAYOUT_REVERSED, /* Tokens and heads lie backwards, with negative strides: for beta, or on the CPU. */
} layout;
enum { LAYOUTS = 6 };

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
    bool for_reference;    /* No kernel is asked for, so that none has to take the call. */

    layout layouts[STRIDED_ARGS];
    bool odd_gaps;        /* Gaps of LAYOUT_PADDED are no multiples of 16 bytes: for the CPU. */
    bool rubbish_strides; /* Dimensions of size 1 have strides that mean nothing. */
    bool k_first;         /* states and checkpoints are [.., K, V] */
    int64_t slot_gap;     /* elements between slots of initial_state and of a state in place, times 8 */
    int64_t final_gap;    /* the same for a final_state of its own */
    int64_t
        final_slots; /* of a final_state of its own, with state_indices; 0: as many as initial_state has */
    int64_t row_gap; /* the same as slot_gap for checkpoint_states */
    bool bf16_checkpoints;
    bool i32_state_indices, i32_offsets, i32_checkpoint_rows; /* the last is of indices and starts */
    int parameter_ndim; /* of A_log and dt_bias: 0 for their own, or 1 to 4 */
} call_options;

/* Where a tensor argument is. */
typedef struct tensor_place {
    int buffer;            /* its number in the call */
    size_t offset;         /* bytes from the start of the buffer to the first element */
    flash_kda_tensor view; /* with states as [.., V, K], whatever their order in memory; ndim 0: absent */
} tensor_place;

enum { BUFFERS = ARGS + 3 };

typedef struct call {
    flash_kda_fwd_params params;
    call_options options;
    int64_t rows, states;
    const problem *problem; /* must outlive the call */
    tensor_place places[ARGS];
    buffer buffers[BUFFERS]; /* one for each argument that has its own, two of slices, and the workspace */
} call;

/* Puts everything in place, and ends the program if there is no memory. Returns the status of
 * flash_kda_fwd_workspace_size(). On anything but FLASH_KDA_OK there is nothing to close. */
flash_kda_status call_open(call *c, const problem *p, call_options options);
void call_close(call *c);

/* Fills out, the final state, checkpoints, everything between them and the workspace with NaN, an in-place
 * state with the initial one, and the records of nonfinite with what no call writes. */
void call_poison(call *c);

/* The start of a buffer, by its number. */
void *call_buffer(const call *c, int number);

/* Calls flash_kda_fwd() on what call_poison() left, and waits until it is done. */
flash_kda_status call_run(call *c);

/* The bits of a tensor, contiguous, states as [.., V, K]. The caller frees them. */
void *call_read(const call *c, call_tensor which);

/* Writes a tensor, or one slot of a tensor of states, from contiguous elements of its type; states are
 * [.., V, K]. */
void call_write(call *c, call_tensor which, const void *contents);
void call_write_slot(call *c, call_tensor which, int64_t slot, const void *contents);

/* The bits of out, bf16 [B, T, HV, DIM], and of the final state, bf16 or f32 [slots, HV, DIM, DIM]. The
 * caller frees them. */
uint16_t *call_read_out(const call *c);
void *call_read_state(const call *c);

/* What a call with counts_nonfinite has counted. */
void call_read_nonfinite(const call *c, flash_kda_nonfinite records[FLASH_KDA_CHECKED_TENSORS]);

/* The name of the first buffer of which a byte was written that no call may write; NULL if there is none. A
 * call may write elements of out and nonfinite, slots in which a sequence ends, and rows of checkpoints. */
const char *call_damage(const call *c, const problem *p);

/* Whether all buffers but the workspace are still as call_poison() left them. */
bool call_untouched(const call *c);

#endif
