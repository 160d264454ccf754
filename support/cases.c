#include "cases.h"

#include <math.h>
#include <string.h>

/*
 * On a GPU the bars are 1.05 times the error that flash-linear-attention's Triton kernels make on the same
 * kind of input (measured on an H100), and OTHER where there is no such figure. With identical keys and a gate
 * that forgets nothing the problem itself is hard (each token must cancel what the one before wrote). On a
 * CPU, where everything is fp32, the output is as good as its rounding to bf16.
 */
#define FLA(out, state)                                                                                      \
    {                                                                                                        \
        1.05 * (out), 1.05 * (state)                                                                         \
    }
#define OTHER                                                                                                \
    {                                                                                                        \
        5.6e-3, 4.8e-3                                                                                       \
    }
#define CPU                                                                                                  \
    {                                                                                                        \
        2.2e-3, 1e-5                                                                                         \
    }
#define HARD                                                                                                 \
    {                                                                                                        \
        2e-2, 2.7e-2                                                                                         \
    }

const test_case test_cases[] = {
    {"random", GATES_RANDOM, 0, KEYS_RANDOM, 1, 1, 1, 0, FLA(4.1e-3, 2.9e-3), CPU},
    {"slow gates", GATES_SLOW, 0, KEYS_RANDOM, 1, 1, 1, 0, FLA(4.9e-3, 4.1e-3), CPU},
    {"channels from fast to slow", GATES_MIXED, 0, KEYS_RANDOM, 1, 1, 1, 0, FLA(4.9e-3, 3.9e-3), CPU},
    {"g = -8", GATES_CONSTANT, -8, KEYS_RANDOM, 1, 1, 1, 0, FLA(5.4e-3, 4.5e-3), CPU},
    {"g = 8", GATES_CONSTANT, 8, KEYS_RANDOM, 1, 1, 1, 0, FLA(3.7e-3, 2.2e-3), CPU},
    {"identical keys", GATES_CONSTANT, -12, KEYS_IDENTICAL, 1, 1, 1, 8, HARD, CPU},
    {"nearly identical keys", GATES_CONSTANT, -12, KEYS_NEARLY_IDENTICAL, 1, 1, 1, 8, FLA(3.5e-2, 7.3e-2),
     CPU},
    {"g = -12", GATES_CONSTANT, -12, KEYS_RANDOM, 1, 1, 1, 0, OTHER, CPU},
    {"g = 0", GATES_CONSTANT, 0, KEYS_RANDOM, 1, 1, 1, 0, OTHER, CPU},
    {"g = 12", GATES_CONSTANT, 12, KEYS_RANDOM, 1, 1, 1, 0, OTHER, CPU},
    {"every gate at the bound", GATES_BOUND, 0, KEYS_RANDOM, 1, 1, 1, 0, OTHER, CPU},
    {"extreme gates and betas", GATES_EXTREME, 0, KEYS_RANDOM, 1, 1, 1, INFINITY, OTHER, CPU},
    {"zero keys", GATES_SLOW, 0, KEYS_RANDOM, 1, 0, 1, 0, OTHER, CPU},
    {"zero queries", GATES_MIXED, 0, KEYS_RANDOM, 0, 1, 1, 0, OTHER, CPU},
    {"zero keys and queries", GATES_MIXED, 0, KEYS_RANDOM, 0, 0, 1, 0, OTHER, CPU},
    {"zero values", GATES_MIXED, 0, KEYS_RANDOM, 1, 1, 0, 0, OTHER, CPU},
    {"faint writes", GATES_MIXED, 0, KEYS_RANDOM, 1, 1, 1, -16, OTHER, CPU},
    {"huge values", GATES_MIXED, 0, KEYS_RANDOM, 1e15f, 1e17f, 1e30f, 0, OTHER, CPU},
    {"tiny values", GATES_MIXED, 0, KEYS_RANDOM, 1e-4f, 1e-4f, 1e-30f, 0, OTHER, CPU},
};
const int test_case_count = sizeof test_cases / sizeof *test_cases;

const test_case recorded_cases[2] = {
    {.name = "recorded, first layer", .gpu = FLA(4.2e-3, 3.0e-3), .cpu = CPU},
    {.name = "recorded, last layer", .gpu = FLA(4.4e-3, 2.7e-3), .cpu = CPU},
};

