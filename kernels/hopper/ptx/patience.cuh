/*
 * Waits that end: a kernel that waits in vain gives up with a trap, instead of holding the GPU for ever.
 *
 * When that happens. CTAs wait for each other at flags in the workspace and, in a pair, at mbarriers. All of
 * them take what they do from cu_seqlens and from lists in the workspace. If these change while the kernel
 * runs, or another call clears the flags because it has the same workspace, a CTA may wait for what nobody
 * will do. The trap ends the launch; the driver reports CUDA_ERROR_LAUNCH_FAILED from then on, and the
 * process has lost its CUDA context. Under MPS all clients of the GPU lose theirs, and the GPU is free again.
 *
 * Which waits are bounded. The waits of one warp in each CTA at flags and mbarriers are: of the loader or, in
 * fkda_hopper_join, of the warp that fetches maps. (The loader also meets the other CTA at the cluster's
 * barrier, and then the other CTA's loader has the bound.) The loader waits at the end of its role until all
 * other warps of its CTA have ended theirs (end_phase in ../block/barriers.cuh). So, if any warp of a CTA
 * waits in vain, at a flag or at an mbarrier, the loader does too, and the loops of all other roles stay as
 * short as they are. A trap in the recurrence would cost more than instructions: ptxas then spills
 * (fkda_hopper_mixed).
 *
 * Why 2^35 clocks. 2^35 clocks are 17 to 20 s at the clocks of an H100 or H200. At lower clocks 2^35 clocks
 * are longer, and so is everything that is waited for. The longest wait of a healthy launch is shorter than
 * the launch. The longest launch that fits into the 141 GB of an H200, one sequence of one head with 10^8
 * tokens that is not cut, takes about 4 s. Only clocks that pass while the warp runs are counted: a look at
 * the clock counts for no more than MOST_CLOCKS, so a debugger or another process that stops the GPU for a
 * minute does no harm.
 * A wait that ends at once costs nothing more than without a bound.
 */
#ifndef FKDA_HOPPER_PTX_PATIENCE_CUH
#define FKDA_HOPPER_PTX_PATIENCE_CUH

#include "mbarrier.cuh"

namespace fkda
{

/* A smaller value makes tests of the trap quicker: cmake -DFLASH_KDA_NVCC_FLAGS=-DFKDA_PATIENCE_CLOCKS=... */
#ifndef FKDA_PATIENCE_CLOCKS
#define FKDA_PATIENCE_CLOCKS (1LL << 35)
#endif

/* Ends the launch, and with it everything that the process has on the device. */
__device__ __forceinline__ void give_up()
{
    asm volatile("trap;");
}

/* One wait. */
class Patience
{
    /* Longer than a round of any wait: mbarrier.try_wait sleeps for milliseconds. */
    static constexpr unsigned MOST_CLOCKS = 1u << 25;
    long long waited = 0; /* clocks */
    unsigned then = 0;

  public:
    /* To be called in each round that was in vain. */
    __device__ __forceinline__ void wear()
    {
        unsigned now;
        asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
        waited += min(now - then, MOST_CLOCKS);
        then = now;
        if (waited > FKDA_PATIENCE_CLOCKS) give_up();
    }
};

/* For loops that ask often, in which a look at the clock would take too many issue slots: counts a poll that
 * was in vain. A poll takes 64 clocks or more, so this bound is no shorter than the other one. */
__device__ __forceinline__ void count_poll(unsigned &polls)
{
    constexpr unsigned MOST_POLLS = static_cast<unsigned>(FKDA_PATIENCE_CLOCKS / 64);
    if (++polls == MOST_POLLS) give_up();
}

/* As mbarrier_wait, with a bound. */
__device__ __forceinline__ void mbarrier_wait_or_give_up(uint64_t *barrier, int parity)
{
    Patience patience;
    while (!mbarrier_try_wait(barrier, parity)) patience.wear();
    __syncwarp();
}

} // namespace fkda

#endif
