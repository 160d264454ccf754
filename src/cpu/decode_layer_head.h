/*
 * decode_layer of one head of one sequence on the CPU, in vectors of fp32. Part of head.h.
 *
 * First the convolution, the norms, the gates and the write strengths of all tokens, then the recurrence. Rows
 * of V do not depend on each other in the recurrence, so a few rows of the state stay in the first cache
 * through all tokens: the state crosses memory once, whatever the number of tokens. For each token, with
 * x = decay * S of a row:
 *
 *     p = x . k     r = x . q     u = b (v - p)     o = scale (r + u (k . q))     S = x + k u
 *
 * so that the row is read once for both products. The norm over V comes last. A sum runs in an order that
 * depends on nothing, so results do not depend on the number of threads.
 */
#ifndef FKDA_CPU_DECODE_LAYER_HEAD_H
#define FKDA_CPU_DECODE_LAYER_HEAD_H

#include "../../kernels/decode/rounding.h"
#include "../decode_layer_problem.h"
#include "gate.h"
#include "state.h"

enum {
    LAYER_TOKENS = FLASH_KDA_MAX_DECODE_TOKENS,
    LAYER_PARTS = FKDA_CONV_PARTS,
    LAYER_ROWS = LANES, /* rows of the state that go through all tokens together */
};

/* What a head of a sequence needs of its tokens. */
typedef struct layer_tokens {
    /* Inputs of the convolution: the window, then x of each token. */
    uint16_t inputs[LAYER_PARTS][FKDA_WINDOW + LAYER_TOKENS][FKDA_DIM];
    float weights[FKDA_CONV_TAPS][FKDA_DIM], bias[FKDA_DIM]; /* of one part */
    float q[LAYER_TOKENS][FKDA_DIM], k[LAYER_TOKENS][FKDA_DIM], v[LAYER_TOKENS][FKDA_DIM];
    float decay[LAYER_TOKENS][FKDA_DIM];
    float out[LAYER_TOKENS][FKDA_DIM];
    float write[LAYER_TOKENS], key_query[LAYER_TOKENS]; /* b, and k . q */
    float u[LAYER_TOKENS][FKDA_DIM];                    /* for records */
    float block[LAYER_ROWS][FKDA_DIM];                   /* of the state */
} __attribute__((aligned(64))) layer_tokens;

/* A head of a sequence that has a state, and where it begins in the tensors. */
typedef struct layer_head {
    const fkda_decode_layer_problem *p;
    int64_t n, h;
    fkda_sequence s;
    int length; /* tokens of the sequence */
    int64_t from;        /* the slot that the state is read from */
    int64_t window_slot; /* and the window */
    int64_t window_column;
} layer_head;

static inline float layer_sum(vec x)
{
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

INLINE vec load_either(const void *data, int32_t dtype, int64_t at)
{
    return dtype == FLASH_KDA_F32 ? load_f32((const float *)data + at)
                                  : load_bf16((const uint16_t *)data + at);
}

static inline float value_of(const void *data, int32_t dtype, int64_t at)
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
    const int64_t at = fkda_channel_offset(c, part, h * FKDA_DIM, column);
    if (c->channel_stride == 1) {
        for (int i = 0; i < FKDA_DIM; i += LANES) *vec_at(to + i) = load_either(c->data, c->dtype, at + i);
        return;
    }
    for (int i = 0; i < FKDA_DIM; i++) to[i] = value_of(c->data, c->dtype, at + i * c->channel_stride);
}

static void read_inputs(const layer_head *x, layer_tokens *t)
{
    const fkda_decode_layer_problem *p = x->p;
    const fkda_channel_view *window = &p->conv_state;
    for (int part = 0; part < LAYER_PARTS; part++) {
        for (int j = 0; j < FKDA_WINDOW; j++) {
            const uint16_t *from =
                (const uint16_t *)window->data + x->window_slot * p->conv_slot_stride +
                fkda_channel_offset(window, part, x->h * FKDA_DIM, x->window_column + j);
            for (int i = 0; i < FKDA_DIM; i++) t->inputs[part][j][i] = from[i * window->channel_stride];
        }
        for (int i = 0; i < x->length; i++)
            memcpy(t->inputs[part][FKDA_WINDOW + i],
                   (const uint16_t *)p->x.data + part * p->x_part_stride +
                       fkda_row_offset(&p->x, x->s.row, x->s.begin + i, x->h),
                   FKDA_DIM * sizeof(uint16_t));
    }
}

/* Inputs `first` to `first` + count - 1 of each channel become columns of a tensor. `at` is where the slot or
 * token begins in it. */
