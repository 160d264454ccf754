/* Loads, stores and flags that C++ cannot express, as named functions. */
#ifndef FKDA_HOPPER_PTX_MEMORY_CUH
#define FKDA_HOPPER_PTX_MEMORY_CUH

#include "../../common/ptx.cuh"

namespace fkda
{

/* Loads from shared memory that stay where the program has them: the compiler would otherwise move them. */
__device__ __forceinline__ float4 load_shared_four(const float *from)
{
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(shared_address(from))
                 : "memory");
    return x;
}

__device__ __forceinline__ float load_shared(const float *from)
{
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(shared_address(from)) : "memory");
    return x;
}

/* Loads from global memory, and lets the 256 bytes around it come to L2. */
__device__ __forceinline__ float load_ahead(const float *from)
{
    float x;
    asm("ld.global.nc.L2::256B.f32 %0, [%1];" : "=f"(x) : "l"(from));
    return x;
}

/* The same of two neighbouring ones. */
__device__ __forceinline__ float2 load_two_ahead(const float *from)
{
    float2 x;
    asm("ld.global.nc.L2::256B.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from));
    return x;
}

/* Lets `bytes` bytes come to L2; both are multiples of 16. */
__device__ __forceinline__ void prefetch_to_l2(const void *from, int bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

/* The 16 bits at an address in shared memory. */
__device__ __forceinline__ uint32_t load_shared_16(uint32_t address)
{
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
    return x;
}

/* The next five load from global memory without a branch, and change nothing if !valid. The offset from
 * `from` is a template argument, which the instruction encodes. */

/* Two neighbouring fp32, `elements` elements after `from`. */
template <int elements>
__device__ __forceinline__ void load_two_if(float &x, float &y, const void *from, bool valid)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p ld.global.v2.f32 {%0, %1}, [%2 + %4];\n}"
                 : "+f"(x), "+f"(y)
                 : "l"(from), "r"(static_cast<int>(valid)), "n"(4 * elements));
}

/* Two neighbouring bf16, `elements` elements after `from`; x gets the bits of both. */
template <int elements> __device__ __forceinline__ void load_pair_if(float &x, const void *from, bool valid)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.b32 %0, [%1 + %3];\n}"
                 : "+f"(x)
                 : "l"(from), "r"(static_cast<int>(valid)), "n"(2 * elements));
}

/* One fp32, `elements` elements after `from`. */
template <int elements> __device__ __forceinline__ void load_one_if(float &x, const void *from, bool valid)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.f32 %0, [%1 + %3];\n}"
                 : "+f"(x)
                 : "l"(from), "r"(static_cast<int>(valid)), "n"(4 * elements));
}

/* One bf16, `elements` elements after `from`; the lower half of x gets its bits. */
template <int elements> __device__ __forceinline__ void load_bf16_if(float &x, const void *from, bool valid)
{
    uint32_t bits = __float_as_uint(x);
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.u16 %0, [%1 + %3];\n}"
                 : "+r"(bits)
                 : "l"(from), "r"(static_cast<int>(valid)), "n"(2 * elements));
    x = __uint_as_float(bits);
}

/* Four fp32, `tiles` tiles of a StateImage (join/layouts.cuh) after `from`. */
template <int tiles> __device__ __forceinline__ void load_four_if(float (&x)[4], const void *from, bool valid)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p ld.global.v4.f32 {%0, %1, %2, %3}, [%4 + %6];\n}"
        : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
        : "l"(from), "r"(static_cast<int>(valid)), "n"(512 * tiles));
}

/* The inverse of load_matrices. */
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* The inverse of load_matrices_transposed. */
__device__ __forceinline__ void store_matrices_transposed(uint32_t row, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* A flag in global memory, with which a warp tells warps of other CTAs that something was written. A thread
 * that sees the flag set also sees everything that this warp wrote before it set the flag. If the warp has
 * met other warps at a barrier of its CTA before, that thread also sees what those warps wrote before the
 * barrier: a release is cumulative over what the barrier has ordered. carry_rows() in join/relay_join.cuh
 * relies on that. */
__device__ __forceinline__ void set_flag(int *flag)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(flag) : "memory");
}

/* Waits for a flag, for which each lane may name its own. The wait has no bound of its own: patience.cuh says
 * who gives up. */
__device__ __forceinline__ void await_flag(const int *flag)
{
    int set = 0;
    while (!set) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
    __syncwarp();
}

} // namespace fkda

#endif
