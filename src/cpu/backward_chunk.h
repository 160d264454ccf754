/* The backward pass of one chunk, as far as the state takes part: what is multiplied by the state S before
 * the chunk, and by D, the gradient with respect to the state after it. Part of backward.h, which has the
 * formulas. */
#ifndef FKDA_CPU_BACKWARD_CHUNK_H
#define FKDA_CPU_BACKWARD_CHUNK_H

#include "chunk.h"
#include "prepare.h"
#include "recurrence.h"

/* A chunk of a stretch, as the walk forwards leaves it for the walk backwards. */
typedef struct kept_chunk {
    scratch s;                           /* prepared; its state is the one before the chunk */
    float keys[CHUNK][CHUNK];            /* L without the factors b_i */
    float u[CHUNK][V], missed[CHUNK][V]; /* U, and what the state did not predict: u_i = b_i missed_i */
    tokens t;
} __attribute__((aligned(64))) kept_chunk;

/* What the backward pass of a chunk computes with. */
typedef struct chunk_gradients {
    float y[2 * CHUNK][V];        /* -dR, then scale dO */
    float dx[CHUNK][V];           /* dU, then dX */
    float columns[V][2 * CHUNK];  /* y, transposed */
    float u_columns[V][CHUNK];    /* U, transposed */
    float by_state[K][2 * CHUNK]; /* S y^T, so dK~' and dQ~' transposed */
    float by_gradient[K][CHUNK];  /* D U^T, so dKr transposed */
    float kept[K];                /* the sum over V of S D */
    float d_keys[CHUNK][CHUNK];   /* dL with the factors b_i */
    float d_mix[CHUNK][CHUNK];    /* dP */
    float dq[CHUNK][K], dk[CHUNK][K];
    float dbeta[CHUNK];
    float bias_sum[K], rate_sum[K]; /* sums over the chunk's tokens, for ddt_bias and dA_log */
} __attribute__((aligned(64))) chunk_gradients;

/* The strips of a state. */
typedef float (*strips)[K][STRIP];

/* Reads rows of 128 numbers of bf16 into y, multiplied by a factor. Rows without a token become zeros. */
static inline void load_dout(const fkda_bwd_problem *p, int64_t row, int64_t token, int64_t h, int count,
                             float (*to)[V])
{
    if (!p->dout.data) count = 0;
    for (int i = 0; i < count; i++) {
        const uint16_t *from = (const uint16_t *)p->dout.data + fkda_row_offset(&p->dout, row, token + i, h);
        for (int v = 0; v < V; v += LANES) *vec_at(to[i] + v) = p->fwd.scale * load_bf16(from + v);
    }
    memset(to[count], 0, (size_t)(CHUNK - count) * sizeof *to);
}

/* dX = (I + L)^-T (dU + P^T scale dO), from the last token to the first, and -dR = -diag(b) dX. */
static inline void solve_backwards(const kept_chunk *r, chunk_gradients *w)
{
    for (int v = 0; v < V; v += LANES) {
        for (int i = CHUNK - 1; i >= 0; i--) {
            vec sum = load(w->dx[i] + v);
            for (int j = i; j < CHUNK; j++) sum += r->s.mix[j][i] * load(w->y[CHUNK + j] + v);
            for (int j = i + 1; j < CHUNK; j++) sum -= r->s.lower[j][i] * load(w->dx[j] + v);
            *vec_at(w->dx[i] + v) = sum;
            *vec_at(w->y[i] + v) = -r->s.write[i] * sum;
        }
    }
}

/* to[v][i] = from[i][v] for `count` rows. */
INLINE void transpose_rows(float (*from)[V], float *to, int count)
{
    for (int i = 0; i < count; i += LANES) {
        for (int v = 0; v < V; v += LANES) {
            vec tile[LANES];
            UNROLL
            for (int r = 0; r < LANES; r++) tile[r] = load(from[i + r] + v);
            transpose(tile);
            UNROLL
            for (int r = 0; r < LANES; r++) *vec_at(to + (v + r) * count + i) = tile[r];
        }
    }
}

/* to[k][i] = sum over v of state[k][v] x[v][i], for `width` columns i. `height` and `columns` are the size of
 * a register tile, in rows of the state and vectors of x. */