static void write_inputs(const layer_head *x, const layer_tokens *t, const fkda_channel_view *to, int64_t at,
                         int first, int count)
{
    for (int part = 0; part < LAYER_PARTS; part++)
        for (int j = 0; j < count; j++) {
            uint16_t *column =
                (uint16_t *)to->data + at + fkda_channel_offset(to, part, x->h * FKDA_DIM, j);
            const uint16_t *from = t->inputs[part][first + j];
            for (int i = 0; i < FKDA_DIM; i++) column[i * to->channel_stride] = from[i];
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
                         x->n * p->windows_sequence_stride + i * p->windows_token_stride, i + 1, FKDA_WINDOW);
    if (!length || write == FLASH_KDA_WRITE_NONE) return;
    if (write == FLASH_KDA_WRITE_LAST) {
        write_inputs(x, t, &p->conv_state, x->window_slot * p->conv_slot_stride, length, FKDA_WINDOW);
    } else if (fkda_keeps_drafts(p)) {
        const int64_t columns = p->window_columns, all = length + FKDA_WINDOW - 1;
        write_inputs(x, t, &p->conv_state, x->window_slot * p->conv_slot_stride, 1,
                     (int)(all < columns ? all : columns));
    } else {
        for (int i = 0; i < length; i++) {
            const int64_t slot = fkda_decode_slot_after(&p->decode, x->n, i);
            if (slot != FKDA_NO_SLOT)
                write_inputs(x, t, &p->conv_state, slot * p->conv_slot_stride, i + 1, FKDA_WINDOW);
        }
    }
}

/* y of all tokens of one part. */
static void convolve(const layer_head *x, layer_tokens *t, int part, float (*to)[FKDA_DIM])
{
    const fkda_decode_layer_problem *p = x->p;
    for (int j = 0; j < FKDA_CONV_TAPS; j++) read_column(&p->weight, part, x->h, j, t->weights[j]);
    if (p->bias.data)
        read_column(&p->bias, part, x->h, 0, t->bias);
    else
        memset(t->bias, 0, sizeof t->bias);
    for (int i = 0; i < x->length; i++)
        for (int c = 0; c < FKDA_DIM; c += LANES) {
            vec sum = load(t->bias + c);
            for (int j = 0; j < FKDA_CONV_TAPS; j++)
                sum += load(t->weights[j] + c) * load_bf16(t->inputs[part][i + j] + c);
            *vec_at(to[i] + c) = sum * sigmoid_exp2(sum * -LOG2E);
        }
}

static void normalise_layer(float x[FKDA_DIM])
{
    vec sum = {0};
    for (int i = 0; i < FKDA_DIM; i += LANES) sum += load(x + i) * load(x + i);
    const float factor = 1.0f / sqrtf(layer_sum(sum) + 1e-6f);
    for (int i = 0; i < FKDA_DIM; i += LANES) *vec_at(x + i) *= factor;
}

static void activate_gates(const layer_head *x, layer_tokens *t)
{
    const fkda_decode_problem *d = &x->p->decode;
    const gate_constants gate = make_gate_constants(d->A_log ? d->A_log[x->h] : 0.0f, d->lower_bound, 1);
    for (int i = 0; i < x->length; i++) {
        const int64_t at = fkda_row_offset(&d->g, x->s.row, x->s.begin + i, x->h);
        for (int c = 0; c < FKDA_DIM; c += LANES) {
            const vec g = load_either(d->g.data, d->g.dtype, at + c),
                      bias = d->dt_bias ? load_f32(d->dt_bias + x->h * FKDA_DIM + c) : splat(0.0f);
            const vec log2_decay = d->gate == FLASH_KDA_GATE_BOUNDED    ? bounded_gate(&gate, g, bias)
                                   : d->gate == FLASH_KDA_GATE_SOFTPLUS ? softplus_gate(&gate, g, bias)
                                                                        : activated_gate(g);
            *vec_at(t->decay[i] + c) = exp2_at_most_1(log2_decay);
        }
    }
}

static void read_betas(const layer_head *x, layer_tokens *t)
{
    const fkda_decode_problem *d = &x->p->decode;
    for (int i = 0; i < x->length; i++) {
        float b = value_of(d->beta.data, d->beta.dtype,
                           fkda_row_offset(&d->beta, x->s.row, x->s.begin + i, x->h));
        if (d->beta_kind != FLASH_KDA_BETA_ACTIVATED) b = sigmoid_exp2(splat(b * -LOG2E))[0];
        t->write[i] = d->beta_kind == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.0f * b : b;
    }
}

