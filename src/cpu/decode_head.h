/*
 * Decode and apply on the CPU, for a range of value channels of one head of one sequence. Part of head.h, so
 * compiled once for each instruction set.
 *
 * Algorithm
 *
 * For a token with the decay d, the key k, the query q and the write strength b, of a row s of the state and
 * the value v of that row:
 *
 *     x = d s        (channel by channel)
 *     u = b (v - x . k)
 *     o = scale (x . q + u (k . q))
 *     s = x + u k
 *
 * So the output needs no second look at the new state, and one pass gives both products.
 *
 * Rows do not depend on each other. Blocks of 16 rows (decode_block.h) pass through all tokens one after the
 * other, so a state crosses memory once in each direction however many tokens there are, and a block stays in
 * the L1 cache. All blocks use the same prepared tokens.
 *
 * In a tree of draft tokens several states of a block are alive together. Each is in a place of its own
 * (fkda_decode_piece), and a chain has one place.
 */
#ifndef FKDA_CPU_DECODE_HEAD_H
#define FKDA_CPU_DECODE_HEAD_H

#include "decode_block.h"
#include "gate.h"
#include "prepare.h"

_Static_assert(FLASH_KDA_MAX_DECODE_TOKENS - CHUNK == 0, "a chunk of tokens holds all tokens of a call");

/* The tokens of a sequence, of one head, as the recurrence takes them. */
typedef struct decode_tokens {
    float decay[CHUNK][K], key[CHUNK][K], query[CHUNK][K];
    float write[CHUNK];     /* b */
    float key_query[CHUNK]; /* k . q */
} __attribute__((aligned(64))) decode_tokens;

