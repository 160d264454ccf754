/*
 * States inside of sequences of equal lengths, at equal distances, as a forward pass leaves them that has
 * them as checkpoints: fp32 [B, T / every, HV, V, K], or [.., K, V] with state_k_first.
 *
 * Stretches of the backward pass begin with such states (stretches.h). Either the forward pass has saved them
 * (flash_kda_fwd_params.saved), or the backward pass runs another forward pass for them alone.
 */
#ifndef FKDA_HOPPER_BORDER_STATES_H
#define FKDA_HOPPER_BORDER_STATES_H

#include "../../problem.h"

typedef struct fkda_border_states {
    fkda_state_view rows; /* [B, T / every] slots */
    int64_t every;        /* tokens from one state to the next: whole chunks */
    int64_t of_sequence;  /* T / every */
} fkda_border_states;

size_t fkda_border_states_bytes(const fkda_shape *shape, int64_t every);

/* Those that lie in memory of fkda_border_states_bytes(). */
fkda_border_states fkda_border_states_in(void *memory, const fkda_shape *shape, int64_t every);

/* The states of all sequences after `offset` tokens, a multiple of `every` that is not 0. */
fkda_state_view fkda_border_state(const fkda_border_states *states, int64_t offset);

/* The same forward pass, which also writes these states. It has no checkpoints of its own. */
fkda_problem fkda_with_border_states(const fkda_problem *problem, const fkda_border_states *states);

/* Tokens from one state to the next in `saved`: as many as a stretch has if the workspace has half of the
 * bytes of q, k, v and g, and at least 512. 0: nothing is saved, since the backward pass cannot be stretched,
 * or because the call has checkpoints, and a kernel writes the states of one list. */
int64_t fkda_hopper_saved_interval(const fkda_shape *shape);

/* Bytes of `saved`. */
size_t fkda_hopper_saved_bytes(const fkda_shape *shape);

#endif
