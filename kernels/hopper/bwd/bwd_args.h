/* The struct that the host passes by value to the backward kernels for Hopper, the same in C and in CUDA
 * C. */
#ifndef FKDA_HOPPER_BWD_ARGS_H
#define FKDA_HOPPER_BWD_ARGS_H

#include "../../backward/bwd_args.h"
#include "chunks/chunk_args.h"

/*
 * A border lies between two segments of a sequence. Border i of a sequence that begins at token `begin` is in
 * front of the sequence's segment i + 1, and has the place begin / segment + i. A state image is a matrix
 * [V, K] of fp16 as shared.cuh lays it out, divided by its unit, a power of two.
 */
typedef struct fkda_hopper_bwd_args {
    fkda_bwd_args bwd; /* `states`, `gradients` and `records` are null */
    /* The workspace. `states` and `gradients` are null if the host knows that no sequence has two segments; a
     * longer sequence then gives wrong gradients, and nothing outside of the workspace is touched. */
    unsigned char *states;    /* [borders, HV] state images: the state at the border */
    unsigned char *gradients; /* [borders, HV] state images: the gradient with respect to it */
    float *state_units;       /* [borders, HV] */
    float *gradient_units;    /* [borders, HV] */
    unsigned char *records;   /* [CTAs, record_chunks, FKDA_HOPPER_BWD_RECORD] */
    int record_chunks;        /* the most chunks that a segment has */
} fkda_hopper_bwd_args;

#endif