static void prepare_layer(const layer_head *x, layer_tokens *t)
{
    read_inputs(x, t);
    convolve(x, t, 0, t->q);
    convolve(x, t, 1, t->k);
    convolve(x, t, 2, t->v);
    activate_gates(x, t);
    read_betas(x, t);
    for (int i = 0; i < x->length; i++) {
        if (!x->p->decode.qk_is_normalised) normalise_layer(t->q[i]), normalise_layer(t->k[i]);
        vec sum = {0};
        for (int c = 0; c < FKDA_DIM; c += LANES) sum += load(t->q[i] + c) * load(t->k[i] + c);
        t->key_query[i] = layer_sum(sum);
    }
}

/* ---- The state: LAYER_ROWS rows of V from `v` on ---- */

static void load_layer_rows(const fkda_decode_problem *d, int64_t at, int v, float block[LAYER_ROWS][FKDA_DIM])
{
    if (!d->state_k_first) {
        for (int r = 0; r < LAYER_ROWS; r++)
            for (int c = 0; c < FKDA_DIM; c += LANES)
                *vec_at(block[r] + c) = load_state_vec(&d->state, at + (v + r) * FKDA_DIM + c);
        return;
    }
    for (int c = 0; c < FKDA_DIM; c += LANES) {
        vec tile[LANES];
        for (int i = 0; i < LANES; i++) tile[i] = load_state_vec(&d->state, at + (c + i) * FKDA_DIM + v);
        transpose(tile);
        for (int i = 0; i < LANES; i++) *vec_at(block[i] + c) = tile[i];
    }
}

/* Rounds rows to bf16 at random, with zeros in the dropped bits. */
static void round_layer_rows(const layer_head *x, int token, int v, float block[LAYER_ROWS][FKDA_DIM])
{
    enum { BLOCK = FKDA_CHANNELS_OF_A_RANDOM_BLOCK };
    const fkda_decode_problem *d = &x->p->decode;
    const uint64_t seed = (uint64_t)d->rounding[0], offset = (uint64_t)d->rounding[1];
    for (int r = 0; r < LAYER_ROWS; r++)
        for (int c = 0; c < FKDA_DIM; c += BLOCK) {
            const fkda_random_block random =
                fkda_random(seed, offset, fkda_random_place(x->n, token, d->heads, x->h, v + r, c / BLOCK));
            for (int i = 0; i < BLOCK; i++) {
                uint32_t bits;
                memcpy(&bits, &block[r][c + i], sizeof bits);
                bits = (uint32_t)fkda_round_at_random(bits, fkda_random_bits(&random, i)) << 16;
                memcpy(&block[r][c + i], &bits, sizeof bits);
            }
        }
}

static void store_layer_rows(const layer_head *x, int64_t slot, int token, int v,
                             float block[LAYER_ROWS][FKDA_DIM])
{
    const fkda_decode_problem *d = &x->p->decode;
    const int64_t at = fkda_state_offset(&d->state, slot, x->h);
    float rounded[LAYER_ROWS][FKDA_DIM] __attribute__((aligned(64)));
    if (d->rounding && d->state.dtype == FLASH_KDA_BF16) {
        memcpy(rounded, block, sizeof rounded);
        round_layer_rows(x, token, v, rounded);
        block = rounded;
    }
    if (!d->state_k_first) {
        for (int r = 0; r < LAYER_ROWS; r++)
            for (int c = 0; c < FKDA_DIM; c += LANES)
                store_state_vec(&d->state, at + (v + r) * FKDA_DIM + c, load(block[r] + c));
        return;
    }
    for (int c = 0; c < FKDA_DIM; c += LANES) {
        vec tile[LANES];
        for (int i = 0; i < LANES; i++) tile[i] = load(block[i] + c);
        transpose(tile);
        for (int i = 0; i < LANES; i++) store_state_vec(&d->state, at + (c + i) * FKDA_DIM + v, tile[i]);
    }
}

/* One token of LAYER_ROWS rows. */
static void step_layer_rows(layer_tokens *t, int i, int v, float scale, float block[LAYER_ROWS][FKDA_DIM])
{
    const float *decay = t->decay[i], *k = t->k[i], *q = t->q[i];
    vec of_key[LANES], of_query[LANES];
    for (int r = 0; r < LAYER_ROWS; r++) {
        vec p = {0}, o = {0};
        UNROLL
        for (int c = 0; c < FKDA_DIM; c += LANES) {
            const vec x = load(block[r] + c) * load(decay + c);
            *vec_at(block[r] + c) = x;
            p += x * load(k + c);
            o += x * load(q + c);
        }
        of_key[r] = p, of_query[r] = o;
    }
    const vec p = lane_sums(of_key), o = lane_sums(of_query);
    const vec u = t->write[i] * (load(t->v[i] + v) - p);
    *vec_at(t->u[i] + v) = u;
    *vec_at(t->out[i] + v) = scale * (o + u * t->key_query[i]);
    for (int r = 0; r < LAYER_ROWS; r++) {
        const float of_row = u[r];
        UNROLL
        for (int c = 0; c < FKDA_DIM; c += LANES) *vec_at(block[r] + c) += load(k + c) * of_row;
    }
}

