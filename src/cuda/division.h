/* How sequences are cut into segments (division.c), for their launch (segments.c). */
#ifndef FKDA_DIVISION_H
#define FKDA_DIVISION_H

#include "../../kernels/hopper/costs.h"
#include "../../kernels/hopper/segments.h"
#include "hopper.h"

static inline int64_t least(int64_t x, int64_t y)
{
    return x < y ? x : y;
}

static inline int64_t most(int64_t x, int64_t y)
{
    return x > y ? x : y;
}

static inline int64_t rounds(int64_t pieces, int64_t places)
{
    return (pieces + places - 1) / places;
}

/* Where all segments are done in one launch (kernels/hopper/at_once.cuh). */
typedef struct at_once {
    int64_t pairs;  /* of blocks; 0: it takes several launches */
    int64_t clocks; /* that it should take, to be compared with those of several launches */
    fkda_relay plan;
} at_once;

/* The best way to cut so many heads of sequences of so many chunks into so many segments in one launch, or none. */
at_once fkda_plan_at_once(int64_t heads, int64_t chunks, int64_t segments, int multiprocessors);

typedef struct division {
    int64_t shortest; /* tokens of a segment, at least; 0: nothing is cut */
    int64_t slots;    /* segments of sequences that are cut, at most */
    int64_t groups;   /* of maps, at most */
    at_once at_once;
    fkda_mixed mixture; /* if there is one: sequences of `shortest` tokens may be cut */
} division;

/* Where sequences are cut: where that pays, in the way that pays; wherever it can be done; or only those of different lengths, in the
 * launch for such a mixture. */
typedef enum cutting { WHERE_IT_PAYS, WHEREVER_POSSIBLE, IN_MIXTURES } cutting;

/* From shapes and the device alone. */
division fkda_divide(const fkda_problem *p, int multiprocessors, cutting where);

/* All sequences have the same length, or there is one. */
bool fkda_sequences_are_alike(const fkda_problem *p);

#endif
