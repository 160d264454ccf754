/* A problem for the forward pass in CPU memory, and its answer in fp64. */
#ifndef SUPPORT_PROBLEM_H
#define SUPPORT_PROBLEM_H

#include "util.h"

typedef struct problem {
    int64_t batch, tokens, heads, sequences; /* B, T of one row, H, N */
    uint16_t *q, *k, *v, *g;                 /* bf16 [B, T, H, DIM] */
    uint16_t *beta;                          /* bf16 [B, T, H] */
    float *A_log;                            /* [H] */
    float *dt_bias;                          /* [H, DIM] */
    float *initial_state;                    /* [N, H, DIM, DIM]; every value is exact in bf16 too */
    int64_t *cu_seqlens;                     /* [N + 1] or NULL */
    float scale, lower_bound;
} problem;

/* Zeros everywhere; scale = DIM^-0.5, lower_bound = -5. */
problem *problem_create(int64_t batch, int64_t tokens, int64_t heads);

/* A batch row that holds `count` sequences of the given lengths. */
problem *problem_create_ragged(const int64_t *lengths, int64_t count, int64_t heads);

void problem_free(problem *p);

int64_t problem_rows(const problem *p);   /* B * T * H */
int64_t problem_states(const problem *p); /* N * H */

/* The tensors of the problem in CPU memory as arguments; out and final_state are absent. */
flash_kda_fwd_params problem_params(const problem *p, bool with_initial_state);

/* A contiguous tensor of that shape. */
flash_kda_tensor tensor_of(void *data, flash_kda_dtype dtype, int ndim, const int64_t *shape);

typedef struct answer {
    double *out;   /* [B, T, H, DIM] */
    double *state; /* [N, H, DIM, DIM] */
} answer;

/* The answer that flash_kda_reference() gives. */
answer problem_solve(const problem *p, bool with_initial_state);
void answer_free(answer *a);

#endif
