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

/* The states every `every` tokens that lie in `memory`. */
fkda_border_states fkda_border_states_in(void *memory, const fkda_shape *shape, int64_t every);

/* The states of all sequences after `offset` tokens, a multiple of `every` that is not 0. */
fkda_state_view fkda_border_state(const fkda_border_states *states, int64_t offset);

/* A forward pass that has `states` as its checkpoints, and is otherwise `problem`, which has none. */
fkda_problem fkda_with_border_states(const fkda_problem *problem, const fkda_border_states *states);

/* Tokens from one state to the next in `saved`: as many as a stretch has if the workspace has half of the
 * bytes of q, k, v and g, and at least 512. 0: nothing is saved, since sequences are shorter, since the
 * backward pass cannot be stretched, or since the call has checkpoints, and a kernel writes the states of one
 * list. */
int64_t fkda_hopper_saved_interval(const fkda_shape *shape);

/* Bytes of `saved`. */
size_t fkda_hopper_saved_bytes(const fkda_shape *shape);

#endif
