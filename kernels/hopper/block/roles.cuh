/* What a block does: sets up its barriers, and gives each warp its role. */
#ifndef FKDA_HOPPER_ROLES_CUH
#define FKDA_HOPPER_ROLES_CUH

#include "../schedule/mixed.cuh"
#include "load.cuh"
#include "prepare.cuh"
#include "recurrence.cuh"
#include "solve.cuh"

namespace fkda
{

/* Barriers for all that is handed on: those with this number and every WORKERS-th after it, by one thread of each warp but the loader's.
 * One alone takes a microsecond. */
template <class Block> static __device__ void set_up_barriers(Shared<Block> &shared, int number)
{
    constexpr int WORKERS = FKDA_HOPPER_THREADS / 32 - 1;
#pragma unroll 1
    for (int i = number; i < ITEMS_AHEAD; i += WORKERS) {
        mbarrier_init(&shared.work.ring.full[i], 1);
        mbarrier_init_for_warps(&shared.work.ring.empty[i], /* all but the loader */
                                Block::RECURRENCE_WARPS + Block::AHEAD_WARPS - 1);
        if (i < Block::OWN_SLOTS) {
            mbarrier_init(&shared.chunk_ring.loaded[i], 1);
            if (Block::LOADER_FINDS_NORMS) mbarrier_init_for_warps(&shared.chunk_ring.normed[i], 1);
            mbarrier_init_for_warps(&shared.chunk_ring.ready[i], Block::TEAM_WARPS + 1); /* the solver */
            mbarrier_init_for_warps(&shared.chunk_ring.empty[i], Block::CTAS * Block::RECURRENCE_WARPS);
        } else if (i < Block::SLOTS) {
            mbarrier_init(&shared.chunk_ring.ready[i], 1); /* the loader, for the copies */
            mbarrier_init_for_warps(&shared.chunk_ring.empty[i], Block::RECURRENCE_WARPS);
        }
        if (i < Block::TEAMS) {
            mbarrier_init_for_warps(&shared.product_ring.full[i], Block::TEAM_WARPS);
            mbarrier_init_for_warps(&shared.product_ring.empty[i], 1);
            if (FOR_RACECHECK) mbarrier_init_for_warps(&shared.meeting[i], Block::TEAM_WARPS);
        }
        if constexpr (Block::JOINS) {
            constexpr int ALL_WARPS = Block::CTAS * Block::RECURRENCE_WARPS;
            if (i < MAP_QUARTERS_AHEAD) {
                mbarrier_init(&shared.join.ring.full[i], 1);
                mbarrier_init_for_warps(&shared.join.ring.empty[i], ALL_WARPS);
            } else if (i == MAP_QUARTERS_AHEAD) {
                mbarrier_init_for_warps(&shared.join.room_for_maps, ALL_WARPS);
                mbarrier_init_for_warps(&shared.join.room_for_tokens, ALL_WARPS);
            }
        }
    }
    static_assert(Block::SLOTS <= ITEMS_AHEAD && Block::TEAMS <= ITEMS_AHEAD, "the loop has them all");
    fence_mbarrier_init();
}

/* Until all barriers are there, in the other block too. A block alone is a cluster of one: its own barrier, which each role has at a place of
 * its own, synccheck would take for divergence. */
static __device__ void wait_for_barriers()
{
    cluster_sync_relaxed();
}

/* How warps come to the registers of their roles: from as many each, as launched; */
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
        give_registers<Block::REGISTERS.preparation>();
    }
};

/* or from those of an earlier part's, if there was one. The loader and the solver keep theirs. */
template <class Before, class Block> struct NextRegisters {
    bool before;

    static __device__ void recurrence()
    {
        take_registers<Block::REGISTERS.recurrence>();
    }
    __device__ void prepare(int warp) const /* of the block */
    {
        if (before && warp >= Before::RECURRENCE_WARPS)
            take_registers<Block::REGISTERS.preparation>();
        else
            give_registers<Block::REGISTERS.preparation>();
    }
    static __device__ void other()
    {
        give_registers<Block::REGISTERS.last_warpgroup>();
    }
};

/* The thread's index. Where there are three sets of roles in a kernel it is read again by each, or the compiler keeps it in memory. */
template <class Block> static __device__ __forceinline__ int thread_index(int known)
{
    int block;
    if constexpr (Block::MIXED) read_indices(block, known);
    return known;
}

/* Each warp's role. What it can do before `wait` is over, when all barriers are there, it does: the first chunk's way through all roles is
 * what short problems take. The compiler leaves roles in this order, and their loops share the instruction cache: those of the recurrence,
 * the solver and the preparation side by side, which takes up to a tenth less than the others (docs/log.md). */
