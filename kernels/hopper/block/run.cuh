/* What a CTA does from its start to its end, under each schedule. */
#ifndef FKDA_HOPPER_RUN_CUH
#define FKDA_HOPPER_RUN_CUH

#include "../schedule/mixed.cuh"
#include "roles.cuh"

namespace fkda
{

/* ---- One block from start to end: even shares ---------------------------------------------------------- */

template <class Block>
static __device__ __forceinline__ void run_block(const fkda_hopper_fwd_args &all, int thread)
{
    Shared<Block> &shared = *reinterpret_cast<Shared<Block> *>(cta_memory());
    const int warp = thread / 32 - Block::RECURRENCE_WARPS;
    let_next_kernel_start();
    if (thread % 32 == 0 && warp != Block::PREPARE_WARPS)
        set_up_barriers(shared, thread / 32 - (warp > Block::PREPARE_WARPS));
    __syncwarp();
    run_role(all, shared, thread, FirstRegisters<Block>(), WaitForBarriers());
    end_phase(shared);
    /* The kernel of maps needs nothing of the previous kernel, but must be over after it: what waits for this
     * kernel then finds the previous one over too. */
    if (!Block::OUTPUTS) wait_for_previous_kernel();
}

/* ---- A relay: two blocks one after the other ----------------------------------------------------------- */

/* Waits for the end of the first phase, if there is one, and for the barriers of both phases. The loader of
 * the first phase has no role in the second phase, or fetches maps there. */
template <class First> struct WaitForNextPhase {
    Shared<First> &shared;
    bool had_first_phase;

    __device__ void operator()() const
    {
        cluster_sync();
    }
    __device__ void without_role() const
    {
        if (had_first_phase)
            end_phase(shared);
        else
            cluster_sync();
    }
};

/*
 * The first block (MapCta) runs the map phase, and the second block (PairCta) runs the join phase and the
 * output phase. The barriers of both blocks are initialised at the start, in different places. Between the
 * blocks a CTA changes its roles, its registers and what its shared memory holds. One barrier of the cluster
 * suffices for the change, since no role of the first block leaves anything behind for the second block.
 *
 * has_first_phase() says whether the first block has any work. If not, the CTA begins with the second block.
 */
template <class First, class Second, class Assignment, class HasFirstPhase>
static __device__ __forceinline__ void run_two_phases(const fkda_hopper_fwd_args &all,
                                                      HasFirstPhase has_first_phase)
{
    static_assert(offsetof(Shared<Second>, work) >= offsetof(Shared<First>, apart) &&
                      offsetof(Shared<First>, work) >= sizeof(Shared<Second>),
                  "a phase has no data where the other phase has barriers");
    Shared<First> &first = *reinterpret_cast<Shared<First> *>(cta_memory());
    Shared<Second> &second = *reinterpret_cast<Shared<Second> *>(cta_memory());
    int cta, thread;
    read_indices(cta, thread);
    constexpr int LOADER = First::RECURRENCE_WARPS + First::PREPARE_WARPS,
                  NEXT_LOADER = Second::RECURRENCE_WARPS + Second::PREPARE_WARPS;
    static_assert(LOADER > NEXT_LOADER + 1, "the first loader has no role in the second phase");
    if (thread % 32 == 0 && thread / 32 != LOADER) {
        const int number = thread / 32 - (thread / 32 > LOADER);
        set_up_barriers(first, number);
        set_up_barriers(second, number);
    }
    __syncwarp();
    /* The index is read again here and below: otherwise the compiler would keep it in local memory. */
    read_indices(cta, thread);
    const bool has_first = has_first_phase();
    if (has_first) run_role(all, first, thread, FirstRegisters<First>(), WaitForBarriers());
    /* The loader of the second block is the first role that needs to know which rows the CTA carries. Its
     * warp prepared chunks in the first block, and so is done before the warps of the recurrence are. */
    if (thread / 32 == NEXT_LOADER) {
        if (thread % 32 == 0) assign_join_rows(Assignment(all), second.join, cluster_rank());
        __syncwarp();
    }
    read_indices(cta, thread);
    const bool had_first = First::MIXED ? has_first_phase() : has_first;
    run_role(all, second, thread, NextRegisters<First, Second>{had_first},
             WaitForNextPhase<First>{first, had_first});
    end_phase(second);
}

template <Arithmetic arithmetic, bool states = arithmetic == Arithmetic::GENERAL>
static __device__ __forceinline__ void run_relay(const fkda_hopper_fwd_args &all)
{
    run_two_phases<Block<MapCta, Relay, arithmetic, states>, Block<PairCta, Relay, arithmetic, states>,
                   RelayAssignment>(all, [&] { return RelayAssignment::has_map_phase(all); });
}

/* ---- Mixed: a relay, or a share of the rest ------------------------------------------------------------ */

template <Arithmetic arithmetic, bool states = arithmetic == Arithmetic::GENERAL>
static __device__ __forceinline__ void run_mixed(const fkda_hopper_mixed_args &all)
{
    using Pair = Block<PairCta, Mixed, arithmetic, states>;
    using Usual = Block<PairCta, Mixed>;
    static_assert(offsetof(Shared<Pair>, assignment) == offsetof(Shared<Usual>, assignment),
                  "the schedule looks where a block that is not general has its assignment");
    MixedAssignment &assignment = mixed_assignment<Pair>();
    int cta, thread;
    read_indices(cta, thread);
    /* One CTA of a pair finds the assignment for both. If each read the lengths, and these changed in
     * between, the CTAs could run different kinds of blocks, and one would send chunks to where the other has
     * pointers. */
    const bool schedules = thread < 32 && cluster_rank() == 0;
    cluster_arrive_relaxed();
    if (schedules) MixedScheduler(all.pair, all.mixed, thread).assign(RelayAssignment::pair(), assignment);
    cluster_wait(); /* the other CTA runs, so its shared memory is there */
    static_assert(sizeof(MixedAssignment) <= 32 * sizeof(int) && alignof(MixedAssignment) == alignof(int),
                  "a lane copies a word");
    if (schedules && thread < static_cast<int>(sizeof(MixedAssignment) / sizeof(int))) {
        int *word = reinterpret_cast<int *>(&assignment) + thread;
        store_in_other_cta(word, *word);
    }
    __syncwarp();
    cluster_sync();
    /* Kernels with options have no solo CTAs here: with three sets of roles they would have spills. Pairs
     * then compute the rest, whatever the estimate says. */
    if (Pair::OPTIONS || assignment.is != MixedAssignment::REST_SOLO) {
        run_two_phases<Block<MapCta, Mixed, arithmetic, states>, Pair, LongAssignment>(
            all.pair, [&] { return assignment.is == MixedAssignment::LONG && assignment.segment > 0; });
        return;
    }
    if constexpr (!Pair::OPTIONS) {
        using Solo = Block<SoloCta, Mixed, arithmetic, states>;
        const MixedAssignment own = assignment;
        /* All threads have read the assignment when a solo CTA has chunks in its place. */
        __syncthreads();
        if (threadIdx.x == 0) mixed_assignment<Solo>() = own;
        __syncthreads();
        read_indices(cta, thread);
        run_block<Solo>(all.solo, thread);
    }
}

} // namespace fkda

#endif
