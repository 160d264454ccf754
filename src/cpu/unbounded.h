/* The products of keys and queries of a chunk for gates without a bound, of which a token may forget e^-300.
 * Part of head.h, which has the formulas.
 *
 * Algorithm
 *
 * A factor 2^-G would leave fp32's range, so the keys fade token by token, as the state does. With the decay
 * d_i = 2^g_i of token i, row after row:
 *
 *     B_j = d_i B_j for j < i      B_i = k_i
 *     L_ij = b_i k_i . B_j         P_ij = q_i . B_j
 *
 * B_j is k_j 2^(G_i - G_j), and after the last row it is Kr_j. Likewise K~'_i = k_i d_0 ... d_i. No decay is
 * above 1, nothing is divided or subtracted, and a product is 0 only where it is below 2^-126. So a slow
 * token keeps its accuracy beside a token that forgets everything, and no gate needs a clamp or a shorter
 * chunk. The time does not depend on the gates.
 *
 * Optimizations
 *
 * - Four rows at a time, so that a vector of B_j stays in a register for four decays, four products with keys
 *   and four with queries.
 * - One exp2 for each gate, where bounded gates have two.
 */
#ifndef FKDA_CPU_UNBOUNDED_H
#define FKDA_CPU_UNBOUNDED_H

#include "chunk.h"
#include "gate.h"

static inline vec load_key(const scratch *s, const tokens *t, int i, int k)
{
    return load_bf16(bf16_row(t->k, i) + k) * s->scale[i] * s->unit[i];
}

static inline vec load_query(const scratch *s, const tokens *t, int i, int k)
{
    return load_bf16(bf16_row(t->q, i) + k) * s->scale[CHUNK + i] * s->unit[CHUNK + i];
}

static inline vec load_gate(const tokens *t, int i, int k, bool is_f32)
{
    return is_f32 ? load_f32(f32_row(t->g, i) + k) : load_bf16(bf16_row(t->g, i) + k);
}

/* Prepares one vector of key channels: keys, queries, the decay of each token and that of the chunk. */
INLINE void load_channels(scratch *s, const tokens *t, const gate_constants *gate, int k, bool is_softplus,
                          bool g_is_f32)
{
    const vec bias = load(s->bias + k);
    vec sum = {0};
    for (int i = 0; i < CHUNK; i++) {
        const vec g = load_gate(t, i, k, g_is_f32);
        vec exponent = is_softplus ? softplus_gate(gate, g, bias) : activated_gate(g);
        if (i >= t->count) exponent = (vec){0};
        sum += exponent;
        *vec_at(s->decay[i] + k) = exp2_at_most_1(exponent);
        const vec key = load_key(s, t, i, k);
        *vec_at(s->kq[i] + k) = *vec_at(s->kr[i] + k) = key;
        *vec_at(s->kq[CHUNK + i] + k) = load_query(s, t, i, k);
    }
    const ivec is_slow = sum > -1.0f;
    *vec_at(s->decay_1 + k) = choose(is_slow, exp2_minus_1(sum), splat(0.0f));
    *vec_at(s->factor + k) = choose(is_slow, splat(1.0f), exp2_at_most_1(sum));
}

enum {
    FADED_ROWS = 4,
    FADED_COLUMNS = LANES < 8 ? 1 : LANES / 8,
    FADED_SUMS = 2 * FADED_ROWS * FADED_COLUMNS, /* of L and of P */
};

/* Rows i to i + 3 of L and P in columns from j on. `diagonal` is the row, counted from i, in whose diagonal
 * the first column is, and negative if the column is before all rows. */
INLINE void faded_products(scratch *s, int i, int j, int diagonal)
{
    vec sums[FADED_SUMS] = {{0}};
    vec *const l = sums, *const p = sums + FADED_SUMS / 2;
    float values[FADED_SUMS] __attribute__((aligned(64)));
    for (int k = 0; k < K; k += LANES) {
        UNROLL
        for (int c = 0; c < FADED_COLUMNS; c++) {
            vec b = load(s->kr[j + c] + k);
            UNROLL
            for (int r = 0; r < FADED_ROWS; r++) {
                if (r > diagonal + c) b *= load(s->decay[i + r] + k);
                if (r > diagonal + c) l[r * FADED_COLUMNS + c] += load(s->kq[i + r] + k) * b;
                if (r >= diagonal + c) p[r * FADED_COLUMNS + c] += load(s->kq[CHUNK + i + r] + k) * b;
            }
            *vec_at(s->kr[j + c] + k) = b;
        }
    }
    for (int at = 0; at < FADED_SUMS; at += LANES) *vec_at(values + at) = lane_sums(sums + at);
    for (int r = 0; r < FADED_ROWS; r++) {
        const float *const row = values + r * FADED_COLUMNS;
        memcpy(&s->lower[i + r][j], row, FADED_COLUMNS * sizeof(float));
        memcpy(&s->mix[i + r][j], row + FADED_SUMS / 2, FADED_COLUMNS * sizeof(float));
    }
}

/* Makes K~' and Q~' of keys and queries. */
static inline void fade_from_first(scratch *s)
{
    for (int k = 0; k < K; k += LANES) {
        vec faded = splat(1.0f);
        for (int i = 0; i < CHUNK; i++) {
            faded *= load(s->decay[i] + k);
            *vec_at(s->kq[i] + k) *= faded;
            *vec_at(s->kq[CHUNK + i] + k) *= faded;
        }
    }
}

static inline void prepare_unbounded(scratch *s, const tokens *t, const gate_constants *gate, int32_t kind)
{
    const bool is_softplus = kind == FLASH_KDA_GATE_SOFTPLUS;
    for (int k = 0; k < K; k += LANES) {
        if (is_softplus && t->g_is_f32)
            load_channels(s, t, gate, k, true, true);
        else if (is_softplus)
            load_channels(s, t, gate, k, true, false);
        else if (t->g_is_f32)
            load_channels(s, t, gate, k, false, true);
        else
            load_channels(s, t, gate, k, false, false);
    }
    for (int i = 0; i < CHUNK; i += FADED_ROWS) {
        for (int j = 0; j < i; j += FADED_COLUMNS) faded_products(s, i, j, -FADED_COLUMNS);
        UNROLL
        for (int r = 0; r < FADED_ROWS; r += FADED_COLUMNS) faded_products(s, i, i + r, r);
    }
    fade_from_first(s);
}

#endif
