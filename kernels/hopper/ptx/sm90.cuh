/* Hopper's own instructions, as named functions: mbarriers, wgmma, register reallocation. */
#ifndef FKDA_HOPPER_PTX_SM90_CUH
#define FKDA_HOPPER_PTX_SM90_CUH

#include "../../common/ptx.cuh"
#include "../fwd_args.h"

namespace fkda
{

/* Barriers in shared memory: a phase ends when `count` arrivals have come, and waiting is for a phase's parity. */
__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, int count)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* The sanitizers' racecheck does not see all of the order that there is; where it does not, kernels are compiled for it otherwise. */
#ifdef FKDA_FOR_RACECHECK
constexpr bool FOR_RACECHECK = true;
#else
constexpr bool FOR_RACECHECK = false;
#endif

/* A warp arrives through one lane, once all have got there; for racecheck, which holds an arrival to order what its own lane did and no more,
 * through all. */
constexpr int WARP_ARRIVALS = FOR_RACECHECK ? 32 : 1;

__device__ __forceinline__ void mbarrier_init_for_warps(uint64_t *barrier, int warps)
{
    mbarrier_init(barrier, warps * WARP_ARRIVALS);
}

__device__ __forceinline__ void mbarrier_arrive_warp(uint64_t *barrier)
{
    __syncwarp();
    if (WARP_ARRIVALS == 32 || threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, int parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* Whether the phase is over, for all lanes of the warp. */
__device__ __forceinline__ bool mbarrier_test(uint64_t *barrier, int parity)
{
    int done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return __all_sync(~0u, done) != 0;
}

/* Between two tests. */
__device__ __forceinline__ void rest_for_a_while()
{
    asm volatile("nanosleep.u32 32;");
}

/* What is the same in all lanes, in a register of the warp: what is made from it costs less. */
__device__ __forceinline__ int uniform(int x)
{
    return static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(x)));
}

/* So that the compiler keeps x instead of making it anew each time. */
__device__ __forceinline__ void keep(int &x)
{
    x = __shfl_xor_sync(~0u, x, 0);
}

/* Of two pairs of unsigned 16-bit integers, the larger ones. */
__device__ __forceinline__ uint32_t max_of_pairs(uint32_t x, uint32_t y)
{
    uint32_t most;
    asm("max.u16x2 %0, %1, %2;" : "=r"(most) : "r"(x), "r"(y));
    return most;
}

/* Where and when the program says, whatever the compiler would rather do. */
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

/* Lets the next kernel in the stream start, if it was launched to do so; and waits until the one before is over, if this one did. */
__device__ __forceinline__ void let_next_kernel_start()
{
    asm volatile("griddepcontrol.launch_dependents;");
}

__device__ __forceinline__ void wait_for_previous_kernel()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* The two blocks of a cluster: which one this is; a barrier in all threads of both; an arrival of a warp at the other block's
 * barrier in the same place; and a copy of so many bytes, a multiple of 16, to where `to` is in the other block, whose barrier
 * there counts them. */
__device__ __forceinline__ int cluster_rank()
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

__device__ __forceinline__ void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

/* The same, but of what was written before only barriers are there, after fence_mbarrier_init. */
__device__ __forceinline__ void cluster_sync_relaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t in_other_cta(uint32_t address)
{
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(cluster_rank() ^ 1));
    return there;
}

__device__ __forceinline__ void mbarrier_arrive_warp_in_other_cta(uint64_t *barrier)
{
    __syncwarp();
    if (WARP_ARRIVALS == 32 || threadIdx.x % 32 == 0)
        asm volatile(
            "mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(in_other_cta(shared_address(barrier)))
            : "memory");
}

__device__ __forceinline__ void copy_to_other_cta(void *to, const void *from, int bytes, uint64_t *barrier)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            in_other_cta(shared_address(to))),
        "r"(shared_address(from)), "r"(bytes), "r"(in_other_cta(shared_address(barrier)))
        : "memory");
}

/* Makes initialised barriers visible to copies. */
__device__ __forceinline__ void fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* A flag in device memory for what a warp of another block waits for: set once all that this warp wrote before is there. */
__device__ __forceinline__ void set_flag(int *flag)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(flag) : "memory");
}

__device__ __forceinline__ void await_flag(const int *flag)
{
    int set = 0;
    while (!set) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
    __syncwarp();
}

