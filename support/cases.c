#include "cases.h"

#include <math.h>
#include <string.h>

/*
 * The bars. FLA: 1.05 times the error of flash-linear-attention's Triton kernels on the same kind of input,
 * measured on an H100. OTHER: kinds of input for which there is no such measurement. HARD: identical keys
 * with a gate that forgets nothing, where each token must cancel what the token before it wrote, so rounding
 * errors grow. CPU: a CPU computes in fp32, so its output is as good as the output's rounding to bf16.
 */
#define FLA(out_error, state_error)                                                                          \
    {                                                                                                        \
        .out = 1.05 * (out_error), .state = 1.05 * (state_error)                                             \
    }
#define OTHER                                                                                                \
    {                                                                                                        \
        .out = 5.6e-3, .state = 4.8e-3                                                                       \
    }
#define HARD                                                                                                 \
    {                                                                                                        \
        .out = 2e-2, .state = 2.7e-2                                                                         \
    }
#define CPU                                                                                                  \
    {                                                                                                        \
        .out = 2.2e-3, .state = 1e-5                                                                         \
    }

/* Sizes of ordinary inputs. */
#define ONES                                                                                                 \
    {                                                                                                        \
        .q = 1, .k = 1, .v = 1                                                                               \
    }

const test_case test_cases[] = {
    {
        .name = "random",
        .gates = GATES_RANDOM,
        .sizes = ONES,
        .gpu = FLA(4.1e-3, 2.9e-3),
        .cpu = CPU,
    },
    {
        .name = "slow gates",
        .gates = GATES_SLOW,
        .sizes = ONES,
        .gpu = FLA(4.9e-3, 4.1e-3),
        .cpu = CPU,
    },
    {
        .name = "channels from fast to slow",
        .gates = GATES_MIXED,
        .sizes = ONES,
        .gpu = FLA(4.9e-3, 3.9e-3),
        .cpu = CPU,
    },
    {
        .name = "g = -8",
        .gates = GATES_CONSTANT,
        .constant_gate = -8,
        .sizes = ONES,
        .gpu = FLA(5.4e-3, 4.5e-3),
        .cpu = CPU,
    },
    {
        .name = "g = 8",
        .gates = GATES_CONSTANT,
        .constant_gate = 8,
        .sizes = ONES,
        .gpu = FLA(3.7e-3, 2.2e-3),
        .cpu = CPU,
    },
    {
        .name = "identical keys",
        .gates = GATES_CONSTANT,
        .constant_gate = -12,
        .keys = KEYS_IDENTICAL,
        .sizes = ONES,
        .betas = BETAS_CONSTANT,
        .constant_beta = 8,
        .gpu = HARD,
        .cpu = CPU,
    },
    {
        .name = "nearly identical keys",
        .gates = GATES_CONSTANT,
        .constant_gate = -12,
        .keys = KEYS_NEARLY_IDENTICAL,
        .sizes = ONES,
        .betas = BETAS_CONSTANT,
        .constant_beta = 8,
        .gpu = FLA(3.5e-2, 7.3e-2),
        .cpu = CPU,
    },
    {
        .name = "g = -12",
        .gates = GATES_CONSTANT,
        .constant_gate = -12,
        .sizes = ONES,
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "g = 0",
        .gates = GATES_CONSTANT,
        .constant_gate = 0,
        .sizes = ONES,
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "g = 12",
        .gates = GATES_CONSTANT,
        .constant_gate = 12,
        .sizes = ONES,
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "every gate at the bound",
        .gates = GATES_BOUND,
        .sizes = ONES,
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "extreme gates and betas",
        .gates = GATES_EXTREME,
        .sizes = ONES,
        .betas = BETAS_EXTREME,
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "zero keys",
        .gates = GATES_SLOW,
        .sizes = {.q = 1, .k = 0, .v = 1},
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "zero queries",
        .gates = GATES_MIXED,
        .sizes = {.q = 0, .k = 1, .v = 1},
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "zero keys and queries",
        .gates = GATES_MIXED,
        .sizes = {.q = 0, .k = 0, .v = 1},
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "zero values",
        .gates = GATES_MIXED,
        .sizes = {.q = 1, .k = 1, .v = 0},
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "faint writes",
        .gates = GATES_MIXED,
        .sizes = ONES,
        .betas = BETAS_CONSTANT,
        .constant_beta = -16,
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "huge values",
        .gates = GATES_MIXED,
        .sizes = {.q = 1e15f, .k = 1e17f, .v = 1e30f},
        .gpu = OTHER,
        .cpu = CPU,
    },
    {
        .name = "tiny values",
        .gates = GATES_MIXED,
        .sizes = {.q = 1e-4f, .k = 1e-4f, .v = 1e-30f},
        .gpu = OTHER,
        .cpu = CPU,
    },
};
const int test_case_count = sizeof test_cases / sizeof *test_cases;

const test_case recorded_cases[RECORDED_CASES] = {
    {.name = "recorded, first layer", .gpu = FLA(4.2e-3, 3.0e-3), .cpu = CPU},
    {.name = "recorded, last layer", .gpu = FLA(4.4e-3, 2.7e-3), .cpu = CPU},
};
const char *const recorded_files[RECORDED_CASES] = {"kda_layer0.safetensors", "kda_layer3.safetensors"};

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

/* KEYS_IDENTICAL: all tokens of a head have one key. KEYS_NEARLY_IDENTICAL: 1% of a token's key is its own.
 * */
static void fill_keys(rng *r, problem *p, const test_case *c)
{
    int64_t tokens = p->batch * p->tokens;
    fill_normal(r, p->k, problem_rows(p) * DIM, c->sizes.k);
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
        case GATES_CONSTANT: p->g[i] = bf16_from_float(c->constant_gate); break;
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
    fill_normal(&r, p->q, rows * DIM, c->sizes.q);
    fill_keys(&r, p, c);
    fill_normal(&r, p->v, rows * DIM, c->sizes.v);
    fill_gates(&r, p, c);
    for (int64_t i = 0; i < rows; i++) {
        switch (c->betas) {
        case BETAS_CONSTANT: p->beta[i] = bf16_from_float(c->constant_beta); break;
        case BETAS_EXTREME: p->beta[i] = any_finite_bf16(&r); break;
        default: p->beta[i] = bf16_from_float((float)rng_normal(&r)); break;
        }
    }
    double size = c->sizes.v != 0.0f ? c->sizes.v : 1.0;
    int64_t states = problem_states(p) * DIM * DIM;
    for (int64_t i = 0; i < states; i++)
        p->initial_state[i] = float_from_bf16(bf16_from_float((float)(0.5 * size * rng_normal(&r))));
}
