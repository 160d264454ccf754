/* The fp64 reference against formulas that can be written down without a recurrence. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "draw.h"

static const double TOLERANCE = 1e-12;

static void unit(const uint16_t *x, double *to)
{
    double sum = 1e-6;
    for (int i = 0; i < DIM; i++) sum += (double)float_from_bf16(x[i]) * float_from_bf16(x[i]);
    for (int i = 0; i < DIM; i++) to[i] = float_from_bf16(x[i]) / sqrt(sum);
}

static double dot(const double *a, const double *b)
{
    double sum = 0.0;
    for (int i = 0; i < DIM; i++) sum += a[i] * b[i];
    return sum;
}

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

static void close_to(const char *what, double got, double want, double size)
{
    CHECK(fabs(got - want) <= TOLERANCE * size, "%s is %.17g; it must be %.17g", what, got, want);
}

/* One token on an empty state: S = k (b v)^T, out = scale b (q . k) v. The state in memory is [V, K]. */
static void one_token(void)
{
    problem *p = problem_create(1, 1, 1);
    fill_case(p, find_case("random"), 1);
    answer a = problem_solve(p, false);
    double q[DIM], k[DIM], b = sigmoid(float_from_bf16(p->beta[0]));
    unit(p->q, q);
    unit(p->k, k);
    for (int v = 0; v < DIM; v++) {
        double value = float_from_bf16(p->v[v]);
        close_to("out", a.out[v], p->scale * b * dot(q, k) * value, 1.0);
        for (int i = 0; i < DIM; i++) close_to("state", a.state[v * DIM + i], k[i] * b * value, 1.0);
    }
    answer_free(&a);
    problem_free(p);
}

/* Nothing is forgotten, b = 1, and both tokens have one key, so the second value replaces the first. The
 * epsilon in the norm leaves a trace of the first. */
static void overwriting(void)
{
    problem *p = problem_create(1, 2, 1);
    fill_case(p, find_case("identical keys"), 2);
    p->lower_bound = 0.0f;
    p->beta[0] = p->beta[1] = bf16_from_float(100.0f);
    answer a = problem_solve(p, false);
    double k[DIM];
    unit(p->k, k);
    double left = 1.0 - dot(k, k);
    for (int v = 0; v < DIM; v++) {
        double first = float_from_bf16(p->v[v]), second = float_from_bf16(p->v[DIM + v]);
        for (int i = 0; i < DIM; i++)
            close_to("state", a.state[v * DIM + i], k[i] * (second + left * first), 1.0);
    }
    answer_free(&a);
    problem_free(p);
}

/* Without keys every channel of the state decays by its own gates, and queries read what is left. */
static void forgetting(void)
{
    const int tokens = 5;
    problem *p = problem_create(1, tokens, 1);
    fill_case(p, find_case("random"), 3);
    memset(p->k, 0, (size_t)tokens * DIM * 2);
    p->lower_bound = -3.0f;
    answer a = problem_solve(p, true);
    double decay[DIM] = {0}, q[DIM], left[DIM];
    for (int t = 0; t < tokens; t++) {
        for (int i = 0; i < DIM; i++)
            decay[i] +=
                p->lower_bound * sigmoid(exp((double)p->A_log[0]) *
                                         ((double)float_from_bf16(p->g[t * DIM + i]) + p->dt_bias[i]));
        unit(p->q + (size_t)t * DIM, q);
        for (int v = 0; v < DIM; v++) {
            for (int i = 0; i < DIM; i++) left[i] = p->initial_state[v * DIM + i] * exp(decay[i]);
            close_to("out", a.out[t * DIM + v], p->scale * dot(left, q), 1.0);
        }
    }
    for (int v = 0; v < DIM; v++)
        for (int i = 0; i < DIM; i++)
            close_to("state", a.state[v * DIM + i], p->initial_state[v * DIM + i] * exp(decay[i]), 1.0);
    answer_free(&a);
    problem_free(p);
}

