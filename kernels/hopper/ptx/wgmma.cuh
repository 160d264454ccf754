/*
 * wgmma, the asynchronous tensor core products of a warpgroup, and the descriptors of its operands in shared
 * memory, as named functions.
 */
#ifndef FKDA_HOPPER_PTX_WGMMA_CUH
#define FKDA_HOPPER_PTX_WGMMA_CUH

#include "../../common/ptx.cuh"

namespace fkda
{

/* ---- Descriptors --------------------------------------------------------------------------------------- */

/* A shared memory address in the form that descriptors have: in units of 16 bytes, and without the rank of
 * the CTA in its cluster, which addresses hold above bit 24 and which would make the descriptor invalid. */
__device__ __forceinline__ uint32_t descriptor_address(const void *tile)
{
    return (shared_address(tile) & 0x3ffff) / 16;
}

/* Descriptors are put together from two words, of which one is a constant and the other is a sum of few
 * terms: this costs less than 64-bit arithmetic. `place` is a descriptor_address. */

/* The B operand of a product, from a tile of 16-bit elements that is not swizzled. The tile consists of core
 * matrices of 8 x 16 contiguous bytes: the next core matrix along the depth of the product is depth_step
 * bytes away, and the next one along the product's columns column_step bytes. */
template <int column_step, int depth_step> __device__ __forceinline__ uint64_t tile_descriptor(uint32_t place)
{
    static_assert(column_step % 16 == 0 && depth_step % 16 == 0, "in units of 16 bytes");
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};"
        : "=l"(descriptor)
        : "r"(place + (depth_step / 16 << 16)), "r"(column_step / 16));
    return descriptor;
}

/* The B operand of a product, from a tile of 16-bit elements in rows of 128 bytes that are swizzled as
 * copy_box leaves them: unit u of 16 bytes of row r lies at u ^ r % 8. The next 64 elements along the rows
 * are block_step bytes away, and the next eight rows row_step bytes. */
template <int block_step, int row_step>
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t place)
{
    static_assert(block_step % 16 == 0 && row_step % 16 == 0, "in units of 16 bytes");
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};"
        : "=l"(descriptor)
        : "r"(place + (block_step / 16 << 16)), "r"(row_step / 16 | 1 << 30));
    return descriptor;
}

/* ---- Order --------------------------------------------------------------------------------------------- */

/* A warp may touch the registers of a product only before this fence and after the wait for the product. */
__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most `pending` committed groups of products are in flight. */
template <int pending> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* ---- Products ------------------------------------------------------------------------------------------ */

/* d (+)= a b on 64 x n (+)= (64 x 16) (16 x n) tiles of fp16, asynchronously. Each warp has 16 of the 64
 * rows. Registers are laid out as in mma.m16n8k16, with n / 8 tiles of d side by side: two neighbouring tiles
 * of d, packed to fp16, are an A operand. In a column-major B eight columns are neighbours in memory,
 * otherwise eight depths are. */
#define FKDA_D4(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])

template <bool add, bool column_major>
__device__ __forceinline__ void wgmma(float (&d)[2][4], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %13, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7}, "
                 "{%8, %9, %10, %11}, %12, add, 1, 1, %14;\n}"
                 : FKDA_D4(d[0]), FKDA_D4(d[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add ? 1 : 0),
                   "n"(column_major ? 1 : 0));
}

template <bool add, bool column_major>
__device__ __forceinline__ void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "{%16, %17, %18, %19}, %20, add, 1, 1, %22;\n}"
                 : FKDA_D4(d[0]), FKDA_D4(d[1]), FKDA_D4(d[2]), FKDA_D4(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add ? 1 : 0),
                   "n"(column_major ? 1 : 0));
}

template <bool add, bool column_major>
__device__ __forceinline__ void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
                 "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, add, 1, 1, %38;\n}"
                 : FKDA_D4(d[0]), FKDA_D4(d[1]), FKDA_D4(d[2]), FKDA_D4(d[3]), FKDA_D4(d[4]), FKDA_D4(d[5]),
                   FKDA_D4(d[6]), FKDA_D4(d[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add ? 1 : 0),
                   "n"(column_major ? 1 : 0));
}

template <bool add, bool column_major>
__device__ __forceinline__ void wgmma(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
                 "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
                 "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
                 "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, add, 1, 1, %70;\n}"
                 : FKDA_D4(d[0]), FKDA_D4(d[1]), FKDA_D4(d[2]), FKDA_D4(d[3]), FKDA_D4(d[4]), FKDA_D4(d[5]),
                   FKDA_D4(d[6]), FKDA_D4(d[7]), FKDA_D4(d[8]), FKDA_D4(d[9]), FKDA_D4(d[10]), FKDA_D4(d[11]),
                   FKDA_D4(d[12]), FKDA_D4(d[13]), FKDA_D4(d[14]), FKDA_D4(d[15])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add ? 1 : 0),
                   "n"(column_major ? 1 : 0));
}

#undef FKDA_D4

} // namespace fkda

#endif
