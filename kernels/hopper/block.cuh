/* What a block does: sets up its barriers, and gives each warp its role. */
#ifndef FKDA_HOPPER_BLOCK_CUH
#define FKDA_HOPPER_BLOCK_CUH

#include "at_once.cuh"
#include "load.cuh"
#include "mixture.cuh"
#include "prepare.cuh"
#include "recurrence.cuh"
#include "solve.cuh"

namespace fkda
{

/* Barriers for all that is handed on: those with this number and every WORKERS-th after it, by one thread of each warp but the loader's.
 * One alone takes a microsecond. */
template <class Kind> static __device__ void set_up_barriers(Shared<Kind> &shared, int number)
{
    constexpr int WORKERS = FKDA_HOPPER_THREADS / 32 - 1;
#pragma unroll 1
    for (int i = number; i < PIECES_AHEAD; i += WORKERS) {
        mbarrier_init(&shared.pieces.ring.full[i], 1);
        mbarrier_init_for_warps(&shared.pieces.ring.empty[i], /* all but the loader */
                                Kind::RECURRENCE_WARPS + Kind::AHEAD_WARPS - 1);
        if (i < Kind::OWN) {
            mbarrier_init(&shared.chunks.loaded[i], 1);
            if (Kind::LOADER_NORMS) mbarrier_init_for_warps(&shared.chunks.normed[i], 1);
            mbarrier_init_for_warps(&shared.chunks.ready[i], Kind::TEAM_WARPS + 1); /* the solver */
            mbarrier_init_for_warps(&shared.chunks.empty[i], Kind::SHARERS * Kind::RECURRENCE_WARPS);
        } else if (i < Kind::SLOTS) {
            mbarrier_init(&shared.chunks.ready[i], 1); /* the loader, for the copies */
            mbarrier_init_for_warps(&shared.chunks.empty[i], Kind::RECURRENCE_WARPS);
        }
        if (i < Kind::TEAMS) {
            mbarrier_init_for_warps(&shared.product_ring.full[i], Kind::TEAM_WARPS);
            mbarrier_init_for_warps(&shared.product_ring.empty[i], 1);
            if (FOR_RACECHECK) mbarrier_init_for_warps(&shared.meeting[i], Kind::TEAM_WARPS);
        }
        if constexpr (Kind::JOINS) {
            constexpr int ALL_WARPS = Kind::SHARERS * Kind::RECURRENCE_WARPS;
            if (i < MAP_QUARTERS_AHEAD) {
                mbarrier_init(&shared.join.ring.full[i], 1);
                mbarrier_init_for_warps(&shared.join.ring.empty[i], ALL_WARPS);
            } else if (i == MAP_QUARTERS_AHEAD) {
                mbarrier_init_for_warps(&shared.join.room, ALL_WARPS);
                mbarrier_init_for_warps(&shared.join.over, ALL_WARPS);
            }
        }
    }
    static_assert(Kind::SLOTS <= PIECES_AHEAD && Kind::TEAMS <= PIECES_AHEAD, "the loop has them all");
    fence_mbarrier_init();
}

/* Until all barriers are there, in the other block too. A block alone is a cluster of one: its own barrier, which each role has at a place of
 * its own, synccheck would take for divergence. */
static __device__ void wait_for_barriers()
{
    cluster_sync_relaxed();
}

/* How warps come to the registers of their roles: from as many each, as launched; */
template <class Kind> struct ShareRegisters {
    static __device__ void recurrence()
    {
        take_registers<Kind::RECURRENCE_REGISTERS>();
    }
    static __device__ void prepare(int)
    {
        give_registers<Kind::OTHER_REGISTERS>();
    }
    static __device__ void other()
    {
        give_registers<Kind::OTHER_REGISTERS>();
    }
};

/* or from those of an earlier part's, if there was one. The loader and the solver keep theirs. */
template <class Before, class Kind> struct ShareRegistersAnew {
    bool before;

    static __device__ void recurrence()
    {
        take_registers<Kind::RECURRENCE_REGISTERS>();
    }
    __device__ void prepare(int warp) const /* of the block */
    {
        if (before && warp >= Before::RECURRENCE_WARPS)
            take_registers<Kind::OTHER_REGISTERS>();
        else
            give_registers<Kind::OTHER_REGISTERS>();
    }
    static __device__ void other()
    {
        give_registers<Kind::LAST_REGISTERS>();
    }
};

/* The thread's index. Where there are three sets of roles in a kernel it is read again by each, or the compiler keeps it in memory. */
template <class Kind> static __device__ __forceinline__ int index_anew(int known)
{
    int block;
    if constexpr (Kind::MIXTURE) read_indices(block, known);
    return known;
}

/* Each warp's role. What it can do before `wait` is over, when all barriers are there, it does: the first chunk's way through all roles is
 * what short problems take. The compiler leaves roles in this order, and their loops share the instruction cache: those of the recurrence,
 * the solver and the preparation side by side, which takes up to a tenth less than the others (docs/log.md). */
template <class Registers, class Kind, class Wait>
static __device__ __forceinline__ void take_roles(const fkda_hopper_fwd_args &all, Shared<Kind> &shared,
                                                  int thread, Registers registers, Wait wait)
{
    const int warp = thread / 32 - Kind::RECURRENCE_WARPS;
    if (warp < 0) {
        registers.recurrence();
        wait();
        Recurrence<Kind>(all, shared, index_anew<Kind>(thread)).run();
    } else if (warp == Kind::PREPARE_WARPS + 1) {
        registers.other();
        wait();
        solve<Kind>(all.fwd, shared, index_anew<Kind>(thread) & 31);
    } else if (static_cast<unsigned>(warp) < Kind::PREPARE_WARPS) {
        registers.prepare(index_anew<Kind>(thread) / 32);
        wait();
        Preparation<Kind>(all.fwd, shared).run();
    } else if (warp == Kind::PREPARE_WARPS) {
        registers.other();
        const int lane = index_anew<Kind>(thread) & 31;
        Loader<Kind>::prefetch_maps(all, lane);
        Loader<Kind>(all, shared, lane).run(wait);
    } else {
        registers.other();
        wait();
        if constexpr (Kind::JOINS)
            if (warp == Kind::PREPARE_WARPS + 2) AtOnceJoin<Kind>(all, shared).bring_maps();
    }
    __syncwarp();
}

template <class Kind>
static __device__ __forceinline__ void run_block(const fkda_hopper_fwd_args &all, int thread)
{
    Shared<Kind> &shared = *reinterpret_cast<Shared<Kind> *>(block_memory());
    const int warp = thread / 32 - Kind::RECURRENCE_WARPS;
    let_next_kernel_start();
    if (thread % 32 == 0 && warp != Kind::PREPARE_WARPS)
        set_up_barriers(shared, thread / 32 - (warp > Kind::PREPARE_WARPS));
    __syncwarp();
    take_roles(all, shared, thread, ShareRegisters<Kind>(), wait_for_barriers);
    if (Kind::SHARERS == 2) cluster_sync();       /* nothing more comes from the other block */
    if (!Kind::OUTPUTS) wait_for_kernel_before(); /* maps need nothing of it, but are over after it */
}

/* All that a pair does where there is one launch for all segments (at_once.cuh): two parts, whose barriers are in different places and there
 * from the start. `finds_maps`: whether there is anything to do in the first one. */
template <class First, class Second, class Way, class FindsMaps>
static __device__ __forceinline__ void run_parts(const fkda_hopper_fwd_args &all, FindsMaps finds_maps)
{
    static_assert(offsetof(Shared<Second>, pieces) >= offsetof(Shared<First>, apart) &&
                      offsetof(Shared<First>, pieces) >= sizeof(Shared<Second>),
                  "where there are barriers of the one the other has nothing");
    Shared<First> &first = *reinterpret_cast<Shared<First> *>(block_memory());
    Shared<Second> &second = *reinterpret_cast<Shared<Second> *>(block_memory());
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
    if (maps) take_roles(all, first, thread, ShareRegisters<First>(), wait_for_barriers);
    /* By one that is through before the recurrence: the loader of the second part, which needs it first of all. */
    if (thread / 32 == Second::RECURRENCE_WARPS + Second::PREPARE_WARPS) {
        if (thread % 32 == 0) share_out(Way(all), second.join, cluster_rank());
        __syncwarp();
    }
    read_indices(block, thread);
    take_roles(all, second, thread, ShareRegistersAnew<First, Second>{First::MIXTURE ? finds_maps() : maps},
               cluster_sync);
    cluster_sync();
}

static __device__ void run_block_at_once(const fkda_hopper_fwd_args &all)
{
    run_parts<MapsAtOnce, PairedAtOnce, AtOnce>(all, [&] { return AtOnce::finds_maps(all); });
}

/* All that a block does where sequences have different lengths (mixture.cuh). */
static __device__ __forceinline__ void run_block_of_mixture(const fkda_hopper_mixed_args &all)
{
    Part &part = part_of_mixture<PairedOfMixture>();
    if (threadIdx.x < 32) Mixture(all.pair, all.mixed, threadIdx.x).tell(AtOnce::pair(), part);
    __syncthreads();
    if (part.is != Part::REST_ALONE) {
        run_parts<MapsOfMixture, PairedOfMixture, LongOfMixture>(
            all.pair, [&] { return part.is == Part::LONG && part.segment > 0; });
        return;
    }
    const Part own = part;
    __syncthreads(); /* all have read it: that is where chunks will be */
    if (threadIdx.x == 0) part_of_mixture<AloneOfMixture>() = own;
    __syncthreads();
    int block, thread;
    read_indices(block, thread);
    run_block<AloneOfMixture>(all.solo, thread);
}

} // namespace fkda

#endif
