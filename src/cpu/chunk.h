/* What the forward pass of a head works on: its scratch memory, and the tokens of a chunk. Part of head.h. */
#ifndef FKDA_CPU_CHUNK_H
#define FKDA_CPU_CHUNK_H

#include <stddef.h>
#include <string.h>

#include "../problem.h"
#include "simd.h"

enum {
    K = FKDA_DIM,
    V = FKDA_DIM,
    CHUNK = 16,
    ROWS = FKDA_ROWS,       /* of a register tile */
    COLUMNS = 2,            /* vectors of a row of a register tile */
    STRIP = COLUMNS * LANES /* value channels that advance together */
};

typedef struct scratch {
    float kq[2 * CHUNK][K];       /* K~ and Q~, then K~' and Q~' */
    float kr[CHUNK][K];           /* K^, then Kr */
    float lower[CHUNK][CHUNK];    /* L */
    float mix[CHUNK][CHUNK];      /* P; entries above the diagonal mean nothing */
    float read[2 * CHUNK][STRIP]; /* K~' S and Q~' S */
    float u[CHUNK][STRIP];
    float to_last[K]; /* 2^(G_last + c), of bounded gates */
    /* 2^G_last - 1. The decay of a slow channel, rounded to fp32 itself, would be wrong by the same amount
     * chunk after chunk. */
    float decay_1[K];
    float bias[K];
    float scale[2 * CHUNK], unit[2 * CHUNK]; /* their products are 1 / |k_i| and 1 / |q_i| */
    float write[CHUNK];                      /* b */
    float state[V / STRIP][K][STRIP];
    /* Of unbounded gates: 2^G_last of a channel that forgets more than half, whose decay_1 is 0, as 2^G_last
     * - 1 would lose what is left. 1 for other channels. */
    float factor[K];
    float decay[CHUNK][K]; /* 2^g_i, of unbounded gates */
    /* The last tokens of a sequence, with rows of zeros after them that fill the chunk. padded_g and
     * padded_beta have the type of g and beta. */
    uint16_t padded_q[CHUNK][K], padded_k[CHUNK][K], padded_v[CHUNK][V];
    float padded_g[CHUNK][K], padded_beta[CHUNK];
} __attribute__((aligned(64))) scratch;

_Static_assert(offsetof(scratch, state) % 64 == 0, "vectors are read and written aligned");

/* Rows of one tensor and one head. */
typedef struct rows {
    const void *first;
    int64_t stride; /* elements from one token to the next */
} rows;

static inline const uint16_t *bf16_row(rows r, int i)
{
    return (const uint16_t *)r.first + i * r.stride;
}

static inline const float *f32_row(rows r, int i)
{
    return (const float *)r.first + i * r.stride;
}

/* The tokens of a chunk, of one head. */
typedef struct tokens {
    rows q, k, g, v, beta;
    bool g_is_f32, beta_is_f32; /* else bf16, as the others */
    uint16_t *out;
    int64_t out_stride;
    int count; /* tokens that exist; rows after them are zeros */
} tokens;

static rows rows_of(const fkda_token_view *t, int64_t row, int64_t token, int64_t h)
{
    const int64_t offset = fkda_row_offset(t, row, token, h);
    if (t->dtype == FLASH_KDA_F32) return (rows){(const float *)t->data + offset, t->token_stride};
    return (rows){(const uint16_t *)t->data + offset, t->token_stride};
}

/* The chunk of a sequence that begins at a token, or what is left of the sequence there, which may be
 * nothing. */
static tokens tokens_at(const fkda_problem *p, int64_t h, const fkda_sequence *sequence, int64_t token)
{
    const int64_t left = sequence->end - token, row = sequence->row, qk_head = fkda_qk_head(&p->shape, h);
    if (left <= 0) return (tokens){0};
    return (tokens){
        .q = rows_of(&p->q, row, token, qk_head),
        .k = rows_of(&p->k, row, token, qk_head),
        .g = rows_of(&p->g, row, token, h),
        .v = rows_of(&p->v, row, token, h),
        .beta = rows_of(&p->beta, row, token, h),
        .g_is_f32 = p->g.dtype == FLASH_KDA_F32,
        .beta_is_f32 = p->beta.dtype == FLASH_KDA_F32,
        .out = p->out.data ? (uint16_t *)p->out.data + fkda_row_offset(&p->out, row, token, h) : NULL,
        .out_stride = p->out.token_stride,
        .count = left < CHUNK ? (int)left : CHUNK,
    };
}

static rows pad_bf16(uint16_t *to, rows from, int width, int count)
{
    memset(to, 0, (size_t)(CHUNK * width) * sizeof *to);
    for (int i = 0; i < count; i++) memcpy(to + i * width, bf16_row(from, i), (size_t)width * sizeof *to);
    return (rows){to, width};
}

static rows pad_f32(float *to, rows from, int width, int count)
{
    memset(to, 0, (size_t)(CHUNK * width) * sizeof *to);
    for (int i = 0; i < count; i++) memcpy(to + i * width, f32_row(from, i), (size_t)width * sizeof *to);
    return (rows){to, width};
}

static rows pad_either(float *to, rows from, int width, int count, bool is_f32)
{
    return is_f32 ? pad_f32(to, from, width, count) : pad_bf16((uint16_t *)to, from, width, count);
}

/* The last tokens of a sequence with rows of zeros after them, so that nothing past the end is read. */
static tokens pad(scratch *s, const tokens *t)
{
    tokens padded = *t;
    padded.q = pad_bf16(s->padded_q[0], t->q, K, t->count);
    padded.k = pad_bf16(s->padded_k[0], t->k, K, t->count);
    padded.v = pad_bf16(s->padded_v[0], t->v, V, t->count);
    padded.g = pad_either(s->padded_g[0], t->g, K, t->count, t->g_is_f32);
    padded.beta = pad_either(s->padded_beta, t->beta, 1, t->count, t->beta_is_f32);
    return padded;
}

INLINE void prefetch_row(const void *row, int bytes)
{
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)row + at, 0, 2);
}

/* Asks for rows of the next chunk. With many heads the rows of a head lie too far apart for the CPU to guess.
 * The function must be inlined: GCC takes a function that only prefetches for one without effect, and drops
 * the call. */
INLINE void prefetch(const tokens *t, int first, int last)
{
    enum { BF16_ROW = K * sizeof(uint16_t), F32_ROW = K * sizeof(float) };
    for (int i = first; i < last && i < t->count; i++) {
        prefetch_row(bf16_row(t->k, i), BF16_ROW);
        prefetch_row(bf16_row(t->q, i), BF16_ROW);
        prefetch_row(bf16_row(t->v, i), BF16_ROW);
        if (t->g_is_f32)
            prefetch_row(f32_row(t->g, i), F32_ROW);
        else
            prefetch_row(bf16_row(t->g, i), BF16_ROW);
    }
}

#endif
