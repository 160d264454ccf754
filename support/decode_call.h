/* Calls of flash_kda_decode() and flash_kda_apply() on a device, ready to run, in the way of call.h. */
#ifndef SUPPORT_DECODE_CALL_H
#define SUPPORT_DECODE_CALL_H

#include "call.h"

/* What a call computes, in CPU memory. */
typedef struct decode_problem {
    /* The tokens: each sequence of the problem has few. Its pool is initial_state, with any number of slots;
     * it has no state_indices and no checkpoints, because those below are decode's own. */
    problem *tokens;
    flash_kda_write_states write_states;
    int64_t *state_indices; /* [N, slot_columns], or NULL */
    int64_t slot_columns;   /* 1, or S with FLASH_KDA_WRITE_EACH without written_states */
    int64_t first_slot;
    int64_t *num_accepted_tokens; /* [N] or NULL: where sequences start */
    int64_t *parents;             /* [N, parent_columns] or NULL */
    int64_t parent_columns;
    int64_t record_columns; /* 0: there are no records */
    int64_t *rounding;      /* [2] or NULL */
    bool has_written;       /* whether there are written_states */
    int64_t written_slots;
    int64_t *written_indices; /* [N, written_columns], or NULL */
    int64_t written_columns;  /* 1, or W with FLASH_KDA_WRITE_EACH */

    /* What apply does with the records. */
    int64_t *applied;  /* [N]: how many tokens */
    int64_t *accepted; /* [N, accepted_columns] or NULL: which ones */
    int64_t accepted_columns;
} decode_problem;

void decode_problem_free(decode_problem *d);

/* The slot that sequence n starts from, or -1: it has no state. */
int64_t decode_first_slot(const decode_problem *d, int64_t n);

/* The slot of the pool, and that of written_states, that gets the state after token i of sequence n, which
 * has `length` tokens; -1 if none does. */
int64_t decode_slot_after(const decode_problem *d, int64_t n, int64_t i, int64_t length);
int64_t decode_written_slot(const decode_problem *d, int64_t n, int64_t i, int64_t length);

/* The token that token i of sequence n continues from, or -1. */
int64_t decode_parent(const decode_problem *d, int64_t n, int64_t i);

/* The tokens of sequence n that a call computes: at most FLASH_KDA_MAX_DECODE_TOKENS. */
int64_t decode_length(const decode_problem *d, int64_t n);

/* Which token is applied to sequence n as number i, or -1: its list is over. */
int64_t decode_applied_token(const decode_problem *d, int64_t n, int64_t i);

/* The answer that flash_kda_decode_reference() gives: [N, T, HV, DIM] and [N, T, HV, DIM, DIM], with
 * cu_seqlens [1, total, ..]. States of tokens without one are NaN. Every number in the problem must be
 * allowed. */
typedef struct decode_answer {
    double *out, *states;
} decode_answer;
decode_answer decode_solve(const decode_problem *d);
void decode_answer_free(decode_answer *a);

typedef struct decode_options {
    call_options tokens; /* of the tensors of tokens and of the pool; `mode` means nothing */
    bool i32_slots, i32_accepted, i32_parents, i32_written;
    int64_t written_gap; /* elements between slots of written_states: a multiple of 16 bytes */
} decode_options;

enum { DECODE_BUFFERS = 10 };

typedef struct decode_call {
    const decode_problem *problem; /* must outlive the call */
    call tokens;                   /* q to cu_seqlens, and the pool as a state in place */
    buffer buffers[DECODE_BUFFERS];
    unsigned char *images[DECODE_BUFFERS]; /* what the buffers hold before the call */
    flash_kda_decode_params decode;
    flash_kda_tensor written_view; /* written_states [slots, HV, V, K], from the beginning of its buffer */
    flash_kda_apply_params apply;  /* without tensors if there are no records */
} decode_call;

/* Puts everything in place, and ends the program if there is no memory. */
void decode_call_open(decode_call *c, const decode_problem *d, decode_options options);
void decode_call_close(decode_call *c);

/* Puts the pool and written_states back to what they held before the call. Records stay. */
void decode_call_restore_pool(decode_call *c);

/* Run the call and wait until it is done. */
flash_kda_status decode_call_run(decode_call *c);
flash_kda_status decode_call_apply(decode_call *c);

/* The bits of out, of the pool and of written_states [slots, HV, DIM, DIM] with V before K, and of records
 * [N, R, HV, 3, DIM]. The caller frees them. */
uint16_t *decode_call_read_out(const decode_call *c);
void *decode_call_read_pool(const decode_call *c);
void *decode_call_read_written(const decode_call *c);
float *decode_call_read_records(const decode_call *c);

/* The name of a tensor of which a byte was written that a call of decode, or of apply after it, may not
 * write; NULL if there is none. */
const char *decode_call_damage(const decode_call *c, bool applied);

/* Whether all tensors are as before the call. */
bool decode_call_untouched(const decode_call *c);

#endif
