/* What the host passes to the Hopper forward kernels: one struct by value, the same in C and CUDA C. */
#ifndef FKDA_HOPPER_FWD_ARGS_H
#define FKDA_HOPPER_FWD_ARGS_H

#include "../common/fwd_args.h"
#include "segments.h"

/* What a launch works through, for every head. */
enum {
    FKDA_SEQUENCES,      /* whole ones */
    FKDA_FIRST_SEGMENTS, /* of cut sequences, and the next two kinds: */
    FKDA_INNER_SEGMENTS, /* all but the first and the last, for their maps */
    FKDA_LATER_SEGMENTS, /* all but the first; and sequences that are not cut */
};

/* Where pairs of blocks share pieces of work between two of them: the one that ends with such a piece takes its state from the one that
 * began it. In the workspace; of `states` only what is signalled is read. */
typedef struct fkda_handoff {
    float *states; /* [pair of blocks][128][128]; null: pieces are not divided */
    int *flags;    /* [pair of blocks][FKDA_HANDOFF_FLAGS], zeros before the launch: one to 16 rows */
} fkda_handoff;
enum { FKDA_HANDOFF_FLAGS = 8 };

/* CUtensorMap of the CUDA driver API, aligned as it must be. */
typedef struct fkda_tensor_map {
#ifdef __cplusplus
    alignas(64)
#else
    _Alignas(64)
#endif
        unsigned long long opaque[16];
} fkda_tensor_map;

/* Maps of the tensors [tokens, heads, 2, 64] with boxes of a chunk of tokens of 64 channels, coordinates in the order channel, token, half,
 * head, and rows of 128 bytes swizzled in shared memory. */
typedef struct fkda_hopper_fwd_args { /* NOLINT(clang-analyzer-optin.performance.Padding): one to a launch */
    fkda_fwd_args fwd;
    fkda_tensor_map q, k, g, v;
    fkda_cut cut;
    fkda_handoff handoff;
    int work; /* FKDA_SEQUENCES, ... */
} fkda_hopper_fwd_args;

/* For sequences of different lengths in one launch: boxes of the tensors are of chunks of pairs of blocks, and of those of blocks alone. */
typedef struct fkda_hopper_mixture_args { /* NOLINT(clang-analyzer-optin.performance.Padding) */
    fkda_hopper_fwd_args paired, alone;
    fkda_mixture mixture;
} fkda_hopper_mixture_args;

#endif
