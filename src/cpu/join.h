/* Carries the state of one head through the maps of pieces. Part of head.h.
 *
 * With matrices as they lie in memory, a step is x map + add, or map x + add with state_k_first; backwards
 * the map is transposed. Both are a product of two matrices of which one may be transposed first, so there is
 * one function for the product, whose sums run over the inner index in order.
 */
#ifndef FKDA_CPU_JOIN_H
#define FKDA_CPU_JOIN_H

#include "chunk.h"

typedef float matrix[K][K]; /* K and V are equal */

typedef struct join_scratch {
    matrix state, next, map;
} __attribute__((aligned(64))) join_scratch;

/* to = a b + add */
static void multiply_and_add(const matrix a, const matrix b, const matrix add, matrix to)
{
    for (int row = 0; row < K; row += ROWS) {
        for (int column = 0; column < K; column += COLUMNS * LANES) {
            vec sum[ROWS][COLUMNS];
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                UNROLL
                for (int c = 0; c < COLUMNS; c++) sum[r][c] = load(add[row + r] + column + c * LANES);
            }
            for (int i = 0; i < K; i++) {
                vec part[COLUMNS];
                UNROLL
                for (int c = 0; c < COLUMNS; c++) part[c] = load(b[i] + column + c * LANES);
                UNROLL
                for (int r = 0; r < ROWS; r++) {
                    const vec x = splat(a[row + r][i]);
                    UNROLL
                    for (int c = 0; c < COLUMNS; c++) sum[r][c] += x * part[c];
                }
            }
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                UNROLL
                for (int c = 0; c < COLUMNS; c++) *vec_at(to[row + r] + column + c * LANES) = sum[r][c];
            }
        }
    }
}

/* Copies a head's matrix of a slot, transposed or not. */
static void load_matrix(const fkda_state_view *from, int64_t slot, int64_t h, bool transposed, matrix to)
{
    const int64_t base = fkda_state_offset(from, slot, h);
    for (int i = 0; i < K; i += LANES) {
        for (int j = 0; j < K; j += LANES) {
            vec tile[LANES];
            for (int r = 0; r < LANES; r++) tile[r] = load_state_vec(from, base + (int64_t)(i + r) * K + j);
            if (transposed) transpose(tile);
            for (int r = 0; r < LANES; r++) *vec_at(transposed ? to[j + r] + i : to[i + r] + j) = tile[r];
        }
    }
}

static void store_matrix(const matrix from, const fkda_state_view *to, int64_t slot, int64_t h)
{
    if (to->data) memcpy((float *)to->data + fkda_state_offset(to, slot, h), from, sizeof(matrix));
}

static void run_join(const fkda_join_problem *p, int64_t h, void *memory)
{
    join_scratch *s = memory;
    if (p->initial_state.data)
        load_matrix(&p->initial_state, 0, h, false, s->state);
    else
        memset(s->state, 0, sizeof s->state);
    for (int64_t i = 0; i < p->pieces; i++) {
        const int64_t piece = p->backwards ? p->pieces - 1 - i : i;
        store_matrix(s->state, &p->entering, piece, h);
        load_matrix(&p->maps, piece, h, p->backwards, s->map);
        /* What is added has the place of the sum. */
        load_matrix(&p->states, piece, h, false, s->next);
        if (p->state_k_first)
            multiply_and_add(s->map, s->state, s->next, s->next);
        else
            multiply_and_add(s->state, s->map, s->next, s->next);
        memcpy(s->state, s->next, sizeof s->state);
    }
    store_matrix(s->state, &p->final_state, 0, h);
}

#endif
