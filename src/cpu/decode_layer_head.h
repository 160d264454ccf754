/*
 * decode_layer of one head of one sequence on the CPU. Part of head.h, so compiled once for each instruction
 * set.
 *
 * The convolution makes queries, keys and values of all tokens in fp32. The recurrence is that of
 * decode_head.h: blocks of 16 rows of V pass through all tokens, so the state crosses memory once in each
 * direction. Outputs stay in fp32 until the norm over V, which needs all rows, so a head is not divided. No
 * sum depends on the number of threads.
 */
#ifndef FKDA_CPU_DECODE_LAYER_HEAD_H
#define FKDA_CPU_DECODE_LAYER_HEAD_H

#include "../decode_layer_problem.h"
#include "decode_head.h"

enum { LAYER_PARTS = FKDA_CONV_PARTS };

/* What a head of a sequence needs of its tokens. */
typedef struct layer_tokens {
    decode_tokens prepared;
    float value[CHUNK][V];
    float out[CHUNK][V];
    float weights[FKDA_CONV_TAPS][K], bias[K]; /* of one part */
    /* Inputs of the convolution: the window, then x of each token. */
    uint16_t inputs[LAYER_PARTS][FKDA_WINDOW + CHUNK][K];
} __attribute__((aligned(64))) layer_tokens;

/* A head of a sequence. */
typedef struct layer_head {
    const fkda_decode_layer_problem *p;
    fkda_decode_piece piece; /* without steps */
    int length;              /* tokens of the sequence */
    int64_t window_slot;     /* that the window is read from */
    int64_t window_column;
} layer_head;

INLINE vec load_either(const void *data, int32_t dtype, int64_t at)
{
    return dtype == FLASH_KDA_F32 ? load_f32((const float *)data + at)
                                  : load_bf16((const uint16_t *)data + at);
}

static inline float number_at(const void *data, int32_t dtype, int64_t at)
{
    if (dtype == FLASH_KDA_F32) return ((const float *)data)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)data)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A column of one part of a head, as fp32. */
static void read_column(const fkda_channel_view *c, int part, int64_t h, int64_t column, float *to)
{
    const int64_t at = fkda_channel_offset(c, part, h * K, column);
    if (c->channel_stride == 1) {
        for (int i = 0; i < K; i += LANES) *vec_at(to + i) = load_either(c->data, c->dtype, at + i);
        return;
    }
    for (int i = 0; i < K; i++) to[i] = number_at(c->data, c->dtype, at + i * c->channel_stride);
}

static void read_inputs(const layer_head *x, layer_tokens *t)
{
    const fkda_decode_layer_problem *p = x->p;
    const fkda_channel_view *window = &p->conv_state;
    for (int part = 0; part < LAYER_PARTS; part++) {
        for (int j = 0; j < FKDA_WINDOW; j++) {
            const uint16_t *from = (const uint16_t *)window->data + x->window_slot * p->conv_slot_stride +
                                   fkda_channel_offset(window, part, x->piece.h * K, x->window_column + j);
            for (int i = 0; i < K; i++) t->inputs[part][j][i] = from[i * window->channel_stride];
        }
        for (int i = 0; i < x->length; i++)
            memcpy(t->inputs[part][FKDA_WINDOW + i],
                   (const uint16_t *)p->x.data + part * p->x_part_stride +
                       fkda_row_offset(&p->x, x->piece.sequence.row, x->piece.sequence.begin + i, x->piece.h),
                   K * sizeof(uint16_t));
    }
}

/* Inputs `first` to `first` + count - 1 of each channel become columns of a tensor. `at` is where the slot or
 * token begins in it. */
static void write_inputs(const layer_head *x, const layer_tokens *t, const fkda_channel_view *to, int64_t at,
                         int first, int count)
{
    for (int part = 0; part < LAYER_PARTS; part++)
        for (int j = 0; j < count; j++) {
            uint16_t *column = (uint16_t *)to->data + at + fkda_channel_offset(to, part, x->piece.h * K, j);
            const uint16_t *from = t->inputs[part][first + j];
            for (int i = 0; i < K; i++) column[i * to->channel_stride] = from[i];
        }
}

/* Writes the convolution's state, after all windows of the head were read. */
static void write_windows(const layer_head *x, const layer_tokens *t)
{
    const fkda_decode_layer_problem *p = x->p;
    const int length = x->length;
    const int32_t write = p->decode.write_states;
    if (p->windows.data)
        for (int i = 0; i < length; i++)
            write_inputs(x, t, &p->windows,
                         x->piece.n * p->windows_sequence_stride + i * p->windows_token_stride, i + 1,
                         FKDA_WINDOW);
    if (!length || write == FLASH_KDA_WRITE_NONE || p->decode.has_written_states) return;
    if (write == FLASH_KDA_WRITE_LAST) {
        write_inputs(x, t, &p->conv_state, x->window_slot * p->conv_slot_stride, length, FKDA_WINDOW);
    } else if (fkda_keeps_drafts(p)) {
        const int64_t columns = p->window_columns, all = length + FKDA_WINDOW - 1;
        write_inputs(x, t, &p->conv_state, x->window_slot * p->conv_slot_stride, 1,
                     (int)(all < columns ? all : columns));
    } else {
        for (int i = 0; i < length; i++) {
            const int64_t slot = fkda_decode_slot_after(&p->decode, x->piece.n, i);
            if (slot != FKDA_NO_SLOT)
                write_inputs(x, t, &p->conv_state, slot * p->conv_slot_stride, i + 1, FKDA_WINDOW);
        }
    }
}

