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
    fkda_decode_args decode; /* without q, k, v and parents */
    const void *x;
    fkda_token_strides x_strides;
    long long x_part; /* from q to k, and from k to v */
    fkda_channel_args weight, bias, conv_state, windows;
    long long conv_slot_stride, windows_sequence, windows_token;
    const void *output_gate; /* or null */
    fkda_token_strides output_gate_strides;
    const void *norm_weight; /* [128], or null */
    float norm_eps;
    int windows_columns, window_columns; /* C and L */
    int keeps_drafts;                    /* one slot keeps the inputs of all draft tokens */
    int write_windows;                   /* flash_kda_write_states of conv_state */
    int weight_is_f32, bias_is_f32, output_gate_is_f32, norm_weight_is_f32;
} fkda_decode_layer_args;

#endif
