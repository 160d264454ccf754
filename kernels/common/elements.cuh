/* Numbers: constants, conversions, and loads and stores of several elements, for all kernels. */
#ifndef FKDA_ELEMENTS_CUH
#define FKDA_ELEMENTS_CUH

#include "ptx.cuh"

namespace fkda
{

/* The tensor core drops the 13 low bits of an fp32 operand. This makes the operand smaller by 0.72 * 2^-11 of
 * itself on average, if mantissas are spread evenly in the logarithm. UNTRUNCATE makes up for the average of
 * a product of two operands; kernels fold it into multiplications that they make anyway. The error that
 * remains is as random and as large as that of rounding. Operands with so few bits that nothing is dropped
 * are not made smaller. They stay as they are if each operand is multiplied by UNTRUNCATE_OPERAND before the
 * product, which does as much for all others. */
constexpr float UNTRUNCATE = 1.0f + 2 * 0.7213f / 2048, UNTRUNCATE_OPERAND = 1.0f + 0.7213f / 2048;

constexpr float LOG2_E = 1.4426950408889634f;

/* 2^x - 1 for x <= 0, with a small relative error also near 0: the Taylor series in y = x ln 2 where x >
 * -0.25. */
__device__ __forceinline__ float ex2_minus_1(float x)
{
    float y = x * 0.6931471805599453f;
    float series = __fmaf_rn(y, 1.0f / 120, 1.0f / 24);
    series = __fmaf_rn(y, series, 1.0f / 6);
    series = __fmaf_rn(y, series, 0.5f);
    series = __fmaf_rn(y, series, 1.0f) * y;
    return x > -0.25f ? series : ex2(x) - 1.0f;
}

/* The two bf16 of a register, as fp32. */
__device__ __forceinline__ float bf16_low(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float bf16_high(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

/* Eight neighbouring bf16, as they are in memory. */
struct Eight {
    uint32_t pair[4];

    __device__ float operator[](int i) const
    {
        return i % 2 ? bf16_high(pair[i / 2]) : bf16_low(pair[i / 2]);
    }
};

__device__ __forceinline__ Eight load_eight(const void *base, long long at)
{
    uint4 x = __ldg(reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(base) + at));
    return {{x.x, x.y, x.z, x.w}};
}

__device__ __forceinline__ void store_four(float *to, float a, float b, float c, float d)
{
    *reinterpret_cast<float4 *>(to) = make_float4(a, b, c, d);
}

__device__ __forceinline__ void store_two(float *to, float a, float b)
{
    *reinterpret_cast<float2 *>(to) = make_float2(a, b);
}

/* 1 / x for a power of two from 2^-126 to 2^126. */
__device__ __forceinline__ float inverse_power(float x)
{
    return __uint_as_float(0x7f000000u - __float_as_uint(x));
}

/* A power of two above x >= 0; at most 2 x if x is a normal number. */
__device__ __forceinline__ float power_above(float x)
{
    return __uint_as_float((__float_as_uint(x) & 0x7f800000u) + 0x00800000u);
}

/* Transposes 4 x 4 words among the four lanes of a quad: lane t gets word t of each lane. */
__device__ __forceinline__ void transpose_in_quad(uint32_t (&x)[4], int t)
{
#pragma unroll
    for (int by = 1; by <= 2; by *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & by) continue;
            const bool upper = (t & by) != 0;
            const uint32_t other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + by], by);
            (upper ? x[i] : x[i + by]) = other;
        }
}

} // namespace fkda

#endif
