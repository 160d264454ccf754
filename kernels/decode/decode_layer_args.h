/* What the kernels of decode_layer take: a fkda_decode_layer_problem as the device sees it. Included by C and
 * by CUDA C++. */
#ifndef FKDA_DECODE_LAYER_ARGS_H
#define FKDA_DECODE_LAYER_ARGS_H

#include "decode_args.h"

/* A tensor of numbers for each channel of q, k and v and each of some columns; strides in elements. */
typedef struct fkda_channel_args {
    void *data; /* or null */
    long long part, channel, column;
} fkda_channel_args;

typedef struct fkda_decode_layer_args {
    const void *x, *g, *beta, *output_gate; /* output_gate may be null */
    void *out;
    fkda_token_strides x_strides, g_strides, beta_strides, output_gate_strides, out_strides;
    long long x_part; /* from q to k, and from k to v */
    fkda_channel_args weight, bias, conv_state, windows;
    long long conv_slot_stride, windows_sequence, windows_token;
    const void *norm_weight;      /* or null */
    const float *A_log, *dt_bias; /* or null: zeros */
    fkda_state_args state;
    fkda_index_args state_indices, num_accepted_tokens, cu_seqlens;
    float *records;            /* [N, record_columns, H, 3, 128], or null */
    const long long *rounding; /* seed and offset, or null */
    long long first_slot;
    long long tokens; /* of each sequence; with cu_seqlens of all */
    int record_columns, windows_columns, window_columns; /* R, C and L */
    int heads, sequences;
    float scale, lower_bound, norm_eps;
    int write_states; /* flash_kda_write_states */
    int keeps_drafts; /* one slot keeps the inputs of all draft tokens */
    int state_is_bf16, state_k_first;
    int gate, beta_kind; /* flash_kda_gate, flash_kda_beta */
    int g_is_f32, beta_is_f32, weight_is_f32, bias_is_f32, output_gate_is_f32, norm_weight_is_f32;
    int qk_is_normalised;
} fkda_decode_layer_args;

#endif
