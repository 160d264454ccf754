/* The struct that the host passes by value to the backward kernels for Hopper, the same in C and in CUDA
 * C. */
#ifndef FKDA_HOPPER_BWD_ARGS_H
#define FKDA_HOPPER_BWD_ARGS_H

#include "../../backward/bwd_args.h"
#include "bwd_shape.h"

/*
 * A border lies between two segments of a sequence. Border i of a sequence that begins at token `begin` is in
 * front of the sequence's segment i + 1, and has the place begin / segment + i.
 */
typedef struct fkda_hopper_bwd_args {
    fkda_bwd_args bwd; /* `states`, `gradients` and `records` are null */
    /* The workspace. `states` and `gradients` are null if the host knows that no sequence has two segments; a
     * longer sequence then gives wrong gradients, and nothing outside of the workspace is touched. */
    fkda_hopper_border *states;    /* [borders, HV]: the state at the border */
    fkda_hopper_border *gradients; /* [borders, HV]: the gradient with respect to it */
    unsigned char *records;        /* [CTAs, record_chunks, FKDA_HOPPER_BWD_RECORD] */
    int record_chunks;             /* the most chunks that a segment has */
} fkda_hopper_bwd_args;

#endif
