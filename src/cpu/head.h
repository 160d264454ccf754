/*
 * The forward pass of one head of one sequence, for a range of its value channels: the chunk form of the
 * recurrence, 16 tokens at a time, in fp32. A template: the including file sets FKDA_LANES (floats in a
 * vector), FKDA_ROWS (rows of a register tile, 4 or 8), FKDA_VARIANT (the name of what it defines), FKDA_KERNEL
 * and FKDA_ARCH (the texts of fkda_cpu_variant).
 *
 * Inside a chunk, with G the running sum of the log2 decays and the middle row m as the reference:
 *
 *     K~_i = k_i 2^(G_i - G_m)     Q~_i = q_i 2^(G_i - G_m)     K^_j = k_j 2^(G_m - G_j)
 *     L = tril(diag(b) K~ K^^T, -1)             P = tril(Q~ K^^T)
 *     (I + L) U = diag(b) (V - K~' S)           K~' = K~ diag(2^G_m), and so for Q
 *     O = scale (Q~' S + P U)
 *     S = diag(2^G_last) S + Kr^T U             Kr_j = k_j 2^(G_last - G_j)
 *
 * At the lowest bound of -5 nats a token no exponent leaves [-116, 58], so nothing over- or underflows.
 * Every sum runs in an order that depends neither on the threads nor on the range of value channels.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "simd.h"
#include "variant.h"

enum {
    K = FKDA_DIM,
    V = FKDA_DIM,
    CHUNK = 16,
    MIDDLE = CHUNK / 2 - 1,
    ROWS = FKDA_ROWS,       /* a register tile has ROWS rows ... */
    COLUMNS = 2,            /* ... of COLUMNS vectors */
    BLOCK = COLUMNS * LANES /* value channels that advance together */
};

static const float LOG2E = 1.44269504088896341f;
static const float HUGE_SCALE = 0x1p-32f; /* for rows too long to be squared in fp32 */

typedef struct scratch {
    float kq[2 * CHUNK][K];       /* K~ and Q~, then K~' and Q~' */
    float kr[CHUNK][K];           /* K^, then Kr */
    float lower[CHUNK][CHUNK];    /* L */
    float mix[CHUNK][CHUNK];      /* P; only entries on and below the diagonal are meant to be read */
    float read[2 * CHUNK][BLOCK]; /* K~' S and Q~' S */
    float u[CHUNK][BLOCK];
    float to_middle[K]; /* 2^G_m */
    float to_last[K];   /* 2^(G_last - G_m) */
    float decay_1[K];   /* 2^G_last - 1: rounded itself, a slow decay would be off alike in every chunk */
    float bias[K];
    float scale[2 * CHUNK], unit[2 * CHUNK]; /* 1 / |k_i| and 1 / |q_i|, each the product of two */
    float write[CHUNK];                      /* b */
    float state[V / BLOCK][K][BLOCK];
    /* The last tokens of a sequence, padded with zero rows to a chunk. */
    uint16_t padded_q[CHUNK][K], padded_k[CHUNK][K], padded_g[CHUNK][K], padded_v[CHUNK][V];
    uint16_t padded_beta[CHUNK];
} __attribute__((aligned(64))) scratch;

/* Some tokens of one head: rows of q, k, g, v and out are stride elements apart, of beta beta_stride. */
typedef struct tokens {
    const uint16_t *q, *k, *g, *v, *beta;
    uint16_t *out;
    int64_t stride, beta_stride, out_stride;
    int count; /* the rows that exist; the others are zeros */
} tokens;

_Static_assert(offsetof(scratch, state) % 64 == 0, "vectors are read and written aligned");

/* The gate's constants of a head. */
typedef struct gate_constants {
    float slope; /* -log2(e) exp(A_log) */
    float bound; /* log2(e) lower_bound */
} gate_constants;

/* The length of a row whose squares leave fp32's range; the epsilon does not matter to it. */
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

/* What makes unit vectors of 16 rows: x * scale * unit, two factors because 1 / |x| alone may be too small
 * for fp32. */
static inline void normalise(const uint16_t *x, int64_t stride, float scale[CHUNK], float unit[CHUNK])
{
    for (int first = 0; first < CHUNK; first += LANES) {
        vec sums[LANES];
        UNROLL
        for (int i = 0; i < LANES; i++) {
            vec sum = {0};
            UNROLL
            for (int k = 0; k < K; k += LANES) {
                vec part = load_bf16(x + (first + i) * stride + k);
                sum += part * part;
            }
            sums[i] = sum;
        }
        *vec_at(unit + first) = lane_sums(sums);
    }
    for (int i = 0; i < CHUNK; i++) {
        bool huge = unit[i] > 1e30f;
        scale[i] = huge ? HUGE_SCALE : 1.0f;
        unit[i] = 1.0f / (huge ? length_of_huge(x + i * stride) : sqrtf(unit[i] + 1e-6f));
    }
}

