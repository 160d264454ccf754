/* Four neighbouring channels of K of one row of V of a state, from and to memory. */
#ifndef FKDA_PORTABLE_STATE_MEMORY_CUH
#define FKDA_PORTABLE_STATE_MEMORY_CUH

#include "shared.cuh"

namespace fkda
{

/* States [V, K]: the four channels are neighbours, and begin at element `at`. */
__device__ __forceinline__ float4 load_channels(const void *states, bool is_bf16, long long at)
{
    if (!is_bf16) return *reinterpret_cast<const float4 *>(static_cast<const float *>(states) + at);
    const uint2 x = *reinterpret_cast<const uint2 *>(static_cast<const uint16_t *>(states) + at);
    return make_float4(bf16_low(x.x), bf16_high(x.x), bf16_low(x.y), bf16_high(x.y));
}

__device__ __forceinline__ void store_channels(void *states, bool is_bf16, long long at, float4 x)
{
    if (is_bf16)
        *reinterpret_cast<uint2 *>(static_cast<uint16_t *>(states) + at) =
            make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
    else
        *reinterpret_cast<float4 *>(static_cast<float *>(states) + at) = x;
}

/* States [K, V]: each channel is DIM elements after the one before it. */
__device__ __forceinline__ float4 load_channels_k_first(const void *states, bool is_bf16, long long at)
{
    float x[4];
#pragma unroll
    for (int c = 0; c < 4; c++)
        x[c] = is_bf16 ? bf16_low(static_cast<const uint16_t *>(states)[at + c * DIM])
                       : static_cast<const float *>(states)[at + c * DIM];
    return make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void store_channels_k_first(void *states, bool is_bf16, long long at, float4 y)
{
    const float x[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int c = 0; c < 4; c++)
        if (is_bf16)
            reinterpret_cast<uint16_t *>(states)[at + c * DIM] = static_cast<uint16_t>(pack_bf16(x[c], 0.0f));
        else
            static_cast<float *>(states)[at + c * DIM] = x[c];
}

} // namespace fkda

#endif
