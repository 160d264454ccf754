/* PTX instructions that every architecture from sm_80 on has, as named functions. */
#ifndef FKDA_PTX_CUH
#define FKDA_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace fkda
{

__device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* The dynamic shared memory of the CTA. */
__device__ __forceinline__ unsigned char *cta_memory()
{
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}

/* Tells the compiler that a pointer points to global memory, where it cannot see this for itself. */
template <class T> __device__ __forceinline__ T *global_memory(T *pointer)
{
    __builtin_assume(__isGlobal(pointer));
    return pointer;
}

/* The indices of the CTA and of the thread in it. They are read again at each call, so the compiler need not
 * keep them, or what is made from them, in registers. */
__device__ __forceinline__ void read_indices(int &cta, int &thread)
{
    asm volatile("mov.u32 %0, %%ctaid.x; mov.u32 %1, %%tid.x;" : "=r"(cta), "=r"(thread));
}

/* Makes the compiler forget where x comes from. What is made of x in a loop is then computed there, and not
 * ahead of the loop, where it would occupy registers. */
__device__ __forceinline__ void forget(uint32_t &x)
{
    asm volatile("" : "+r"(x));
}

__device__ __forceinline__ void forget(int &x)
{
    asm volatile("" : "+r"(x));
}

__device__ __forceinline__ void forget(long long &x)
{
    asm volatile("" : "+l"(x));
}

/* Special functions. Their relative error is near 1e-7, and they flush denormals to zero. */
__device__ __forceinline__ float ex2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rcp(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rsqrt_approx(float x)
{
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The smaller one, or NaN if one of them is NaN. */
__device__ __forceinline__ float min_or_nan(float x, float y)
{
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(y));
    return least;
}

/* d += a b on 16 x 8 += (16 x 8) (8 x 8) tiles of tf32. Lane (g, t) = (lane / 4, lane % 4) has
 *   of d: rows g, g, g + 8, g + 8 and columns 2 t, 2 t + 1, 2 t, 2 t + 1
 *   of a: rows g, g + 8, g, g + 8 and depths t, t, t + 4, t + 4
 *   of b: column g and depths t, t + 4
 * The tensor core ignores the 13 low bits of a and b: fp32 is truncated to tf32. */
__device__ __forceinline__ void mma_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                                         float b1)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
          "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

/* d += a b on 16 x 8 += (16 x 16) (16 x 8) tiles of bf16, with two neighbouring depths in a register. Rows
 * and columns are as in mma_tf32; a0 to a3 begin with depths 2 t, 2 t, 2 t + 8, 2 t + 8, and b0 and b1 with
 * depths 2 t, 2 t + 8. */
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* As mma_bf16, for fp16. */
__device__ __forceinline__ void mma_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Loads four 8 x 8 matrices of 16-bit elements. Lane i names the address of row i % 8 of matrix i / 8.
 * Register m of lane (g, t) gets columns 2 t and 2 t + 1 of row g of matrix m. */
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row)
{
    load_matrices(r, shared_address(row));
}

/* As load_matrices, but transposes each matrix on the way: register m of lane (g, t) gets rows 2 t and 2 t +
 * 1 of column g of matrix m. */
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void *row)
{
    load_matrices_transposed(r, shared_address(row));
}

/* Transposes one 8 x 8 matrix of 16-bit elements in registers, two elements to a lane. It is volatile so that
 * the compiler does not move it to where only some lanes of the warp come. */
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* Stores 16 bytes to global memory without a branch, or nothing if !valid. */
__device__ __forceinline__ void store_16_if(void *to, uint4 x, bool valid)
{
    asm volatile("{\n.reg .pred valid;\nsetp.ne.b32 valid, %5, 0;\n"
                 "@valid st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
                 "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(static_cast<int>(valid))
                 : "memory");
}

/* Copies 16 bytes from global to shared memory in the background, or writes zeros if !valid. */
__device__ __forceinline__ void copy_async_16(void *to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most `pending` of the groups that this thread has committed are in flight. */
template <int pending> __device__ __forceinline__ void copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/* Named barriers, number first + index: `threads` threads of the CTA take part, some that wait and some that
 * only arrive. The sum is made in the instruction's own assembly, because the compiler would keep it in a
 * register across loops. */
template <int first, int threads> __device__ __forceinline__ void barrier_sync(int index)
{
    asm volatile("{ .reg .u32 id; add.u32 id, %0, %1; bar.sync id, %2; }" ::"r"(index), "n"(first),
                 "n"(threads)
                 : "memory");
}

template <int first, int threads> __device__ __forceinline__ void barrier_arrive(int index)
{
    asm volatile("{ .reg .u32 id; add.u32 id, %0, %1; bar.arrive id, %2; }" ::"r"(index), "n"(first),
                 "n"(threads)
                 : "memory");
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

__device__ __forceinline__ uint32_t pack_half(float low, float high)
{
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* The two fp16 of a register, as fp32. */
__device__ __forceinline__ float half_low(uint32_t pair)
{
    float x;
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(x) : "r"(pair));
    return x;
}

__device__ __forceinline__ float half_high(uint32_t pair)
{
    float x;
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, high;\n}" : "=f"(x) : "r"(pair));
    return x;
}

/* The products of two pairs of fp16. */
__device__ __forceinline__ uint32_t multiply_halves(uint32_t x, uint32_t y)
{
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
    return product;
}

} // namespace fkda

#endif
