/* The definition of the operator: the recurrence in fp64, one token after the other. It is written to be read
 * and believed, because every other implementation is held to it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../checkpoints.h"
#include "../errors.h"
#include "cpu.h"
#include "reference.h"

enum { K = FKDA_DIM, V = FKDA_DIM };

typedef struct job {
    const fkda_problem *problem;
    double *out;                    /* [B, T, HV, V] */
    double *final_state;            /* [N, HV, V, K] or NULL */
    double *checkpoints;            /* [rows, HV, V, K] or NULL */
    int64_t *first_rows;            /* [N], where checkpoints.h needs it */
    double (*scratch_states)[K][V]; /* one for each worker */
} job;

double fkda_reference_value(const void *data, int32_t dtype, int64_t i)
{
    if (dtype == FLASH_KDA_F64) return ((const double *)data)[i];
    if (dtype == FLASH_KDA_F32) return ((const float *)data)[i];
    const uint16_t bits = ((const uint16_t *)data)[i];
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

double fkda_reference_sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

/* log(1 + e^x) without overflow. */
static double softplus(double x)
{
    return x > 0.0 ? x + log1p(exp(-x)) : log1p(exp(x));
}

double fkda_reference_log_decay(const fkda_problem *p, int64_t h, int i, double g)
{
    const double A_log = p->A_log ? p->A_log[h] : 0.0, dt_bias = p->dt_bias ? p->dt_bias[h * K + i] : 0.0;
    switch (p->gate) {
    case FLASH_KDA_GATE_BOUNDED: return p->lower_bound * fkda_reference_sigmoid(exp(A_log) * (g + dt_bias));
    case FLASH_KDA_GATE_SOFTPLUS: return -exp(A_log) * softplus(g + dt_bias);
    default: return g;
    }
}

double fkda_reference_write_strength(const fkda_problem *p, double beta)
{
    switch (p->beta_kind) {
    case FLASH_KDA_BETA_SIGMOID: return fkda_reference_sigmoid(beta);
    case FLASH_KDA_BETA_TWICE_SIGMOID: return 2.0 * fkda_reference_sigmoid(beta);
    default: return beta;
    }
}

void fkda_reference_unit(const fkda_problem *p, const fkda_token_view *t, int64_t offset, double *unit)
{
    double sum = 0.0;
    for (int i = 0; i < K; i++) {
        unit[i] = fkda_reference_value(t->data, t->dtype, offset + i);
        sum += unit[i] * unit[i];
    }
    const double factor = p->qk_is_normalised ? 1.0 : 1.0 / sqrt(sum + 1e-6);
    for (int i = 0; i < K; i++) unit[i] *= factor;
}

void fkda_reference_load(const fkda_state_view *from, int64_t slot, int64_t h, bool k_first, double S[K][V])
{
    const int64_t k_stride = k_first ? V : 1, v_stride = k_first ? 1 : K;
    for (int k = 0; k < K; k++)
        for (int v = 0; v < V; v++)
            S[k][v] =
                slot == FKDA_NO_SLOT
                    ? 0.0
                    : fkda_reference_value(from->data, from->dtype,
                                           fkda_state_offset(from, slot, h) + k * k_stride + v * v_stride);
}

void fkda_reference_store(double S[K][V], double *to)
{
    for (int v = 0; v < V; v++)
        for (int k = 0; k < K; k++) to[v * K + k] = S[k][v];
}

void fkda_reference_step(const fkda_problem *p, int64_t row, int64_t token, int64_t h, double S[K][V],
                         double *out)
{
    double q[K], k[K], decay[K], u[V], o[V];
    const int64_t of = fkda_qk_head(&p->shape, h);
    fkda_reference_unit(p, &p->q, fkda_row_offset(&p->q, row, token, of), q);
    fkda_reference_unit(p, &p->k, fkda_row_offset(&p->k, row, token, of), k);
    const int64_t g = fkda_row_offset(&p->g, row, token, h);
    for (int i = 0; i < K; i++)
        decay[i] = exp(fkda_reference_log_decay(p, h, i, fkda_reference_value(p->g.data, p->g.dtype, g + i)));
    const int64_t beta = fkda_row_offset(&p->beta, row, token, h);
    const double b =
        fkda_reference_write_strength(p, fkda_reference_value(p->beta.data, p->beta.dtype, beta));
    const int64_t values = fkda_row_offset(&p->v, row, token, h);

    for (int v = 0; v < V; v++) u[v] = 0.0;
    for (int i = 0; i < K; i++) {
        for (int v = 0; v < V; v++) {
            S[i][v] *= decay[i];
            u[v] += S[i][v] * k[i];
        }
    }
    for (int v = 0; v < V; v++) {
        u[v] = b * (fkda_reference_value(p->v.data, p->v.dtype, values + v) - u[v]);
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

/* The state of sequence n and head h after `offset` tokens. */
static void store_checkpoints(const job *j, int64_t n, int64_t h, int64_t offset, double S[K][V])
{
    const fkda_problem *p = j->problem;
    int64_t column = 0, row;
    while ((row = fkda_next_checkpoint_row(p, j->first_rows, n, offset, &column)) != FKDA_NO_CHECKPOINT)
        fkda_reference_store(S, j->checkpoints + (row * p->shape.heads + h) * V * K);
}

static bool run_head(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_problem *p = j->problem;
    const int64_t heads = p->shape.heads, n = index / heads, h = index % heads;
    double(*S)[V] = j->scratch_states[worker];
    const fkda_sequence sequence = fkda_sequence_at(p, n);

    const int64_t length = sequence.end - sequence.begin;
    int64_t checkpoint = j->checkpoints ? fkda_next_checkpoint(p, n, length, 0) : FKDA_NO_CHECKPOINT;
    if (fkda_interrupted(p)) return false;
    fkda_reference_load(&p->initial_state, fkda_slot_of(p, &p->initial_state, n), h, p->state_k_first, S);
    for (int64_t done = 0; done < length; done++) {
        const int64_t token = sequence.begin + done;
        if (fkda_interrupted(p)) return false;
        fkda_reference_step(p, sequence.row, token, h, S,
                            j->out + ((sequence.row * p->shape.tokens + token) * heads + h) * V);
        if (done + 1 != checkpoint) continue;
        store_checkpoints(j, n, h, checkpoint, S);
        checkpoint = fkda_next_checkpoint(p, n, length, checkpoint);
    }
    if (j->final_state) fkda_reference_store(S, j->final_state + index * V * K);
    return true;
}

flash_kda_status fkda_cpu_reference(const fkda_problem *p, double *out, double *final_state,
                                    double *checkpoints)
{
    const fkda_shape *shape = &p->shape;
    int64_t count = shape->sequences * shape->heads;
    int threads = shape->threads < FKDA_MAX_THREADS ? shape->threads : FKDA_MAX_THREADS;
    if (threads > count) threads = count > 0 ? (int)count : 1;

    const size_t states = (size_t)threads * sizeof(double[K][V]),
                 bytes = states + (size_t)shape->sequences * sizeof(int64_t);
    void *memory = malloc(bytes);
    if (!memory)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR, "the reference could not allocate %zu bytes of memory",
                         bytes);
    job j = {.problem = p,
             .out = out,
             .final_state = final_state,
             .checkpoints = checkpoints,
             .first_rows = (int64_t *)((char *)memory + states),
             .scratch_states = memory};
    if (fkda_needs_checkpoint_rows(p)) fkda_checkpoint_rows(p, j.first_rows);
    const bool finished = fkda_parallel_for(threads, count, run_head, &j);
    free(memory);
    return finished ? FLASH_KDA_OK : fkda_interruption();
}
