/* The kinds of input that the library is tested with, and the error that each may have. */
#ifndef SUPPORT_CASES_H
#define SUPPORT_CASES_H

#include "problem.h"

typedef enum case_gates {
    GATES_RANDOM,   /* A_log, dt_bias and g are normal numbers, so most channels forget fast */
    GATES_SLOW,     /* -2e-4 to -3e-2 nats a token */
    GATES_MIXED,    /* from -2e-4 nats a token in channel 0 to -5 in the last */
    GATES_CONSTANT, /* g is test_case.constant_gate, A_log = dt_bias = 0 */
    GATES_BOUND,    /* so high that every log decay is lower_bound */
    GATES_EXTREME,  /* any finite bf16, of both signs: nearly every token forgets all or nothing */
} case_gates;

typedef enum case_betas {
    BETAS_RANDOM,   /* normal numbers */
    BETAS_CONSTANT, /* test_case.constant_beta everywhere */
    BETAS_EXTREME,  /* any finite bf16, of both signs */
} case_betas;

typedef enum case_keys { KEYS_RANDOM, KEYS_IDENTICAL, KEYS_NEARLY_IDENTICAL } case_keys;

typedef struct bars {
    double out, state; /* relative RMS against the fp64 recurrence */
} bars;

typedef struct test_case {
    const char *name;
    case_gates gates;
    float constant_gate; /* for GATES_CONSTANT */
    case_keys keys;
    struct {
        float q, k, v; /* standard deviations; the initial state has half of v's, or 1 if v's is 0 */
    } sizes;
    case_betas betas;
    float constant_beta; /* for BETAS_CONSTANT: logits of the write strength */
    bars gpu, cpu;
} test_case;

extern const test_case test_cases[];
extern const int test_case_count;

/* The recorded first and last layer of a model, of which a case has name and bars alone; and their files in
 * data/. */
enum { RECORDED_CASES = 2 };
extern const test_case recorded_cases[RECORDED_CASES];
extern const char *const recorded_files[RECORDED_CASES];

const test_case *find_case(const char *name);

bars case_bars(const test_case *c, flash_kda_device device);
bars ordinary_bars(flash_kda_device device); /* for inputs that are none of the cases */

/* The bar of a state that is rounded to bf16. The rounding error and the bar add up in squares. */
double bar_of_bf16_state(double bar);

/* Fills every tensor of the problem. The same seed gives the same numbers everywhere. */
void fill_case(problem *p, const test_case *c, uint64_t seed);

#endif
