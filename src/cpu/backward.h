/*
 * The backward pass on the CPU, for all value heads that share a head of q and k, of some sequences: the
 * chain rule through the chunk form of head.h, in fp32. Part of head.h, so compiled once for each instruction
 * set.
 *
 * Algorithm
 *
 * With the names of head.h, S the state before a chunk, D the gradient with respect to the state after it,
 * and dO scaled:
 *
 *     dU   = Kr D + P^T dO                    dX = (I + L)^-T dU
 *     dR   = diag(b) dX, which is also dV     db_i = dX_i . (what the state did not predict for token i)
 *     dQ~' = dO S^T      dK~' = -dR S^T       dKr = U D^T
 *     dP   = dO U^T      dL   = -dX U^T       both on and below, or below the diagonal
 *     D    = diag(2^G_last) D + Q~'^T dO - K~'^T dR        now with respect to S
 *
 * backward_chunk.h computes these products, and backward_channels.h what follows from them for q, k and g.
 *
 * A sequence is cut into stretches. The state before each stretch is kept: a first walk over the sequence
 * finds them, unless the forward pass has saved them. Then, from the last stretch to the first, a walk
 * forwards finds what each chunk needs, its state included, and a walk backwards uses it. So states are
 * computed twice, or once with `saved`, and a worker's memory grows with the square root of the sequence's
 * length, or with `saved` not at all.
 *
 * Value heads that share a head of q and k go through a stretch one after the other, and their dq and dk are
 * added up in fp32 in this order. Every sum runs in an order that does not depend on the number of threads.
 */
#ifndef FKDA_CPU_BACKWARD_H
#define FKDA_CPU_BACKWARD_H

#include "../saved.h"
#include "backward_channels.h"
#include "backward_chunk.h"
#include "decode_head.h"
#include "state.h"

/* What lasts from stretch to stretch, of one value head. */
typedef struct head_gradients {
    float state[V / STRIP][K][STRIP];  /* D */
    double bias_sums[K], rate_sums[K]; /* for ddt_bias and dA_log, of all tokens of the piece */
} __attribute__((aligned(64))) head_gradients;

typedef float border[V / STRIP][K][STRIP];

/* The memory of a worker. */
typedef struct backward {
    const fkda_bwd_problem *p;
    int64_t stretch; /* tokens */
    int64_t group;   /* value heads that share a head of q and k */
    int64_t most_borders;
    bool only_state; /* of all gradients dinitial_state alone is wanted, which needs no states */
    chunk_gradients *w;
    kept_chunk *kept;           /* of the chunks of a stretch */
    head_gradients *heads;      /* of the group */
    border *borders;            /* of each head, the states before the stretches but the first */
    float (*sums)[2][CHUNK][K]; /* dq and dk of the chunks of a stretch, of the heads so far; in groups */
} backward;

/* Divides memory from `start` on, and returns the bytes it takes. */
static size_t divide_memory(backward *b, const fkda_bwd_problem *p, int64_t stretch, char *start)
{
    const fkda_shape *s = &p->fwd.shape;
    const int64_t chunks = stretch / CHUNK;
    size_t at = 0;
    *b = (backward){.p = p, .stretch = stretch, .group = s->heads / s->qk_heads};
    b->only_state =
        !p->dq.data && !p->dk.data && !p->dv.data && !p->dg.data && !p->dbeta.data && !p->wants_parameters;
    b->most_borders = s->tokens > 0 && !p->has_saved ? (s->tokens - 1) / stretch : 0;
    const struct {
        void **to;
        size_t bytes;
    } parts[] = {
        {(void **)&b->w, sizeof *b->w},
        {(void **)&b->kept, (size_t)chunks * sizeof *b->kept},
        {(void **)&b->heads, (size_t)b->group * sizeof *b->heads},
        {(void **)&b->borders, (size_t)(b->group * b->most_borders) * sizeof *b->borders},
        {(void **)&b->sums, b->group > 1 ? (size_t)chunks * sizeof *b->sums : 0},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (start) *parts[i].to = start + at;
        at += parts[i].bytes;
    }
    return at;
}

