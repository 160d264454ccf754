/* The backward pass of one chunk, channel by channel of K: gradients of keys, queries and gates. Part of
 * backward.h.
 *
 * Algorithm
 *
 * With F_ij = 2^(G_i - G_j), the decay of a channel between the writing of token j and the reading of token
 * i, and E_i = 2^G_i, the one since the chunk's start (E_last of the whole chunk):
 *
 *     z_ij = dP_ij q_i + b_i dL_ij k_i                   what reading a unit of k_j by token i is worth
 *     dq_i = E_i dQ~'_i + sum over j <= i of F_ij dP_ij k_j
 *     dk_i = E_i dK~'_i + sum over j < i of F_ij b_i dL_ij k_j            as a reader
 *          + F_last,i dKr_i + sum over j >= i of F_ji z_ji                as a writer
 *
 * The gate of token t acts on all that is written before it and read by it or later. So its gradient is a sum
 * of such pairs, in which the state before the chunk is a writer and the state after it a reader:
 *
 *     dg_t = sum over j < t <= i of F_ij z_ij k_j
 *          + sum over i >= t of E_i (q_i dQ~'_i + k_i dK~'_i)
 *          + sum over j < t of F_last,j k_j dKr_j
 *          + E_last (sum over V of S D)
 *
 * The other way to write it, a difference of running sums over q dq + k dk, would lose slow channels, whose
 * sums of large terms cancel, and would leave rounding errors where a gate forgets everything. Here every
 * term has the factor 2^g_t, and nothing is subtracted. The sums over j run along with the pairs: a reader i
 * adds the writers before it one by one, and what it has so far is its part of the next token's dg.
 *
 * Decays are products of the decays of single tokens, at most 1, so no gate leaves the range of fp32. */
#ifndef FKDA_CPU_BACKWARD_CHANNELS_H
#define FKDA_CPU_BACKWARD_CHANNELS_H

#include "backward_chunk.h"
#include "gate.h"

/* The decays of a vector of channels of a chunk, and derivatives of their natural logarithms. */
typedef struct channel_gates {
    vec decay[CHUNK];
    vec by_g[CHUNK];     /* with respect to g + dt_bias */
    vec by_A_log[CHUNK]; /* means nothing with the activated gate */
} channel_gates;

/* x where it is within [-most, most], and else that end. */
static inline vec clamp_to(vec x, float most)
{
    x = choose(x > most, splat(most), x);
    return choose(x < -most, splat(-most), x);
}

/* The exponent of the decay, as gate.h has it, and the derivatives. 2^-125 stands for all smaller sigmoids,
 * so that products with infinite arguments are 0 and not NaN. */
static inline vec differentiate(const fkda_problem *p, const gate_constants *gate, vec g, vec bias, vec *by_g,
                                vec *by_A_log)
{
    if (p->gate == FLASH_KDA_GATE_BOUNDED) {
        const vec x = (g + bias) * gate->slope, inside = clamp_to(x, 125.0f),
                  slope = p->lower_bound * sigmoid_exp2(x) * sigmoid_exp2(-x);
        *by_g = slope * gate->rate;
        *by_A_log = slope * inside * (-1.0f / LOG2E);
        return bounded_gate(gate, g, bias);
    }
    if (p->gate == FLASH_KDA_GATE_SOFTPLUS) {
        const vec exponent = softplus_gate(gate, g, bias);
        *by_g = -gate->rate * sigmoid_exp2((g + bias) * -LOG2E);
        *by_A_log = clamp_to(exponent, 0x1p100f) * (1.0f / LOG2E);
        return exponent;
    }
    *by_g = splat(1.0f);
    *by_A_log = (vec){0};
    return activated_gate(g);
}

static inline void load_gates(const fkda_problem *p, const kept_chunk *r, const gate_constants *gate, int k,
                              channel_gates *to)
{
    const vec bias = load(r->s.bias + k);
    for (int i = 0; i < CHUNK; i++) {
        to->decay[i] = splat(1.0f);
        if (i >= r->t.count) continue;
        const vec g = load_gate(&r->t, i, k, r->t.g_is_f32);
        to->decay[i] = exp2_at_most_1(differentiate(p, gate, g, bias, &to->by_g[i], &to->by_A_log[i]));
    }
}

/* to[i] becomes column `first` + i of LANES rows of `width` numbers from row k on. */
INLINE void load_columns(const float *from, int width, int first, int k, vec *to)
{
    for (int at = 0; at < CHUNK; at += LANES) {
        UNROLL
        for (int r = 0; r < LANES; r++) to[at + r] = load(from + (k + r) * width + first + at);
        transpose(to + at);
    }
}

