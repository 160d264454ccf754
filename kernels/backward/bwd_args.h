/* The struct that the host passes by value to the backward kernels, the same in C and in CUDA C. */
#ifndef FKDA_BWD_ARGS_H
#define FKDA_BWD_ARGS_H

#include "../common/fwd_args.h"

/*
 * A sequence is cut into segments of `segment` tokens. Each segment has a slot in what is kept between
 * launches: slot begin / segment + n + i is segment i of sequence n, which begins at token `begin`. Slots of
 * two sequences never meet, and the host needs no length to know how many there are.
 */
typedef struct fkda_bwd_args {
    fkda_fwd_args fwd; /* inputs and options. There are no outputs, no pool and no checkpoints. */
    const void *dout;  /* or null: zeros */
    fkda_token_strides dout_strides;
    fkda_state_args dfinal_state; /* data null: zeros */
    int initial_is_bf16, dfinal_is_bf16;
    void *dq, *dk, *dv, *dg, *dbeta; /* or null: not wanted */
    fkda_token_strides dq_strides, dk_strides, dv_strides, dg_strides, dbeta_strides;
    fkda_state_args dinitial_state;
    float *dA_log, *ddt_bias;
    int segment;   /* tokens, a multiple of 16 */
    int row_slots; /* segments of a batch row; without cu_seqlens */
    long long slots;
    /* The workspace. [.., V, K] are states in fp32. */
    float *states;    /* [slots, HV, V, K]: the state before the segment, of all segments but the first */
    float *gradients; /* [slots, HV, V, K]: D after the segment, of all segments but the last */
    float *records;   /* [CTAs, segment / 16, FKDA_BWD_RECORD]: what a CTA keeps of each chunk of a segment */
    float *sums;      /* [slots, HV, 2, K]: sums over a segment, for ddt_bias and dA_log; or null */
    float *dq_parts, *dk_parts; /* [B * T, HV, K]: of each value head, or null: there is one for each head */
} fkda_bwd_args;

#endif