static inline float lane_sum(vec x)
{
    float sum[LANES] __attribute__((aligned(64)));
    *vec_at(sum) = x;
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

static void prepare_row(const uint16_t *x, bool is_normalised, float to[K])
{
    float scale = 1.0f, unit = 1.0f;
    if (!is_normalised) {
        vec sum = {0};
        for (int k = 0; k < K; k += LANES) sum += load_bf16(x + k) * load_bf16(x + k);
        find_unit(x, lane_sum(sum), &scale, &unit);
    }
    for (int k = 0; k < K; k += LANES) *vec_at(to + k) = load_bf16(x + k) * scale * unit;
}

static void prepare_decay(const fkda_decode_problem *p, const tokens *t, int64_t h, int i,
                          const gate_constants *gate, float to[K])
{
    for (int k = 0; k < K; k += LANES) {
        const vec g = load_gate(t, i, k, t->g_is_f32);
        const vec bias = p->dt_bias ? load_f32(p->dt_bias + h * K + k) : (vec){0};
        *vec_at(to + k) = exp2_at_most_1(p->gate == FLASH_KDA_GATE_BOUNDED    ? bounded_gate(gate, g, bias)
                                         : p->gate == FLASH_KDA_GATE_SOFTPLUS ? softplus_gate(gate, g, bias)
                                                                              : activated_gate(g));
    }
}

static void prepare_tokens(const fkda_decode_problem *p, const tokens *t, int64_t h, decode_tokens *x)
{
    const gate_constants gate = make_gate_constants(p->A_log ? p->A_log[h] : 0.0f, p->lower_bound, CHUNK);
    read_write_strengths(x->write, t, p->beta_kind);
    for (int i = 0; i < t->count; i++) {
        prepare_row(bf16_row(t->k, i), p->qk_is_normalised, x->key[i]);
        prepare_row(bf16_row(t->q, i), p->qk_is_normalised, x->query[i]);
        prepare_decay(p, t, h, i, &gate, x->decay[i]);
        vec sum = {0};
        for (int k = 0; k < K; k += LANES) sum += load(x->key[i] + k) * load(x->query[i] + k);
        x->key_query[i] = lane_sum(sum);
    }
}

static tokens decode_tokens_at(const fkda_decode_problem *p, const fkda_decode_piece *x)
{
    const int64_t row = x->sequence.row, token = x->sequence.begin, qk_head = x->h / (p->heads / p->qk_heads);
    return (tokens){
        .q = rows_of(&p->q, row, token, qk_head),
        .k = rows_of(&p->k, row, token, qk_head),
        .g = rows_of(&p->g, row, token, x->h),
        .v = rows_of(&p->v, row, token, x->h),
        .beta = rows_of(&p->beta, row, token, x->h),
        .g_is_f32 = p->g.dtype == FLASH_KDA_F32,
        .beta_is_f32 = p->beta.dtype == FLASH_KDA_F32,
        .out = (uint16_t *)p->out.data + fkda_row_offset(&p->out, row, token, x->h),
        .out_stride = p->out.token_stride,
        .count = (int)(x->sequence.end - x->sequence.begin),
    };
}

/* A row of the record of token i of a sequence. */
static float *record_row(const fkda_decode_problem *p, const fkda_decode_piece *x, int i, int row)
{
    return p->records + fkda_record_offset(x->n, p->record_columns, i, p->heads, x->h) + row * K;
}

/* The first piece of a head writes decays and keys for all pieces. */
static void record_tokens(const fkda_decode_problem *p, const fkda_decode_piece *x, const decode_tokens *t)
{
    if (!p->records || x->v_begin > 0) return;
    for (int i = 0; i < (int)(x->sequence.end - x->sequence.begin); i++) {
        memcpy(record_row(p, x, i, FKDA_RECORD_DECAY), t->decay[i], sizeof t->decay[i]);
        memcpy(record_row(p, x, i, FKDA_RECORD_KEY), t->key[i], sizeof t->key[i]);
    }
}

/* Brings what the recurrence multiplies with rows of a bf16 state into the order of these rows. */
static void split_tokens(const fkda_decode_problem *p, int count, decode_tokens *x)
{
    if (!is_split(&p->state, p->state_k_first)) return;
    for (int i = 0; i < count; i++) {
        split_row(x->decay[i], K);
        split_row(x->key[i], K);
        split_row(x->query[i], K);
    }
}

/* Whether a state may hold NaN after a token that wrote u. If all of u is finite, it holds none: a NaN in the
 * state before, in the decay or in the key, and an infinity in the state before, make u not finite. */
static bool may_have_nan(const block_view *to, const float u[BLOCK_ROWS])
{
    vec zeros = {0};
    if (to->state->dtype != FLASH_KDA_BF16) return true; /* nobody asks */
    for (int c = 0; c < BLOCK_ROWS; c += LANES) zeros += load(u + c) * 0.0f;
    return lane_sum(zeros) != 0.0f;
}

/* Outputs and records of a sequence without a state. */
static void write_zeros(const fkda_decode_problem *p, const fkda_decode_piece *x, const tokens *t)
{
    const size_t channels = (size_t)(x->v_end - x->v_begin);
    for (int i = 0; i < t->count; i++) {
        memset(t->out + i * t->out_stride + x->v_begin, 0, channels * sizeof *t->out);
        if (!p->records) continue;
        memset(record_row(p, x, i, FKDA_RECORD_U) + x->v_begin, 0, channels * sizeof(float));
        if (x->v_begin > 0) continue;
        memset(record_row(p, x, i, FKDA_RECORD_DECAY), 0, K * sizeof(float));
        memset(record_row(p, x, i, FKDA_RECORD_KEY), 0, K * sizeof(float));
    }
}

/* Writes the output of token i for the rows from v on, whose state is `block`, and finds u. */
INLINE void read_token(const fkda_decode_problem *p, const tokens *t, const decode_tokens *x, int i, int v,
                       const float *block, float u[BLOCK_ROWS])
{
    float by_key[BLOCK_ROWS] __attribute__((aligned(64))), by_query[BLOCK_ROWS] __attribute__((aligned(64)));
    if (p->state_k_first)
        read_columns(block, x->decay[i], x->key[i], x->query[i], by_key, by_query);
    else
        read_rows(block, x->decay[i], x->key[i], x->query[i], by_key, by_query);
    for (int c = 0; c < BLOCK_ROWS; c += LANES) {
        const vec difference = load_bf16(bf16_row(t->v, i) + v + c) - load(by_key + c);
        const vec written = x->write[i] * difference;
        *vec_at(u + c) = written;
        store_bf16(t->out + i * t->out_stride + v + c,
                   p->scale * (load(by_query + c) + written * x->key_query[i]));
    }
}

/* All tokens, for one block after the other. */
INLINE void decode_blocks(const fkda_decode_problem *p, const fkda_decode_piece *x, const tokens *t,
                          const decode_tokens *prepared, float (*places)[BLOCK])
{
    float u[BLOCK_ROWS] __attribute__((aligned(64)));
    for (int v = x->v_begin; v < x->v_end; v += BLOCK_ROWS) {
        const block_view start = block_at(&p->state, p->state_k_first, x->slot, x->h, v);
        load_block(&start, places[0], p->state_k_first);
        const bool has_next = v + BLOCK_ROWS < x->v_end;
        const block_view next = block_at(&p->state, p->state_k_first, x->slot, x->h, v + BLOCK_ROWS);
        if (has_next) prefetch_part(&next, 0, 2);
        for (int i = 0; i < t->count; i++) {
            const fkda_decode_step *step = &x->steps[i];
            read_token(p, t, prepared, i, v, places[step->from], u);
            if (p->records) memcpy(record_row(p, x, i, FKDA_RECORD_U) + v, u, sizeof u);
            if (i == 0 && has_next) prefetch_part(&next, 1, 2);
            if (step->to == FKDA_NO_PLACE) continue;
            advance(p->state_k_first, places[step->from], prepared->decay[i], prepared->key[i], u,
                    places[step->to]);
            if (step->slot == FKDA_NO_SLOT) continue;
            const block_view to = block_at(&p->written, p->state_k_first, step->slot, x->h, v);
            write_block(&to, places[step->to], p->state_k_first, p->rounding, x->n,
                        p->write_states == FLASH_KDA_WRITE_EACH ? i : 0, x->h, v, may_have_nan(&to, u));
        }
    }
}

/* A function of its own, so that a chain does not use the stack that a tree needs. */
__attribute__((noinline)) static void decode_tree(const fkda_decode_problem *p, const fkda_decode_piece *x,
                                                  const tokens *t, const decode_tokens *prepared)
{
    float places[FKDA_DECODE_PLACES][BLOCK] __attribute__((aligned(64)));
    decode_blocks(p, x, t, prepared, places);
}

__attribute__((noinline)) static void decode_chain(const fkda_decode_problem *p, const fkda_decode_piece *x,
                                                   const tokens *t, const decode_tokens *prepared)
{
    float places[1][BLOCK] __attribute__((aligned(64)));
    decode_blocks(p, x, t, prepared, places);
}

static void decode(const fkda_decode_problem *p, const fkda_decode_piece *x)
{
    const tokens t = decode_tokens_at(p, x);
    if (x->slot == FKDA_NO_SLOT) {
        write_zeros(p, x, &t);
        return;
    }
    decode_tokens prepared;
    const block_view first = block_at(&p->state, p->state_k_first, x->slot, x->h, x->v_begin);
    prefetch_block(&first);
    prepare_tokens(p, &t, x->h, &prepared);
    record_tokens(p, x, &prepared);
    split_tokens(p, t.count, &prepared);
    if (x->places > 1)
        decode_tree(p, x, &t, &prepared);
    else
        decode_chain(p, x, &t, &prepared);
}

/* The records of a piece. Decays and keys are in the order of the rows of its state. */
typedef struct applied_tokens {
    const float *decay[CHUNK], *key[CHUNK], *u[CHUNK];
    float split[CHUNK][2][K]; /* of a bf16 state */
} __attribute__((aligned(64))) applied_tokens;

static void find_records(const fkda_apply_problem *p, const fkda_apply_piece *x, applied_tokens *to)
{
    for (int i = 0; i < x->count; i++) {
        const float *record =
            p->records + fkda_record_offset(x->n, p->record_columns, x->tokens[i], p->heads, x->h);
        to->decay[i] = record + FKDA_RECORD_DECAY * K;
        to->key[i] = record + FKDA_RECORD_KEY * K;
        to->u[i] = record + FKDA_RECORD_U * K;
        if (!is_split(&p->state, p->state_k_first)) continue;
        memcpy(to->split[i][0], to->decay[i], K * sizeof(float));
        memcpy(to->split[i][1], to->key[i], K * sizeof(float));
        split_row(to->split[i][0], 2 * K);
        to->decay[i] = to->split[i][0];
        to->key[i] = to->split[i][1];
    }
}

static void apply(const fkda_apply_problem *p, const fkda_apply_piece *x)
{
    float block[BLOCK] __attribute__((aligned(64)));
    applied_tokens applied;
    find_records(p, x, &applied);
    for (int v = x->v_begin; v < x->v_end; v += BLOCK_ROWS) {
        const block_view state = block_at(&p->state, p->state_k_first, x->slot, x->h, v);
        load_block(&state, block, p->state_k_first);
        if (v + BLOCK_ROWS < x->v_end) {
            const block_view next = block_at(&p->state, p->state_k_first, x->slot, x->h, v + BLOCK_ROWS);
            prefetch_block(&next);
        }
        for (int i = 0; i < x->count; i++)
            advance(p->state_k_first, block, applied.decay[i], applied.key[i], applied.u[i] + v, block);
        write_block(&state, block, p->state_k_first, p->rounding, x->n, 0, x->h, v, true);
    }
}

#endif
