/*
 * The forward pass of one head of one sequence on the CPU, for a range of its value channels: the chunk form
 * of the recurrence in fp32, 16 tokens at a time.
 *
 * This file is a template. The including file defines FKDA_LANES (floats of a vector), FKDA_ROWS (rows of a
 * register tile, 4 or 8), FKDA_VARIANT (the name of the fkda_cpu_variant that is defined here), FKDA_KERNEL
 * and FKDA_ARCH (its texts).
 *
 * Algorithm
 *
 * Inside a chunk, with G the running sum of the log2 decays from the chunk's first token on, and a constant
 * c:
 *
 *     K~_i = k_i 2^(G_i + c)       Q~_i = q_i 2^(G_i + c)       K^_j = k_j 2^(-G_j - c)
 *     L = tril(diag(b) K~ K^^T, -1)             P = tril(Q~ K^^T)
 *     (I + L) U = diag(b) (V - K~' S)           K~' = 2^-c K~, and so for Q
 *     O = scale (Q~' S + P U)
 *     S = diag(2^G_last) S + Kr^T U             Kr_j = k_j 2^(G_last - G_j)
 *
 * c is about half of the largest decay that a chunk can have, which is 16 times the bound. With a bound of -5
 * nats a token G is at least -116, so exponents stay within [-59, 58], and no factor over- or underflows. c
 * is a whole number, so multiplications by 2^c and 2^-c are exact.
 *
 * A token changes no bit of the tokens before it, whatever it holds: c does not depend on the tokens, sums
 * over tokens run from the first token on, and of L and P only entries on and below the diagonal are used.
 * Every sum runs in an order that depends neither on the number of threads nor on the range of value
 * channels, so results do not depend on them either.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "simd.h"

#include "gate.h"
#include "variant.h"

enum {
    K = FKDA_DIM,
    V = FKDA_DIM,
    CHUNK = 16,
    ROWS = FKDA_ROWS,       /* of a register tile */
    COLUMNS = 2,            /* vectors of a row of a register tile */
    STRIP = COLUMNS * LANES /* value channels that advance together */
};

static const float HUGE_SCALE = 0x1p-32f; /* makes rows that are too long to be squared in fp32 shorter */

typedef struct scratch {
    float kq[2 * CHUNK][K];       /* K~ and Q~, then K~' and Q~' */
    float kr[CHUNK][K];           /* K^, then Kr */
    float lower[CHUNK][CHUNK];    /* L */
    float mix[CHUNK][CHUNK];      /* P; entries above the diagonal mean nothing */
    float read[2 * CHUNK][STRIP]; /* K~' S and Q~' S */
    float u[CHUNK][STRIP];
    float to_last[K]; /* 2^(G_last + c) */
    /* 2^G_last - 1. The decay of a slow channel, rounded to fp32 itself, would be wrong by the same amount
     * chunk after chunk. */
    float decay_1[K];
    float bias[K];
    float scale[2 * CHUNK], unit[2 * CHUNK]; /* their products are 1 / |k_i| and 1 / |q_i| */
    float write[CHUNK];                      /* b */
    float state[V / STRIP][K][STRIP];
    /* The last tokens of a sequence, with rows of zeros after them that fill the chunk. */
    uint16_t padded_q[CHUNK][K], padded_k[CHUNK][K], padded_g[CHUNK][K], padded_v[CHUNK][V];
    uint16_t padded_beta[CHUNK];
} __attribute__((aligned(64))) scratch;

/* Rows of one tensor and one head. */
typedef struct rows {
    const uint16_t *first;
    int64_t stride; /* elements from one token to the next */
} rows;

static inline const uint16_t *row_at(rows r, int i)
{
    return r.first + i * r.stride;
}

/* The tokens of a chunk, of one head. */
typedef struct tokens {
    rows q, k, g, v, beta;
    uint16_t *out;
    int64_t out_stride;
    int count; /* tokens that exist; rows after them are zeros */
} tokens;

_Static_assert(offsetof(scratch, state) % 64 == 0, "vectors are read and written aligned");

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

/* Finds the factors that make unit vectors of 16 rows: x * scale * unit. There are two factors because 1 /
 * |x| alone may be too small for fp32. */
