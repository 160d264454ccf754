/* A problem for the forward pass in CPU memory, and its answer in fp64. */
#ifndef SUPPORT_PROBLEM_H
#define SUPPORT_PROBLEM_H

#include "util.h"

typedef struct problem {
    int64_t batch, tokens, sequences; /* B, T of one row, N */
    int64_t heads, qk_heads;          /* HV, and H, which divides HV and is HV unless it is said otherwise */
    uint16_t *q, *k;                  /* bf16 [B, T, H, DIM] */
    uint16_t *v, *g;                  /* bf16 [B, T, HV, DIM] */
    uint16_t *beta;                   /* bf16 [B, T, HV] */
    float *g_f32, *beta_f32;          /* NULL, or what the call gets in place of g and beta */
    float *A_log;                     /* [HV] */
    float *dt_bias;                   /* [HV, DIM] */
    int64_t *cu_seqlens;              /* [N + 1] or NULL */
    float scale, lower_bound;
    flash_kda_gate gate;
    flash_kda_beta beta_kind;
    bool qk_is_normalised;
    bool without_A_log,
        without_dt_bias; /* The call does not get the tensor; the activated gate never does. */

    int64_t slots;              /* N, unless there are state_indices */
    float *initial_state;       /* [slots, HV, DIM, DIM], V before K; every value is exact in bf16 too */
    int64_t *state_indices;     /* [N] or NULL */
    uint8_t *has_initial_state; /* [N] or NULL */
    int64_t first_slot;

    int64_t checkpoint_rows; /* of checkpoint_states; 0: the call has no checkpoints */
    int64_t checkpoint_columns;
    int64_t *checkpoint_offsets; /* [N, columns], or [N] if columns is 0; NULL with checkpoint_every */
    int64_t *checkpoint_indices; /* like checkpoint_offsets, or NULL */
    int64_t *checkpoint_starts;  /* [N] or NULL */
    int64_t checkpoint_every;
} problem;

/* Zeros everywhere; scale = DIM^-0.5, lower_bound = -5. */
problem *problem_create(int64_t batch, int64_t tokens, int64_t heads);

/* A batch row that holds `count` sequences of the given lengths. */
problem *problem_create_ragged(const int64_t *lengths, int64_t count, int64_t heads);

/* Makes every `group` value heads share a head of q and k. For a problem that was just created. */
void problem_group_heads(problem *p, int64_t group);

/* Gives the problem a pool of states. For a problem that has no state_indices. */
void problem_make_pool(problem *p, int64_t slots);

problem *problem_copy(const problem *p);
void problem_free(problem *p);

int64_t problem_rows(const problem *p);    /* B * T * HV */
int64_t problem_qk_rows(const problem *p); /* B * T * H */
int64_t problem_states(const problem *p);  /* N * HV */

/* Sequence n is tokens `begin` to `end` - 1, counted over all batch rows. */
void problem_sequence(const problem *p, int64_t n, int64_t *begin, int64_t *end);

/* The slot from which sequence n starts, in a pool of that many slots, or -1: it starts from zeros. */
int64_t problem_initial_slot(const problem *p, int64_t slots, int64_t n);

/* The slot in which sequence n ends, in a pool of that many slots, or -1: its final state is not written. */
int64_t problem_final_slot(const problem *p, int64_t slots, int64_t n);

/* Calls found() for every checkpoint that is allowed: the state of sequence n after `offset` tokens goes to
 * `row`. */
void problem_checkpoints(const problem *p,
                         void (*found)(void *context, int64_t n, int64_t offset, int64_t row), void *context);

/* The tensors of the problem in CPU memory as arguments; out, final_state and checkpoint_states are absent.
 */
flash_kda_fwd_params problem_params(const problem *p, bool with_initial_state);

/* A contiguous tensor of that shape. */
flash_kda_tensor tensor_of(void *data, flash_kda_dtype dtype, int ndim, const int64_t *shape);

typedef struct answer {
    double *out;         /* [B, T, HV, DIM] */
    double *state;       /* [N, HV, DIM, DIM] */
    double *checkpoints; /* [rows, HV, DIM, DIM], NaN in rows without a checkpoint; or NULL */
} answer;

/* The answer that flash_kda_reference() gives. */
answer problem_solve(const problem *p, bool with_initial_state);
void answer_free(answer *a);

#endif