/* A problem that is one sequence and one head of another problem. */
static problem *one_head(const problem *p, int64_t begin, int64_t end, int64_t n, int64_t h)
{
    problem *one = problem_create(1, end - begin, 1);
    for (int64_t t = begin; t < end; t++) {
        int64_t row = t * p->heads + h, to = t - begin;
        memcpy(one->q + to * DIM, p->q + row * DIM, DIM * 2);
        memcpy(one->k + to * DIM, p->k + row * DIM, DIM * 2);
        memcpy(one->v + to * DIM, p->v + row * DIM, DIM * 2);
        memcpy(one->g + to * DIM, p->g + row * DIM, DIM * 2);
        one->beta[to] = p->beta[row];
    }
    one->A_log[0] = p->A_log[h];
    memcpy(one->dt_bias, p->dt_bias + h * DIM, DIM * sizeof(float));
    memcpy(one->initial_state, p->initial_state + (n * p->heads + h) * DIM * DIM, sizeof(float) * DIM * DIM);
    return one;
}

/* Every sequence and head of a problem gives exactly what it gives by itself. */
static void check_heads(const problem *p)
{
    answer whole = problem_solve(p, true);
    for (int64_t n = 0; n < p->sequences; n++) {
        int64_t begin = p->cu_seqlens ? p->cu_seqlens[n] : n * p->tokens;
        int64_t end = p->cu_seqlens ? p->cu_seqlens[n + 1] : begin + p->tokens;
        for (int64_t h = 0; h < p->heads; h++) {
            problem *one = one_head(p, begin, end, n, h);
            answer single = problem_solve(one, true);
            for (int64_t t = begin; t < end; t++)
                CHECK(memcmp(whole.out + (t * p->heads + h) * DIM, single.out + (t - begin) * DIM,
                             DIM * sizeof(double)) == 0,
                      "sequence %lld, head %lld: out differs", (long long)n, (long long)h);
            CHECK(memcmp(whole.state + (n * p->heads + h) * DIM * DIM, single.state,
                         sizeof(double) * DIM * DIM) == 0,
                  "sequence %lld, head %lld: state differs", (long long)n, (long long)h);
            answer_free(&single);
            problem_free(one);
        }
    }
    answer_free(&whole);
}

static void heads_by_themselves(void)
{
    static const int64_t lengths[] = {3, 0, 17, 1};
    problem *ragged = problem_create_ragged(lengths, 4, 3), *batch = problem_create(3, 9, 2);
    fill_case(ragged, find_case("random"), 4);
    fill_case(batch, find_case("channels from fast to slow"), 5);
    check_heads(ragged);
    check_heads(batch);
    problem_free(ragged);
    problem_free(batch);
}

/* ---- Every option, by loops of their own --------------------------------------------------------------- */

/* Element i of a tensor that the call has in bf16, or in fp32 in its place. */
static double element(const uint16_t *narrow, const float *wide, int64_t i)
{
    return wide ? (double)wide[i] : (double)float_from_bf16(narrow[i]);
}

static double log_decay(const problem *p, int64_t h, int i, double g)
{
    const double rate = p->without_A_log ? 1.0 : exp((double)p->A_log[h]),
                 x = g + (p->without_dt_bias ? 0.0 : (double)p->dt_bias[h * DIM + i]);
    if (p->gate == FLASH_KDA_GATE_ACTIVATED) return g;
    if (p->gate == FLASH_KDA_GATE_BOUNDED) return p->lower_bound / (1.0 + exp(-rate * x));
    return -rate * (x > 36.0 ? x : x < -36.0 ? exp(x) : log(1.0 + exp(x)));
}

static double strength(const problem *p, int64_t row)
{
    const double beta = element(p->beta, p->beta_f32, row);
    if (p->beta_kind == FLASH_KDA_BETA_ACTIVATED) return beta;
    return (p->beta_kind == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.0 : 1.0) / (1.0 + exp(-beta));
}

static void key(const problem *p, const uint16_t *x, double *to)
{
    if (!p->qk_is_normalised)
        unit(x, to);
    else
        for (int i = 0; i < DIM; i++) to[i] = float_from_bf16(x[i]);
}

/* The sums of the squares of differences and of what was expected. */
typedef struct difference {
    double wrong, all;
} difference;

static void compare(difference *d, double got, double want)
{
    d->wrong += (got - want) * (got - want);
    d->all += want * want;
}

