/* What the host passes to the Hopper forward kernels: one struct by value, the same in C and CUDA C. */
#ifndef FKDA_HOPPER_FWD_ARGS_H
#define FKDA_HOPPER_FWD_ARGS_H

#include "../common/fwd_args.h"
#include "segments.h"

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
typedef struct fkda_hopper_fwd_args {
    fkda_fwd_args fwd;
    fkda_tensor_map q, k, g, v;
    fkda_cut cut;
} fkda_hopper_fwd_args;

#endif
