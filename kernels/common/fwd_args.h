/* The struct that the host passes by value to the forward kernels, the same in C and in CUDA C. */
#ifndef FKDA_FWD_ARGS_H
#define FKDA_FWD_ARGS_H

/* Steps in a tensor [B, T, heads, 128] or [B, T, heads], in elements. */
typedef struct fkda_token_strides {
    long long batch, token, head;
} fkda_token_strides;

/* A tensor [slots, HV, V, K] of states. The states of all heads of a slot are contiguous. */
typedef struct fkda_state_args {
    void *data; /* or null */
    long long slots;
    long long slot_stride; /* in elements */
} fkda_state_args;

/* States from inside sequences that the call writes; flash_kda.h says which and where. */
typedef struct fkda_checkpoint_args {
    fkda_state_args states;                 /* null: there are none */
    const void *offsets, *indices, *starts; /* each may be null */
    long long every;                        /* tokens, or 0: `offsets` says where */
    int columns;                            /* offsets of a sequence */
    int is_bf16;
    int offsets_are_i32, indices_are_i32, starts_are_i32; /* else int64 */
} fkda_checkpoint_args;

/* What a launch needs first comes first, side by side: an SM fetches parameters in lines of 64 bytes, and the
 * first chunk waits for each line that finding the first work item touches. */
typedef struct fkda_fwd_args {
    const void *cu_seqlens; /* or null */
    long long tokens;       /* of one batch row */
    int heads;              /* HV, of all tensors but q and k */
    int group;              /* HV / H: value heads that share a head of q and k */
    int sequences;
    int cu_seqlens_is_i32, state_indices_are_i32; /* else int64 */
    int state_is_bf16;
    int state_k_first; /* states are [.., K, V] */
    float lower_bound;
    fkda_state_args initial_state, final_state;
    const unsigned char *has_initial_state; /* or null: all have one */
    const void *state_indices;              /* or null: sequence n has slot n */
    long long first_slot;
    const float *A_log, *dt_bias; /* or null: zeros */
    float scale;
    int qk_is_normalised;
    int gate, beta_kind;       /* flash_kda_gate, flash_kda_beta */
    int g_is_f32, beta_is_f32; /* else bf16 */
    void *out;
    fkda_token_strides out_strides;
    long long chunk_bytes; /* bytes from a row of out to the row 16 tokens later */
    const void *beta; /* q, k, v, g, beta: bf16, or fp32 where a flag says so; flash_kda.h has the shapes */
    fkda_token_strides beta_strides;
    const void *q, *k, *v, *g;
    fkda_token_strides q_strides, k_strides, v_strides, g_strides;
    fkda_checkpoint_args checkpoints;
} fkda_fwd_args;

#endif
