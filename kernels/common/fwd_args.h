/* The struct that the host passes by value to the forward kernels, the same in C and in CUDA C. */
#ifndef FKDA_FWD_ARGS_H
#define FKDA_FWD_ARGS_H

typedef struct fkda_fwd_args {
    const void *q, *k, *v, *g, *beta; /* bf16; flash_kda.h has the shapes */
    void *out;
    const float *A_log, *dt_bias;
    const void *initial_state; /* or null */
    void *final_state;         /* or null */
    const void *cu_seqlens;    /* or null */
    long long tokens;          /* of one batch row */
    long long chunk_bytes;     /* bytes from a row of out to the row 16 tokens later */
    int heads;
    int sequences;
    float scale, lower_bound;
    int state_is_bf16;
    int cu_seqlens_is_i32;
} fkda_fwd_args;

#endif