static inline void normalise(rows x, float scale[CHUNK], float unit[CHUNK])
{
    for (int first = 0; first < CHUNK; first += LANES) {
        vec sums[LANES];
        UNROLL
        for (int i = 0; i < LANES; i++) {
            vec sum = {0};
            UNROLL
            for (int k = 0; k < K; k += LANES) {
                vec part = load_bf16(row_at(x, first + i) + k);
                sum += part * part;
            }
            sums[i] = sum;
        }
        *vec_at(unit + first) = lane_sums(sums);
    }
    for (int i = 0; i < CHUNK; i++) {
        bool huge = unit[i] > 1e30f;
        scale[i] = huge ? HUGE_SCALE : 1.0f;
        unit[i] = 1.0f / (huge ? length_of_huge(row_at(x, i)) : sqrtf(unit[i] + 1e-6f));
    }
}

/* Prepares one vector of key channels of a chunk, from gates to decayed keys and queries. */
static inline void decay_channels(scratch *s, const tokens *t, const gate_constants *gate, int k)
{
    vec gates[CHUNK], exponent[CHUNK];
    vec bias = load(s->bias + k);
    UNROLL
    for (int i = 0; i < CHUNK; i++) {
        gates[i] = bounded_gate(gate, load_bf16(row_at(t->g, i) + k), bias);
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
        vec key = load_bf16(row_at(t->k, i) + k) * s->scale[i] * s->unit[i];
        vec query = load_bf16(row_at(t->q, i) + k) * s->scale[CHUNK + i] * s->unit[CHUNK + i];
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

/* Prepares everything of a chunk that needs neither the state nor the values. */
static void prepare(scratch *s, const tokens *t, const gate_constants *gate)
{
    normalise(t->k, s->scale, s->unit);
    normalise(t->q, s->scale + CHUNK, s->unit + CHUNK);
    for (int i = 0; i < CHUNK; i++) {
        uint32_t bits = i < t->count ? (uint32_t)*row_at(t->beta, i) << 16 : 0;
        memcpy(&s->write[i], &bits, sizeof bits);
    }
    for (int i = 0; i < CHUNK; i += LANES) *vec_at(s->write + i) = sigmoid_exp2(load(s->write + i) * -LOG2E);
    for (int i = t->count; i < CHUNK; i++) s->write[i] = 0.0f;

    for (int k = 0; k < K; k += LANES) decay_channels(s, t, gate, k);

    lower_products(s->kq, s->kr, s->lower);
    lower_products(s->kq + CHUNK, s->kr, s->mix);
    for (int i = 0; i < CHUNK; i++)
        for (int j = 0; j < CHUNK; j += LANES) *vec_at(s->lower[i] + j) *= s->write[i];

    for (int k = 0; k < K; k += LANES) {
        vec to_last = load(s->to_last + k);
        for (int i = 0; i < 2 * CHUNK; i++) *vec_at(s->kq[i] + k) *= gate->down;
        for (int i = 0; i < CHUNK; i++) *vec_at(s->kr[i] + k) *= to_last;
    }
}

/* read = [K~'; Q~'] S */
static inline void read_state(scratch *s, float (*state)[STRIP])
{
    for (int row = 0; row < 2 * CHUNK; row += ROWS) {
        vec sum[ROWS][COLUMNS] = {{{0}}};
        for (int k = 0; k < K; k++) {
            vec part[COLUMNS];
            UNROLL
            for (int c = 0; c < COLUMNS; c++) part[c] = load(state[k] + c * LANES);
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                vec a = splat(s->kq[row + r][k]);
                UNROLL
                for (int c = 0; c < COLUMNS; c++) sum[r][c] += a * part[c];
            }
        }
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            UNROLL
            for (int c = 0; c < COLUMNS; c++) *vec_at(s->read[row + r] + c * LANES) = sum[r][c];
        }
    }
}

/* u = (I + L)^-1 diag(b) (v - K~' S) by forward substitution, in strips of ROWS rows. */
static inline void solve(scratch *s, const tokens *t, int64_t v)
{
    for (int row = 0; row < CHUNK; row += ROWS) {
        for (int c = 0; c < STRIP; c += LANES) {
            vec u[ROWS];
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                vec value = load_bf16(row_at(t->v, row + r) + v + c);
                u[r] = s->write[row + r] * (value - load(s->read[row + r] + c));
            }
            for (int j = 0; j < row; j++) {
                vec above = load(s->u[j] + c);
                UNROLL
                for (int r = 0; r < ROWS; r++) u[r] -= s->lower[row + r][j] * above;
            }
            UNROLL
            for (int j = 0; j < ROWS; j++) {
                UNROLL
                for (int r = j + 1; r < ROWS; r++) u[r] -= s->lower[row + r][row + j] * u[j];
                *vec_at(s->u[row + j] + c) = u[j];
            }
        }
    }
}

