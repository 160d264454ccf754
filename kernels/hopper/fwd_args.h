/* The struct that the host passes by value to every Hopper forward kernel, the same in C and in CUDA C. */
#ifndef FKDA_HOPPER_FWD_ARGS_H
#define FKDA_HOPPER_FWD_ARGS_H

#include "../common/fwd_args.h"
#include "segments.h"

/* The list of segments or sequences that a launch works through, for every head. */
enum {
    FKDA_SEQUENCES,      /* whole sequences */
    FKDA_FIRST_SEGMENTS, /* the first segment of each cut sequence */
    FKDA_INNER_SEGMENTS, /* all but the first and the last segment: those whose maps are needed */
    FKDA_LATER_SEGMENTS, /* all but the first segment, and the sequences that are not cut */
};

/* What the kernel fkda_hopper_join does, in `work` (join/join.cuh). A sequence without map groups needs CHAIN
 * alone; otherwise COMPOSE, CHAIN and EXPAND are launched one after the other. */
enum {
    FKDA_JOIN_COMPOSE, /* the maps of each map group to one map and one state */
    FKDA_JOIN_CHAIN,   /* states from map to map, or from map group to map group */
    FKDA_JOIN_EXPAND,  /* states through the maps of each map group */
};

/* Workspace of the even-share schedule, for work items that two workers share (a worker is a solo CTA or a
 * CTA pair): the first worker leaves the state here, the second one waits for the flag. Of `states` only
 * flagged rows are read. */
typedef struct fkda_handoff {
    float *states; /* [share border][128][128]; null: work items are not divided */
    int *flags;    /* [share border][FKDA_HANDOFF_FLAGS], zeros before the launch: one flag for 16 rows */
} fkda_handoff;
enum { FKDA_HANDOFF_FLAGS = 8 };
enum { FKDA_PIECE_STATE_FLOATS = 128 * 128 + 8 * 32 * 4 }; /* of a PieceState */

/* The driver's CUtensorMap, with the alignment it must have. */
typedef struct fkda_tma_descriptor {
#ifdef __cplusplus
    alignas(64)
#else
    _Alignas(64)
#endif
        unsigned long long opaque[16];
} fkda_tma_descriptor;

/* TMA descriptors are of the tensors [B, T, heads, 128], in boxes of one chunk of tokens by 64 channels, with
 * coordinates in the order channel, token, head, row of the batch, and rows of 128 bytes swizzled in shared
 * memory. */
typedef struct fkda_hopper_fwd_args { /* NOLINT(clang-analyzer-optin.performance.Padding): one a launch */
    int work;                         /* FKDA_SEQUENCES, ...; of fkda_hopper_join FKDA_JOIN_COMPOSE, ... */
    fkda_handoff handoff;
    fkda_fwd_args fwd;
    fkda_cut cut;
    fkda_tma_descriptor q, k, g, v;
    /* Workspace for checkpoints inside chunks: a PieceState (join/layouts.cuh) for each CTA pair, or null. */
    void *piece_states;
} fkda_hopper_fwd_args;

/* The mixed schedule has both chunk sizes in one launch: boxes of `pair` are chunks of a CTA pair, boxes of
 * `solo` are chunks of a solo CTA. */
typedef struct fkda_hopper_mixed_args { /* NOLINT(clang-analyzer-optin.performance.Padding) */
    fkda_hopper_fwd_args pair, solo;
    fkda_mixed mixed;
} fkda_hopper_mixed_args;

#endif
