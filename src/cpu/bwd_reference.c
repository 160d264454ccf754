/* The definition of the backward pass: the chain rule through the recurrence in fp64, from the last token to
 * the first. It is written to be read and believed, because every other implementation is held to it.
 *
 * A token needs the state before it, which the recurrence finds from the first token on. So states at every
 * `interval` tokens are kept, and inside of an interval those of each token: about two square roots of the
 * sequence's length in all. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../errors.h"
#include "cpu.h"
#include "reference.h"

enum { K = FKDA_DIM, V = FKDA_DIM };

typedef double state[K][V];

typedef struct job {
    const fkda_bwd_problem *problem;
    const flash_kda_gradients64 *to;
    int64_t interval,
        intervals; /* tokens between states that are kept, and how many a sequence has at most */
    state *states; /* of each worker: one for each interval, then one for each token of one */
} job;

/* ---- One token ----------------------------------------------------------------------------------------- */

/* The inputs of a token of one head, as the recurrence takes them, and gradients with respect to these. */
typedef struct token {
    double q[K], k[K], v[V], log_decay[K], b, dout[V];
    double dq[K], dk[K], dv[V], dlog_decay[K], db;
} token;

static void load_token(const fkda_bwd_problem *p, int64_t row, int64_t at, int64_t h, token *t)
{
    const fkda_problem *f = &p->fwd;
    const int64_t of = fkda_qk_head(&f->shape, h), g = fkda_row_offset(&f->g, row, at, h),
                  v = fkda_row_offset(&f->v, row, at, h), beta = fkda_row_offset(&f->beta, row, at, h),
                  dout = fkda_row_offset(&p->dout, row, at, h);
    fkda_reference_unit(f, &f->q, fkda_row_offset(&f->q, row, at, of), t->q);
    fkda_reference_unit(f, &f->k, fkda_row_offset(&f->k, row, at, of), t->k);
    for (int i = 0; i < K; i++)
        t->log_decay[i] =
            fkda_reference_log_decay(f, h, i, fkda_reference_value(f->g.data, f->g.dtype, g + i));
    for (int i = 0; i < V; i++) t->v[i] = fkda_reference_value(f->v.data, f->v.dtype, v + i);
    t->b = fkda_reference_write_strength(f, fkda_reference_value(f->beta.data, f->beta.dtype, beta));
    for (int i = 0; i < V; i++)
        t->dout[i] = p->dout.data ? fkda_reference_value(p->dout.data, p->dout.dtype, dout + i) : 0.0;
}

/* Goes back over a token. S is the state before the token. D is the gradient with respect to the state after
 * the token, and becomes that with respect to S. */
static void step_back(const fkda_problem *p, token *t, state S, state D)
{
    const double scale = p->scale;
    double missed[V], du[V]; /* v - S~^T k */
    for (int v = 0; v < V; v++) missed[v] = t->v[v], du[v] = 0.0;
    for (int k = 0; k < K; k++) {
        const double decay = exp(t->log_decay[k]);
        for (int v = 0; v < V; v++) {
            S[k][v] *= decay; /* now S~ */
            missed[v] -= S[k][v] * t->k[k];
            D[k][v] += scale * t->q[k] * t->dout[v];
            du[v] += D[k][v] * t->k[k];
        }
    }
    t->db = 0.0;
    for (int v = 0; v < V; v++) {
        t->dv[v] = t->b * du[v];
        t->db += du[v] * missed[v];
    }
    for (int k = 0; k < K; k++) {
        const double decay = exp(t->log_decay[k]);
        double dq = 0.0, dk = 0.0, dlog_decay = 0.0;
        for (int v = 0; v < V; v++) {
            const double u = t->b * missed[v];
            dq += scale * (S[k][v] + t->k[k] * u) * t->dout[v];
            dk += D[k][v] * u - t->b * S[k][v] * du[v];
            D[k][v] -= t->b * t->k[k] * du[v]; /* now D~ */
            dlog_decay += S[k][v] * D[k][v];
            D[k][v] *= decay;
        }
        t->dq[k] = dq;
        t->dk[k] = dk;
        t->dlog_decay[k] = dlog_decay;
    }
}

/* ---- From the recurrence to the tensors ---------------------------------------------------------------- */