template <class Registers, class Block, class Wait>
static __device__ __forceinline__ void take_roles(const fkda_hopper_fwd_args &all, Shared<Block> &shared,
                                                  int thread, Registers registers, Wait wait)
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
    } else {
        registers.other();
        wait();
        if constexpr (Block::JOINS)
            if (warp == Block::PREPARE_WARPS + 2) RelayJoin<Block>(all, shared).bring_maps();
    }
    __syncwarp();
}

template <class Block>
static __device__ __forceinline__ void run_one_phase(const fkda_hopper_fwd_args &all, int thread)
{
    Shared<Block> &shared = *reinterpret_cast<Shared<Block> *>(cta_memory());
    const int warp = thread / 32 - Block::RECURRENCE_WARPS;
    let_next_kernel_start();
    if (thread % 32 == 0 && warp != Block::PREPARE_WARPS)
        set_up_barriers(shared, thread / 32 - (warp > Block::PREPARE_WARPS));
    __syncwarp();
    take_roles(all, shared, thread, FirstRegisters<Block>(), wait_for_barriers);
    if (Block::CTAS == 2) cluster_sync();            /* nothing more comes from the other block */
    if (!Block::OUTPUTS) wait_for_previous_kernel(); /* maps need nothing of it, but are over after it */
}

/* All that a pair does where there is one launch for all segments (at_once.cuh): two parts, whose barriers are in different places and there
 * from the start. `finds_maps`: whether there is anything to do in the first one. */
template <class First, class Second, class Way, class FindsMaps>
static __device__ __forceinline__ void run_two_phases(const fkda_hopper_fwd_args &all, FindsMaps finds_maps)
{
    static_assert(offsetof(Shared<Second>, work) >= offsetof(Shared<First>, apart) &&
                      offsetof(Shared<First>, work) >= sizeof(Shared<Second>),
                  "where there are barriers of the one the other has nothing");
    Shared<First> &first = *reinterpret_cast<Shared<First> *>(cta_memory());
    Shared<Second> &second = *reinterpret_cast<Shared<Second> *>(cta_memory());
    int block, thread = threadIdx.x;
    constexpr int LOADER = First::RECURRENCE_WARPS + First::PREPARE_WARPS;
    if (thread % 32 == 0 && thread / 32 != LOADER) {
        const int number = thread / 32 - (thread / 32 > LOADER);
        set_up_barriers(first, number);
        set_up_barriers(second, number);
    }
    __syncwarp();
    read_indices(block, thread); /* anew, or all that follows would have them in common, in memory */
    const bool maps = finds_maps();
    if (maps) take_roles(all, first, thread, FirstRegisters<First>(), wait_for_barriers);
    /* By one that is through before the recurrence: the loader of the second part, which needs it first of all. */
    if (thread / 32 == Second::RECURRENCE_WARPS + Second::PREPARE_WARPS) {
        if (thread % 32 == 0) assign_join_rows(Way(all), second.join, cluster_rank());
        __syncwarp();
    }
    read_indices(block, thread);
    take_roles(all, second, thread, NextRegisters<First, Second>{First::MIXED ? finds_maps() : maps},
               cluster_sync);
    cluster_sync();
}

static __device__ void run_relay(const fkda_hopper_fwd_args &all)
{
    run_two_phases<Block<MapCta, Relay>, Block<PairCta, Relay>, RelayAssignment>(
        all, [&] { return RelayAssignment::finds_maps(all); });
}

/* All that a block does where sequences have different lengths (mixture.cuh). */
static __device__ __forceinline__ void run_mixed(const fkda_hopper_mixed_args &all)
{
    MixedAssignment &assignment = assignment_of<Block<PairCta, Mixed>>();
    if (threadIdx.x < 32)
        MixedScheduler(all.pair, all.mixed, threadIdx.x).tell(RelayAssignment::pair(), assignment);
    __syncthreads();
    if (assignment.is != MixedAssignment::REST_SOLO) {
        run_two_phases<Block<MapCta, Mixed>, Block<PairCta, Mixed>, LongAssignment>(
            all.pair, [&] { return assignment.is == MixedAssignment::LONG && assignment.segment > 0; });
        return;
    }
    const MixedAssignment own = assignment;
    __syncthreads(); /* all have read it: that is where chunks will be */
    if (threadIdx.x == 0) assignment_of<Block<SoloCta, Mixed>>() = own;
    __syncthreads();
    int block, thread;
    read_indices(block, thread);
    run_one_phase<Block<SoloCta, Mixed>>(all.solo, thread);
}

} // namespace fkda

#endif
