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
 * Inside a chunk, with G the running sum of the log2 decays from the chunk's first token on:
 *
 *     L_ij = b_i k_i . (2^(G_i - G_j) k_j) for j < i      P_ij = q_i . (2^(G_i - G_j) k_j) for j <= i
 *     K~'_i = k_i 2^G_i         Q~'_i = q_i 2^G_i         Kr_j = k_j 2^(G_last - G_j)
 *     (I + L) U = diag(b) (V - K~' S)
 *     O = scale (Q~' S + P U)
 *     S = diag(2^G_last) S + Kr^T U
 *
 * L and P of bounded gates are products of two matrices (prepare.h). For unbounded gates, keys fade row by
 * row (unbounded.h).
 *
 * Chunks begin at multiples of 16 tokens of the sequence, whatever the tokens hold. So every checkpoint lies
 * between two chunks, and has the bits of the final state of a sequence that ends there.
 *
 * A token changes no bit of the tokens before it, whatever it holds: factors of a token depend on the chunk's
 * tokens up to it alone, sums over tokens run from the first token on, and of L and P only entries on and
 * below the diagonal are used. Every sum runs in an order that depends neither on the number of threads nor
 * on the range of value channels, so results do not depend on them either.
 */
#include "../checkpoints.h"
#include "../saved.h"
#include "variant.h"

#include "simd.h"

#include "chunk.h"
#include "decode_head.h"
#include "decode_layer_head.h"
#include "gate.h"
#include "prepare.h"
#include "recurrence.h"
#include "state.h"

#include "backward.h"
#include "join.h"
#include "map.h"

/* Value channels of one head of one sequence. */
typedef struct piece {
    int64_t n, h;
    int v_begin, v_end;
} piece;

/* Stores the state after `offset` tokens of the sequence into its rows of checkpoint_states. */
static void store_checkpoints(const fkda_problem *p, const int64_t *first_rows, const piece *x,
                              int64_t offset, scratch *s)
{
    int64_t column = 0, row;
    while ((row = fkda_next_checkpoint_row(p, first_rows, x->n, offset, &column)) != FKDA_NO_CHECKPOINT)
        store_state(p, &p->checkpoints.states, row, x->h, x->v_begin, x->v_end, s->state);
}

/* Saves the state after `done` tokens of the sequence for the backward pass, if one is asked for there. */
static void save_state(const fkda_problem *p, const fkda_sequence *sequence, int64_t done, const piece *x,
                       scratch *s)
{
    if (!p->saved || done % fkda_saved_interval(&p->shape) || done >= sequence->end - sequence->begin) return;
    copy_to_saved(s->state, x->v_begin, x->v_end, fkda_saved_state(p, sequence, done, x->h));
}

static void run_chunk(const fkda_problem *p, scratch *s, const piece *x, const tokens *t, const tokens *next,
                      const gate_constants *gate)
{
    const int channels = x->v_end - x->v_begin;
    prepare(s, p, t, gate);
    for (int v = x->v_begin; v < x->v_end; v += STRIP) {
        float(*state)[STRIP] = s->state[v / STRIP];
        const int done = v - x->v_begin;
        prefetch(next, CHUNK * done / channels, CHUNK * (done + STRIP) / channels);
        read_state(s, state);
        solve(s, t, v);
        write_out(s, t, v, p->scale);
        if (p->gate != FLASH_KDA_GATE_BOUNDED) fade_fast_channels(s, state);
        update_state(s, state);
    }
}

static bool run_head(const fkda_problem *p, const int64_t *first_rows, int64_t n, int64_t h, int v_begin,
                     int v_end, void *memory)
{
    scratch *s = memory;
    const piece x = {n, h, v_begin, v_end};
    load_state(p, &p->initial_state, fkda_slot_of(p, &p->initial_state, n), h, v_begin, v_end, s->state);
    load_bias(p, h, s);
    const gate_constants gate = make_gate_constants(p->A_log ? p->A_log[h] : 0.0f, p->lower_bound, CHUNK);
    const fkda_sequence sequence = fkda_sequence_at(p, n);
    const int64_t length = sequence.end - sequence.begin;
    int64_t checkpoint = fkda_next_checkpoint(p, n, length, 0);
    for (int64_t done = 0; done < length; done += CHUNK) {
        if (fkda_interrupted(p)) return false;
        const int64_t token = sequence.begin + done;
        tokens t = tokens_at(p, h, &sequence, token), next = tokens_at(p, h, &sequence, token + CHUNK);
        if (t.count < CHUNK) t = pad(s, &t);
        run_chunk(p, s, &x, &t, &next, &gate);
        save_state(p, &sequence, done + CHUNK, &x, s);
        if (done + CHUNK != checkpoint) continue;
        store_checkpoints(p, first_rows, &x, checkpoint, s);
        checkpoint = fkda_next_checkpoint(p, n, length, checkpoint);
    }
    store_state(p, &p->final_state, fkda_slot_of(p, &p->final_state, n), h, v_begin, v_end, s->state);
    return true;
}

_Static_assert(FKDA_CHECKPOINT_UNIT % CHUNK == 0, "a checkpoint lies between two chunks");

const fkda_cpu_variant FKDA_VARIANT = {
    .kernel = FKDA_KERNEL,
    .arch = FKDA_ARCH,
    .scratch_size = sizeof(scratch),
    .run_head = run_head,
    .bwd_memory = bwd_memory,
    .run_bwd = run_bwd,
    .map_memory = sizeof(map_scratch),
    .run_map = run_map,
    .join_memory = sizeof(join_scratch),
    .run_join = run_join,
    .run_layer_head = run_layer_head,
    .decode = decode,
    .apply = apply,
};
