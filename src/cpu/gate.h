/* The gate on the CPU: from the tensor g to the log2 decay of a channel, in vectors of fp32. Part of head.h.
 *
 * The same gates in fp64 are in reference.c, which defines what all others must agree with.
 */
#ifndef FKDA_CPU_GATE_H
#define FKDA_CPU_GATE_H

#include <float.h>
#include <math.h>

#include "../problem.h"
#include "simd.h"

static const float LOG2E = 1.44269504088896341f;

/* The constants of a head. */
typedef struct gate_constants {
    float rate;  /* exp(A_log) */
    float slope; /* -log2(e) rate, of the bounded gate */
    float bound; /* log2(e) lower_bound, of the bounded gate */
    /* 2^c and 2^-c, for the bounded gate. c is half of the size of the log2 decay of a chunk whose gates are
     * all at the bound, rounded down (prepare.h). */
    float up, down;
} gate_constants;

/* exp(A_log) is held to at most half of the largest fp32 number, so that the slope is finite. An infinite
 * slope would make a NaN of g + dt_bias = 0, since infinity times 0 is NaN. */
static inline gate_constants make_gate_constants(float A_log, float lower_bound, int chunk)
{
    float rate = expf(A_log);
    if (rate > FLT_MAX / 2) rate = FLT_MAX / 2;
    const float bound = LOG2E * lower_bound;
    const int c = (int)(-0.5f * (float)chunk * bound);
    return (gate_constants){.rate = rate,
                            .slope = -LOG2E * rate,
                            .bound = bound,
                            .up = ldexpf(1.0f, c),
                            .down = ldexpf(1.0f, -c)};
}

/* log2(e) lower_bound sigmoid(exp(A_log) (g + dt_bias)). The sigmoid has a small relative error everywhere,
 * because slow channels have sigmoids near 0 that add up over thousands of tokens. */
static inline vec bounded_gate(const gate_constants *gate, vec g, vec bias)
{
    return gate->bound * sigmoid_exp2((g + bias) * gate->slope);
}

/* -log2(e) exp(A_log) softplus(g + dt_bias). In powers of 2, log2(e) softplus(x) = log2(1 + 2^(x log2(e))) =
 * max(y, 0) + log2(1 + 2^-|y|) with y = x log2(e). Its relative error is small everywhere too. */
static inline vec softplus_gate(const gate_constants *gate, vec g, vec bias)
{
    const vec y = (g + bias) * LOG2E;
    const vec more = choose(y > 0.0f, y, splat(0.0f));
    return -gate->rate * (more + log2_1_plus(exp2_at_most_1(choose(y > 0.0f, -y, y))));
}

/* log2(e) g. A g above 0 is not allowed. Above the range of exp2_at_most_1() it becomes infinity, which makes
 * NaN of the token's decay. */
static inline vec activated_gate(vec g)
{
    const vec y = g * LOG2E;
    return choose(y > 125.0f, splat(INFINITY), y);
}

#endif
