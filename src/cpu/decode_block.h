/* Blocks of a state: 16 rows of V of one head, in fp32. A block has the order of the state in memory, so it
 * is [16][K], or [K][16] with state_k_first. Part of decode_head.h, which has the formulas.
 *
 * Rows of bf16 are in *split order* (is_split()): of every 2 LANES channels, the even ones come first and the
 * odd ones behind them. A vector of 32-bit words in memory holds LANES pairs of neighbouring channels, so one
 * shift makes fp32 numbers of all even channels and one mask makes those of the odd channels, and a pair is
 * stored again without moving a number to another lane. In the order of memory each vector would take a
 * conversion between 16 and 32 bits, which is two instructions on the way in and three on the way out. The
 * token's decay, key and query are brought into split order once for each head (split_row()).
 *
 * The block's arithmetic depends neither on the threads nor on how rows are divided among them: a block
 * begins at a multiple of 16 rows, and rows of V do not depend on each other.
 */
#ifndef FKDA_CPU_DECODE_BLOCK_H
#define FKDA_CPU_DECODE_BLOCK_H

#include "../../kernels/decode/rounding.h"
#include "chunk.h"
#include "pairs.h"

enum {
    BLOCK_ROWS = FKDA_DECODE_ROWS, /* of V */
    BLOCK = BLOCK_ROWS * K,        /* numbers */
};

_Static_assert(BLOCK_ROWS % LANES == 0, "vectors along V fill a block");

/* Where a block lies in memory. */
typedef struct block_view {
    const fkda_state_view *state;
    int64_t first;    /* the element where the block begins */
    int64_t stride;   /* elements between neighbours of the block's outer dimension */
    int outer, inner; /* the block's dimensions */
} block_view;

static inline block_view block_at(const fkda_state_view *state, bool k_first, int64_t slot, int64_t h, int v)
{
    const int64_t base = fkda_state_offset(state, slot, h);
    if (k_first) return (block_view){state, base + v, V, K, BLOCK_ROWS};
    return (block_view){state, base + (int64_t)v * K, K, BLOCK_ROWS, K};
}