INLINE void multiply_columns(strips state, const float *x, int width, float *to, int height, int columns)
{
    for (int at = 0; at < width; at += columns * LANES) {
        for (int k = 0; k < K; k += height) {
            vec sum[2 * ROWS][COLUMNS] = {{{0}}};
            for (int strip = 0; strip < V / STRIP; strip++) {
                const float *column = state[strip][k];
                for (int v = 0; v < STRIP; v++, column++) {
                    vec part[COLUMNS];
                    UNROLL
                    for (int c = 0; c < columns; c++)
                        part[c] = load(x + (strip * STRIP + v) * width + at + c * LANES);
                    UNROLL
                    for (int r = 0; r < height; r++) {
                        const vec factor = splat(column[r * STRIP]);
                        UNROLL
                        for (int c = 0; c < columns; c++) sum[r][c] += factor * part[c];
                    }
                }
            }
            UNROLL
            for (int r = 0; r < height; r++) {
                UNROLL
                for (int c = 0; c < columns; c++) *vec_at(to + (k + r) * width + at + c * LANES) = sum[r][c];
            }
        }
    }
}

/* kept[k] = sum over v of S[k][v] D[k][v] */
static inline void multiply_states(strips S, strips D, float kept[K])
{
    for (int k = 0; k < K; k += LANES) {
        vec sums[LANES] = {{0}};
        for (int strip = 0; strip < V / STRIP; strip++) {
            UNROLL
            for (int r = 0; r < LANES; r++) {
                UNROLL
                for (int c = 0; c < COLUMNS; c++)
                    sums[r] += load(S[strip][k + r] + c * LANES) * load(D[strip][k + r] + c * LANES);
            }
        }
        *vec_at(kept + k) = lane_sums(sums);
    }
}

/* The sums of e_i . x_i over 128 channels. */
static inline void row_products(float (*e)[V], float (*x)[V], float to[CHUNK])
{
    for (int i = 0; i < CHUNK; i += LANES) {
        vec sums[LANES] = {{0}};
        for (int v = 0; v < V; v += LANES) {
            UNROLL
            for (int r = 0; r < LANES; r++) sums[r] += load(e[i + r] + v) * load(x[i + r] + v);
        }
        *vec_at(to + i) = lane_sums(sums);
    }
}

/* Lets channels of bounded gates that forget more than half have a factor, as those of unbounded gates have
 * it. The forward pass needs none, since what its chunk writes outweighs what 2^G_last - 1 loses of them.
 * Going back, there may be nothing else. */
static inline void find_factors(scratch *s, const gate_constants *gate)
{
    for (int k = 0; k < K; k += LANES) {
        const vec decay = load(s->to_last + k) * gate->down;
        const ivec is_slow = decay > 0.5f;
        *vec_at(s->factor + k) = choose(is_slow, splat(1.0f), decay);
        *vec_at(s->decay_1 + k) = choose(is_slow, load(s->decay_1 + k), splat(0.0f));
    }
}

/* What the channels of K still need of a chunk is left in w. D is the gradient after it. */
static inline void multiply_for_inputs(kept_chunk *r, chunk_gradients *w, strips D)
{
    enum { ONE = CHUNK / LANES < COLUMNS ? 1 : COLUMNS, TALL = ONE < COLUMNS ? 2 * ROWS : ROWS };
    scratch *s = &r->s;
    row_products(w->dx, r->missed, w->dbeta);
    lower_products(w->y, r->u, w->d_keys);
    lower_products(w->y + CHUNK, r->u, w->d_mix);
    transpose_rows(w->y, w->columns[0], 2 * CHUNK);
    transpose_rows(r->u, w->u_columns[0], CHUNK);
    multiply_columns(s->state, w->columns[0], 2 * CHUNK, w->by_state[0], ROWS, COLUMNS);
    multiply_columns(D, w->u_columns[0], CHUNK, w->by_gradient[0], TALL, ONE);
    multiply_states(s->state, D, w->kept);
}

/* Goes back over a chunk: D becomes the gradient with respect to the state before it. That depends neither on
 * states nor on values, so a call that wants no other gradient has only_state, and the chunk then needs no
 * state. */
static void chunk_backwards(kept_chunk *r, chunk_gradients *w, strips D, const gate_constants *gate,
                            bool is_bounded, bool only_state)
{
    scratch *s = &r->s;
    for (int v = 0; v < V; v += STRIP) multiply_state(s->kr, D[v / STRIP], &w->dx[0][v], V, CHUNK);
    solve_backwards(r, w);
    if (!only_state) multiply_for_inputs(r, w, D);
    if (is_bounded) find_factors(s, gate);
    for (int v = 0; v < V; v += STRIP) {
        fade_fast_channels(s, D[v / STRIP]);
        decay_and_add(s->decay_1, s->kq, &w->y[0][v], V, 2 * CHUNK, D[v / STRIP]);
    }
}

#endif