/* out = scale (Q~' S + P u) */
static inline void write_out(const scratch *s, const tokens *t, int64_t v, float scale)
{
    for (int row = 0; row < t->count; row += ROWS) {
        for (int c = 0; c < STRIP; c += LANES) {
            vec sum[ROWS];
            UNROLL
            for (int r = 0; r < ROWS; r++) sum[r] = load(s->read[CHUNK + row + r] + c);
            for (int j = 0; j < row; j++) {
                vec u = load(s->u[j] + c);
                UNROLL
                for (int r = 0; r < ROWS; r++) sum[r] += s->mix[row + r][j] * u;
            }
            UNROLL
            for (int j = 0; j < ROWS; j++) {
                vec u = load(s->u[row + j] + c);
                UNROLL
                for (int r = j; r < ROWS; r++) sum[r] += s->mix[row + r][row + j] * u;
            }
            UNROLL
            for (int r = 0; r < ROWS; r++)
                if (row + r < t->count)
                    store_bf16(t->out + (row + r) * t->out_stride + v + c, scale * sum[r]);
        }
    }
}

/* S = diag(decay) S + Kr^T u */
static inline void update_state(const scratch *s, float (*state)[STRIP])
{
    for (int k = 0; k < K; k += ROWS) {
        vec sum[ROWS][COLUMNS];
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            UNROLL
            for (int c = 0; c < COLUMNS; c++) {
                vec old = load(state[k + r] + c * LANES);
                sum[r][c] = s->decay_1[k + r] * old + old;
            }
        }
        for (int i = 0; i < CHUNK; i++) {
            vec u[COLUMNS];
            UNROLL
            for (int c = 0; c < COLUMNS; c++) u[c] = load(s->u[i] + c * LANES);
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                vec a = splat(s->kr[i][k + r]);
                UNROLL
                for (int c = 0; c < COLUMNS; c++) sum[r][c] += a * u[c];
            }
        }
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            UNROLL
            for (int c = 0; c < COLUMNS; c++) *vec_at(state[k + r] + c * LANES) = sum[r][c];
        }
    }
}

/* A state in memory is [V, K], bf16 or fp32. The scratch has it as [V / STRIP][K][STRIP]. */
static void load_state(const fkda_state_view *from, int64_t n, int64_t h, int v_begin, int v_end, scratch *s)
{
    if (!from->data) {
        memset(s->state, 0, sizeof s->state);
        return;
    }
    const int64_t base = fkda_state_offset(from, n, h);
    for (int v = v_begin; v < v_end; v += LANES) {
        for (int k = 0; k < K; k += LANES) {
            vec tile[LANES];
            for (int i = 0; i < LANES; i++) {
                int64_t at = base + (int64_t)(v + i) * K + k;
                tile[i] = from->dtype == FLASH_KDA_BF16 ? load_bf16((const uint16_t *)from->data + at)
                                                        : load_f32((const float *)from->data + at);
            }
            transpose(tile);
            for (int i = 0; i < LANES; i++) *vec_at(s->state[v / STRIP][k + i] + v % STRIP) = tile[i];
        }
    }
}

static void store_state(const fkda_state_view *to, int64_t n, int64_t h, int v_begin, int v_end,
                        const scratch *s)
{
    if (!to->data) return;
    const int64_t base = fkda_state_offset(to, n, h);
    for (int v = v_begin; v < v_end; v += LANES) {
        for (int k = 0; k < K; k += LANES) {
            vec tile[LANES];
            for (int i = 0; i < LANES; i++) tile[i] = load(s->state[v / STRIP][k + i] + v % STRIP);
            transpose(tile);
            for (int i = 0; i < LANES; i++) {
                int64_t at = base + (int64_t)(v + i) * K + k;
                if (to->dtype == FLASH_KDA_BF16)
                    store_bf16((uint16_t *)to->data + at, tile[i]);
                else
                    store_f32((float *)to->data + at, tile[i]);
            }
        }
    }
}

