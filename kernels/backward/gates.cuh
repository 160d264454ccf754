/* The gate of a head and its derivatives, and the write strength, for the backward pass. */
#ifndef FKDA_BACKWARD_GATES_CUH
#define FKDA_BACKWARD_GATES_CUH

#include "../../include/flash_kda.h"
#include "../common/gate.cuh"
#include "../common/task.cuh"

namespace fkda
{

/* The gate of a head, in shared memory. */
struct GateOfHead {
    float slope; /* -exp(A_log) log2(e) */
    float bias[DIM];
};

/* The gate of one channel of a head. Each use makes a ChannelGate of its own, for lack of registers. */
struct ChannelGate {
    int kind;
    float slope, rate, bound, lower_bound, bias; /* rate: exp(A_log) */

    __device__ ChannelGate(const fkda_fwd_args &args, const GateOfHead &head, int channel)
        : ChannelGate(args, args.gate, head.slope, head.bias[channel])
    {
    }
    __device__ ChannelGate(const fkda_fwd_args &args, int gate, float slope_of_head, float bias_of_channel)
        : kind(gate), slope(slope_of_head), rate(slope * (-1.0f / LOG2_E)),
          bound(sigmoid_gate_bound(args.lower_bound)), lower_bound(args.lower_bound), bias(bias_of_channel)
    {
    }

    __device__ float log2_decay(float g) const
    {
        if (kind == FLASH_KDA_GATE_BOUNDED) return sigmoid_gate(g + bias, slope, 0.0f, bound);
        if (kind == FLASH_KDA_GATE_SOFTPLUS) return softplus_gate(g, slope, bias);
        return activated_gate(g);
    }

    /* x where it is within [-most, most], and else that end. */
    static __device__ float clamp_to(float x, float most)
    {
        x = x > most ? most : x; /* fminf would hide a NaN */
        return x < -most ? -most : x;
    }

    /* The derivatives of the natural logarithm of the decay. A product with an infinite argument is 0 where
     * the sigmoid is, and not NaN. */
    __device__ void differentiate(float g, float &by_g, float &by_A_log) const
    {
        const float x = g + bias;
        by_g = 1.0f, by_A_log = 0.0f;
        if (kind == FLASH_KDA_GATE_BOUNDED) {
            const float y = x * slope, both = rcp(1.0f + ex2(y)) * rcp(1.0f + ex2(-y)) * lower_bound;
            by_g = both * rate;
            by_A_log = both * clamp_to(y, 125.0f) * (-1.0f / LOG2_E);
        } else if (kind == FLASH_KDA_GATE_SOFTPLUS) {
            by_g = -rate * rcp(1.0f + ex2(x * -LOG2_E));
            by_A_log = clamp_to(softplus(x) * slope, 0x1p100f) * (1.0f / LOG2_E);
        }
    }
};

/* All threads of the CTA call it, and meet before the gate is read. */
__device__ __forceinline__ void load_gate(GateOfHead &gate, const fkda_fwd_args &args, int head)
{
    int cta, channel; /* the thread's index is read again: no register keeps it */
    read_indices(cta, channel);
    if (channel == 0) gate.slope = sigmoid_gate_slope(args.A_log ? args.A_log[head] : 0.0f);
    if (channel < DIM) gate.bias[channel] = args.dt_bias ? args.dt_bias[head * DIM + channel] : 0.0f;
}

/* The write strength, and its derivative. */
__device__ __forceinline__ float write_strength(int kind, float beta, float &slope)
{
    slope = 1.0f;
    if (kind == FLASH_KDA_BETA_ACTIVATED) return beta;
    const float factor = kind == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.0f : 1.0f,
                b = rcp(1.0f + ex2(beta * -LOG2_E)), not_b = rcp(1.0f + ex2(beta * LOG2_E));
    slope = factor * b * not_b;
    return factor * b;
}

} // namespace fkda

#endif