const test_case *find_case(const char *name)
{
    for (int i = 0; i < test_case_count; i++)
        if (strcmp(test_cases[i].name, name) == 0) return &test_cases[i];
    die("there is no case \"%s\"", name);
}

bars case_bars(const test_case *c, flash_kda_device device)
{
    return device.type == FLASH_KDA_CPU ? c->cpu : c->gpu;
}

bars ordinary_bars(flash_kda_device device)
{
    return device.type == FLASH_KDA_CPU ? (bars)CPU : (bars)OTHER;
}

double bar_of_bf16_state(double bar)
{
    const double rounding = 0x1p-9; /* half a step of an 8-bit significand */
    return sqrt(bar * bar + rounding * rounding);
}

static uint16_t any_finite_bf16(rng *r)
{
    uint16_t bits = (uint16_t)rng_bits(r);
    return (bits & 0x7f80) == 0x7f80 ? (uint16_t)(bits & 0x80ff) : bits;
}

static void fill_normal(rng *r, uint16_t *x, int64_t count, double size)
{
    for (int64_t i = 0; i < count; i++) x[i] = bf16_from_float((float)(size * rng_normal(r)));
}

/* Every head has one key; "nearly" adds 1% of its own to each token's. */
static void fill_keys(rng *r, problem *p, const test_case *c)
{
    int64_t tokens = p->batch * p->tokens;
    fill_normal(r, p->k, problem_rows(p) * DIM, c->k_size);
    if (c->keys == KEYS_RANDOM || tokens == 0) return;
    double own = c->keys == KEYS_IDENTICAL ? 0.0 : 0.01;
    int64_t row = p->heads * DIM;
    for (int64_t t = tokens - 1; t >= 0; t--)
        for (int64_t i = 0; i < row; i++)
            p->k[t * row + i] =
                bf16_from_float((float)(float_from_bf16(p->k[i]) + own * float_from_bf16(p->k[t * row + i])));
}

static double dt_bias_of(rng *r, case_gates gates, int channel)
{
    switch (gates) {
    case GATES_RANDOM: return rng_normal(r);
    case GATES_SLOW: return rng_uniform(r, -10.0, -5.0);
    case GATES_MIXED: return -10.0 + 16.0 * channel / (DIM - 1);
    default: return 0.0;
    }
}

static void fill_gates(rng *r, problem *p, const test_case *c)
{
    int64_t count = problem_rows(p) * DIM;
    for (int64_t h = 0; h < p->heads; h++) {
        p->A_log[h] = c->gates == GATES_RANDOM ? (float)(0.5 * rng_normal(r)) : 0.0f;
        if (c->gates == GATES_BOUND) p->A_log[h] = 3.0f;
        for (int i = 0; i < DIM; i++) p->dt_bias[h * DIM + i] = (float)dt_bias_of(r, c->gates, i);
    }
    for (int64_t i = 0; i < count; i++) {
        switch (c->gates) {
        case GATES_CONSTANT: p->g[i] = bf16_from_float(c->gate); break;
        case GATES_BOUND: p->g[i] = bf16_from_float(1e4f); break;
        case GATES_EXTREME: p->g[i] = any_finite_bf16(r); break;
        case GATES_RANDOM: p->g[i] = bf16_from_float((float)rng_normal(r)); break;
        default: p->g[i] = bf16_from_float((float)(0.5 * rng_normal(r))); break;
        }
    }
}

void fill_case(problem *p, const test_case *c, uint64_t seed)
{
    rng r = rng_seed(seed);
    int64_t rows = problem_rows(p);
    fill_normal(&r, p->q, rows * DIM, c->q_size);
    fill_keys(&r, p, c);
    fill_normal(&r, p->v, rows * DIM, c->v_size);
    fill_gates(&r, p, c);
    for (int64_t i = 0; i < rows; i++) {
        double beta = c->beta != 0.0f ? c->beta : rng_normal(&r);
        p->beta[i] = isinf(c->beta) ? any_finite_bf16(&r) : bf16_from_float((float)beta);
    }
    double size = c->v_size != 0.0f ? c->v_size : 1.0;
    int64_t states = problem_states(p) * DIM * DIM;
    for (int64_t i = 0; i < states; i++)
        p->initial_state[i] = float_from_bf16(bf16_from_float((float)(0.5 * size * rng_normal(&r))));
}
