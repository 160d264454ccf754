/* Calls on the pretended GPU (tests/pretend_driver), on which nothing runs: arguments with made-up addresses,
 * and what the driver was asked for. */
#ifndef SUPPORT_PRETENDED_H
#define SUPPORT_PRETENDED_H

#include "../tests/pretend_driver/counts.h"
#include "problem.h"

/* The counts of the calling thread. Ends the program if the driver is not the pretended one: a real driver
 * would run kernels on the made-up addresses. */
const pretended_counts *pretended_counts_find(void);

/* Arguments for CUDA device 0, with initial and final states in fp32 and a workspace that is large enough for
 * any call. */
typedef struct pretended_shape {
    int64_t batch, tokens, heads; /* B, T of one row, H */
    int64_t sequences;            /* N of cu_seqlens; 0: there is no cu_seqlens */
    int64_t longest;              /* tokens of the longest sequence; 0: not given */
} pretended_shape;
flash_kda_fwd_params pretended_params(pretended_shape shape);

/* Calls of decode, decode_layer and apply on a pool of fp32 states with state_indices. */
typedef struct pretended_decode {
    int64_t sequences, tokens, heads; /* N, T, H */
    int32_t writes;                   /* flash_kda_write_states; of decode alone, as what follows */
    bool has_records, is_tree;
} pretended_decode;
flash_kda_decode_params pretended_decode_params(pretended_decode shape);
flash_kda_decode_layer_params pretended_layer_params(pretended_decode shape);
flash_kda_apply_params pretended_apply_params(pretended_decode shape);

#endif