/* The gradients of a vector of channels with respect to the log decays. dq and dk are stored, or added to
 * what another head has stored. */
static inline void pair_tokens(const kept_chunk *r, const chunk_gradients *w, const channel_gates *gates,
                               int k, bool add, float (*dq)[K], float (*dk)[K], vec dg[CHUNK])
{
    const scratch *s = &r->s;
    vec key[CHUNK], query[CHUNK], fade[CHUNK]; /* F_ij of the reader i */
    vec d_read_k[CHUNK], d_read_q[CHUNK], d_write[CHUNK], reader_dk[CHUNK], writer_dk[CHUNK];
    load_columns(w->by_state[0], 2 * CHUNK, 0, k, d_read_k);
    load_columns(w->by_state[0], 2 * CHUNK, CHUNK, k, d_read_q);
    load_columns(w->by_gradient[0], CHUNK, 0, k, d_write);
    vec since_start = splat(1.0f);
    for (int i = 0; i < CHUNK; i++) {
        const vec decay = gates->decay[i], ki = load_key(s, &r->t, i, k), qi = load_query(s, &r->t, i, k);
        since_start *= decay;
        const vec from_state_k = since_start * d_read_k[i], from_state_q = since_start * d_read_q[i];
        vec dqi = from_state_q + w->d_mix[i][i] * ki, dki = from_state_k,
            sum = ki * from_state_k + qi * from_state_q;
        dg[i] = (vec){0};
        dg[0] += sum;
        for (int j = 0; j < i; j++) {
            const float d_mix = w->d_mix[i][j], d_keys = w->d_keys[i][j];
            const vec f = fade[j] * decay, faded = f * key[j], worth = (d_mix * qi + d_keys * ki) * f;
            fade[j] = f;
            dqi += d_mix * faded;
            dki += d_keys * faded;
            writer_dk[j] += worth;
            sum += worth * key[j];
            dg[j + 1] += sum;
        }
        fade[i] = splat(1.0f);
        key[i] = ki;
        query[i] = dqi;
        reader_dk[i] = dki;
        writer_dk[i] = w->d_mix[i][i] * qi;
    }
    vec sum = since_start * load(w->kept + k);
    dg[0] += sum;
    for (int j = 0; j < CHUNK; j++) {
        const vec to_end = fade[j] * d_write[j];
        writer_dk[j] += to_end;
        sum += key[j] * to_end;
        if (j + 1 < CHUNK) dg[j + 1] += sum;
    }
    for (int i = 0; i < CHUNK; i++) {
        const vec before_q = add ? load(dq[i] + k) : (vec){0}, before_k = add ? load(dk[i] + k) : (vec){0};
        *vec_at(dq[i] + k) = before_q + query[i];
        *vec_at(dk[i] + k) = before_k + (reader_dk[i] + writer_dk[i]);
    }
}

/* Where the gradients of a chunk of one head go: the place of its first token. */
typedef struct chunk_place {
    int64_t row, token, h;
} chunk_place;

static inline void store_dg(const fkda_bwd_problem *p, const chunk_place *at, int i, int k, vec x)
{
    if (!p->dg.data) return;
    const int64_t offset = fkda_row_offset(&p->dg, at->row, at->token + i, at->h) + k;
    if (p->dg.dtype == FLASH_KDA_F32)
        store_f32((float *)p->dg.data + offset, x);
    else
        store_bf16((uint16_t *)p->dg.data + offset, x);
}

/* From what chunk_backwards() left in w to the gradients of g, and of q and k before their norms. */
static void channels_backwards(const fkda_bwd_problem *p, const kept_chunk *r, chunk_gradients *w,
                               const gate_constants *gate, const chunk_place *at, bool add, float (*dq)[K],
                               float (*dk)[K])
{
    for (int k = 0; k < K; k += LANES) {
        channel_gates gates;
        vec dg[CHUNK], bias_sum = {0}, rate_sum = {0};
        load_gates(&p->fwd, r, gate, k, &gates);
        pair_tokens(r, w, &gates, k, add, dq, dk, dg);
        for (int i = 0; i < r->t.count; i++) rate_sum += dg[i] * gates.by_A_log[i];
        for (int i = 0; i < r->t.count; i++) dg[i] *= gates.by_g[i];
        /* A loop of its own, so that the sum has the same bits whether dg is wanted or not: the compiler
         * would fuse the product above with one addition and not with the other. */
        for (int i = 0; i < r->t.count; i++) bias_sum += dg[i];
        for (int i = 0; i < r->t.count; i++) store_dg(p, at, i, k, dg[i]);
        *vec_at(w->bias_sum + k) = bias_sum;
        *vec_at(w->rate_sum + k) = rate_sum;
    }
}

#endif