/* y of all tokens of one part. */
static void convolve(const layer_head *x, layer_tokens *t, int part, float (*to)[K])
{
    const fkda_decode_layer_problem *p = x->p;
    for (int j = 0; j < FKDA_CONV_TAPS; j++) read_column(&p->weight, part, x->piece.h, j, t->weights[j]);
    if (p->bias.data)
        read_column(&p->bias, part, x->piece.h, 0, t->bias);
    else
        memset(t->bias, 0, sizeof t->bias);
    for (int i = 0; i < x->length; i++)
        for (int c = 0; c < K; c += LANES) {
            vec sum = load(t->bias + c);
            for (int j = 0; j < FKDA_CONV_TAPS; j++)
                sum += load(t->weights[j] + c) * load_bf16(t->inputs[part][i + j] + c);
            *vec_at(to[i] + c) = sum * sigmoid_exp2(sum * -LOG2E);
        }
}

/* The tensors that decode takes too. There are no q, k and v. */
static tokens layer_tokens_at(const layer_head *x)
{
    const fkda_decode_problem *d = &x->p->decode;
    const int64_t row = x->piece.sequence.row, token = x->piece.sequence.begin;
    return (tokens){
        .g = rows_of(&d->g, row, token, x->piece.h),
        .beta = rows_of(&d->beta, row, token, x->piece.h),
        .g_is_f32 = d->g.dtype == FLASH_KDA_F32,
        .beta_is_f32 = d->beta.dtype == FLASH_KDA_F32,
        .out = (uint16_t *)d->out.data + fkda_row_offset(&d->out, row, token, x->piece.h),
        .out_stride = d->out.token_stride,
        .count = x->length,
    };
}

static float product_of(const float *a, const float *b)
{
    vec sum = {0};
    for (int k = 0; k < K; k += LANES) sum += load(a + k) * load(b + k);
    return lane_sum(sum);
}

static void normalise_row(float x[K])
{
    const float factor = 1.0f / sqrtf(product_of(x, x) + 1e-6f);
    for (int k = 0; k < K; k += LANES) *vec_at(x + k) *= factor;
}

static void prepare_layer(const layer_head *x, const tokens *t, layer_tokens *to)
{
    const fkda_decode_problem *d = &x->p->decode;
    decode_tokens *prepared = &to->prepared;
    const gate_constants gate =
        make_gate_constants(d->A_log ? d->A_log[x->piece.h] : 0.0f, d->lower_bound, CHUNK);
    read_inputs(x, to);
    convolve(x, to, 0, prepared->query);
    convolve(x, to, 1, prepared->key);
    convolve(x, to, 2, to->value);
    read_write_strengths(prepared->write, t, d->beta_kind);
    for (int i = 0; i < x->length; i++) {
        if (!d->qk_is_normalised) {
            normalise_row(prepared->query[i]);
            normalise_row(prepared->key[i]);
        }
        prepare_decay(d, t, x->piece.h, i, &gate, prepared->decay[i]);
        prepared->key_query[i] = product_of(prepared->key[i], prepared->query[i]);
    }
}

/* One token of the rows from v on, whose state is `block`. Finds u. */
static void run_layer_token(const layer_head *x, layer_tokens *t, int i, int v, float block[BLOCK],
                            float u[BLOCK_ROWS])
{
    const fkda_decode_problem *d = &x->p->decode;
    const decode_tokens *token = &t->prepared;
    float by_key[BLOCK_ROWS] __attribute__((aligned(64))), by_query[BLOCK_ROWS] __attribute__((aligned(64)));
    if (d->state_k_first)
        read_columns(block, token->decay[i], token->key[i], token->query[i], by_key, by_query);
    else
        read_rows(block, token->decay[i], token->key[i], token->query[i], by_key, by_query);
    for (int c = 0; c < BLOCK_ROWS; c += LANES) {
        const vec written = token->write[i] * (load(t->value[i] + v + c) - load(by_key + c));
        *vec_at(u + c) = written;
        *vec_at(t->out[i] + v + c) = d->scale * (load(by_query + c) + written * token->key_query[i]);
    }
    if (d->records) memcpy(record_row(d, &x->piece, i, FKDA_RECORD_U) + v, u, BLOCK_ROWS * sizeof *u);
    advance(d->state_k_first, block, token->decay[i], token->key[i], u, block);
}