/* One vector of key channels of a chunk, from gates to decayed keys and queries. */
static inline void decay_channels(scratch *s, const tokens *t, const gate_constants *gate, int k)
{
    vec gates[CHUNK], exponent[CHUNK];
    vec bias = load(s->bias + k);
    UNROLL
    for (int i = 0; i < CHUNK; i++) {
        vec raw = load_bf16(t->g + i * t->stride + k);
        gates[i] = gate->bound * sigmoid_exp2((raw + bias) * gate->slope);
        if (i >= t->count) gates[i] = (vec){0};
    }

    /* Summed outwards from the middle row, so that neighbours differ by no more than they must. */
    vec to_middle = gates[0];
    UNROLL
    for (int i = 1; i <= MIDDLE; i++) to_middle += gates[i];
    exponent[MIDDLE] = (vec){0};
    UNROLL
    for (int i = MIDDLE; i > 0; i--) exponent[i - 1] = exponent[i] - gates[i];
    UNROLL
    for (int i = MIDDLE + 1; i < CHUNK; i++) exponent[i] = exponent[i - 1] + gates[i];

    *vec_at(s->to_middle + k) = exp2_near(to_middle);
    *vec_at(s->to_last + k) = exp2_near(exponent[CHUNK - 1]);
    *vec_at(s->decay_1 + k) = exp2_minus_1(to_middle + exponent[CHUNK - 1]);

    UNROLL
    for (int i = 0; i < CHUNK; i++) {
        vec forward = exp2_near(exponent[i]), backward = exp2_near(-exponent[i]);
        vec key = load_bf16(t->k + i * t->stride + k) * s->scale[i] * s->unit[i];
        vec query = load_bf16(t->q + i * t->stride + k) * s->scale[CHUNK + i] * s->unit[CHUNK + i];
        *vec_at(s->kq[i] + k) = key * forward;
        *vec_at(s->kq[CHUNK + i] + k) = query * forward;
        *vec_at(s->kr[i] + k) = key * backward;
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

/* Everything of a chunk that needs neither the state nor the values. */
static void prepare(scratch *s, const tokens *t, const gate_constants *gate)
{
    normalise(t->k, t->stride, s->scale, s->unit);
    normalise(t->q, t->stride, s->scale + CHUNK, s->unit + CHUNK);
    for (int i = 0; i < CHUNK; i++) {
        uint32_t bits = i < t->count ? (uint32_t)t->beta[i * t->beta_stride] << 16 : 0;
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
        vec to_middle = load(s->to_middle + k), to_last = load(s->to_last + k);
        for (int i = 0; i < 2 * CHUNK; i++) *vec_at(s->kq[i] + k) *= to_middle;
        for (int i = 0; i < CHUNK; i++) *vec_at(s->kr[i] + k) *= to_last;
    }
}

/* read = [K~'; Q~'] S */
static inline void read_state(scratch *s, float (*state)[BLOCK])
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

/* u = (I + L)^-1 diag(b) (v - K~' S) by forward substitution, in blocks of ROWS rows. */
static inline void solve(scratch *s, const tokens *t, int64_t v)
{
    for (int row = 0; row < CHUNK; row += ROWS) {
        for (int c = 0; c < BLOCK; c += LANES) {
            vec u[ROWS];
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                vec value = load_bf16(t->v + (row + r) * t->stride + v + c);
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
        for (int c = 0; c < BLOCK; c += LANES) {
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
static inline void update_state(const scratch *s, float (*state)[BLOCK])
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

/* The state in memory is [V, K], bf16 or fp32; at work it is [V / BLOCK][K][BLOCK]. */
static void load_state(const fkda_problem *p, int64_t base, int v_begin, int v_end, scratch *s)
{
    if (!p->initial_state) {
        memset(s->state, 0, sizeof s->state);
        return;
    }
    for (int v = v_begin; v < v_end; v += LANES) {
        for (int k = 0; k < K; k += LANES) {
            vec tile[LANES];
            for (int i = 0; i < LANES; i++) {
                int64_t at = base + (int64_t)(v + i) * K + k;
                tile[i] = p->state_is_bf16 ? load_bf16((const uint16_t *)p->initial_state + at)
                                           : load_f32((const float *)p->initial_state + at);
            }
            transpose(tile);
            for (int i = 0; i < LANES; i++) *vec_at(s->state[v / BLOCK][k + i] + v % BLOCK) = tile[i];
        }
    }
}

static void store_state(const fkda_problem *p, int64_t base, int v_begin, int v_end, const scratch *s)
{
    if (!p->final_state) return;
    for (int v = v_begin; v < v_end; v += LANES) {
        for (int k = 0; k < K; k += LANES) {
            vec tile[LANES];
            for (int i = 0; i < LANES; i++) tile[i] = load(s->state[v / BLOCK][k + i] + v % BLOCK);
            transpose(tile);
            for (int i = 0; i < LANES; i++) {
                int64_t at = base + (int64_t)(v + i) * K + k;
                if (p->state_is_bf16)
                    store_bf16((uint16_t *)p->final_state + at, tile[i]);
                else
                    store_f32((float *)p->final_state + at, tile[i]);
            }
        }
    }
}

/* The last rows of a sequence, with zero rows after them, so that nothing past the end is read. */
static tokens pad(scratch *s, const tokens *t)
{
    memset(s->padded_q, 0, sizeof s->padded_q);
    memset(s->padded_k, 0, sizeof s->padded_k);
    memset(s->padded_g, 0, sizeof s->padded_g);
    memset(s->padded_v, 0, sizeof s->padded_v);
    for (int i = 0; i < t->count; i++) {
        memcpy(s->padded_q[i], t->q + i * t->stride, sizeof s->padded_q[i]);
        memcpy(s->padded_k[i], t->k + i * t->stride, sizeof s->padded_k[i]);
        memcpy(s->padded_g[i], t->g + i * t->stride, sizeof s->padded_g[i]);
        memcpy(s->padded_v[i], t->v + i * t->stride, sizeof s->padded_v[i]);
        s->padded_beta[i] = t->beta[i * t->beta_stride];
    }
    tokens padded = *t;
    padded.q = s->padded_q[0];
    padded.k = s->padded_k[0];
    padded.g = s->padded_g[0];
    padded.v = s->padded_v[0];
    padded.beta = s->padded_beta;
    padded.stride = K;
    padded.beta_stride = 1;
    return padded;
}

/* The chunk that starts at a token, or what is left of the sequence there, which may be nothing. */
static tokens tokens_at(const fkda_problem *p, int64_t h, int64_t token, int64_t end)
{
    int64_t left = end - token, row = token * p->heads + h;
    if (left <= 0) return (tokens){0};
    return (tokens){
        .q = p->q + row * K,
        .k = p->k + row * K,
        .g = p->g + row * K,
        .v = p->v + row * V,
        .beta = p->beta + row,
        .out = p->out + row * V,
        .stride = p->heads * K,
        .beta_stride = p->heads,
        .out_stride = p->heads * V,
        .count = left < CHUNK ? (int)left : CHUNK,
    };
}

/* Asks for rows of the next chunk: with many heads they lie too far apart for the CPU to guess. Always
 * inlined, because GCC takes a function that only prefetches for one without effect and drops the call. */
__attribute__((always_inline)) static inline void prefetch(const tokens *t, int first, int last)
{
    enum { LINE = 64 / sizeof(uint16_t) };
    for (int i = first; i < last && i < t->count; i++) {
        for (int k = 0; k < K; k += LINE) {
            __builtin_prefetch(t->k + i * t->stride + k, 0, 2);
            __builtin_prefetch(t->q + i * t->stride + k, 0, 2);
            __builtin_prefetch(t->g + i * t->stride + k, 0, 2);
            __builtin_prefetch(t->v + i * t->stride + k, 0, 2);
        }
    }
}

static void run_head(const fkda_problem *p, int64_t n, int64_t h, int v_begin, int v_end, void *memory)
{
    scratch *s = memory;
    int64_t state_base = (n * p->heads + h) * V * K;
    load_state(p, state_base, v_begin, v_end, s);

    memcpy(s->bias, p->dt_bias + h * K, sizeof s->bias);
    /* Bounded, so that a rate past fp32's range still meets a gate of 0 as a number. */
    float rate = expf(p->A_log[h]);
    if (rate > FLT_MAX / 2) rate = FLT_MAX / 2;
    gate_constants gate = {.slope = -LOG2E * rate, .bound = LOG2E * p->lower_bound};

    int64_t begin, end;
    fkda_sequence_range(p, n, &begin, &end);
    for (int64_t token = begin; token < end; token += CHUNK) {
        tokens t = tokens_at(p, h, token, end), next = tokens_at(p, h, token + CHUNK, end);
        if (t.count < CHUNK) t = pad(s, &t);
        prepare(s, &t, &gate);
        for (int v = v_begin; v < v_end; v += BLOCK) {
            float(*state)[BLOCK] = s->state[v / BLOCK];
            prefetch(&next, CHUNK * (v - v_begin) / (v_end - v_begin),
                     CHUNK * (v + BLOCK - v_begin) / (v_end - v_begin));
            read_state(s, state);
            solve(s, &t, v);
            write_out(s, &t, v, p->scale);
            update_state(s, state);
        }
    }
    store_state(p, state_base, v_begin, v_end, s);
}

const fkda_cpu_variant FKDA_VARIANT = {
    .kernel = FKDA_KERNEL,
    .arch = FKDA_ARCH,
    .scratch_size = sizeof(scratch),
    .run_head = run_head,
};
