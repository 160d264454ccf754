/* The definition: the recurrence, one token after the other, in fp64. Written to be read and believed;
 * everything else is held to it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

enum { K = FKDA_DIM, V = FKDA_DIM };

typedef struct job {
    const fkda_problem *problem;
    double *out;                    /* [B, T, H, V] */
    double *final_state;            /* [N, H, V, K] or NULL */
    double (*scratch_states)[K][V]; /* one for each worker */
} job;

static double bf16_value(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

static void normalise(const uint16_t *x, double *unit)
{
    double sum = 0.0;
    for (int i = 0; i < K; i++) {
        unit[i] = bf16_value(x[i]);
        sum += unit[i] * unit[i];
    }
    double factor = 1.0 / sqrt(sum + 1e-6);
    for (int i = 0; i < K; i++) unit[i] *= factor;
}

/* S is kept as [K][V], so that the inner loops run along memory. */
static void load_state(const fkda_problem *p, int64_t n, int64_t h, double S[K][V])
{
    int64_t base = (n * p->heads + h) * V * K;
    for (int v = 0; v < V; v++) {
        for (int k = 0; k < K; k++) {
            int64_t i = base + v * K + k;
            if (!p->initial_state)
                S[k][v] = 0.0;
            else if (p->state_is_bf16)
                S[k][v] = bf16_value(((const uint16_t *)p->initial_state)[i]);
            else
                S[k][v] = ((const float *)p->initial_state)[i];
        }
    }
}

static void step(const fkda_problem *p, int64_t token, int64_t h, double S[K][V], double *out)
{
    int64_t row = token * p->heads + h;
    double q[K], k[K], decay[K], u[V], o[V];
    normalise(p->q + row * K, q);
    normalise(p->k + row * K, k);
    double rate = exp((double)p->A_log[h]);
    for (int i = 0; i < K; i++) {
        double raw = bf16_value(p->g[row * K + i]) + (double)p->dt_bias[h * K + i];
        decay[i] = exp((double)p->lower_bound * sigmoid(rate * raw));
    }
    double b = sigmoid(bf16_value(p->beta[row]));

    for (int v = 0; v < V; v++) u[v] = 0.0;
    for (int i = 0; i < K; i++) {
        for (int v = 0; v < V; v++) {
            S[i][v] *= decay[i];
            u[v] += S[i][v] * k[i];
        }
    }
    for (int v = 0; v < V; v++) {
        u[v] = b * (bf16_value(p->v[row * V + v]) - u[v]);
        o[v] = 0.0;
    }
    for (int i = 0; i < K; i++) {
        for (int v = 0; v < V; v++) {
            S[i][v] += k[i] * u[v];
            o[v] += S[i][v] * q[i];
        }
    }
    for (int v = 0; v < V; v++) out[row * V + v] = (double)p->scale * o[v];
}

static void run_head(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_problem *p = j->problem;
    int64_t n = index / p->heads, h = index % p->heads;
    double(*S)[V] = j->scratch_states[worker];

    load_state(p, n, h, S);
    int64_t begin, end;
    fkda_sequence_range(p, n, &begin, &end);
    for (int64_t token = begin; token < end; token++) step(p, token, h, S, j->out);
    if (!j->final_state) return;
    double *final = j->final_state + index * V * K;
    for (int v = 0; v < V; v++)
        for (int k = 0; k < K; k++) final[v * K + k] = S[k][v];
}

flash_kda_status fkda_cpu_reference(const fkda_problem *p, double *out, double *final_state)
{
    int64_t count = p->sequences * p->heads;
    int threads = p->threads < FKDA_MAX_THREADS ? p->threads : FKDA_MAX_THREADS;
    if (threads > count) threads = count > 0 ? (int)count : 1;

    size_t bytes = (size_t)threads * sizeof(double[K][V]);
    job j = {.problem = p, .out = out, .final_state = final_state, .scratch_states = malloc(bytes)};
    if (!j.scratch_states)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR, "the reference could not allocate %zu bytes of memory",
                         bytes);
    fkda_parallel_for(threads, count, run_head, &j);
    free(j.scratch_states);
    return FLASH_KDA_OK;
}
