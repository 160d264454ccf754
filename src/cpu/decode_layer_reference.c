/* The definition of decode_layer: convolution, recurrence and norm in fp64, one token after the other. It is
 * written to be read and believed, because every other implementation is held to it. */
#include <math.h>
#include <string.h>

#include "../errors.h"
#include "cpu.h"

enum { D = FKDA_DIM, PARTS = FKDA_CONV_PARTS };

typedef struct job {
    const fkda_decode_layer_problem *problem;
    double *out;    /* [N, T, H, V] */
    double *states; /* [N, T, H, V, K], or NULL */
} job;

/* Element i of a tensor of bf16 or fp32. */
static double value_at(const void *data, int32_t dtype, int64_t i)
{
    if (dtype == FLASH_KDA_F32) return ((const float *)data)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

/* log(1 + e^x) without overflow. */
static double softplus(double x)
{
    return x > 0.0 ? x + log1p(exp(-x)) : log1p(exp(x));
}

/* The natural logarithm of the decay of channel i of head h, from element g of the gate tensor. */
static double log_decay(const fkda_decode_problem *p, int64_t h, int i, double g)
{
    const double A_log = p->A_log ? p->A_log[h] : 0.0, dt_bias = p->dt_bias ? p->dt_bias[h * D + i] : 0.0;
    switch (p->gate) {
    case FLASH_KDA_GATE_BOUNDED: return p->lower_bound * sigmoid(exp(A_log) * (g + dt_bias));
    case FLASH_KDA_GATE_SOFTPLUS: return -exp(A_log) * softplus(g + dt_bias);
    default: return g;
    }
}

static double write_strength(const fkda_decode_problem *p, double beta)
{
    switch (p->beta_kind) {
    case FLASH_KDA_BETA_SIGMOID: return sigmoid(beta);
    case FLASH_KDA_BETA_TWICE_SIGMOID: return 2.0 * sigmoid(beta);
    default: return beta;
    }
}

/* Input x_t of a channel, for t from -3 on: negative ones come from the window of the sequence. */
static double input_at(const fkda_decode_layer_problem *p, const fkda_sequence *s, int64_t window_at,
                       int part, int64_t channel, int t)
{
    if (t < 0)
        return value_at(p->conv_state.data, p->conv_state.dtype,
                        window_at + fkda_channel_offset(&p->conv_state, part, channel, t + FKDA_WINDOW));
    return value_at(p->x.data, p->x.dtype,
                    fkda_row_offset(&p->x, s->row, s->begin + t, 0) + part * p->x_part_stride + channel);
}

/* y_t of a channel. */
static double convolve(const fkda_decode_layer_problem *p, const fkda_sequence *s, int64_t window_at,
                       int part, int64_t channel, int t)
{
    double sum = 0.0;
    if (p->bias.data)
        sum = value_at(p->bias.data, p->bias.dtype, fkda_channel_offset(&p->bias, part, channel, 0));
    for (int j = 0; j < FKDA_CONV_TAPS; j++)
        sum += value_at(p->weight.data, p->weight.dtype, fkda_channel_offset(&p->weight, part, channel, j)) *
               input_at(p, s, window_at, part, channel, t + j - FKDA_WINDOW);
    return sum * sigmoid(sum);
}

static void normalise(const fkda_decode_problem *p, double x[D])
{
    double sum = 0.0;
    for (int i = 0; i < D; i++) sum += x[i] * x[i];
    const double factor = p->qk_is_normalised ? 1.0 : 1.0 / sqrt(sum + 1e-6);
    for (int i = 0; i < D; i++) x[i] *= factor;
}

/* One token of one head. S is [K][V], so that the inner loops run along memory. */
static void step(const fkda_decode_problem *p, const fkda_sequence *s, int64_t h, int t,
                 double (*qkv)[D], double S[D][D], double out[D])
{
    const double *q = qkv[0], *k = qkv[1], *v = qkv[2];
    const int64_t token = s->begin + t, g = fkda_row_offset(&p->g, s->row, token, h);
    const double b = write_strength(
        p, value_at(p->beta.data, p->beta.dtype, fkda_row_offset(&p->beta, s->row, token, h)));
    double u[D] = {0}, o[D] = {0};
    for (int i = 0; i < D; i++) {
        const double decay = exp(log_decay(p, h, i, value_at(p->g.data, p->g.dtype, g + i)));
        for (int j = 0; j < D; j++) {
            S[i][j] *= decay;
            u[j] += S[i][j] * k[i];
        }
    }
    for (int j = 0; j < D; j++) u[j] = b * (v[j] - u[j]);
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) {
            S[i][j] += k[i] * u[j];
            o[j] += S[i][j] * q[i];
        }
    for (int j = 0; j < D; j++) out[j] = (double)p->scale * o[j];
}

