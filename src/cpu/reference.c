/* The definition of the operator: the recurrence in fp64, one token after the other. It is written to be read
 * and believed, because every other implementation is held to it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../errors.h"
#include "cpu.h"

enum { K = FKDA_DIM, V = FKDA_DIM };

typedef struct job {
    const fkda_problem *problem;
    double *out;                    /* [B, T, H, V] */
    double *final_state;            /* [N, H, V, K] or NULL */
    double (*scratch_states)[K][V]; /* one for each worker */
} job;

/* Element i of a tensor of bf16. */
static double value_at(const void *data, int64_t i)
{
    const uint16_t bits = ((const uint16_t *)data)[i];
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

/* The natural logarithm of the decay, from the gate's input. Another gate is another function. */
static double bounded_gate(double g, double A_log, double dt_bias, double lower_bound)
{
    return lower_bound * sigmoid(exp(A_log) * (g + dt_bias));
}

/* The unit vector of the row at an offset of a tensor [.., K] of bf16. */
static void normalise(const void *data, int64_t offset, double *unit)
{
    double sum = 0.0;
    for (int i = 0; i < K; i++) {
        unit[i] = value_at(data, offset + i);
        sum += unit[i] * unit[i];
    }
    double factor = 1.0 / sqrt(sum + 1e-6);
    for (int i = 0; i < K; i++) unit[i] *= factor;
}

/* S is kept as [K][V], so that the inner loops run along memory. */
static void load_state(const fkda_state_view *from, int64_t n, int64_t h, double S[K][V])
{
    const int64_t base = fkda_state_offset(from, n, h);
    for (int v = 0; v < V; v++) {
        for (int k = 0; k < K; k++) {
            const int64_t i = base + v * K + k;
            if (!from->data)
                S[k][v] = 0.0;
            else if (from->dtype == FLASH_KDA_BF16)
                S[k][v] = value_at(from->data, i);
            else
                S[k][v] = ((const float *)from->data)[i];
        }
    }
}

/* One token of one head; `out` is its row of V numbers. */
static void step(const fkda_problem *p, int64_t row, int64_t token, int64_t h, double S[K][V], double *out)
{
    double q[K], k[K], decay[K], u[V], o[V];
    normalise(p->q.data, fkda_row_offset(&p->q, row, token, h), q);
    normalise(p->k.data, fkda_row_offset(&p->k, row, token, h), k);
    const int64_t g = fkda_row_offset(&p->g, row, token, h);
    for (int i = 0; i < K; i++)
        decay[i] =
            exp(bounded_gate(value_at(p->g.data, g + i), p->A_log[h], p->dt_bias[h * K + i], p->lower_bound));
    const double b = sigmoid(value_at(p->beta.data, fkda_row_offset(&p->beta, row, token, h)));
    const int64_t values = fkda_row_offset(&p->v, row, token, h);

    for (int v = 0; v < V; v++) u[v] = 0.0;
    for (int i = 0; i < K; i++) {
        for (int v = 0; v < V; v++) {
            S[i][v] *= decay[i];
            u[v] += S[i][v] * k[i];
        }
    }
    for (int v = 0; v < V; v++) {
        u[v] = b * (value_at(p->v.data, values + v) - u[v]);
        o[v] = 0.0;
    }
    for (int i = 0; i < K; i++) {
        for (int v = 0; v < V; v++) {
            S[i][v] += k[i] * u[v];
            o[v] += S[i][v] * q[i];
        }
    }
    for (int v = 0; v < V; v++) out[v] = (double)p->scale * o[v];
}

static bool run_head(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_problem *p = j->problem;
    const int64_t heads = p->shape.heads, n = index / heads, h = index % heads;
    double(*S)[V] = j->scratch_states[worker];
    const fkda_sequence sequence = fkda_sequence_at(p, n);

    if (fkda_interrupted(p)) return false;
    load_state(&p->initial_state, n, h, S);
    for (int64_t token = sequence.begin; token < sequence.end; token++) {
        if (fkda_interrupted(p)) return false;
        step(p, sequence.row, token, h, S,
             j->out + ((sequence.row * p->shape.tokens + token) * heads + h) * V);
    }
    if (!j->final_state) return true;
    double *final = j->final_state + index * V * K;
    for (int v = 0; v < V; v++)
        for (int k = 0; k < K; k++) final[v * K + k] = S[k][v];
    return true;
}

flash_kda_status fkda_cpu_reference(const fkda_problem *p, double *out, double *final_state)
{
    int64_t count = p->shape.sequences * p->shape.heads;
    int threads = p->shape.threads < FKDA_MAX_THREADS ? p->shape.threads : FKDA_MAX_THREADS;
    if (threads > count) threads = count > 0 ? (int)count : 1;

    size_t bytes = (size_t)threads * sizeof(double[K][V]);
    job j = {.problem = p, .out = out, .final_state = final_state, .scratch_states = malloc(bytes)};
    if (!j.scratch_states)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR, "the reference could not allocate %zu bytes of memory",
                         bytes);
    const bool finished = fkda_parallel_for(threads, count, run_head, &j);
    free(j.scratch_states);
    return finished ? FLASH_KDA_OK : fkda_interruption();
}
