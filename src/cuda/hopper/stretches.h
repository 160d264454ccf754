/*
 * A backward pass over stretches of tokens, one after the other, which use the same memory for what lies
 * between the walks and the gradients of chunks.
 *
 * A stretch is a problem of its own: some tokens of every sequence, with the state before them as its initial
 * state, and the gradient with respect to the state after them as its gradient of a final state.
 */
#ifndef FKDA_HOPPER_STRETCHES_H
#define FKDA_HOPPER_STRETCHES_H

#include "../../bwd_problem.h"

/* All stretches but the last one have `tokens` tokens. */
typedef struct fkda_stretches {
    int64_t count, tokens;
} fkda_stretches;

/* Whether the host knows where each sequence begins, and borders between stretches may depend on the limit of
 * the workspace, and thereby on how many sequences there are. */
bool fkda_can_be_stretched(const fkda_shape *shape);

/* At most `count` stretches. All but the last one are multiples of `unit` tokens, which is whole chunks. */
fkda_stretches fkda_make_stretches(const fkda_shape *shape, int64_t count, int64_t unit);

/* The same stretches, or shorter ones and one more of them, if their chunks then are done in less time. A CTA
 * has one chunk of one head, and `ctas` of them run at the same time: a stretch with a few chunks more than
 * fit takes as long as if there were twice as many. */
fkda_stretches fkda_fill_gpu(const fkda_shape *shape, fkda_stretches stretches, int64_t ctas);

/* Stretch i without what it gets from other stretches: its states are those of the whole problem where it has
 * the sequences' beginning or end, and absent elsewhere. */
fkda_bwd_problem fkda_stretch_of(const fkda_bwd_problem *problem, const fkda_stretches *stretches, int64_t i);

#endif
