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
    fkda_state_view written; /* where states go: written_states, or the pool that they come from */
    bool has_written_states;
    fkda_index_view written_indices; /* [N], or [N, written_columns] with FLASH_KDA_WRITE_EACH; or absent */
    int64_t written_columns;
    const float
        *past_records; /* [N, past_columns, HV, 3, 128], or NULL; num_accepted_tokens is theirs then */
    int64_t past_columns;
    fkda_index_view accepted; /* [N, accepted_columns] of them; absent: the first tokens */
    int64_t accepted_columns;
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

/* What a decode call with past_records does before it computes its tokens. */
static inline fkda_apply_problem fkda_past_of(const fkda_decode_problem *p)
{
    return (fkda_apply_problem){
        .kernel = p->kernel,
        .device = p->device,
        .stream = p->stream,
        .threads = p->threads,
        .sequences = p->sequences,
        .heads = p->heads,
        .records = p->past_records,
        .record_columns = p->past_columns,
        .num_accepted_tokens = p->num_accepted_tokens,
        .accepted = p->accepted,
        .accepted_columns = p->accepted_columns,
        .state_k_first = p->state_k_first,
        .state = p->state,
        .state_indices = p->state_indices,
        .rounding = p->rounding,
        .first_slot = p->first_slot,
        .interrupt = p->interrupt,
    };
}

/* ---- What the numbers in tensors of integers say, for tensors that the host may read. The check has seen
 * right ones. Another thread may have changed them since: every function here reads a number once, and
 * whatever it reads, the result lies inside of the tensors. ---- */

/* The tokens of sequence n, at most FLASH_KDA_MAX_DECODE_TOKENS. */
static inline fkda_sequence fkda_decode_sequence_at(const fkda_decode_problem *p, int64_t n)
{
    if (!p->cu_seqlens.data) return (fkda_sequence){n, 0, p->tokens};
    const int64_t begin = fkda_clamp(fkda_index_at(&p->cu_seqlens, n), 0, p->tokens),
                  end = fkda_clamp(fkda_index_at(&p->cu_seqlens, n + 1), begin, p->tokens);
    return (fkda_sequence){0, begin, fkda_clamp(end, begin, begin + FLASH_KDA_MAX_DECODE_TOKENS)};
}

/* The slot that element i of state_indices names, or FKDA_NO_SLOT. */
static inline int64_t fkda_slot_at(const fkda_index_view *state_indices, int64_t i, int64_t first_slot,
                                   const fkda_state_view *state)
{
    const int64_t slot = state_indices->data ? fkda_index_at(state_indices, i) : i;
    return slot < first_slot || slot < 0 || slot >= state->slots ? FKDA_NO_SLOT : slot;
}

/* The slot that sequence n starts from, or FKDA_NO_SLOT: it has no state. */
static inline int64_t fkda_decode_first_slot(const fkda_decode_problem *p, int64_t n)
{
    int64_t column = 0;
    if (p->num_accepted_tokens.data)
        column = fkda_clamp(fkda_index_at(&p->num_accepted_tokens, n), 1, p->slot_columns) - 1;
    return fkda_slot_at(&p->state_indices, n * p->slot_columns + column, p->first_slot, &p->state);
}

/* With FLASH_KDA_WRITE_EACH: the slot of the pool that the state after token i of sequence n goes to, or
 * FKDA_NO_SLOT. */
static inline int64_t fkda_decode_slot_after(const fkda_decode_problem *p, int64_t n, int64_t i)
{
    if (i >= p->slot_columns) return FKDA_NO_SLOT;
    return fkda_slot_at(&p->state_indices, n * p->slot_columns + i, p->first_slot, &p->state);
}

/* With written_states: their slot that takes the state after token i of sequence n, or FKDA_NO_SLOT. With
 * FLASH_KDA_WRITE_LAST token i is the last one. */
static inline int64_t fkda_decode_written_slot(const fkda_decode_problem *p, int64_t n,
                                               const fkda_sequence *sequence, int64_t i)
{
    const bool each = p->write_states == FLASH_KDA_WRITE_EACH, has_indices = p->written_indices.data;
    int64_t at = n;
    if (each && has_indices && i >= p->written_columns) return FKDA_NO_SLOT;
    if (each) at = has_indices ? n * p->written_columns + i : sequence->row * p->tokens + sequence->begin + i;
    return fkda_slot_at(&p->written_indices, at, 0, &p->written);
}

/* The slot of `written` that takes the state after token i of sequence n, which starts from slot `start`; or
 * FKDA_NO_SLOT. */
static inline int64_t fkda_decode_slot_to_write(const fkda_decode_problem *p, int64_t n,
                                                const fkda_sequence *sequence, int64_t start, int64_t i)
{
    const bool each = p->write_states == FLASH_KDA_WRITE_EACH,
               last = p->write_states == FLASH_KDA_WRITE_LAST && i == sequence->end - sequence->begin - 1;
    if (!each && !last) return FKDA_NO_SLOT;
    if (p->has_written_states) return fkda_decode_written_slot(p, n, sequence, i);
    return each ? fkda_decode_slot_after(p, n, i) : start;
}

/* The token that token i of sequence n continues from, or -1: the state that the sequence starts from. */
static inline int64_t fkda_decode_parent(const fkda_decode_problem *p, int64_t n, int64_t i)
{
    if (!p->parents.data || i >= p->parent_columns) return i - 1;
    return fkda_clamp(fkda_index_at(&p->parents, n * p->parent_columns + i), -1, i - 1);
}

/* The element offset of a token's record of one head. */
static inline int64_t fkda_record_offset(int64_t n, int64_t record_columns, int64_t i, int64_t heads,
                                         int64_t h)
{
    return ((n * record_columns + i) * heads + h) * (int64_t)(FLASH_KDA_RECORD_ROWS * FKDA_DIM);
}

/* How many tokens of sequence n are applied, if they are all tokens. */
static inline int64_t fkda_apply_count(const fkda_apply_problem *p, int64_t n)
{
    int64_t most = p->record_columns;
    if (most > FLASH_KDA_MAX_DECODE_TOKENS) most = FLASH_KDA_MAX_DECODE_TOKENS;
    if (p->accepted.data && most > p->accepted_columns) most = p->accepted_columns;
    return fkda_clamp(fkda_index_at(&p->num_accepted_tokens, n), 0, most);
}

/* The token of sequence n that is applied as number i, or -1: the list ends before it. */
static inline int64_t fkda_apply_token(const fkda_apply_problem *p, int64_t n, int64_t i)
{
    if (!p->accepted.data) return i;
    const int64_t token = fkda_index_at(&p->accepted, n * p->accepted_columns + i);
    return token < 0 || token >= p->record_columns ? -1 : token;
}

/* The rows of a token's record, each of FKDA_DIM fp32 numbers. */
enum { FKDA_RECORD_DECAY, FKDA_RECORD_KEY, FKDA_RECORD_U, FKDA_RECORD_ROWS };

#endif
