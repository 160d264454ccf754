#include "kinds.h"

#include <math.h>

const char *const decays_names[DECAY_KINDS] = {
    "slow decays",          "ordinary decays",        "fast decays", "decays from slow to fast",
    "isolated fast tokens", "isolated fast channels", "no decay",    "extreme decays"};

static double log_uniform(rng *r, double low, double high)
{
    return exp(rng_uniform(r, log(low), log(high)));
}

/* The nats that a channel of a token forgets, a number of 0 or more. */
static double draw_nats(rng *r, decays how, int channel, bool is_isolated_token)
{
    const double place = (double)channel / (DIM - 1);
    switch (how) {
    case DECAYS_SLOW: return log_uniform(r, 1e-6, 1e-2);
    case DECAYS_ORDINARY: return log_uniform(r, 1e-2, 3.0);
    case DECAYS_FAST: return log_uniform(r, 3.0, 100.0);
    case DECAYS_MIXED: return exp(log(1e-6) + place * log(300.0 / 1e-6)) * rng_uniform(r, 0.5, 1.0);
    case DECAYS_ISOLATED_TOKENS: return is_isolated_token ? 300.0 : 1e-6;
    case DECAYS_ISOLATED: return rng_uniform(r, 0.0, 8.0) < 1.0 ? 300.0 : 1e-6;
    case DECAYS_NONE: return 0.0;
    case DECAYS_EXTREME: return log_uniform(r, 1e-30, 1e38);
    }
    return 0.0;
}

/* The x for which softplus(x) = y. */
static double inverse_softplus(double y)
{
    if (y > 40.0) return y;
    return y > 1e-37 ? log(expm1(y)) : -88.0;
}

void fill_decays(problem *p, decays how, bool is_f32, uint64_t seed)
{
    rng r = rng_seed(seed);
    const int64_t rows = problem_rows(p);
    const bool softplus = p->gate == FLASH_KDA_GATE_SOFTPLUS;
    if (is_f32) p->g_f32 = allocate((size_t)rows * DIM, sizeof *p->g_f32);
    for (int64_t h = 0; h < p->heads; h++) {
        p->A_log[h] = (float)rng_uniform(&r, -1.0, log(16.0));
        for (int i = 0; i < DIM; i++) p->dt_bias[h * DIM + i] = (float)rng_normal(&r);
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t h = row % p->heads;
        const bool isolated = rng_bits(&r) % 8 == 0;
        const double rate = exp((double)p->A_log[h]);
        for (int i = 0; i < DIM; i++) {
            const double nats = draw_nats(&r, how, i, isolated);
            const double bias = p->without_dt_bias ? 0.0 : p->dt_bias[h * DIM + i];
            const float g = (float)(softplus ? inverse_softplus(nats / rate) - bias : -nats);
            if (is_f32) p->g_f32[row * DIM + i] = g;
            p->g[row * DIM + i] = bf16_from_float(g);
        }
    }
}

/* fp32 numbers beside bf16 ones: the bits that bf16 does not have are drawn. */
static float *widen(const uint16_t *narrow, int64_t count, uint64_t seed)
{
    rng r = rng_seed(seed);
    float *wide = allocate((size_t)count, sizeof *wide);
    for (int64_t i = 0; i < count; i++)
        wide[i] = float_from_bf16(narrow[i]) * (float)(1.0 + rng_uniform(&r, 0.0, 0x1p-9));
    return wide;
}

void widen_gates(problem *p, uint64_t seed)
{
    p->g_f32 = widen(p->g, problem_rows(p) * DIM, seed);
}

void widen_betas(problem *p, uint64_t seed)
{
    p->beta_f32 = widen(p->beta, problem_rows(p), seed);
}

void activate_betas(problem *p)
{
    if (p->beta_kind != FLASH_KDA_BETA_ACTIVATED) return;
    for (int64_t i = 0; i < problem_rows(p); i++)
        p->beta[i] = bf16_from_float(1.0f / (1.0f + expf(-float_from_bf16(p->beta[i]))));
}

static void normalise(uint16_t *row)
{
    double sum = 1e-6;
    for (int i = 0; i < DIM; i++) sum += (double)float_from_bf16(row[i]) * float_from_bf16(row[i]);
    for (int i = 0; i < DIM; i++) row[i] = bf16_from_float((float)(float_from_bf16(row[i]) / sqrt(sum)));
}

void normalise_keys(problem *p)
{
    p->qk_is_normalised = true;
    for (int64_t row = 0; row < problem_qk_rows(p); row++) {
        normalise(p->q + row * DIM);
        normalise(p->k + row * DIM);
    }
}