static size_t bwd_memory(const fkda_bwd_problem *p, int64_t stretch)
{
    backward b;
    return divide_memory(&b, p, stretch, NULL);
}

static gate_constants gate_of_head(const fkda_problem *p, int64_t h)
{
    return make_gate_constants(p->A_log ? p->A_log[h] : 0.0f, p->lower_bound, CHUNK);
}

/* ---- Walks forwards ------------------------------------------------------------------------------------ */

/* Keeps U and what the state did not predict, of a strip. */
static inline void keep_writes(kept_chunk *r, int v)
{
    const scratch *s = &r->s;
    for (int c = 0; c < STRIP; c += LANES) {
        for (int i = 0; i < CHUNK; i++) {
            vec missed = load_bf16(bf16_row(r->t.v, i) + v + c) - load(s->read[i] + c);
            for (int j = 0; j < i; j++) missed -= r->keys[i][j] * load(s->u[j] + c);
            *vec_at(r->missed[i] + v + c) = missed;
            *vec_at(r->u[i] + v + c) = load(s->u[i] + c);
        }
    }
}

/* Computes a prepared chunk without its output. The state after it goes to `after`, unless that is NULL; it
 * may be the scratch's own. The kept chunk, if there is one, has the scratch. */
static void pass_chunk(const fkda_problem *p, scratch *s, const tokens *t, kept_chunk *r, strips after)
{
    for (int v = 0; v < V; v += STRIP) {
        float(*state)[STRIP] = s->state[v / STRIP];
        multiply_state(s->kq, state, s->read[0], STRIP, CHUNK);
        solve(s, t, v);
        if (r) keep_writes(r, v);
        if (!after) continue;
        float(*next)[STRIP] = after[v / STRIP];
        if (next != state) memcpy(next, state, sizeof(float[K][STRIP]));
        if (p->gate != FLASH_KDA_GATE_BOUNDED) fade_fast_channels(s, next);
        update_state(s, next);
    }
}

/* Finds the states before all stretches but the first. Returns false if the call was interrupted. */
static bool find_borders(backward *b, const fkda_sequence *sequence, int64_t h, border *borders)
{
    const fkda_problem *p = &b->p->fwd;
    const int64_t length = sequence->end - sequence->begin, last = (length - 1) / b->stretch * b->stretch;
    const gate_constants gate = gate_of_head(p, h);
    scratch *s = &b->kept[0].s;
    for (int64_t done = 0; done < last; done += CHUNK) {
        const tokens t = tokens_at(p, h, sequence, sequence->begin + done);
        if (fkda_interrupted(p)) return false;
        prepare(s, p, &t, &gate);
        pass_chunk(p, s, &t, NULL, s->state);
        const int64_t after = done + CHUNK;
        if (after % b->stretch == 0) memcpy(borders[after / b->stretch - 1], s->state, sizeof(border));
    }
    return true;
}

/* Fills the kept chunks of the stretch that begins after `begin` tokens of the sequence. The first one has
 * the state before it. */
static bool walk_forwards(backward *b, const fkda_sequence *sequence, int64_t h, int64_t begin, int64_t end)
{
    const fkda_problem *p = &b->p->fwd;
    const gate_constants gate = gate_of_head(p, h);
    for (int64_t done = begin; done < end; done += CHUNK) {
        kept_chunk *r = &b->kept[(done - begin) / CHUNK];
        if (fkda_interrupted(p)) return false;
        load_bias(p, h, &r->s);
        r->t = tokens_at(p, h, sequence, sequence->begin + done);
        if (r->t.count < CHUNK) r->t = pad(&r->s, &r->t);
        prepare_without_strengths(&r->s, p, &r->t, &gate);
        memcpy(r->keys, r->s.lower, sizeof r->keys);
        multiply_by_strengths(&r->s);
        if (!b->only_state) pass_chunk(p, &r->s, &r->t, r, done + CHUNK < end ? r[1].s.state : NULL);
    }
    return true;
}

/* ---- The walk backwards -------------------------------------------------------------------------------- */

