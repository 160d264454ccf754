/* What the host passes to the Hopper forward kernels: one struct by value, the same in C and CUDA C. */
#ifndef FKDA_HOPPER_FWD_ARGS_H
#define FKDA_HOPPER_FWD_ARGS_H

#include "../common/fwd_args.h"
#include "segments.h"

/* Where there are more heads than pairs of blocks, and fewer than blocks: in each phase those of one group are shared by pairs and all
 * others have a block to themselves. Every group has its phase, after which all are through. `paired` and `single` say how far a
 * head comes in a phase in either way, in parts of what the groups come to together. */
typedef struct fkda_phases {
    float *states; /* between phases: [task][128][128]; null: there is one phase for all */
    int groups, phase;
    int group_tasks; /* of each group, the last one perhaps fewer */
    int paired, single;
} fkda_phases;

/* CUtensorMap of the CUDA driver API, aligned as it must be. */
typedef struct fkda_tensor_map {
#ifdef __cplusplus
    alignas(64)
#else
    _Alignas(64)
#endif
        unsigned long long opaque[16];
} fkda_tensor_map;

/* Maps of the tensors [tokens, heads, 2, 64] with boxes of 16 tokens of 64 channels, coordinates in the order channel, token, half,
 * head, and rows of 128 bytes swizzled in shared memory. */
typedef struct fkda_hopper_fwd_args { /* NOLINT(clang-analyzer-optin.performance.Padding): one to a launch */
    fkda_fwd_args fwd;
    fkda_tensor_map q, k, g, v;
    fkda_cut cut;
    fkda_phases phases;
} fkda_hopper_fwd_args;

#endif
