/*
 * A call of decode or apply after its arguments were checked, as problem.h has it for the forward pass.
 * Everything below check_decode.c takes these structs.
 */
#ifndef FKDA_DECODE_PROBLEM_H
#define FKDA_DECODE_PROBLEM_H

#include "problem.h"

typedef struct fkda_decode_problem {
    const fkda_kernel *kernel;
    flash_kda_device device;
    void *stream;
    int32_t threads;                       /* of the CPU backend, at least 1; 0 on a GPU */
    int64_t sequences;                     /* N */
    int64_t tokens;                        /* T, of each sequence; with cu_seqlens the tokens of all */
    int64_t heads;                         /* HV */
    int64_t qk_heads;                      /* H */
    fkda_token_view q, k, v, g, beta, out; /* with cu_seqlens they have one batch row */
    int32_t gate, beta_kind;               /* flash_kda_gate, flash_kda_beta */
    const float *A_log;                    /* [HV], or NULL: zeros */
    const float *dt_bias;                  /* [HV, K], or NULL: zeros */
    bool qk_is_normalised;
    bool state_k_first;
    int32_t write_states; /* flash_kda_write_states */
    fkda_state_view state;
    fkda_index_view state_indices;       /* [N], or [N, slot_columns]; absent: sequence n has slot n */
    int64_t slot_columns;                /* 1, or S with FLASH_KDA_WRITE_EACH */
    fkda_index_view num_accepted_tokens; /* [N]; absent: 1 each */
    fkda_index_view cu_seqlens;          /* [N + 1]; absent: each sequence has T tokens */
    fkda_index_view parents;             /* [N, parent_columns]; absent: a chain */
    int64_t parent_columns;
    float *records; /* [N, record_columns, HV, 3, 128], or NULL */
    int64_t record_columns;
    const int64_t *rounding; /* seed and offset, or NULL: to nearest */
    int64_t first_slot;
    float scale, lower_bound;
    const volatile int32_t *interrupt; /* or NULL */
} fkda_decode_problem;

typedef struct fkda_apply_problem {
    const fkda_kernel *kernel;
    flash_kda_device device;
    void *stream;
    int32_t threads;
    int64_t sequences;    /* N */
    int64_t heads;        /* HV */
    const float *records; /* [N, record_columns, HV, 3, 128] */
    int64_t record_columns;
    fkda_index_view num_accepted_tokens; /* [N] */
    fkda_index_view accepted;            /* [N, accepted_columns]; absent: the first tokens */
    int64_t accepted_columns;
    bool state_k_first;
    fkda_state_view state;
    fkda_index_view state_indices; /* [N]; absent: sequence n has slot n */
    const int64_t *rounding;
    int64_t first_slot;
    const volatile int32_t *interrupt;
} fkda_apply_problem;

/* The rows of a token's record, each of FKDA_DIM fp32 numbers. */
enum { FKDA_RECORD_DECAY, FKDA_RECORD_KEY, FKDA_RECORD_U, FKDA_RECORD_ROWS };

#endif
