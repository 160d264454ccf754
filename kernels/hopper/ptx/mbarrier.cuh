/*
 * mbarriers: barriers in shared memory, as named functions.
 *
 * An mbarrier counts arrivals. When `count` arrivals have come, and all bytes of copies that were announced,
 * its phase ends and the next one begins. A thread waits for the end of a phase by the phase's parity, 0 for
 * the first one. A parity tells two neighbouring phases apart and no more: a thread that waits must know that
 * the phase before is over.
 */
#ifndef FKDA_HOPPER_PTX_MBARRIER_CUH
#define FKDA_HOPPER_PTX_MBARRIER_CUH

#include "../../common/ptx.cuh"

namespace fkda
{

/* compute-sanitizer's racecheck does not recognise every order between threads that the kernels rely on. The
 * kernels can be compiled with FKDA_FOR_RACECHECK, which replaces the orders that racecheck misses by orders
 * that it sees. */
#ifdef FKDA_FOR_RACECHECK
constexpr bool FOR_RACECHECK = true;
#else
constexpr bool FOR_RACECHECK = false;
#endif

/* A warp arrives through one lane, after all its lanes have met. racecheck takes an arrival to order only
 * what the arriving lane did before, so for racecheck all 32 lanes arrive. */
constexpr int WARP_ARRIVALS = FOR_RACECHECK ? 32 : 1;

__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, int count)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_init_for_warps(uint64_t *barrier, int warps)
{
    mbarrier_init(barrier, warps * WARP_ARRIVALS);
}

/* Makes mbarriers that this thread has initialised visible to copies and to the other CTA of a pair. */
__device__ __forceinline__ void fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* One arrival for the whole warp. */
__device__ __forceinline__ void mbarrier_arrive_warp(uint64_t *barrier)
{
    __syncwarp();
    if (WARP_ARRIVALS == 32 || threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

/* Arrives, and announces `bytes` bytes of copies that the phase waits for too. */
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t *barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
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

/* Waits for the end of the phase, but not for longer than the SM wants to. Returns whether it is over. */
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t *barrier, int parity)
{
    int done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

/* Asks without waiting whether the phase is over. All lanes of the warp get one answer. */
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

/* Between two calls of mbarrier_test, so that a warp that polls takes few issue slots from the other
 * warps. */
__device__ __forceinline__ void rest_for_a_while()
{
    asm volatile("nanosleep.u32 32;");
}

} // namespace fkda

#endif
