/* Powers of two that fp32 numbers are divided by to become fp16 operands. */
#ifndef FKDA_HOPPER_BWD_UNITS_CUH
#define FKDA_HOPPER_BWD_UNITS_CUH

#include "../../common/elements.cuh"

namespace fkda
{

/* A power of two that numbers are divided by before they become fp16. The largest of them becomes 2^13 to
 * 2^14, so that numbers 2^27 times smaller still have all bits of fp16. If one of them is infinite, all of
 * them become NaN: divided by a huge unit the others would be 0, and what depends on them would look
 * right. */
struct Unit {
    float size, inverse;

    /* `largest`: the bits of the largest magnitude. */
    __device__ __forceinline__ explicit Unit(uint32_t largest)
    {
        const bool finite = largest < 0x7f800000u;
        const float above = power_above(__uint_as_float(largest)), power = above < 0x1p-100f  ? 0x1p-100f
                                                                           : above > 0x1p126f ? 0x1p126f
                                                                                              : above;
        size = finite ? power * 0x1p-14f : NAN;
        inverse = finite ? inverse_power(power * 0x1p-14f) : NAN;
    }
};

/* The bits of the largest magnitude, without NaN: a NaN stays one as an operand, whatever its unit is. */
template <int tiles> __device__ __forceinline__ uint32_t largest_of(const float (&x)[tiles][4])
{
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * tiles; i++) most = fmaxf(most, fabsf(x[i / 4][i % 4]));
    return __float_as_uint(most);
}

/* Two tiles of an accumulator as an A operand, multiplied by `factor`. */
__device__ __forceinline__ void pack(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4],
                                     float factor)
{
    a[0] = pack_half(low[0] * factor, low[1] * factor);
    a[1] = pack_half(low[2] * factor, low[3] * factor);
    a[2] = pack_half(high[0] * factor, high[1] * factor);
    a[3] = pack_half(high[2] * factor, high[3] * factor);
}

/* The same of what the operand that pack() made lacks. */
__device__ __forceinline__ void pack_lack(uint32_t (&lack)[4], const uint32_t (&a)[4], const float (&low)[4],
                                          const float (&high)[4], float factor)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *const x = i / 2 ? high : low;
        lack[i] = pack_half(__fmaf_rn(x[i % 2 * 2], factor, -half_low(a[i])),
                            __fmaf_rn(x[i % 2 * 2 + 1], factor, -half_high(a[i])));
    }
}

} // namespace fkda

#endif