static void store_number(const fkda_token_view *to, int64_t offset, float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (to->dtype == FLASH_KDA_F32)
        ((float *)to->data)[offset] = x;
    else
        ((uint16_t *)to->data)[offset] =
            x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* ties to even */
}

static void store_dbeta(const fkda_bwd_problem *p, const kept_chunk *r, chunk_gradients *w,
                        const chunk_place *at)
{
    float slope[CHUNK] __attribute__((aligned(64)));
    if (!p->dbeta.data) return;
    read_betas(slope, &r->t);
    for (int i = 0; i < CHUNK; i += LANES) {
        const vec x = load(slope + i) * LOG2E;
        *vec_at(slope + i) = sigmoid_exp2(x) * sigmoid_exp2(-x);
    }
    for (int i = 0; i < r->t.count; i++) {
        float factor = slope[i];
        if (p->fwd.beta_kind == FLASH_KDA_BETA_TWICE_SIGMOID) factor *= 2.0f;
        if (p->fwd.beta_kind == FLASH_KDA_BETA_ACTIVATED) factor = 1.0f;
        store_number(&p->dbeta, fkda_row_offset(&p->dbeta, at->row, at->token + i, at->h),
                     w->dbeta[i] * factor);
    }
}

/* dV is dR, and -dR is in w->y. */
static void store_dv(const fkda_bwd_problem *p, const kept_chunk *r, chunk_gradients *w,
                     const chunk_place *at)
{
    if (!p->dv.data) return;
    for (int i = 0; i < r->t.count; i++) {
        uint16_t *to = (uint16_t *)p->dv.data + fkda_row_offset(&p->dv, at->row, at->token + i, at->h);
        for (int v = 0; v < V; v += LANES) store_bf16(to + v, -load(w->y[i] + v));
    }
}

/* Stores the gradients of rows x of q or k, from those of x * scale * unit = x / sqrt(sum(x^2) + 1e-6). */
static void store_rows(const fkda_bwd_problem *p, const fkda_token_view *to, const chunk_place *at, rows x,
                       const float *scale, const float *unit, float (*gradient)[K], int count)
{
    if (!to->data) return;
    const int64_t of = fkda_qk_head(&p->fwd.shape, at->h);
    for (int i = 0; i < count; i++) {
        uint16_t *row = (uint16_t *)to->data + fkda_row_offset(to, at->row, at->token + i, of);
        if (p->fwd.qk_is_normalised) {
            for (int k = 0; k < K; k += LANES) store_bf16(row + k, load(gradient[i] + k));
            continue;
        }
        vec sum = {0};
        for (int k = 0; k < K; k += LANES)
            sum += load_bf16(bf16_row(x, i) + k) * scale[i] * unit[i] * load(gradient[i] + k);
        const float along = lane_sum(sum);
        for (int k = 0; k < K; k += LANES) {
            const vec direction = load_bf16(bf16_row(x, i) + k) * scale[i] * unit[i];
            store_bf16(row + k, (load(gradient[i] + k) - direction * along) * unit[i] * scale[i]);
        }
    }
}

static void add_parameters(head_gradients *head, const chunk_gradients *w)
{
    for (int k = 0; k < K; k++) {
        head->bias_sums[k] += (double)w->bias_sum[k];
        head->rate_sums[k] += (double)w->rate_sum[k];
    }
}

