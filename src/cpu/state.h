/* States between memory and the scratch. In memory a state is [V, K], or [K, V] with state_k_first, of bf16
 * or fp32. The scratch has it as [V / STRIP][K][STRIP]. Part of head.h. */
#ifndef FKDA_CPU_STATE_H
#define FKDA_CPU_STATE_H

#include "chunk.h"

static inline vec load_state_vec(const fkda_state_view *from, int64_t at)
{
    return from->dtype == FLASH_KDA_BF16 ? load_bf16((const uint16_t *)from->data + at)
                                         : load_f32((const float *)from->data + at);
}

static inline void store_state_vec(const fkda_state_view *to, int64_t at, vec x)
{
    if (to->dtype == FLASH_KDA_BF16)
        store_bf16((uint16_t *)to->data + at, x);
    else
        store_f32((float *)to->data + at, x);
}

/* Value channels v_begin to v_end - 1 of the state of one head in a slot, or zeros for FKDA_NO_SLOT. */
static void load_state(const fkda_problem *p, const fkda_state_view *from, int64_t slot, int64_t h,
                       int v_begin, int v_end, float (*state)[K][STRIP])
{
    if (slot == FKDA_NO_SLOT) {
        memset(state, 0, sizeof(float[V / STRIP][K][STRIP]));
        return;
    }
    const int64_t base = fkda_state_offset(from, slot, h);
    for (int v = v_begin; v < v_end; v += LANES) {
        for (int k = 0; k < K; k += LANES) {
            const int64_t at = base + (p->state_k_first ? (int64_t)k * V + v : (int64_t)v * K + k);
            vec tile[LANES];
            for (int i = 0; i < LANES; i++) tile[i] = load_state_vec(from, at + i * FKDA_DIM);
            if (!p->state_k_first) transpose(tile);
            for (int i = 0; i < LANES; i++) *vec_at(state[v / STRIP][k + i] + v % STRIP) = tile[i];
        }
    }
}

static void store_state(const fkda_problem *p, const fkda_state_view *to, int64_t slot, int64_t h,
                        int v_begin, int v_end, float (*state)[K][STRIP])
{
    if (slot == FKDA_NO_SLOT) return;
    const int64_t base = fkda_state_offset(to, slot, h);
    for (int v = v_begin; v < v_end; v += LANES) {
        for (int k = 0; k < K; k += LANES) {
            const int64_t at = base + (p->state_k_first ? (int64_t)k * V + v : (int64_t)v * K + k);
            vec tile[LANES];
            for (int i = 0; i < LANES; i++) tile[i] = load(state[v / STRIP][k + i] + v % STRIP);
            if (!p->state_k_first) transpose(tile);
            for (int i = 0; i < LANES; i++) store_state_vec(to, at + i * FKDA_DIM, tile[i]);
        }
    }
}

/* Copy value channels of a state to what is saved for the backward pass, [K, V] (saved.h), and back. */
static inline void copy_to_saved(float (*state)[K][STRIP], int v_begin, int v_end, float *to)
{
    for (int v = v_begin; v < v_end; v += STRIP)
        for (int k = 0; k < K; k++) memcpy(to + k * V + v, state[v / STRIP][k], sizeof(float[STRIP]));
}

static inline void copy_from_saved(const float *from, float (*state)[K][STRIP])
{
    for (int v = 0; v < V; v += STRIP)
        for (int k = 0; k < K; k++) memcpy(state[v / STRIP][k], from + k * V + v, sizeof(float[STRIP]));
}

#endif