/* Asks for part `part` of `parts` of a block that is loaded soon. */
INLINE void prefetch_part(const block_view *from, int part, int parts)
{
    const int64_t bytes = from->state->dtype == FLASH_KDA_BF16 ? 2 : 4;
    const int part_rows = from->outer / parts;
    const char *row =
        (const char *)from->state->data + (from->first + part * part_rows * from->stride) * bytes;
    for (int o = 0; o < part_rows; o++, row += from->stride * bytes)
        for (int at = 0; at < from->inner * bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

/* Whether blocks of the state are in split order. */
static inline bool is_split(const fkda_state_view *state, bool k_first)
{
    return !k_first && state->dtype == FLASH_KDA_BF16;
}

static void load_pairs(const block_view *view, float *block)
{
    const int64_t stride = view->stride;
    const uint16_t *row = (const uint16_t *)view->state->data + view->first;
    for (int r = 0; r < BLOCK_ROWS; r++, row += stride, block += K) {
        UNROLL
        for (int k = 0; k < K; k += 2 * LANES) {
            const uvec pairs = *(const uvec_unaligned *)(row + k);
            *vec_at(block + k) = first_of_pairs(pairs);
            *vec_at(block + k + LANES) = second_of_pairs(pairs);
        }
    }
}

INLINE void prefetch_block(const block_view *from)
{
    prefetch_part(from, 0, 1);
}

/* The functions with constant arguments are code of their own for each order and type of a state. They copy
 * the view, which a store of a vector might otherwise change for all the compiler knows. */
INLINE void load_numbers(const block_view *view, float *block, int outer, int inner, bool is_bf16)
{
    const void *data = view->state->data;
    const int64_t stride = view->stride;
    int64_t at = view->first;
    for (int o = 0; o < outer; o++, at += stride, block += inner) {
        UNROLL
        for (int i = 0; i < inner; i += LANES)
            *vec_at(block + i) =
                is_bf16 ? load_bf16((const uint16_t *)data + at + i) : load_f32((const float *)data + at + i);
    }
}

static void load_block(const block_view *from, float *block, bool k_first)
{
    const bool is_bf16 = from->state->dtype == FLASH_KDA_BF16;
    if (k_first && is_bf16)
        load_numbers(from, block, K, BLOCK_ROWS, true);
    else if (k_first)
        load_numbers(from, block, K, BLOCK_ROWS, false);
    else if (is_bf16)
        load_pairs(from, block);
    else
        load_numbers(from, block, BLOCK_ROWS, K, false);
}

INLINE void store_numbers(const block_view *view, const float *block, int outer, int inner, bool is_bf16)
{
    void *data = view->state->data;
    const int64_t stride = view->stride;
    int64_t at = view->first;
    for (int o = 0; o < outer; o++, at += stride, block += inner) {
        UNROLL
        for (int i = 0; i < inner; i += LANES) {
            if (is_bf16)
                store_bf16((uint16_t *)data + at + i, load(block + i));
            else
                store_f32((float *)data + at + i, load(block + i));
        }
    }
}

INLINE void store_pairs(const block_view *view, const float *block, bool has_nan)
{
    const int64_t stride = view->stride;
    uint16_t *row = (uint16_t *)view->state->data + view->first;
    for (int r = 0; r < BLOCK_ROWS; r++, row += stride, block += K) {
        UNROLL
        for (int k = 0; k < K; k += 2 * LANES)
            round_pairs(row + k, load(block + k), load(block + k + LANES), has_nan);
    }
}

/* `may_have_nan` is false only if the block is known to hold no NaN. */
static void store_block(const block_view *to, const float *block, bool k_first, bool may_have_nan)
{
    const bool is_bf16 = to->state->dtype == FLASH_KDA_BF16;
    if (k_first && is_bf16)
        store_numbers(to, block, K, BLOCK_ROWS, true);
    else if (k_first)
        store_numbers(to, block, K, BLOCK_ROWS, false);
    else if (is_bf16 && may_have_nan)
        store_pairs(to, block, true);
    else if (is_bf16)
        store_pairs(to, block, false);
    else
        store_numbers(to, block, BLOCK_ROWS, K, false);
}

/* ---- Rounding at random: fkda_random() and fkda_round_at_random() of rounding.h, in vectors ------------ */

enum { RANDOM_ROUNDS = 7, RANDOM_BLOCKS = K / FKDA_CHANNELS_OF_A_RANDOM_BLOCK /* of a row */ };

_Static_assert(RANDOM_BLOCKS % LANES == 0, "a row has whole vectors of random blocks");

/* What all random numbers of a call share. */
typedef struct random_source {
    uint32_t offset[2], key[RANDOM_ROUNDS][2];
} random_source;

static random_source make_random_source(const int64_t *rounding)
{
    const uint64_t seed = (uint64_t)rounding[0], offset = (uint64_t)rounding[1];
    random_source source = {.offset = {(uint32_t)offset, (uint32_t)(offset >> 32)}};
    for (uint32_t i = 0; i < RANDOM_ROUNDS; i++) {
        source.key[i][0] = (uint32_t)seed + i * 0x9e3779b9u;
        source.key[i][1] = (uint32_t)(seed >> 32) + i * 0xbb67ae85u;
    }
    return source;
}

/* The Philox rounds for LANES / 2 counters, one in the lower half of each 64-bit lane. Upper halves hold
 * anything. */
INLINE void random_rounds(const random_source *source, wide_uvec place, uint32_t place_high,
                          wide_uvec word[4])
{
    wide_uvec c0 = (wide_uvec){0} + source->offset[0], c1 = (wide_uvec){0} + source->offset[1];
    wide_uvec c2 = place, c3 = (wide_uvec){0} + place_high;
    UNROLL
    for (int i = 0; i < RANDOM_ROUNDS; i++) {
        const wide_uvec a = multiply_lower(c0, 0xd2511f53u), b = multiply_lower(c2, 0xcd9e8d57u);
        c0 = (b >> 32) ^ c1 ^ source->key[i][0];
        c2 = (a >> 32) ^ c3 ^ source->key[i][1];
        c1 = b;
        c3 = a;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
}

/* The random words of LANES places, which differ in their lower halves alone. */
INLINE void random_words(const random_source *source, uvec place, uint32_t place_high, uvec word[4])
{
    wide_uvec lower[4], upper[4];
    random_rounds(source, (wide_uvec)place, place_high, lower);
    random_rounds(source, (wide_uvec)place >> 32, place_high, upper);
    UNROLL
    for (int w = 0; w < 4; w++) word[w] = (uvec)((lower[w] & 0xffffffffu) | upper[w] << 32);
}

/* 0 to LANES - 1. */
#define LANE_NUMBER(unused_a, unused_b, i) (i)
static inline uvec lane_numbers(void)
{
    return (uvec){EACH_LANE(LANE_NUMBER, 0, 0)};
}

INLINE void store_at_random(uint16_t *to, vec x, uvec random)
{
    const uvec bits = (uvec)x;
    const uvec is_finite = (uvec)((ivec)(bits & 0x7f800000) != 0x7f800000);
    const uvec is_nan = (uvec)(x != x);
    *(bf16vec_unaligned *)to = narrow((bits + (random & is_finite)) >> 16 | (is_nan & 0x0040));
}

/* Puts the words of each place next to each other: all of the first place, then all of the second. */
#define PAIRED_LANE(first, unused, i) ((first) + (i) / 4 * 2 + (i) % 2 + (i) / 2 % 2 * FKDA_LANES)
INLINE void join_words(uvec word[4])
{
    enum { HALF = LANES / 2 };
    const vec a = (vec)word[0], b = (vec)word[1], c = (vec)word[2], d = (vec)word[3];
    const vec first = SHUFFLE(a, b, EACH_LANE(MIXED_LANE, 0, 0)),
              second = SHUFFLE(a, b, EACH_LANE(MIXED_LANE, HALF, 0)),
              third = SHUFFLE(c, d, EACH_LANE(MIXED_LANE, 0, 0)),
              fourth = SHUFFLE(c, d, EACH_LANE(MIXED_LANE, HALF, 0));
    word[0] = (uvec)SHUFFLE(first, third, EACH_LANE(PAIRED_LANE, 0, 0));
    word[1] = (uvec)SHUFFLE(first, third, EACH_LANE(PAIRED_LANE, HALF, 0));
    word[2] = (uvec)SHUFFLE(second, fourth, EACH_LANE(PAIRED_LANE, 0, 0));
    word[3] = (uvec)SHUFFLE(second, fourth, EACH_LANE(PAIRED_LANE, HALF, 0));
}

/* `place` is that of the state's number 0, from fkda_random_place(), and `v` the block's first row. The
 * places of a state differ in their lowest 11 bits alone. */
static void store_rows_at_random(const block_view *to, const float *block, const random_source *source,
                                 uint64_t place, int v)
{
    const bool is_big_endian = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__;
    uint16_t *row = (uint16_t *)to->state->data + to->first;
    for (int r = 0; r < BLOCK_ROWS; r++, row += K, block += K) {
        const uint64_t row_place = place + (uint64_t)((v + r) * RANDOM_BLOCKS);
        for (int b = 0; b < RANDOM_BLOCKS; b += LANES) {
            uvec word[4]; /* each lane has the random bits of a pair of channels */
            random_words(source, lane_numbers() + (uint32_t)(row_place + (uint64_t)b),
                         (uint32_t)(row_place >> 32), word);
            join_words(word);
            UNROLL
            for (int w = 0; w < 4; w++) {
                const int k = b * FKDA_CHANNELS_OF_A_RANDOM_BLOCK + w * 2 * LANES;
                if (is_big_endian) word[w] = word[w] << 16 | word[w] >> 16;
                round_pairs_at_random(row + k, load(block + k), load(block + k + LANES), word[w]);
            }
        }
    }
}

static void store_columns_at_random(const block_view *to, const float *block, const random_source *source,
                                    uint64_t place, int v)
{
    enum { CHANNELS = FKDA_CHANNELS_OF_A_RANDOM_BLOCK };
    uint16_t *first_channel = (uint16_t *)to->state->data + to->first;
    for (int b = 0; b < RANDOM_BLOCKS; b++) {
        for (int c = 0; c < BLOCK_ROWS; c += LANES) {
            const uint64_t first = place + (uint64_t)((v + c) * RANDOM_BLOCKS + b);
            uvec word[4];
            random_words(source, lane_numbers() * RANDOM_BLOCKS + (uint32_t)first, (uint32_t)(first >> 32),
                         word);
            UNROLL
            for (int i = 0; i < CHANNELS; i++) {
                const int k = b * CHANNELS + i;
                uvec random = word[i / 2] & 0xffffu;
                if (i % 2) random = word[i / 2] >> 16;
                store_at_random(first_channel + k * V + c, load(block + k * BLOCK_ROWS + c), random);
            }
        }
    }
}

/* Stores a block of a state after token `token` of sequence n. `rounding` is NULL, or seed and offset.
 * `may_have_nan` is false only if the block is known to hold no NaN. */
static void write_block(const block_view *to, const float *block, bool k_first, const int64_t *rounding,
                        int64_t n, int token, int64_t h, int v, bool may_have_nan)
{
    if (!rounding || to->state->dtype != FLASH_KDA_BF16) {
        store_block(to, block, k_first, may_have_nan);
        return;
    }
    const random_source source = make_random_source(rounding);
    const uint64_t place = fkda_random_place(n, token, to->state->heads, h, 0, 0);
    if (k_first)
        store_columns_at_random(to, block, &source, place, v);
    else
        store_rows_at_random(to, block, &source, place, v);
}

/* ---- A token ------------------------------------------------------------------------------------------- */

/* Of the block's rows, each decayed: the products with the key and with the query. */
static void read_rows(const float *block, const float *decay, const float *key, const float *query,
                      float by_key[BLOCK_ROWS], float by_query[BLOCK_ROWS])
{
    enum { TILE = 4 }; /* rows whose sums stay in registers together */
    for (int first = 0; first < BLOCK_ROWS; first += LANES) {
        vec key_sums[LANES], query_sums[LANES];
        for (int tile = 0; tile < LANES; tile += TILE) {
            const float *rows_of_tile = block + (first + tile) * K;
            vec a[TILE] = {{0}}, b[TILE] = {{0}};
            for (int k = 0; k < K; k += LANES) {
                const vec d = load(decay + k), x = load(key + k), y = load(query + k);
                UNROLL
                for (int r = 0; r < TILE; r++) {
                    const vec s = load(rows_of_tile + r * K + k) * d;
                    a[r] += s * x;
                    b[r] += s * y;
                }
            }
            UNROLL
            for (int r = 0; r < TILE; r++) {
                key_sums[tile + r] = a[r];
                query_sums[tile + r] = b[r];
            }
        }
        *vec_at(by_key + first) = lane_sums(key_sums);
        *vec_at(by_query + first) = lane_sums(query_sums);
    }
}

/* The same for [K][16]. Sums of every PARTS-th channel run side by side, since one sum would wait for its own
 * last addition. */
static void read_columns(const float *block, const float *decay, const float *key, const float *query,
                         float by_key[BLOCK_ROWS], float by_query[BLOCK_ROWS])
{
    enum { VECS = BLOCK_ROWS / LANES, PARTS = 4 / VECS };
    vec a[PARTS][VECS] = {{{0}}}, b[PARTS][VECS] = {{{0}}};
    for (int k = 0; k < K; k += PARTS) {
        UNROLL
        for (int part = 0; part < PARTS; part++) {
            const vec d = splat(decay[k + part]), x = splat(key[k + part]), y = splat(query[k + part]);
            UNROLL
            for (int c = 0; c < VECS; c++) {
                const vec s = load(block + (k + part) * BLOCK_ROWS + c * LANES) * d;
                a[part][c] += s * x;
                b[part][c] += s * y;
            }
        }
    }
    UNROLL
    for (int c = 0; c < VECS; c++) {
        UNROLL
        for (int part = 1; part < PARTS; part++) {
            a[0][c] += a[part][c];
            b[0][c] += b[part][c];
        }
        *vec_at(by_key + c * LANES) = a[0][c];
        *vec_at(by_query + c * LANES) = b[0][c];
    }
}

/* to = diag(decay) from + key u^T; `to` may be `from`. The functions are not inlined: decode and apply then
 * have the same instructions, and so the same bits. `decay` and `key` need not be aligned. */
__attribute__((noinline)) static void advance_rows(const float *from, const float *decay, const float *key,
                                                   const float *u, float *to)
{
    enum { TILE = 4 };
    for (int first = 0; first < BLOCK_ROWS; first += TILE) {
        vec row_u[TILE];
        UNROLL
        for (int r = 0; r < TILE; r++) row_u[r] = splat(u[first + r]);
        for (int k = 0; k < K; k += LANES) {
            const vec d = load_f32(decay + k), x = load_f32(key + k);
            UNROLL
            for (int r = 0; r < TILE; r++) {
                const int at = (first + r) * K + k;
                *vec_at(to + at) = load(from + at) * d + x * row_u[r];
            }
        }
    }
}

__attribute__((noinline)) static void advance_columns(const float *from, const float *decay, const float *key,
                                                      const float *u, float *to)
{
    enum { VECS = BLOCK_ROWS / LANES };
    vec column_u[VECS];
    UNROLL
    for (int c = 0; c < VECS; c++) column_u[c] = load_f32(u + c * LANES);
    for (int k = 0; k < K; k++) {
        const vec d = splat(decay[k]), x = splat(key[k]);
        UNROLL
        for (int c = 0; c < VECS; c++) {
            const int at = k * BLOCK_ROWS + c * LANES;
            *vec_at(to + at) = load(from + at) * d + x * column_u[c];
        }
    }
}

INLINE void advance(bool k_first, const float *from, const float *decay, const float *key, const float *u,
                    float *to)
{
    if (k_first)
        advance_columns(from, decay, key, u, to);
    else
        advance_rows(from, decay, key, u, to);
}

#endif
