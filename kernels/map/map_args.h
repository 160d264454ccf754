/* What the host passes to the kernels for maps of pieces of sequences, the same in C and in CUDA C. */
#ifndef FKDA_MAP_ARGS_H
#define FKDA_MAP_ARGS_H

/* A CTA of the join has this many rows of a state, and a thread for each column. */
#define FKDA_JOIN_MAP_ROWS 16
#define FKDA_JOIN_MAP_THREADS 128

/* Its dynamic shared memory: the rows, and 32 rows or columns of a map with a column of padding. */
#define FKDA_JOIN_MAP_SHARED_BYTES (4 * 128 * (16 + 33))

#define FKDA_STATES_THREADS 256

/* Matrices [P, HV, 128, 128]; those of all heads of a piece are contiguous. */
typedef struct fkda_piece_matrices {
    void *data;       /* or null: absent */
    long long stride; /* elements from one piece to the next */
} fkda_piece_matrices;

typedef struct fkda_join_args {
    fkda_piece_matrices maps, states;
    fkda_piece_matrices entering; /* or absent */
    const void *initial_state;    /* [HV, ..], or null: zeros */
    float *final_state;           /* [HV, ..], or null */
    int pieces, heads;
    int backwards, state_k_first;
    int initial_is_bf16;
    int zero; /* no padding */
} fkda_join_args;

/* Initial states in fp32 for a forward pass, from bf16 [N, HV, ..] or, without them, identities. */
typedef struct fkda_states_args {
    float *to;        /* [N, HV, ..] */
    const void *from; /* or null */
    long long from_stride;
    int heads;
    int zero; /* no padding */
} fkda_states_args;

#endif
