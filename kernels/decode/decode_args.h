/* What the decode kernels take: a fkda_decode_problem or fkda_apply_problem as the device sees it. Included
 * by C and by CUDA C++. */
#ifndef FKDA_DECODE_ARGS_H
#define FKDA_DECODE_ARGS_H

#include "../common/fwd_args.h"

/* A tensor of integers, or null. */
typedef struct fkda_index_args {
    const void *data;
    int is_i32;  /* else int64 */
    int columns; /* of a row, for tensors of two dimensions */
} fkda_index_args;

/* Records of tokens that were computed before, and which of them are to be applied to the states. */
typedef struct fkda_past_args {
    const float *records; /* [N, columns, HV, 3, 128], or null */
    int columns;
    fkda_index_args num_accepted_tokens, accepted; /* flash_kda.h has their shapes */
} fkda_past_args;

typedef struct fkda_decode_args {
    const void *q, *k, *v, *g, *beta; /* bf16, or fp32 where a flag says so; flash_kda.h has the shapes */
    void *out;
    fkda_token_strides q_strides, k_strides, v_strides, g_strides, beta_strides, out_strides;
    const float *A_log, *dt_bias; /* or null: zeros */
    fkda_state_args state;
    fkda_index_args state_indices, num_accepted_tokens, cu_seqlens, parents;
    fkda_state_args written; /* where states go: written_states, or the pool that they come from */
    fkda_index_args written_indices;
    int has_written_states;
    float *records; /* [N, record_columns, HV, 3, 128], or null */
    fkda_past_args past;
    const long long *rounding; /* seed and offset, or null */
    long long first_slot;
    long long tokens; /* of each sequence; with cu_seqlens of all */
    int record_columns;
    int heads;     /* HV */
    int group;     /* HV / H */
    int sequences; /* N */
    float scale, lower_bound;
    int write_states; /* flash_kda_write_states */
    int state_is_bf16, state_k_first;
    int gate, beta_kind; /* flash_kda_gate, flash_kda_beta */
    int g_is_f32, beta_is_f32;
    int qk_is_normalised;
    int split; /* log2 of the CTAs that a head is divided among */
    int room;  /* tokens whose vectors a CTA of a chunk kernel has shared memory for */
} fkda_decode_args;

typedef struct fkda_apply_args {
    fkda_past_args past;
    fkda_state_args state;
    fkda_index_args state_indices;
    const long long *rounding;
    long long first_slot;
    int heads, sequences;
    int state_is_bf16, state_k_first;
    int split; /* log2 of the CTAs that a head is divided among */
} fkda_apply_args;

#endif
