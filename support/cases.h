/* The kinds of input that the library is held to, with the error each may have. */
#ifndef SUPPORT_CASES_H
#define SUPPORT_CASES_H

#include "problem.h"

typedef enum case_gates {
    GATES_RANDOM,   /* A_log, dt_bias and g normal: every channel its own pace, fast on the whole */
    GATES_SLOW,     /* -2e-4 to -3e-2 nats a token */
    GATES_MIXED,    /* from -2e-4 nats a token in channel 0 to -5 in the last */
    GATES_CONSTANT, /* g everywhere case.gate, A_log = dt_bias = 0 */
    GATES_BOUND,    /* so high that every log decay is lower_bound */
    GATES_EXTREME,  /* any finite bf16, of both signs: all or nothing */
} case_gates;

typedef enum case_keys { KEYS_RANDOM, KEYS_IDENTICAL, KEYS_NEARLY_IDENTICAL } case_keys;

typedef struct bars {
    double out, state; /* relative RMS against the fp64 recurrence */
} bars;

typedef struct test_case {
    const char *name;
    case_gates gates;
    float gate;
    case_keys keys;
    float q_size, k_size, v_size; /* of the normal numbers; v_size also of the initial state */
    float beta;                   /* constant; 0 means normal numbers, infinity any finite bf16 */
    bars gpu, cpu;
} test_case;

extern const test_case test_cases[];
extern const int test_case_count;
extern const test_case recorded_cases[2]; /* the recorded first and last layer: name and bars only */

const test_case *find_case(const char *name);

bars case_bars(const test_case *c, flash_kda_device device);
bars ordinary_bars(flash_kda_device device); /* for inputs that are no case of these */

/* What rounding a state to bf16 adds at most, and how it adds to a bar: in squares. */
double bar_of_bf16_state(double bar);

/* Fills every tensor of the problem. The same seed gives the same numbers everywhere. */
void fill_case(problem *p, const test_case *c, uint64_t seed);

#endif