/* One token: the formulas of flash_kda.h, one after the other. */
static void one_step(const problem *p, int64_t token, int64_t h, double (*S)[DIM], const double *out,
                     difference *d)
{
    const int64_t row = token * p->heads + h, sharing = p->heads / p->qk_heads,
                  qk_row = token * p->qk_heads + h / sharing;
    double q[DIM], k[DIM];
    key(p, p->q + qk_row * DIM, q);
    key(p, p->k + qk_row * DIM, k);
    for (int i = 0; i < DIM; i++) {
        const double decay = exp(log_decay(p, h, i, element(p->g, p->g_f32, row * DIM + i)));
        for (int v = 0; v < DIM; v++) S[v][i] *= decay;
    }
    for (int v = 0; v < DIM; v++) {
        const double u = strength(p, row) * ((double)float_from_bf16(p->v[row * DIM + v]) - dot(S[v], k));
        for (int i = 0; i < DIM; i++) S[v][i] += k[i] * u;
        compare(d, out[row * DIM + v], p->scale * dot(S[v], q));
    }
}

static void compare_state(difference *d, const double *got, double (*S)[DIM])
{
    for (int i = 0; i < DIM * DIM; i++) compare(d, got[i], S[i / DIM][i % DIM]);
}

/* Compares the checkpoints of sequence n after `offset` tokens, and marks their rows. `before` is how many
 * checkpoints the sequences before it have. */
static void compare_checkpoints(const problem *p, int64_t n, int64_t before, int64_t offset, int64_t h,
                                const double *checkpoints, double (*S)[DIM], difference *d, bool *has)
{
    const int64_t columns = p->checkpoint_columns > 0 ? p->checkpoint_columns : 1;
    for (int64_t c = 0; c < (p->checkpoint_every ? 1 : columns); c++) {
        int64_t row = n * columns + c;
        if (p->checkpoint_every) {
            if (offset % p->checkpoint_every) continue;
            row =
                (p->checkpoint_starts ? p->checkpoint_starts[n] : before) + offset / p->checkpoint_every - 1;
        } else {
            if (p->checkpoint_offsets[row] != offset) continue;
            if (p->checkpoint_indices) row = p->checkpoint_indices[row];
        }
        has[row] = true;
        compare_state(d, checkpoints + (row * p->heads + h) * DIM * DIM, S);
    }
}

/* Sequence n of head h. */
static void compare_head(const problem *p, const answer *a, int64_t n, int64_t before, int64_t h,
                         difference *d, bool *has)
{
    static double S[DIM][DIM];
    const int64_t begin = p->cu_seqlens ? p->cu_seqlens[n] : n * p->tokens,
                  length = p->cu_seqlens ? p->cu_seqlens[n + 1] - begin : p->tokens,
                  slot = p->state_indices ? p->state_indices[n] : n;
    const bool from_zeros =
        (p->state_indices && slot < p->first_slot) || (p->has_initial_state && p->has_initial_state[n] == 0);
    for (int i = 0; i < DIM * DIM; i++)
        S[i / DIM][i % DIM] = from_zeros ? 0.0 : p->initial_state[(slot * p->heads + h) * DIM * DIM + i];
    for (int64_t t = 0; t < length; t++) {
        one_step(p, begin + t, h, S, a->out, &d[0]);
        if (p->checkpoint_rows) compare_checkpoints(p, n, before, t + 1, h, a->checkpoints, S, &d[2], has);
    }
    compare_state(&d[1], a->state + (n * p->heads + h) * DIM * DIM, S);
}

static void try_options(uint64_t seed)
{
    static const char *const what[] = {"out", "state", "checkpoints"};
    rng r = rng_seed(seed);
    const drawing how = {.options = draw_subset(&r, ALL_OPTIONS), .tokens = 120};
    problem *p = draw_problem(&r, how);
    answer a = problem_solve(p, true);
    difference d[3] = {{0.0, 0.0}, {0.0, 0.0}, {0.0, 0.0}};
    bool *has = allocate((size_t)p->checkpoint_rows, sizeof *has);
    int64_t before = 0;
    trying("seed %llu", (unsigned long long)seed);
    for (int64_t n = 0; n < p->sequences; n++) {
        for (int64_t h = 0; h < p->heads; h++) compare_head(p, &a, n, before, h, d, has);
        const int64_t length = p->cu_seqlens ? p->cu_seqlens[n + 1] - p->cu_seqlens[n] : p->tokens;
        if (p->checkpoint_every) before += length / p->checkpoint_every;
    }
    for (int i = 0; i < 3; i++)
        CHECK(d[i].wrong <= TOLERANCE * TOLERANCE * d[i].all, "%s differs by %g of it", what[i],
              sqrt(d[i].wrong / d[i].all));
    for (int64_t row = 0; row < p->checkpoint_rows; row++)
        CHECK(has[row] || isnan(a.checkpoints[row * p->heads * DIM * DIM]),
              "row %lld of the checkpoints was written", (long long)row);
    free(has);
    answer_free(&a);
    problem_free(p);
}

