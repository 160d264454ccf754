/*
 * The gate on the CPU: from the input g to the log2 decay of a channel, in vectors of fp32. Another gate is
 * another function here, beside bounded_gate(). The including file has included simd.h.
 *
 * The same gate in fp64 is in reference.c, which defines what all others must agree with.
 */
#ifndef FKDA_CPU_GATE_H
#define FKDA_CPU_GATE_H

#include <float.h>
#include <math.h>

static const float LOG2E = 1.44269504088896341f;

/* The constants of a head. */
typedef struct gate_constants {
    float slope; /* -log2(e) exp(A_log) */
    float bound; /* log2(e) lower_bound */
    /* 2^c and 2^-c, where c = floor(half of the largest log2 decay of a chunk) (head.h). */
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
    return (gate_constants){
        .slope = -LOG2E * rate, .bound = bound, .up = ldexpf(1.0f, c), .down = ldexpf(1.0f, -c)};
}

/* log2(e) lower_bound sigmoid(exp(A_log) (g + dt_bias)). The sigmoid has a small relative error everywhere,
 * because slow channels have sigmoids near 0 that add up over thousands of tokens. */
static inline vec bounded_gate(const gate_constants *gate, vec g, vec bias)
{
    return gate->bound * sigmoid_exp2((g + bias) * gate->slope);
}

#endif