/* The norm and the output gate of one token. */
static void finish(const fkda_decode_layer_problem *p, const fkda_sequence *s, int64_t h, int t,
                   double o[D])
{
    double sum = 0.0, factor = 1.0;
    for (int j = 0; j < D; j++) sum += o[j] * o[j];
    if (p->norm_weight) factor = 1.0 / sqrt(sum / D + (double)p->norm_eps);
    for (int j = 0; j < D; j++) {
        if (p->norm_weight) o[j] *= factor * value_at(p->norm_weight, p->norm_weight_dtype, j);
        if (p->output_gate.data)
            o[j] *= sigmoid(value_at(p->output_gate.data, p->output_gate.dtype,
                                     fkda_row_offset(&p->output_gate, s->row, s->begin + t, h) + j));
    }
}

static void load_state(const fkda_decode_problem *p, int64_t slot, int64_t h, double S[D][D])
{
    const int64_t at = fkda_state_offset(&p->state, slot, h), k_stride = p->state_k_first ? D : 1,
                  v_stride = p->state_k_first ? 1 : D;
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++)
            S[i][j] = value_at(p->state.data, p->state.dtype, at + i * k_stride + j * v_stride);
}

static bool run_head(void *context, int64_t index, int worker)
{
    const job *task = context;
    const fkda_decode_layer_problem *p = task->problem;
    const fkda_decode_problem *d = &p->decode;
    const int64_t n = index / d->heads, h = index % d->heads, from = fkda_decode_first_slot(d, n),
                  window_slot = fkda_window_slot(p, n, from),
                  window_at = window_slot * p->conv_slot_stride +
                              fkda_window_column(p, n) * p->conv_state.column_stride;
    const bool has_state = from != FKDA_NO_SLOT && window_slot != FKDA_NO_SLOT;
    const fkda_sequence s = fkda_decode_sequence_at(d, n);
    double S[D][D], qkv[PARTS][D];
    (void)worker;
    if (fkda_is_interrupt(d->interrupt)) return false;
    if (has_state) load_state(d, from, h, S);
    for (int t = 0; t < s.end - s.begin; t++) {
        const int64_t row = (s.row * d->tokens + s.begin + t) * d->heads + h;
        double *out = task->out + row * D;
        if (!has_state) {
            memset(out, 0, D * sizeof *out);
            continue;
        }
        for (int part = 0; part < PARTS; part++)
            for (int i = 0; i < D; i++) qkv[part][i] = convolve(p, &s, window_at, part, h * D + i, t);
        normalise(d, qkv[0]);
        normalise(d, qkv[1]);
        step(d, &s, h, t, qkv, S, out);
        finish(p, &s, h, t, out);
        if (!task->states) continue;
        for (int i = 0; i < D; i++)
            for (int j = 0; j < D; j++) task->states[(row * D + j) * D + i] = S[i][j];
    }
    return true;
}

flash_kda_status fkda_cpu_decode_layer_reference(const fkda_decode_layer_problem *p, double *out,
                                                 double *states)
{
    job task = {.problem = p, .out = out, .states = states};
    const int64_t heads = p->decode.sequences * p->decode.heads;
    return fkda_parallel_for(p->decode.threads, heads, run_head, &task) ? FLASH_KDA_OK : fkda_interruption();
}