static void options(void)
{
    for (uint64_t seed = 1; seed <= (test.quick ? 30 : 150); seed++) try_options(seed);
}

/* K-first states hold the transposed numbers; what the reference writes is V-first in any case. */
static void k_first(void)
{
    problem *p = problem_create(2, 7, 2), *transposed = problem_copy(p);
    fill_case(p, find_case("random"), 6);
    const int64_t states = problem_states(p), values = problem_rows(p) * DIM;
    for (int64_t i = 0; i < states * DIM * DIM; i++) {
        const int64_t state = i / (DIM * DIM), v = i / DIM % DIM, k = i % DIM;
        transposed->initial_state[(state * DIM + k) * DIM + v] = p->initial_state[i];
    }
    answer a = problem_solve(p, true);
    double *out = allocate((size_t)values, sizeof *out),
           *state = allocate((size_t)states * DIM * DIM, sizeof *state);
    flash_kda_fwd_params params = problem_params(p, true);
    params.initial_state.data = transposed->initial_state;
    params.state_k_first = 1;
    must(flash_kda_reference(&params, out, state, NULL));
    CHECK(memcmp(out, a.out, (size_t)values * sizeof *out) == 0, "out differs");
    CHECK(memcmp(state, a.state, (size_t)(states * DIM * DIM) * sizeof *state) == 0, "state differs");
    free(out);
    free(state);
    answer_free(&a);
    problem_free(p);
    problem_free(transposed);
}

/* Gates with numbers that can be worked out by hand. */
static void gates(void)
{
    static const struct {
        flash_kda_gate gate;
        float A_log, g, dt_bias;
        double decay;
    } known[] = {
        {FLASH_KDA_GATE_SOFTPLUS, 0.0f, 0.0f, 0.0f, 0.5},                 /* softplus(0) = log 2 */
        {FLASH_KDA_GATE_SOFTPLUS, 0.0f, 2.0f, -2.0f, 0.5},                /* of the sum with dt_bias */
        {FLASH_KDA_GATE_SOFTPLUS, 0.6931471805599453f, 0.0f, 0.0f, 0.25}, /* twice as fast */
        {FLASH_KDA_GATE_SOFTPLUS, 0.0f, 100.0f, 0.0f, 3.720075976020836e-44},
        {FLASH_KDA_GATE_SOFTPLUS, 0.0f, -40.0f, 0.0f, 1.0 - 4.248354255291589e-18},
        {FLASH_KDA_GATE_ACTIVATED, 9.0f, -2.0f, 9.0f, 0.1353352832366127},
        {FLASH_KDA_GATE_ACTIVATED, 9.0f, 0.0f, 9.0f, 1.0},
        {FLASH_KDA_GATE_BOUNDED, 0.0f, 0.0f, 0.0f, 0.0820849986238988}, /* exp(-5 / 2) */
    };
    for (size_t c = 0; c < sizeof known / sizeof *known; c++) {
        problem *p = problem_create(1, 1, 1);
        p->gate = known[c].gate;
        p->A_log[0] = known[c].A_log;
        p->initial_state[0] = p->initial_state[DIM * DIM - 1] = 1.0f;
        for (int i = 0; i < DIM; i++) {
            p->g[i] = bf16_from_float(known[c].g);
            p->dt_bias[i] = known[c].dt_bias;
        }
        answer a = problem_solve(p, true);
        trying("gate %d, g = %g", (int)known[c].gate, (double)known[c].g);
        const double got[] = {a.state[0], a.state[DIM * DIM - 1]};
        for (int i = 0; i < 2; i++) /* exp(A_log) of a float is not 2 exactly */
            CHECK(fabs(got[i] - known[c].decay) <= 1e-7 * known[c].decay, "the decay is %.17g", got[i]);
        answer_free(&a);
        problem_free(p);
    }
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"one-token", one_token},   {"overwriting", overwriting},
        {"forgetting", forgetting}, {"heads-by-themselves", heads_by_themselves},
        {"options", options},       {"k-first", k_first},
        {"gates", gates},
    };
    harness_start(argc, argv);
    if (test.device.type == FLASH_KDA_CPU) test.kernel = "cpu"; /* the reference has no kernels */
    return harness_run(groups, sizeof groups / sizeof *groups);
}
