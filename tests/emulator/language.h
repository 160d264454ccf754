/* What CUDA C++ has and C++ does not have, as far as the kernels use it. */
#ifndef FKDA_EMULATOR_LANGUAGE_H
#define FKDA_EMULATOR_LANGUAGE_H

#include <algorithm>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "machine.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx (emulator::thread().thread)
#define blockIdx (emulator::thread().block)
#define blockDim (emulator::thread().block_dim)
#define gridDim (emulator::thread().grid_dim)

using __nv_bfloat16 = uint16_t; /* kernels only move it */

using std::max;
using std::min;

struct float2 {
    float x, y;
};
struct __align__(16) float4
{
    float x, y, z, w;
};
struct uint2 {
    uint32_t x, y;
};
struct __align__(16) uint4
{
    uint32_t x, y, z, w;
};

inline float2 make_float2(float x, float y)
{
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}
inline uint2 make_uint2(uint32_t x, uint32_t y)
{
    return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return {x, y, z, w};
}

inline float __uint_as_float(uint32_t x)
{
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline uint32_t __float_as_uint(float x)
{
    uint32_t y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline float __fmaf_rn(float x, float y, float z)
{
    return fmaf(x, y, z);
}
template <class T> T __ldg(const T *at)
{
    return *at;
}
/* Streaming loads and stores. */
template <class T> T __ldcs(const T *at)
{
    return *at;
}
template <class T> void __stcs(T *at, T x)
{
    *at = x;
}
inline int atomicAdd(int *at, int x)
{
    return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);
}

inline unsigned long long atomicAdd(unsigned long long *at, unsigned long long x)
{
    return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);
}

inline void __syncthreads()
{
    emulator::cta_sync();
}
inline void __syncwarp()
{
    emulator::gather("__syncwarp", nullptr, [](void *const *) {});
}

/* Each lane gets the value of the lane it names. */
template <class T> T __shfl_sync(unsigned, T mine, int from)
{
    struct {
        T in;
        int from;
        T out;
    } x = {mine, from, mine};
    using X = decltype(x);
    emulator::gather("__shfl_sync", &x, [](void *const *all) {
        for (int i = 0; i < 32; i++) {
            X *to = static_cast<X *>(all[i]);
            to->out = static_cast<X *>(all[to->from % 32])->in;
        }
    });
    return x.out;
}
template <class T> T __shfl_xor_sync(unsigned mask, T mine, int bits)
{
    return __shfl_sync(mask, mine, static_cast<int>(threadIdx.x) % 32 ^ bits);
}
template <class T> T __shfl_up_sync(unsigned mask, T mine, int by)
{
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return __shfl_sync(mask, mine, lane < by ? lane : lane - by);
}

/* All lanes get what `combine` makes of the values of all lanes. */
template <class T, class Combine> T reduce(const char *what, T mine, Combine combine)
{
    emulator::gather(what, &mine, [&](void *const *all) {
        T sum = *static_cast<T *>(all[0]);
        for (int i = 1; i < 32; i++) sum = combine(sum, *static_cast<T *>(all[i]));
        for (int i = 0; i < 32; i++) *static_cast<T *>(all[i]) = sum;
    });
    return mine;
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t x)
{
    return reduce("__reduce_min_sync", x, [](uint32_t a, uint32_t b) { return min(a, b); });
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t x)
{
    return reduce("__reduce_max_sync", x, [](uint32_t a, uint32_t b) { return max(a, b); });
}
inline int __any_sync(unsigned, int x)
{
    return reduce("__any_sync", x, [](int a, int b) { return a || b; });
}
inline uint32_t __ballot_sync(unsigned, int x)
{
    const uint32_t bit = x ? 1u << threadIdx.x % 32 : 0;
    return reduce("__ballot_sync", bit, [](uint32_t a, uint32_t b) { return a | b; });
}
/* Fibers of one launch that share memory never run at the same time. */
template <class T> T atomicMin(T *to, T x)
{
    const T before = *to;
    *to = min(before, x);
    return before;
}
inline int __ffs(int x)
{
    return __builtin_ffs(x);
}

#endif
