/* The struct that the host passes by value to the kernel for the gradients of chunks, the same in C and in
 * CUDA C. */
#ifndef FKDA_HOPPER_CHUNK_ARGS_H
#define FKDA_HOPPER_CHUNK_ARGS_H

#include "../../../backward/bwd_args.h"
#include "../../fwd_args.h"

/* Tokens of a chunk, and threads of a CTA, which has one chunk of one head. */
#define FKDA_HOPPER_BWD_CHUNK 32
#define FKDA_HOPPER_CHUNK_THREADS 256

/* Dynamic shared memory of a CTA, at most: two CTAs run on an SM. */
#define FKDA_HOPPER_CHUNK_SHARED_BYTES 115712

/* A border image: a matrix [V, K] of fp16, whose row v was divided by a power of two, scale[v]. A row has 16
 * units of 16 bytes, and unit u of row v lies at u ^ v % 8. */
#define FKDA_HOPPER_BORDER_IMAGE (2 * 128 * 128 + 4 * 128)

/* Slot begin / 32 + n + i is chunk i of sequence n, which begins at token `begin`. */
typedef struct fkda_hopper_chunk_args { /* NOLINT(clang-analyzer-optin.performance.Padding): one a launch */
    fkda_bwd_args bwd;                  /* `segment` is FKDA_HOPPER_BWD_CHUNK */
    const unsigned char *states;        /* [slots, HV] border images: the state before the chunk */
    const unsigned char *gradients;     /* and the gradient with respect to the state after it */
    fkda_tma_descriptor q, k, g, v, dout;
} fkda_hopper_chunk_args;

#endif