/* True in one lane of the warp, the same one wherever all are active. */
__device__ __forceinline__ bool elect_lane()
{
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

/* Arrives, and has the phase wait for so many bytes of copies too. */
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t *barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

/* Copies a box of a tensor to shared memory; `barrier` counts its bytes. Coordinates as in fkda_hopper_fwd_args. */
__device__ __forceinline__ void copy_box(void *to, const fkda_tma_descriptor *map, int token, int half,
                                         int head, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
                 "l"(map), "r"(0), "r"(token), "r"(half), "r"(head), "r"(shared_address(barrier))
                 : "memory");
}

/* Fetches a map, for a copy that needs it soon. */
__device__ __forceinline__ void prefetch_descriptor(const fkda_tma_descriptor *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Copies so many bytes, a multiple of 16, to shared memory; `barrier` counts them. */
__device__ __forceinline__ void copy_bulk(void *to, const void *from, int bytes, uint64_t *barrier)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

/* The same to the same place in both blocks of the pair, where a barrier each in the same place counts them. */
__device__ __forceinline__ void copy_bulk_to_pair(void *to, const void *from, int bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(3))
                 : "memory");
}

/* Copies so many bytes, a multiple of 16, from shared memory, and waits until they are there. */
__device__ __forceinline__ void copy_bulk_to_global(void *to, const void *from, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                 "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nfence.proxy.async;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}

/* The opposites of load_matrices and load_matrices_transposed. */
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

__device__ __forceinline__ void store_matrices_transposed(uint32_t row, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* Two neighbours `elements` after `from`, without a branch: of fp32; or of bf16, as they are in memory, both in x. */
template <int elements>
__device__ __forceinline__ void load_two_if(float &x, float &y, const void *from, bool valid)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p ld.global.v2.f32 {%0, %1}, [%2 + %4];\n}"
                 : "+f"(x), "+f"(y)
                 : "l"(from), "r"(static_cast<int>(valid)), "n"(4 * elements));
}

template <int elements> __device__ __forceinline__ void load_pair_if(float &x, const void *from, bool valid)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.b32 %0, [%1 + %3];\n}"
                 : "+f"(x)
                 : "l"(from), "r"(static_cast<int>(valid)), "n"(2 * elements));
}

/* Four fp32 `tiles` of StateImage after `from`. */
template <int tiles> __device__ __forceinline__ void load_four_if(float (&x)[4], const void *from, bool valid)
{
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p ld.global.v4.f32 {%0, %1, %2, %3}, [%4 + %6];\n}"
        : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
        : "l"(from), "r"(static_cast<int>(valid)), "n"(512 * tiles));
}

/* Makes this thread's stores to shared memory visible to wgmma, once ordered by a barrier. */
__device__ __forceinline__ void fence_async_proxy()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* The same of all memory that this thread knows of, for copies. */
__device__ __forceinline__ void fence_async_proxy_of_all_memory()
{
    asm volatile("fence.proxy.async;" ::: "memory");
}

template <int registers> __device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers> __device__ __forceinline__ void give_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

/* A shared memory address as wgmma's descriptors have it: without the block's rank in its cluster, which is above bit 24. */
__device__ __forceinline__ uint32_t descriptor_address(const void *tile)
{
    return (shared_address(tile) & 0x3ffff) / 16;
}

/* A tile of 16-bit elements in shared memory, at descriptor_address `place`, as wgmma's B operand. Not swizzled: core matrices of
 * 8 x 16 bytes, each contiguous; depth_step bytes from one to the next along the depth of the product, column_step along
 * its columns. Put together from words, of which one is a constant and the other a sum of few. */
template <int column_step, int depth_step> __device__ __forceinline__ uint64_t tile_descriptor(uint32_t place)
{
    static_assert(column_step % 16 == 0 && depth_step % 16 == 0, "in units of 16 bytes");
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};"
        : "=l"(descriptor)
        : "r"(place + (depth_step / 16 << 16)), "r"(column_step / 16));
    return descriptor;
}

/* The same for rows of 64 elements, 128 bytes, whose eight units of 16 bytes are swizzled as copy_box leaves them: unit
 * u of row r lies at u ^ r % 8. `block_step` bytes from one such column of eight rows to the next along the dimension of
 * the units, `row_step` along that of the rows. */
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

/* Around products: registers are touched before the fence and after the wait only. */
__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most `pending` committed groups are in flight. */
template <int pending> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* d (+)= a b on 64 x n (+)= (64 x 16) (16 x n) tiles of fp16, asynchronously; a warp has 16 of the 64 rows. Registers are
 * laid out as in mma.m16n8k16, here with n / 8 tiles of d side by side: two such tiles, packed to fp16, are an A
 * operand. In a column-major B eight columns are neighbours in memory, else eight depths. */
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