static void run_layer_rows(const layer_head *x, layer_tokens *t, int v)
{
    const fkda_decode_problem *d = &x->p->decode;
    load_layer_rows(d, fkda_state_offset(&d->state, x->from, x->h), v, t->block);
    for (int i = 0; i < x->length; i++) {
        step_layer_rows(t, i, v, d->scale, t->block);
        if (d->write_states != FLASH_KDA_WRITE_EACH) continue;
        const int64_t slot = fkda_decode_slot_after(d, x->n, i);
        if (slot != FKDA_NO_SLOT) store_layer_rows(x, slot, i, v, t->block);
    }
    if (d->write_states == FLASH_KDA_WRITE_LAST && x->length) store_layer_rows(x, x->from, 0, v, t->block);
}

/* ---- Outputs ---- */

static void finish_layer(const layer_head *x, layer_tokens *t)
{
    const fkda_decode_layer_problem *p = x->p;
    const fkda_token_view *to = &p->decode.out, *gate = &p->output_gate;
    for (int i = 0; i < x->length; i++) {
        const int64_t token = x->s.begin + i, at = fkda_row_offset(to, x->s.row, token, x->h);
        vec sum = {0};
        for (int c = 0; c < FKDA_DIM; c += LANES) sum += load(t->out[i] + c) * load(t->out[i] + c);
        const float factor = 1.0f / sqrtf(layer_sum(sum) / FKDA_DIM + p->norm_eps);
        for (int c = 0; c < FKDA_DIM; c += LANES) {
            vec o = load(t->out[i] + c);
            if (p->norm_weight) o *= factor * load_either(p->norm_weight, p->norm_weight_dtype, c);
            if (gate->data)
                o *= sigmoid_exp2(load_either(gate->data, gate->dtype,
                                              fkda_row_offset(gate, x->s.row, token, x->h) + c) *
                                  -LOG2E);
            store_bf16((uint16_t *)to->data + at + c, o);
        }
    }
}

static float *record_of(const layer_head *x, int i)
{
    const fkda_decode_problem *d = &x->p->decode;
    return d->records + fkda_record_offset(x->n, d->record_columns, i, d->heads, x->h);
}

static void write_layer_records(const layer_head *x, const layer_tokens *t)
{
    for (int i = 0; i < x->length; i++) {
        float *to = record_of(x, i);
        memcpy(to + FKDA_RECORD_DECAY * FKDA_DIM, t->decay[i], sizeof t->decay[i]);
        memcpy(to + FKDA_RECORD_KEY * FKDA_DIM, t->k[i], sizeof t->k[i]);
        memcpy(to + FKDA_RECORD_U * FKDA_DIM, t->u[i], sizeof t->u[i]);
    }
}

/* A sequence without a state gives zeros. */
static void write_zeros(const layer_head *x, layer_tokens *t)
{
    const fkda_decode_layer_problem *p = x->p;
    const fkda_token_view *to = &p->decode.out;
    memset(t->inputs, 0, sizeof t->inputs);
    for (int i = 0; i < x->length; i++) {
        memset((uint16_t *)to->data + fkda_row_offset(to, x->s.row, x->s.begin + i, x->h), 0,
               FKDA_DIM * sizeof(uint16_t));
        if (p->windows.data)
            write_inputs(x, t, &p->windows,
                         x->n * p->windows_sequence_stride + i * p->windows_token_stride, 0, FKDA_WINDOW);
        if (p->decode.records)
            memset(record_of(x, i), 0, FKDA_RECORD_ROWS * FKDA_DIM * sizeof(float));
    }
}

static void run_layer_head(const fkda_decode_layer_problem *p, int64_t n, int64_t h)
{
    const fkda_decode_problem *d = &p->decode;
    const int64_t from = fkda_decode_first_slot(d, n);
    const fkda_sequence s = fkda_decode_sequence_at(d, n);
    const layer_head x = {.p = p,
                          .n = n,
                          .h = h,
                          .s = s,
                          .length = (int)(s.end - s.begin),
                          .from = from,
                          .window_slot = fkda_window_slot(p, n, from),
                          .window_column = fkda_window_column(p, n)};
    layer_tokens t;
    if (x.from == FKDA_NO_SLOT || x.window_slot == FKDA_NO_SLOT) {
        write_zeros(&x, &t);
        return;
    }
    prepare_layer(&x, &t);
    for (int v = 0; v < FKDA_DIM; v += LAYER_ROWS) run_layer_rows(&x, &t, v);
    finish_layer(&x, &t);
    if (d->records) write_layer_records(&x, &t);
    write_windows(&x, &t);
}

#endif
