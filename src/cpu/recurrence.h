/* The part of a chunk that needs the state, for the value channels of a strip: what is read from the state,
 * what is written into it, and the output. Part of head.h. */
#ifndef FKDA_CPU_RECURRENCE_H
#define FKDA_CPU_RECURRENCE_H

#include "chunk.h"

/* Rows 0 to count - 1 of `to`, which are `stride` floats apart, become those of `a` times the state. */
INLINE void multiply_state(float (*a)[K], float (*state)[STRIP], float *to, int stride, int count)
{
    for (int row = 0; row < count; row += ROWS) {
        vec sum[ROWS][COLUMNS] = {{{0}}};
        const float *column = a[row]; /* one pointer for all rows, for which GCC would have ROWS */
        for (int k = 0; k < K; k++, column++) {
            vec part[COLUMNS];
            UNROLL
            for (int c = 0; c < COLUMNS; c++) part[c] = load(state[k] + c * LANES);
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                vec x = splat(column[r * K]);
                UNROLL
                for (int c = 0; c < COLUMNS; c++) sum[r][c] += x * part[c];
            }
        }
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            UNROLL
            for (int c = 0; c < COLUMNS; c++) *vec_at(to + (row + r) * stride + c * LANES) = sum[r][c];
        }
    }
}

/* read = [K~'; Q~'] S */
static inline void read_state(scratch *s, float (*state)[STRIP])
{
    multiply_state(s->kq, state, s->read[0], STRIP, 2 * CHUNK);
}

/* u = (I + L)^-1 diag(b) (v - K~' S) by forward substitution, in strips of ROWS rows. */
static inline void solve(scratch *s, const tokens *t, int64_t v)
{
    for (int row = 0; row < CHUNK; row += ROWS) {
        for (int c = 0; c < STRIP; c += LANES) {
            vec u[ROWS];
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                vec value = load_bf16(bf16_row(t->v, row + r) + v + c);
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

/* Lets the channels fade that forget more than half in a chunk of unbounded gates. */
static inline void fade_fast_channels(const scratch *s, float (*state)[STRIP])
{
    for (int k = 0; k < K; k++) {
        const float factor = s->factor[k];
        if (factor == 1.0f) continue;
        for (int c = 0; c < STRIP; c += LANES) *vec_at(state[k] + c) *= factor;
    }
}

/* S = diag(1 + decay_1) S + a^T y, for `count` rows of `a` and of `y`, which are `stride` floats apart. */
INLINE void decay_and_add(const float *decay_1, float (*a)[K], const float *y, int stride, int count,
                          float (*state)[STRIP])
{
    for (int k = 0; k < K; k += ROWS) {
        vec sum[ROWS][COLUMNS];
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            UNROLL
            for (int c = 0; c < COLUMNS; c++) {
                vec old = load(state[k + r] + c * LANES);
                sum[r][c] = decay_1[k + r] * old + old;
            }
        }
        const float *row = a[0] + k;
        for (int i = 0; i < count; i++, row += K) {
            vec part[COLUMNS];
            UNROLL
            for (int c = 0; c < COLUMNS; c++) part[c] = load(y + i * stride + c * LANES);
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                vec x = splat(row[r]);
                UNROLL
                for (int c = 0; c < COLUMNS; c++) sum[r][c] += x * part[c];
            }
        }
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            UNROLL
            for (int c = 0; c < COLUMNS; c++) *vec_at(state[k + r] + c * LANES) = sum[r][c];
        }
    }
}

/* S = diag(1 + decay_1) S + Kr^T u */
static inline void update_state(scratch *s, float (*state)[STRIP])
{
    decay_and_add(s->decay_1, s->kr, s->u[0], STRIP, CHUNK, state);
}

#endif
