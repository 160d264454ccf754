/* Which checkpoints a sequence has, for tensors that the host may read: the CPU backend and the reference.
 *
 * Another thread may write to the tensors meanwhile. Every function here reads an element once, and whatever
 * it reads, offsets lie within the sequence and rows within checkpoint_states. */
#ifndef FKDA_CHECKPOINTS_H
#define FKDA_CHECKPOINTS_H

#include "problem.h"

enum { FKDA_NO_CHECKPOINT = -1, FKDA_CHECKPOINT_UNIT = 16 /* tokens, of which offsets are multiples */ };

/* With checkpoint_every and without checkpoint_starts: first_rows[n] becomes the row of the first checkpoint
 * of sequence n. */
static inline void fkda_checkpoint_rows(const fkda_problem *p, int64_t *first_rows)
{
    int64_t next = 0;
    for (int64_t n = 0; n < p->shape.sequences; n++) {
        const fkda_sequence sequence = fkda_sequence_at(p, n);
        first_rows[n] = next;
        next += (sequence.end - sequence.begin) / p->checkpoints.every;
    }
}

/* Whether fkda_checkpoint_rows() is needed. */
static inline bool fkda_needs_checkpoint_rows(const fkda_problem *p)
{
    return p->checkpoints.wanted && p->checkpoints.every && !p->checkpoints.starts.data;
}

/* The first checkpoint of sequence n, which has `length` tokens, after more than `after` tokens, or
 * FKDA_NO_CHECKPOINT. */
static inline int64_t fkda_next_checkpoint(const fkda_problem *p, int64_t n, int64_t length, int64_t after)
{
    const fkda_checkpoints *c = &p->checkpoints;
    int64_t next = FKDA_NO_CHECKPOINT;
    if (!c->wanted) return next;
    if (c->every) {
        const int64_t offset = (after / c->every + 1) * c->every;
        return offset <= length ? offset : next;
    }
    for (int64_t i = n * c->columns; i < (n + 1) * c->columns; i++) {
        const int64_t offset = fkda_index_at(&c->offsets, i);
        if (offset <= after || offset > length || offset % FKDA_CHECKPOINT_UNIT) continue;
        if (next == FKDA_NO_CHECKPOINT || offset < next) next = offset;
    }
    return next;
}

/* The rows that get the state of sequence n after `offset` tokens, one a call: `*column` is 0 at first.
 * Returns FKDA_NO_CHECKPOINT after the last one. `first_rows` is from fkda_checkpoint_rows() where it is
 * needed. */
static inline int64_t fkda_next_checkpoint_row(const fkda_problem *p, const int64_t *first_rows, int64_t n,
                                               int64_t offset, int64_t *column)
{
    const fkda_checkpoints *c = &p->checkpoints;
    while (*column < (c->every ? 1 : c->columns)) {
        const int64_t i = n * c->columns + (*column)++;
        int64_t row = i;
        if (c->every) /* without overflow, whatever starts has become since it was checked */
            row = (int64_t)((uint64_t)(c->starts.data ? fkda_index_at(&c->starts, n) : first_rows[n]) +
                            (uint64_t)(offset / c->every - 1));
        else if (fkda_index_at(&c->offsets, i) != offset)
            continue;
        else if (c->indices.data)
            row = fkda_index_at(&c->indices, i);
        if (row >= 0 && row < c->states.slots) return row;
    }
    return FKDA_NO_CHECKPOINT;
}

#endif
