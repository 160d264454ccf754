/*
 * What the forward pass saves for the backward pass on the CPU: fp32 states [K, V] from inside of sequences,
 * so that a walk over the whole sequence need not find them again. The states lie as [B, states of a batch
 * row, HV, K, V].
 *
 * States are apart by as many tokens as make them a fifth of the bytes of q, k, v and g in bf16, or a little
 * less. The place of a state depends on where its sequence begins, and the room on T alone, which the host
 * knows: a sequence that begins at token b has its state after j intervals C in place b / C + j - 1 of its
 * row. No two sequences share a place, because all states of a sequence lie before its last token.
 */
#ifndef FKDA_SAVED_H
#define FKDA_SAVED_H

#include "problem.h"

/* Tokens between two states. 4 bytes * K * V of a state are at most a fifth of those of so many tokens, which
 * have 2 bytes * K * (2 + 2 / m) for each value head, if m value heads share a head of q and k. */
static inline int64_t fkda_saved_interval(const fkda_shape *s)
{
    const int64_t m = s->heads / s->qk_heads, tokens_16 = 5 * FKDA_DIM / 16;
    return (tokens_16 * m + m) / (m + 1) * 16;
}

/* States of a batch row. */
static inline int64_t fkda_saved_states(const fkda_shape *s)
{
    return s->tokens > 0 ? (s->tokens - 1) / fkda_saved_interval(s) : 0;
}

static inline size_t fkda_saved_bytes(const fkda_shape *s)
{
    return (size_t)(s->batch * fkda_saved_states(s) * s->heads) * (sizeof(float) * FKDA_DIM * FKDA_DIM);
}

/* The state of a head after `offset` tokens of a sequence: a multiple of the interval, less than the
 * sequence's length. */
static inline float *fkda_saved_state(const fkda_problem *p, const fkda_sequence *sequence, int64_t offset,
                                      int64_t h)
{
    const fkda_shape *s = &p->shape;
    const int64_t interval = fkda_saved_interval(s), place = sequence->row * fkda_saved_states(s) +
                                                             sequence->begin / interval + offset / interval -
                                                             1;
    return (float *)p->saved + (place * s->heads + h) * (FKDA_DIM * FKDA_DIM);
}

#endif
