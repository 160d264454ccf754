/*
 * The gate: how a head's parameters A_log, dt_bias and lower_bound become constants, and how a raw gate g of
 * a channel becomes the log2 of its decay.
 *
 * There are three gates:
 *
 *     bounded      ln decay = lower_bound sigmoid(exp(A_log) (g + dt_bias))         lower_bound < 0
 *     softplus     ln decay = -exp(A_log) softplus(g + dt_bias)
 *     activated    ln decay = g
 *
 * All functions here work with the log2 of the decay, because ex2 is an instruction and exp is not. For the
 * bounded gate, with
 *
 *     slope  = -exp(A_log) log2(e)      for each head
 *     offset = dt_bias slope            for each channel
 *     bound  = lower_bound log2(e)
 *
 * the log2 decay is bound / (1 + 2^(g slope + offset)).
 *
 * The portable and the Hopper kernels round differently, so each gate is here once for each. The functions
 * under "Portable" are called in portable/prepare.cuh, decode/prepare.cuh, decode/layer_prepare.cuh and
 * backward/gates.cuh. The Hopper kernels call the functions for the constants in hopper/block/prepare.cuh
 * and those for the log2 decay in hopper/block/prepare_slice.cuh and hopper/block/bad_tokens.cuh. The bounded
 * gate is here a third time, with the same bits, as a branch of activate_gates(), which knows every gate.
 */
#ifndef FKDA_GATE_CUH
#define FKDA_GATE_CUH

#include "elements.cuh"

namespace fkda
{

/* The exponent is held below 100, so that the slope is finite even for an A_log that nobody should have. */
__device__ __forceinline__ float sigmoid_gate_slope(float a_log)
{
    const float exponent = a_log * LOG2_E;
    return ex2(exponent > 100.0f ? 100.0f : exponent) * -LOG2_E;
}

__device__ __forceinline__ float sigmoid_gate_offset(float dt_bias, float slope)
{
    return dt_bias * slope;
}

/* Holds the log2 decay of a token, of a gate without a bound, at -128. 2^-128 leaves nothing that fp32 holds
 * beside what was there before (ex2() flushes denormals to zero), so the hold changes no result. It keeps
 * sums of log2 decays finite, and so small that their differences are exact enough. */
__device__ __forceinline__ float hold_log2_decay(float log2_decay)
{
    return log2_decay < -128.0f ? -128.0f : log2_decay; /* fmaxf would hide a NaN */
}

/* ---- Portable ---- */

/* The portable kernel does the operations of the formula one after the other. tests/torch_ref.py does the
 * operations in PyTorch, and the portable kernel must give equal bits. */

__device__ __forceinline__ float sigmoid_gate_bound(float lower_bound)
{
    return lower_bound * LOG2_E;
}

__device__ __forceinline__ float sigmoid_gate(float g, float slope, float offset, float bound)
{
    return rcp(1.0f + ex2(__fmaf_rn(g, slope, offset))) * bound;
}

/* log(1 + e^x), with a small relative error also where it is tiny: slow channels add up over thousands of
 * tokens. log(1 + y) / y is taken from a polynomial, which is off by 2e-7 of itself for y in [0, 1]. */
__device__ __forceinline__ float softplus(float x)
{
    const float y = ex2(fabsf(x) * -LOG2_E);
    float series = __fmaf_rn(-0.0085391989f, y, 0.0440897346f);
    series = __fmaf_rn(series, y, -0.1076820865f);
    series = __fmaf_rn(series, y, 0.1774528623f);
    series = __fmaf_rn(series, y, -0.2449548692f);
    series = __fmaf_rn(series, y, 0.3327548504f);
    series = __fmaf_rn(series, y, -0.4999740422f);
    series = __fmaf_rn(series, y, 0.9999998211f);
    return __fmaf_rn(series, y, fmaxf(x, 0.0f));
}

/* `slope` is that of the sigmoid gate. */
__device__ __forceinline__ float softplus_gate(float g, float slope, float dt_bias)
{
    return hold_log2_decay(softplus(g + dt_bias) * slope);
}

__device__ __forceinline__ float activated_gate(float g)
{
    return hold_log2_decay(g * LOG2_E);
}

/* ---- Hopper ---- */

/* The Hopper kernels take the bound into the reciprocal: 1 / (e / bound + 1 / bound) takes one multiplication
 * less for each element than bound / (1 + e).
 *
 * Tokens past the end of a sequence have the gate -inf and must decay by exactly nothing. So slope and bound
 * are kept away from zero: with a slope of zero, -inf times the slope would be NaN. */

/* What a preparation warp keeps of the gate of the head that it is working on. */
struct __align__(16) HeadGate
{
    float slope;  /* never zero */
    float factor; /* bounded gate: 1 / bound; softplus: -exp(A_log); activated: 0, and not used */
    int head;
};

constexpr float NEAREST_TO_ZERO = -1e-30f;

__device__ __forceinline__ float hopper_sigmoid_gate_slope(float a_log)
{
    const float slope = sigmoid_gate_slope(a_log);
    return slope > NEAREST_TO_ZERO ? NEAREST_TO_ZERO : slope; /* fminf would hide a NaN */
}

/* An offset of -inf, which is dt_bias = inf, would make NaN of the gates of tokens past the end. */
__device__ __forceinline__ float hopper_sigmoid_gate_offset(float dt_bias, float slope)
{
    const float offset = sigmoid_gate_offset(dt_bias, slope);
    return offset < -3.4e38f ? -3.4e38f : offset;
}

__device__ __forceinline__ float hopper_sigmoid_gate_inverse_bound(float lower_bound)
{
    return 1.0f / (fminf(lower_bound, NEAREST_TO_ZERO) * LOG2_E);
}

__device__ __forceinline__ float hopper_sigmoid_gate(float g, const HeadGate &gate, float offset)
{
    const float e = ex2(__fmaf_rn(g, gate.slope, offset));
    return rcp(__fmaf_rn(e, gate.factor, gate.factor));
}

/* ---- Hopper, every gate ---- */

/* Kernels for other gates keep the constants of each gate in a HeadGate. With z = g slope + offset the log2
 * decay is
 *
 *     bounded      1 / (factor 2^z + factor)    factor = 1 / bound
 *     softplus     factor log2(1 + 2^z)         factor = -exp(A_log)
 *     activated    z, or 0 (no decay) where z is above zero, since a decay is at most 1
 *
 * Tokens past the end of a sequence have a raw gate that decays by exactly nothing: `neutral`. */
struct GateOfCall {
    enum { BOUNDED, SOFTPLUS, ACTIVATED }; /* flash_kda_gate */
    int kind;