static rows copy_rows(uint16_t *to, rows from, int width, int count)
{
    memset(to, 0, (size_t)(CHUNK * width) * sizeof *to);
    for (int i = 0; i < count; i++) memcpy(to + i * width, row_at(from, i), (size_t)width * sizeof *to);
    return (rows){to, width};
}

/* The last tokens of a sequence with rows of zeros after them, so that nothing past the end is read. */
static tokens pad(scratch *s, const tokens *t)
{
    tokens padded = *t;
    padded.q = copy_rows(s->padded_q[0], t->q, K, t->count);
    padded.k = copy_rows(s->padded_k[0], t->k, K, t->count);
    padded.g = copy_rows(s->padded_g[0], t->g, K, t->count);
    padded.v = copy_rows(s->padded_v[0], t->v, V, t->count);
    padded.beta = copy_rows(s->padded_beta, t->beta, 1, t->count);
    return padded;
}

static rows rows_of(const fkda_token_view *t, int64_t row, int64_t token, int64_t h)
{
    return (rows){(const uint16_t *)t->data + fkda_row_offset(t, row, token, h), t->token_stride};
}

/* The chunk of a sequence that begins at a token, or what is left of the sequence there, which may be
 * nothing. */
static tokens tokens_at(const fkda_problem *p, int64_t h, const fkda_sequence *sequence, int64_t token)
{
    const int64_t left = sequence->end - token, row = sequence->row;
    if (left <= 0) return (tokens){0};
    return (tokens){
        .q = rows_of(&p->q, row, token, h),
        .k = rows_of(&p->k, row, token, h),
        .g = rows_of(&p->g, row, token, h),
        .v = rows_of(&p->v, row, token, h),
        .beta = rows_of(&p->beta, row, token, h),
        .out = (uint16_t *)p->out.data + fkda_row_offset(&p->out, row, token, h),
        .out_stride = p->out.token_stride,
        .count = left < CHUNK ? (int)left : CHUNK,
    };
}

/* Asks for rows of the next chunk. With many heads the rows of a head lie too far apart for the CPU to guess.
 * The function must be inlined: GCC takes a function that only prefetches for one without effect, and drops
 * the call. */
__attribute__((always_inline)) static inline void prefetch(const tokens *t, int first, int last)
{
    enum { LINE = 64 / sizeof(uint16_t) };
    for (int i = first; i < last && i < t->count; i++) {
        for (int k = 0; k < K; k += LINE) {
            __builtin_prefetch(row_at(t->k, i) + k, 0, 2);
            __builtin_prefetch(row_at(t->q, i) + k, 0, 2);
            __builtin_prefetch(row_at(t->g, i) + k, 0, 2);
            __builtin_prefetch(row_at(t->v, i) + k, 0, 2);
        }
    }
}

static bool run_head(const fkda_problem *p, int64_t n, int64_t h, int v_begin, int v_end, void *memory)
{
    scratch *s = memory;
    load_state(&p->initial_state, n, h, v_begin, v_end, s);
    memcpy(s->bias, p->dt_bias + h * K, sizeof s->bias);
    const gate_constants gate = make_gate_constants(p->A_log[h], p->lower_bound, CHUNK);
    const fkda_sequence sequence = fkda_sequence_at(p, n);
    for (int64_t token = sequence.begin; token < sequence.end; token += CHUNK) {
        if (fkda_interrupted(p)) return false;
        tokens t = tokens_at(p, h, &sequence, token), next = tokens_at(p, h, &sequence, token + CHUNK);
        if (t.count < CHUNK) t = pad(s, &t);
        prepare(s, &t, &gate);
        for (int v = v_begin; v < v_end; v += STRIP) {
            float(*state)[STRIP] = s->state[v / STRIP];
            prefetch(&next, CHUNK * (v - v_begin) / (v_end - v_begin),
                     CHUNK * (v + STRIP - v_begin) / (v_end - v_begin));
            read_state(s, state);
            solve(s, &t, v);
            write_out(s, &t, v, p->scale);
            update_state(s, state);
        }
    }
    store_state(&p->final_state, n, h, v_begin, v_end, s);
    return true;
}

const fkda_cpu_variant FKDA_VARIANT = {
    .kernel = FKDA_KERNEL,
    .arch = FKDA_ARCH,
    .scratch_size = sizeof(scratch),
    .run_head = run_head,
};