static void write_layer_block(const layer_head *x, const float *block, int64_t slot, int token, int v,
                              const float u[BLOCK_ROWS])
{
    const fkda_decode_problem *d = &x->p->decode;
    const block_view to = block_at(&d->written, d->state_k_first, slot, x->piece.h, v);
    write_block(&to, block, d->state_k_first, d->rounding, x->piece.n, token, x->piece.h, v,
                may_have_nan(&to, u));
}

static void run_layer_block(const layer_head *x, layer_tokens *t, int v)
{
    const fkda_decode_problem *d = &x->p->decode;
    const block_view from = block_at(&d->state, d->state_k_first, x->piece.slot, x->piece.h, v);
    float block[BLOCK] __attribute__((aligned(64))), u[BLOCK_ROWS] __attribute__((aligned(64)));
    load_block(&from, block, d->state_k_first);
    if (v + BLOCK_ROWS < V) {
        const block_view next =
            block_at(&d->state, d->state_k_first, x->piece.slot, x->piece.h, v + BLOCK_ROWS);
        prefetch_block(&next);
    }
    for (int i = 0; i < x->length; i++) {
        run_layer_token(x, t, i, v, block, u);
        const int64_t slot = fkda_decode_slot_to_write(d, x->piece.n, &x->piece.sequence, x->piece.slot, i);
        if (slot != FKDA_NO_SLOT)
            write_layer_block(x, block, slot, d->write_states == FLASH_KDA_WRITE_EACH ? i : 0, v, u);
    }
}

/* The norm over V and the output gate. */
static void finish_layer(const layer_head *x, const tokens *to, const layer_tokens *t)
{
    const fkda_decode_layer_problem *p = x->p;
    const fkda_token_view *gate = &p->output_gate;
    for (int i = 0; i < x->length; i++) {
        const int64_t gate_at =
            fkda_row_offset(gate, x->piece.sequence.row, x->piece.sequence.begin + i, x->piece.h);
        const float factor = 1.0f / sqrtf(product_of(t->out[i], t->out[i]) / V + p->norm_eps);
        for (int v = 0; v < V; v += LANES) {
            vec o = load(t->out[i] + v);
            if (p->norm_weight) o *= factor * load_either(p->norm_weight, p->norm_weight_dtype, v);
            if (gate->data) o *= sigmoid_exp2(load_either(gate->data, gate->dtype, gate_at + v) * -LOG2E);
            store_bf16(to->out + i * to->out_stride + v, o);
        }
    }
}

/* A sequence without a state gives zeros. */
static void write_layer_zeros(const layer_head *x, const tokens *to, layer_tokens *t)
{
    const fkda_decode_layer_problem *p = x->p;
    write_zeros(&p->decode, &x->piece, to);
    memset(t->inputs, 0, sizeof t->inputs);
    for (int i = 0; p->windows.data && i < x->length; i++)
        write_inputs(x, t, &p->windows, x->piece.n * p->windows_sequence_stride + i * p->windows_token_stride,
                     0, FKDA_WINDOW);
}

/* The tokens of sequence n, which have room in records and windows also if another thread has made the
 * sequence longer since the check. */
static fkda_sequence layer_sequence_at(const fkda_decode_layer_problem *p, int64_t n)
{
    fkda_sequence s = fkda_decode_sequence_at(&p->decode, n);
    int64_t most = s.end - s.begin;
    if (p->decode.records && most > p->decode.record_columns) most = p->decode.record_columns;
    if (p->windows.data && most > p->windows_columns) most = p->windows_columns;
    s.end = s.begin + most;
    return s;
}

static void run_layer_head(const fkda_decode_layer_problem *p, int64_t n, int64_t h)
{
    const fkda_decode_problem *d = &p->decode;
    const int64_t slot = fkda_decode_first_slot(d, n);
    const fkda_sequence s = layer_sequence_at(p, n);
    const layer_head x = {.p = p,
                          .piece = {.n = n, .h = h, .v_end = V, .sequence = s, .slot = slot},
                          .length = (int)(s.end - s.begin),
                          .window_slot = fkda_window_slot(p, n, slot),
                          .window_column = fkda_window_column(p, n)};
    const tokens t = layer_tokens_at(&x);
    layer_tokens prepared;
    if (slot == FKDA_NO_SLOT || x.window_slot == FKDA_NO_SLOT) {
        write_layer_zeros(&x, &t, &prepared);
        return;
    }
    if (!x.length) return;
    const block_view first = block_at(&d->state, d->state_k_first, slot, h, 0);
    prefetch_block(&first);
    prepare_layer(&x, &t, &prepared);
    record_tokens(d, &x.piece, &prepared.prepared);
    split_tokens(d, x.length, &prepared.prepared);
    for (int v = 0; v < V; v += BLOCK_ROWS) run_layer_block(&x, &prepared, v);
    finish_layer(&x, &t, &prepared);
    write_windows(&x, &prepared);
}

#endif
