/* The part of a chunk that needs neither the state nor the values: norms, write strengths, and the products
 * of keys and queries for bounded gates. Part of head.h, which has the formulas.
 *
 * With G the running sum of the log2 decays from the chunk's first token on, and a constant c:
 *
 *     K~_i = k_i 2^(G_i + c)       Q~_i = q_i 2^(G_i + c)       K^_j = k_j 2^(-G_j - c)
 *     L = tril(diag(b) K~ K^^T, -1)             P = tril(Q~ K^^T)
 *     K~' = 2^-c K~, and so for Q               Kr_j = 2^(G_last + c) K^_j
 *
 * c is about half of the largest decay that a chunk can have, which is 16 times the bound. With a bound of -5
 * nats a token G is at least -116, so exponents stay within [-59, 58], and no factor over- or underflows. c
 * is a whole number, so multiplications by 2^c and 2^-c are exact.
 */
#ifndef FKDA_CPU_PREPARE_H
#define FKDA_CPU_PREPARE_H

#include "chunk.h"
#include "gate.h"
#include "unbounded.h"

static const float HUGE_SCALE = 0x1p-32f; /* makes rows that are too long to be squared in fp32 shorter */

/* The length of a row whose squares leave fp32's range. The epsilon of the norm does not change it. */
static float length_of_huge(const uint16_t *x)
{
    double sum = 0.0;
    for (int i = 0; i < K; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        sum += (double)(value * HUGE_SCALE) * (double)(value * HUGE_SCALE);
    }
    return (float)sqrt(sum);
}

/* Finds the factors that make a unit vector of a row: x * scale * unit. There are two factors because 1 / |x|
 * alone may be too small for fp32. */
static inline void find_unit(const uint16_t *x, float sum_of_squares, float *scale, float *unit)
{
    bool huge = sum_of_squares > 1e30f;
    *scale = huge ? HUGE_SCALE : 1.0f;
    *unit = 1.0f / (huge ? length_of_huge(x) : sqrtf(sum_of_squares + 1e-6f));
}

/* Finds the factors that make unit vectors of 16 rows. */
static inline void normalise(rows x, float scale[CHUNK], float unit[CHUNK])
{
    for (int first = 0; first < CHUNK; first += LANES) {
        vec sums[LANES];
        UNROLL
        for (int i = 0; i < LANES; i++) {
            vec sum = {0};
            UNROLL
            for (int k = 0; k < K; k += LANES) {
                vec part = load_bf16(bf16_row(x, first + i) + k);
                sum += part * part;
            }
            sums[i] = sum;
        }
        *vec_at(unit + first) = lane_sums(sums);
    }
    for (int i = 0; i < CHUNK; i++) find_unit(bf16_row(x, i), unit[i], scale + i, unit + i);
}

/* The factors of q and k that are used as they are. */
static inline void leave_as_they_are(float scale[CHUNK], float unit[CHUNK])
{
    for (int i = 0; i < CHUNK; i++) scale[i] = unit[i] = 1.0f;
}

/* to[i] becomes beta of token i, and 0 where there is no token. */
static inline void read_betas(float to[CHUNK], const tokens *t)
{
    for (int i = 0; i < CHUNK; i++) {
        uint32_t bits = i < t->count && !t->beta_is_f32 ? (uint32_t)*bf16_row(t->beta, i) << 16 : 0;
        memcpy(&to[i], &bits, sizeof bits);
        if (i < t->count && t->beta_is_f32) to[i] = *f32_row(t->beta, i);
    }
}

/* write[i] becomes the write strength of token i, and 0 where there is no token. */
static inline void read_write_strengths(float write[CHUNK], const tokens *t, int32_t kind)
{
    read_betas(write, t);
    if (kind != FLASH_KDA_BETA_ACTIVATED)
        for (int i = 0; i < CHUNK; i += LANES) *vec_at(write + i) = sigmoid_exp2(load(write + i) * -LOG2E);
    if (kind == FLASH_KDA_BETA_TWICE_SIGMOID)
        for (int i = 0; i < CHUNK; i++) write[i] *= 2.0f;
    for (int i = t->count; i < CHUNK; i++) write[i] = 0.0f;
}