/* Goes back over the kept chunks of a stretch, of value head `index` of the group. */
static bool walk_backwards(backward *b, const fkda_sequence *sequence, int64_t qk_head, int64_t index,
                           int64_t begin, int64_t end)
{
    const fkda_bwd_problem *p = b->p;
    head_gradients *head = &b->heads[index];
    chunk_gradients *w = b->w;
    const int64_t h = qk_head * b->group + index;
    const gate_constants gate = gate_of_head(&p->fwd, h);
    for (int64_t chunk = (end - begin - 1) / CHUNK; chunk >= 0; chunk--) {
        kept_chunk *r = &b->kept[chunk];
        const scratch *s = &r->s;
        const chunk_place at = {sequence->row, sequence->begin + begin + chunk * CHUNK, h};
        float(*dq)[K] = b->group > 1 ? b->sums[chunk][0] : w->dq,
        (*dk)[K] = b->group > 1 ? b->sums[chunk][1] : w->dk;
        if (fkda_interrupted(&p->fwd)) return false;
        load_dout(p, at.row, at.token, h, r->t.count, w->y + CHUNK);
        chunk_backwards(r, w, head->state, &gate, p->fwd.gate == FLASH_KDA_GATE_BOUNDED, b->only_state);
        if (b->only_state) continue;
        channels_backwards(p, r, w, &gate, &at, index > 0, dq, dk);
        store_dv(p, r, w, &at);
        store_dbeta(p, r, w, &at);
        add_parameters(head, w);
        if (index + 1 < b->group) continue;
        store_rows(p, &p->dq, &at, r->t.q, s->scale + CHUNK, s->unit + CHUNK, dq, r->t.count);
        store_rows(p, &p->dk, &at, r->t.k, s->scale, s->unit, dk, r->t.count);
    }
    return true;
}

static bool run_sequence(backward *b, int64_t n, int64_t qk_head)
{
    const fkda_bwd_problem *p = b->p;
    const fkda_problem *f = &p->fwd;
    const fkda_sequence sequence = fkda_sequence_at(f, n);
    const int64_t length = sequence.end - sequence.begin, first = qk_head * b->group,
                  initial_slot = fkda_bwd_slot(&f->initial_state, n);
    strips start = b->kept[0].s.state;
    for (int64_t i = 0; i < b->group; i++) {
        load_state(f, &p->dfinal_state, fkda_bwd_slot(&p->dfinal_state, n), first + i, 0, V,
                   b->heads[i].state);
        if (length <= b->stretch || p->has_saved || b->only_state) continue;
        load_state(f, &f->initial_state, initial_slot, first + i, 0, V, start);
        load_bias(f, first + i, &b->kept[0].s);
        if (!find_borders(b, &sequence, first + i, b->borders + i * b->most_borders)) return false;
    }
    for (int64_t end = length; end > 0;) {
        const int64_t stretch = (end - 1) / b->stretch, begin = stretch * b->stretch;
        for (int64_t i = 0; i < b->group; i++) {
            if (b->only_state) {
                /* No chunk reads a state. */
            } else if (stretch > 0 && p->has_saved)
                copy_from_saved(fkda_saved_state(f, &sequence, begin, first + i), start);
            else if (stretch > 0)
                memcpy(start, b->borders[i * b->most_borders + stretch - 1], sizeof(border));
            else
                load_state(f, &f->initial_state, initial_slot, first + i, 0, V, start);
            if (!walk_forwards(b, &sequence, first + i, begin, end)) return false;
            if (!walk_backwards(b, &sequence, qk_head, i, begin, end)) return false;
        }
        end = begin;
    }
    for (int64_t i = 0; i < b->group; i++)
        store_state(f, &p->dinitial_state, fkda_bwd_slot(&p->dinitial_state, n), first + i, 0, V,
                    b->heads[i].state);
    return true;
}

static bool run_bwd(const fkda_bwd_problem *p, const fkda_bwd_piece *piece, int64_t stretch, void *memory)
{
    backward b;
    divide_memory(&b, p, stretch, memory);
    for (int64_t i = 0; i < b.group; i++) {
        memset(b.heads[i].bias_sums, 0, sizeof b.heads[i].bias_sums);
        memset(b.heads[i].rate_sums, 0, sizeof b.heads[i].rate_sums);
    }
    for (int64_t n = piece->first; n < piece->last; n++)
        if (!run_sequence(&b, n, piece->qk_head)) return false;
    for (int64_t i = 0; piece->sums && i < b.group; i++) {
        double *to = piece->sums + i * FKDA_BWD_SUMS, rate_sum = 0.0;
        for (int k = 0; k < K; k++) rate_sum += b.heads[i].rate_sums[k];
        memcpy(to, b.heads[i].bias_sums, sizeof b.heads[i].bias_sums);
        to[K] = rate_sum;
    }
    return true;
}

#endif
