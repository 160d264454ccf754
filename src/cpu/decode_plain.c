/* A plain version of decode and apply, one head after the other, until the vector code is there. */
#include <math.h>
#include <string.h>

#include "../../kernels/decode/rounding.h"
#include "../errors.h"
#include "cpu.h"

enum { K = FKDA_DIM, V = FKDA_DIM };

static float bf16(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static float value_at(const void *data, int32_t dtype, int64_t i)
{
    return dtype == FLASH_KDA_F32 ? ((const float *)data)[i] : bf16(((const uint16_t *)data)[i]);
}

static uint16_t nearest(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (isnan(x)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static int64_t place(const fkda_state_view *s, int64_t slot, int64_t h, bool k_first, int v, int k)
{
    return fkda_state_offset(s, slot, h) + (k_first ? k * V + v : v * K + k);
}

static void load(const fkda_state_view *s, int64_t slot, int64_t h, bool k_first, float S[V][K])
{
    for (int v = 0; v < V; v++)
        for (int k = 0; k < K; k++) S[v][k] = value_at(s->data, s->dtype, place(s, slot, h, k_first, v, k));
}

static void store(const fkda_state_view *s, int64_t slot, int64_t h, bool k_first, float S[V][K],
                  const int64_t *rounding, int64_t n, int token)
{
    if (slot == FKDA_NO_SLOT) return;
    for (int v = 0; v < V; v++)
        for (int k = 0; k < K; k++) {
            const int64_t at = place(s, slot, h, k_first, v, k);
            if (s->dtype == FLASH_KDA_F32) {
                ((float *)s->data)[at] = S[v][k];
            } else if (rounding) {
                const fkda_random_block block =
                    fkda_random((uint64_t)rounding[0], (uint64_t)rounding[1],
                                fkda_random_place(n, token, s->heads, h, v, k / 8));
                uint32_t bits;
                memcpy(&bits, &S[v][k], sizeof bits);
                ((uint16_t *)s->data)[at] = fkda_round_at_random(bits, fkda_random_bits(&block, k % 8));
            } else {
                ((uint16_t *)s->data)[at] = nearest(S[v][k]);
            }
        }
}

static void update(float S[V][K], const float *decay, const float *k, const float *u)
{
    for (int v = 0; v < V; v++)
        for (int i = 0; i < K; i++) S[v][i] = decay[i] * S[v][i] + k[i] * u[v];
}

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

static float decay_of(const fkda_decode_problem *p, int64_t h, int i, double g)
{
    const double A = p->A_log ? p->A_log[h] : 0.0, x = g + (p->dt_bias ? p->dt_bias[h * K + i] : 0.0);
    switch (p->gate) {
    case FLASH_KDA_GATE_BOUNDED: return (float)exp(p->lower_bound * sigmoid(exp(A) * x));
    case FLASH_KDA_GATE_SOFTPLUS: return (float)exp(-exp(A) * (x > 0 ? x + log1p(exp(-x)) : log1p(exp(x))));
    default: return (float)exp(g);
    }
}

static void unit(const fkda_decode_problem *p, const fkda_token_view *t, int64_t at, float *to)
{
    float sum = 0;
    for (int i = 0; i < K; i++) to[i] = value_at(t->data, t->dtype, at + i), sum += to[i] * to[i];
    for (int i = 0; i < K && !p->qk_is_normalised; i++) to[i] /= sqrtf(sum + 1e-6f);
}

static void step(const fkda_decode_problem *p, const fkda_sequence *s, int64_t token, int64_t h,
                 float S[V][K], uint16_t *out, float *record)
{
    float q[K], k[K], decay[K], u[V];
    const int64_t of = h / (p->heads / p->qk_heads);
    unit(p, &p->q, fkda_row_offset(&p->q, s->row, token, of), q);
    unit(p, &p->k, fkda_row_offset(&p->k, s->row, token, of), k);
    const int64_t g = fkda_row_offset(&p->g, s->row, token, h);
    for (int i = 0; i < K; i++) decay[i] = decay_of(p, h, i, value_at(p->g.data, p->g.dtype, g + i));
    double b = value_at(p->beta.data, p->beta.dtype, fkda_row_offset(&p->beta, s->row, token, h));
    if (p->beta_kind != FLASH_KDA_BETA_ACTIVATED)
        b = sigmoid(b) * (p->beta_kind == FLASH_KDA_BETA_TWICE_SIGMOID ? 2 : 1);
    const int64_t values = fkda_row_offset(&p->v, s->row, token, h);
    for (int v = 0; v < V; v++) {
        float sum = 0;
        for (int i = 0; i < K; i++) sum += decay[i] * S[v][i] * k[i];
        u[v] = (float)b * (value_at(p->v.data, p->v.dtype, values + v) - sum);
    }
    update(S, decay, k, u);
    for (int v = 0; v < V; v++) {
        float sum = 0;
        for (int i = 0; i < K; i++) sum += S[v][i] * q[i];
        out[v] = nearest(p->scale * sum);
    }
    if (!record) return;
    memcpy(record, decay, sizeof decay);
    memcpy(record + K, k, sizeof k);
    memcpy(record + 2 * K, u, sizeof u);
}

static void decode_head(const fkda_decode_problem *p, int64_t n, int64_t h)
{
    float S[FLASH_KDA_MAX_DECODE_TOKENS + 1][V][K];
    const fkda_sequence s = fkda_decode_sequence_at(p, n);
    const int64_t slot = fkda_decode_first_slot(p, n), length = s.end - s.begin;
    if (slot != FKDA_NO_SLOT) load(&p->state, slot, h, p->state_k_first, S[0]);
    for (int64_t i = 0; i < length; i++) {
        uint16_t *out = (uint16_t *)p->out.data + fkda_row_offset(&p->out, s.row, s.begin + i, h);
        float *record = NULL;
        if (p->records && i < p->record_columns)
            record = p->records + fkda_record_offset(n, p->record_columns, i, p->heads, h);
        if (slot == FKDA_NO_SLOT) {
            memset(out, 0, V * sizeof *out);
            if (record) memset(record, 0, 3 * K * sizeof *record);
            continue;
        }
        memcpy(S[i + 1], S[fkda_decode_parent(p, n, i) + 1], sizeof S[0]);
        step(p, &s, s.begin + i, h, S[i + 1], out, record);
        if (p->write_states == FLASH_KDA_WRITE_EACH)
            store(&p->state, fkda_decode_slot_after(p, n, i), h, p->state_k_first, S[i + 1], p->rounding, n,
                  (int)i);
    }
    if (p->write_states == FLASH_KDA_WRITE_LAST && slot != FKDA_NO_SLOT && length)
        store(&p->state, slot, h, p->state_k_first, S[length], p->rounding, n, 0);
}

flash_kda_status fkda_cpu_decode(const fkda_decode_problem *p)
{
    for (int64_t n = 0; n < p->sequences; n++)
        for (int64_t h = 0; h < p->heads; h++) {
            if (fkda_is_interrupt(p->interrupt)) return fkda_interruption();
            decode_head(p, n, h);
        }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_cpu_apply(const fkda_apply_problem *p)
{
    float S[V][K];
    for (int64_t n = 0; n < p->sequences; n++) {
        const int64_t slot = fkda_slot_at(&p->state_indices, n, p->first_slot, &p->state),
                      count = fkda_apply_count(p, n);
        for (int64_t h = 0; h < p->heads && slot != FKDA_NO_SLOT && count; h++) {
            if (fkda_is_interrupt(p->interrupt)) return fkda_interruption();
            load(&p->state, slot, h, p->state_k_first, S);
            for (int64_t i = 0; i < count; i++) {
                const int64_t token = fkda_apply_token(p, n, i);
                if (token < 0) break;
                const float *r = p->records + fkda_record_offset(n, p->record_columns, token, p->heads, h);
                update(S, r, r + K, r + 2 * K);
            }
            store(&p->state, slot, h, p->state_k_first, S, p->rounding, n, 0);
        }
    }
    return FLASH_KDA_OK;
}
