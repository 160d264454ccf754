/* Gives each warp its registers and its role. */
#ifndef FKDA_HOPPER_ROLES_CUH
#define FKDA_HOPPER_ROLES_CUH

#include "../join/relay_join.cuh"
#include "barriers.cuh"
#include "loader.cuh"
#include "prepare.cuh"
#include "recurrence.cuh"
#include "solve.cuh"

namespace fkda
{

/* ---- Registers ----------------------------------------------------------------------------------------- */

/* Registers of the first phase: all warps start with the number that the kernel was launched with. */
template <class Block> struct FirstRegisters {
    static __device__ void recurrence()
    {
        take_registers<Block::REGISTERS.recurrence>();
    }
    static __device__ void prepare(int)
    {
        give_registers<Block::REGISTERS.preparation>();
    }
    static __device__ void other()
    {
        give_registers<Block::REGISTERS.last_warpgroup>();
    }
};

/* Registers of the second phase: if there was a first phase, warps start with the numbers that its block
 * `Before` gave them, and the warps of its recurrence have more than others. */
template <class Before, class Block> struct NextRegisters {
    bool had_first_phase;

    static __device__ void recurrence()
    {
        take_registers<Block::REGISTERS.recurrence>();
    }
    __device__ void prepare(int warp) const /* of the CTA */
    {
        if (had_first_phase && warp >= Before::RECURRENCE_WARPS)
            take_registers<Block::REGISTERS.preparation>();
        else
            give_registers<Block::REGISTERS.preparation>();
    }
    static __device__ void other()
    {
        give_registers<Block::REGISTERS.last_warpgroup>();
    }
};

/* ---- Roles --------------------------------------------------------------------------------------------- */

/* The index of the thread. Two kinds of kernels read it again for each role, because the compiler would
 * otherwise keep it in local memory: the mixed kernels, which have two or three sets of roles, and, except
 * for relays, the kernels with checkpoints and states with K first (STATES). */
template <class Block> static __device__ __forceinline__ int thread_index(int known)
{
    int cta;
    if constexpr (Block::MIXED || (Block::STATES && !Block::RELAYS)) read_indices(cta, known);
    return known;
}

/*
 * Runs the role of this thread's warp. A role calls wait() to wait until all barriers are initialised. Warps
 * without a role call wait.without_role() instead: after a first phase the loader of that phase is among
 * them, and ends the phase there (WaitForNextPhase in run.cuh). The loader prefetches, and finds its first
 * work item, before it waits: short problems take little more than the way of their first chunk through all
 * roles.
 *
 * The compiler leaves the code of the roles in the order in which they are here. The loops of all roles share
 * the instruction cache, and a kernel is fastest with the loops of the recurrence, the solver and the
 * preparation side by side (docs/experiments.md).
 */
template <class ForRegisters, class Block, class Wait>
static __device__ __forceinline__ void run_role(const fkda_hopper_fwd_args &all, Shared<Block> &shared,
                                                int thread, ForRegisters registers, Wait wait)
{
    const int warp = thread / 32 - Block::RECURRENCE_WARPS;
    if (warp < 0) {
        registers.recurrence();
        wait();
        Recurrence<Block>(all, shared, thread_index<Block>(thread)).run();
    } else if (warp == Block::PREPARE_WARPS + 1) {
        registers.other();
        wait();
        solve<Block>(all.fwd, shared, thread_index<Block>(thread) & 31);
    } else if (static_cast<unsigned>(warp) < Block::PREPARE_WARPS) {
        registers.prepare(thread_index<Block>(thread) / 32);
        wait();
        Preparation<Block>(all.fwd, shared).run();
    } else if (warp == Block::PREPARE_WARPS) {
        registers.other();
        const int lane = thread_index<Block>(thread) & 31;
        Loader<Block>::prefetch_descriptors(all, lane);
        Loader<Block>(all, shared, lane).run(wait);
    } else { /* warps without a role; in the join phase of a relay one of them fetches maps */
        registers.other();
        wait.without_role();
        if constexpr (Block::JOINS)
            if (warp == Block::PREPARE_WARPS + 2) RelayJoin<Block>(all, shared).fetch_maps();
    }
    /* The index is read again: otherwise the roles would keep it in a register. */
    int cta, same_thread;
    read_indices(cta, same_thread);
    if (same_thread / 32 != Block::RECURRENCE_WARPS + Block::PREPARE_WARPS)
        mbarrier_arrive_warp(&shared.end.others_done);
    __syncwarp();
}

} // namespace fkda

#endif
