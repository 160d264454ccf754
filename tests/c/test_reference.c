/* The fp64 reference against formulas that can be written down without a recurrence. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

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

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"one-token", one_token},
        {"overwriting", overwriting},
        {"forgetting", forgetting},
        {"heads-by-themselves", heads_by_themselves},
    };
    harness_start(argc, argv);
    if (test.device.type == FLASH_KDA_CPU) test.kernel = "cpu"; /* the reference has no kernels */
    return harness_run(groups, sizeof groups / sizeof *groups);
}