/* Adds the gradient with respect to a row x of q or k, through x / sqrt(sum(x^2) + 1e-6). */
static void add_row(const fkda_problem *p, const fkda_token_view *x, int64_t offset, const double *unit,
                    const double *gradient, double *to)
{
    double squares = 1e-6, along = 0.0;
    for (int i = 0; i < K; i++) {
        const double value = fkda_reference_value(x->data, x->dtype, offset + i);
        squares += value * value;
        along += unit[i] * gradient[i];
    }
    for (int i = 0; i < K; i++)
        to[i] += p->qk_is_normalised ? gradient[i] : (gradient[i] - unit[i] * along) / sqrt(squares);
}

/* The derivatives of the log decay with respect to g + dt_bias and to A_log. A factor that is 0 makes them 0,
 * also where x is infinite. */
static void differentiate_gate(const fkda_problem *p, int64_t h, int i, double g, double *by_g,
                               double *by_A_log)
{
    const double rate = exp(p->A_log ? p->A_log[h] : 0.0), x = g + (p->dt_bias ? p->dt_bias[h * K + i] : 0.0);
    if (p->gate == FLASH_KDA_GATE_BOUNDED) {
        const double s = fkda_reference_sigmoid(rate * x),
                     slope = p->lower_bound * s * fkda_reference_sigmoid(-rate * x);
        *by_g = slope * rate;
        *by_A_log = slope == 0.0 ? 0.0 : slope * rate * x;
    } else if (p->gate == FLASH_KDA_GATE_SOFTPLUS) {
        *by_g = -rate * fkda_reference_sigmoid(x);
        *by_A_log = fkda_reference_log_decay(p, h, i, g);
    } else {
        *by_g = 1.0;
        *by_A_log = 0.0;
    }
}

static void store_gates(const job *j, int64_t row, int64_t at, int64_t h, const token *t)
{
    const fkda_problem *p = &j->problem->fwd;
    const int64_t offset = fkda_row_offset(&p->g, row, at, h),
                  place = ((row * p->shape.tokens + at) * p->shape.heads + h) * K;
    for (int i = 0; i < K; i++) {
        double by_g, by_A_log;
        differentiate_gate(p, h, i, fkda_reference_value(p->g.data, p->g.dtype, offset + i), &by_g,
                           &by_A_log);
        const double dlog_decay = t->dlog_decay[i], dg = dlog_decay * by_g;
        if (j->to->dg) j->to->dg[place + i] = dg;
        if (p->gate == FLASH_KDA_GATE_ACTIVATED) continue;
        if (j->to->ddt_bias) j->to->ddt_bias[h * K + i] += dg;
        if (j->to->dA_log && dlog_decay != 0.0) j->to->dA_log[h] += dlog_decay * by_A_log;
    }
}

/* The derivative of the write strength. */
static double differentiate_beta(const fkda_problem *p, double beta)
{
    const double slope = fkda_reference_sigmoid(beta) * fkda_reference_sigmoid(-beta);
    switch (p->beta_kind) {
    case FLASH_KDA_BETA_SIGMOID: return slope;
    case FLASH_KDA_BETA_TWICE_SIGMOID: return 2.0 * slope;
    default: return 1.0;
    }
}

static void store_token(const job *j, int64_t row, int64_t at, int64_t h, const token *t)
{
    const fkda_problem *p = &j->problem->fwd;
    const int64_t of = fkda_qk_head(&p->shape, h), place = row * p->shape.tokens + at,
                  qk_row = place * p->shape.qk_heads + of, v_row = place * p->shape.heads + h;
    if (j->to->dq)
        add_row(p, &p->q, fkda_row_offset(&p->q, row, at, of), t->q, t->dq, j->to->dq + qk_row * K);
    if (j->to->dk)
        add_row(p, &p->k, fkda_row_offset(&p->k, row, at, of), t->k, t->dk, j->to->dk + qk_row * K);
    if (j->to->dv) memcpy(j->to->dv + v_row * V, t->dv, sizeof t->dv);
    if (j->to->dbeta) {
        const int64_t offset = fkda_row_offset(&p->beta, row, at, h);
        j->to->dbeta[v_row] =
            t->db * differentiate_beta(p, fkda_reference_value(p->beta.data, p->beta.dtype, offset));
    }
    store_gates(j, row, at, h, t);
}