/* Prepares one vector of key channels of a chunk, from bounded gates to decayed keys and queries. */
INLINE void decay_channels(scratch *s, const tokens *t, const gate_constants *gate, int k, bool g_is_f32)
{
    vec gates[CHUNK], exponent[CHUNK];
    vec bias = load(s->bias + k);
    UNROLL
    for (int i = 0; i < CHUNK; i++) {
        gates[i] = bounded_gate(gate, load_gate(t, i, k, g_is_f32), bias);
        if (i >= t->count) gates[i] = (vec){0};
    }

    exponent[0] = gates[0];
    UNROLL
    for (int i = 1; i < CHUNK; i++) exponent[i] = exponent[i - 1] + gates[i];

    *vec_at(s->to_last + k) = exp2_near(exponent[CHUNK - 1]) * gate->up;
    *vec_at(s->decay_1 + k) = exp2_minus_1(exponent[CHUNK - 1]);

    UNROLL
    for (int i = 0; i < CHUNK; i++) {
        vec forward = exp2_near(exponent[i]), backward = exp2_near(-exponent[i]);
        vec key = load_key(s, t, i, k), query = load_query(s, t, i, k);
        *vec_at(s->kq[i] + k) = key * gate->up * forward;
        *vec_at(s->kq[CHUNK + i] + k) = query * gate->up * forward;
        *vec_at(s->kr[i] + k) = key * gate->down * backward;
    }
}

/* to[i][j] = a_i . b_j for j <= i, and some of the entries above the diagonal. */
static inline void lower_products(float (*a)[K], float (*b)[K], float (*to)[CHUNK])
{
    enum { TILE_ROWS = 4, TILE_COLUMNS = LANES / TILE_ROWS };
    for (int i = 0; i < CHUNK; i += TILE_ROWS) {
        for (int j = 0; j < i + TILE_ROWS; j += TILE_COLUMNS) {
            vec sums[LANES] = {{0}};
            for (int k = 0; k < K; k += LANES) {
                UNROLL
                for (int x = 0; x < LANES; x++)
                    sums[x] += load(a[i + x / TILE_COLUMNS] + k) * load(b[j + x % TILE_COLUMNS] + k);
            }
            vec tile = lane_sums(sums);
            for (int r = 0; r < TILE_ROWS; r++)
                memcpy(&to[i + r][j], (const float *)&tile + r * TILE_COLUMNS, TILE_COLUMNS * sizeof(float));
        }
    }
}

static inline void prepare_bounded(scratch *s, const tokens *t, const gate_constants *gate)
{
    if (t->g_is_f32)
        for (int k = 0; k < K; k += LANES) decay_channels(s, t, gate, k, true);
    else
        for (int k = 0; k < K; k += LANES) decay_channels(s, t, gate, k, false);

    lower_products(s->kq, s->kr, s->lower);
    lower_products(s->kq + CHUNK, s->kr, s->mix);

    for (int k = 0; k < K; k += LANES) {
        vec to_last = load(s->to_last + k);
        for (int i = 0; i < 2 * CHUNK; i++) *vec_at(s->kq[i] + k) *= gate->down;
        for (int i = 0; i < CHUNK; i++) *vec_at(s->kr[i] + k) *= to_last;
    }
}

static inline void load_bias(const fkda_problem *p, int64_t h, scratch *s)
{
    if (p->dt_bias)
        memcpy(s->bias, p->dt_bias + h * K, sizeof s->bias);
    else
        memset(s->bias, 0, sizeof s->bias);
}

/* Everything but the factors b_i of L. */
static void prepare_without_strengths(scratch *s, const fkda_problem *p, const tokens *t,
                                      const gate_constants *gate)
{
    if (p->qk_is_normalised) {
        leave_as_they_are(s->scale, s->unit);
        leave_as_they_are(s->scale + CHUNK, s->unit + CHUNK);
    } else {
        normalise(t->k, s->scale, s->unit);
        normalise(t->q, s->scale + CHUNK, s->unit + CHUNK);
    }
    read_write_strengths(s->write, t, p->beta_kind);
    if (p->gate == FLASH_KDA_GATE_BOUNDED)
        prepare_bounded(s, t, gate);
    else
        prepare_unbounded(s, t, gate, p->gate);
}

static inline void multiply_by_strengths(scratch *s)
{
    for (int i = 0; i < CHUNK; i++)
        for (int j = 0; j < CHUNK; j += LANES) *vec_at(s->lower[i] + j) *= s->write[i];
}

static void prepare(scratch *s, const fkda_problem *p, const tokens *t, const gate_constants *gate)
{
    prepare_without_strengths(s, p, t, gate);
    multiply_by_strengths(s);
}

#endif