    __device__ bool is_bounded() const
    {
        return kind == BOUNDED;
    }
    __device__ bool is_softplus() const
    {
        return kind == SOFTPLUS;
    }
    __device__ bool is_activated() const
    {
        return kind == ACTIVATED;
    }
    __device__ float neutral() const
    {
        return is_bounded() || is_softplus() ? -INFINITY : 0.0f;
    }
    __device__ float slope(float a_log) const
    {
        return is_bounded() ? hopper_sigmoid_gate_slope(a_log) : LOG2_E;
    }
    /* HeadGate::factor. sigmoid_gate_slope is -exp(A_log) log2(e). */
    __device__ float factor(float a_log, float lower_bound) const
    {
        if (is_bounded()) return hopper_sigmoid_gate_inverse_bound(lower_bound);
        return is_softplus() ? sigmoid_gate_slope(a_log) * 0.6931471805599453f : 0.0f;
    }
    __device__ float offset(float dt_bias, float slope) const
    {
        const float x = hopper_sigmoid_gate_offset(dt_bias, slope);
        return x > 3.4e38f ? 3.4e38f : x; /* with inf, tokens past the end would be NaN */
    }
};

/*
 * log2(1 + 2^z), with a relative error of at most 1e-5, and of next to nothing where z is far below zero:
 * such channels are slow, and their decays add up over thousands of tokens. An error of 1e-5 in the logarithm
 * changes what is left of a state by at most 4e-6 of what it was.
 *
 * With t = 2^-|z| in (0, 1] it is max(z, 0) + log2(1 + t). The polynomial is log2(1 + t) / t, exact at zero,
 * with the coefficients that make its largest relative error least.
 */
__device__ __forceinline__ float log2_of_1_plus_ex2(float z)
{
    const float t = ex2(-fabsf(z));
    float p = -3.568439893641124e-2f;
    p = __fmaf_rn(p, t, 1.494525857501165e-1f);
    p = __fmaf_rn(p, t, -3.064344948826834e-1f);
    p = __fmaf_rn(p, t, 4.706447523630256e-1f);
    p = __fmaf_rn(p, t, -7.206831210677531e-1f);
    p = __fmaf_rn(p, t, LOG2_E);
    return __fmaf_rn(p, t, fmaxf(z, 0.0f)); /* t is NaN if z is */
}

/* Makes log2 decays of `count` raw gates of one channel. Those of unbounded gates may be of any size. */
template <int count>
__device__ __forceinline__ void activate_gates(float (&x)[count], GateOfCall call, const HeadGate &gate,
                                               float offset)
{
#pragma unroll
    for (int i = 0; i < count; i++) x[i] = __fmaf_rn(x[i], gate.slope, offset);
    if (call.is_bounded()) {
#pragma unroll
        for (int i = 0; i < count; i++) x[i] = rcp(__fmaf_rn(ex2(x[i]), gate.factor, gate.factor));
    } else if (call.is_softplus()) {
#pragma unroll
        for (int i = 0; i < count; i++) x[i] = gate.factor * log2_of_1_plus_ex2(x[i]);
    } else {
#pragma unroll
        for (int i = 0; i < count; i++) x[i] = min_or_nan(x[i], 0.0f);
    }
}

} // namespace fkda

#endif