/* ---- One head ------------------------------------------------------------------------------------------ */

static bool run_sequence(const job *j, int64_t n, int64_t h, state *kept)
{
    const fkda_bwd_problem *p = j->problem;
    const fkda_problem *f = &p->fwd;
    const fkda_sequence sequence = fkda_sequence_at(f, n);
    const int64_t length = fkda_clamp(sequence.end - sequence.begin, 0, j->interval * j->intervals);
    state *const inner = kept + j->intervals;
    double(*S)[V] = inner[j->interval], (*D)[V] = inner[j->interval + 1], out[V];
    token t;

    fkda_reference_load(&f->initial_state, fkda_bwd_slot(&f->initial_state, n), h, f->state_k_first, S);
    for (int64_t i = 0; i < length; i++) {
        if (fkda_interrupted(f)) return false;
        if (i % j->interval == 0) memcpy(kept[i / j->interval], S, sizeof(state));
        fkda_reference_step(f, sequence.row, sequence.begin + i, h, S, out);
    }
    fkda_reference_load(&p->dfinal_state, fkda_bwd_slot(&p->dfinal_state, n), h, f->state_k_first, D);
    for (int64_t end = length; end > 0;) {
        const int64_t begin = (end - 1) / j->interval * j->interval;
        memcpy(S, kept[begin / j->interval], sizeof(state));
        for (int64_t i = begin; i < end; i++) {
            if (fkda_interrupted(f)) return false;
            memcpy(inner[i - begin], S, sizeof(state));
            fkda_reference_step(f, sequence.row, sequence.begin + i, h, S, out);
        }
        for (; end > begin; end--) {
            const int64_t at = sequence.begin + end - 1;
            if (fkda_interrupted(f)) return false;
            load_token(p, sequence.row, at, h, &t);
            step_back(f, &t, inner[end - 1 - begin], D);
            store_token(j, sequence.row, at, h, &t);
        }
    }
    if (j->to->dinitial_state)
        fkda_reference_store(D, j->to->dinitial_state + (n * f->shape.heads + h) * V * K);
    return true;
}

/* All sequences and all value heads of a head of q and k, so that a sum has one order. */
static bool run_qk_head(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_shape *s = &j->problem->fwd.shape;
    const int64_t group = s->heads / s->qk_heads;
    state *kept = j->states + worker * (j->intervals + j->interval + 2);
    for (int64_t h = index * group; h < (index + 1) * group; h++)
        for (int64_t n = 0; n < s->sequences; n++)
            if (!run_sequence(j, n, h, kept)) return false;
    return !fkda_interrupted(&j->problem->fwd);
}

static void set_zero(double *to, int64_t count)
{
    if (to) memset(to, 0, (size_t)count * sizeof *to);
}

flash_kda_status fkda_cpu_bwd_reference(const fkda_bwd_problem *p, const flash_kda_gradients64 *to)
{
    const fkda_shape *s = &p->fwd.shape;
    const int64_t rows = s->batch * s->tokens;
    int64_t longest = 1;
    for (int64_t n = 0; n < s->sequences; n++) {
        const fkda_sequence sequence = fkda_sequence_at(&p->fwd, n);
        if (sequence.end - sequence.begin > longest) longest = sequence.end - sequence.begin;
    }
    int threads = s->threads < FKDA_MAX_THREADS ? s->threads : FKDA_MAX_THREADS;
    if (threads > s->qk_heads) threads = (int)s->qk_heads;

    job j = {.problem = p, .to = to, .interval = (int64_t)ceil(sqrt((double)longest))};
    j.intervals = (longest + j.interval - 1) / j.interval;
    const size_t bytes = (size_t)threads * (size_t)(j.intervals + j.interval + 2) * sizeof(state);
    j.states = malloc(bytes);
    if (!j.states)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR, "the reference could not allocate %zu bytes of memory",
                         bytes);
    set_zero(to->dq, rows * s->qk_heads * K); /* sums begin with zeros */
    set_zero(to->dk, rows * s->qk_heads * K);
    set_zero(to->dA_log, s->heads);
    set_zero(to->ddt_bias, s->heads * K);
    const bool finished = fkda_parallel_for(threads, s->qk_heads, run_qk_head, &j);
    free(j.states);
    return finished ? FLASH_KDA_OK : fkda_interruption();
}
