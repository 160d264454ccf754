/*
 * All barriers with which the roles of a CTA hand work to each other, and how they are initialised.
 *
 * The table has every mbarrier. R is the number of warps of the recurrence, P that of the preparation and T
 * that of a team. In a solo CTA / a CTA of a pair / a map CTA, R = 8 / 4 / 8, P = 6 / 8 / 6, T = 2 / 4 / 2.
 *
 * barrier                     warps that arrive in a round         who waits         what may happen then
 * --------------------------  -----------------------------------  ----------------  ------------------------
 * work.ring.full[i]           1: loader                            all other roles   work item i is read
 * work.ring.empty[i]          R + P + 1: all roles but the loader  loader            the item is overwritten
 * chunk_ring.loaded[own]      1: loader; bytes of g, k, q, v       its team; in a    inputs are read
 *                                                                  MapCta whoever
 *                                                                  finds the norms
 * chunk_ring.normed[own]      1: loader (LOADER_FINDS_NORMS)       its team          norms are read
 * chunk_ring.ready[own]       T + 1: its team and the solver       recurrence        the chunk is read
 * chunk_ring.ready[received]  1: loader; bytes of v, of the        recurrence        the chunk is read
 *                             tokens and of the stage
 * chunk_ring.empty[own]       R; in a pair 2 R, of both CTAs,      loader            inputs are loaded there
 *                             since both read the chunk            solver            the other CTA's slot
 *                                                                                    that received the chunk
 *                                                                                    is overwritten
 *                                                                  team of a MapCta  the team waits for
 *                                                                                    loaded and normed
 *                                                                  recurrence        a map overwrites tokens
 * chunk_ring.empty[received]  R: recurrence                        loader            v is loaded there
 * checkpoints.ring.full[i]    1: loader                            recurrence        checkpoint i is read
 * checkpoints.ring.empty[i]   R: recurrence                        loader            it is overwritten
 * product_ring.full[team]     T: the team                          solver            products are read
 * product_ring.empty[team]    1: solver                            the team          products are overwritten
 * meeting[team]               T: the team (only for racecheck)     the team          as at TEAM_BARRIER
 * join.ring.full[i]           1: map fetcher; bytes of a map       recurrence        map quarter i is read
 *                             quarter, fetched by one CTA for both
 * join.ring.empty[i]          2 R: recurrences of both CTAs        map fetcher       it is overwritten,
 *                                                                                    in both CTAs
 * join.room_for_maps          2 R: recurrences of both CTAs        map fetcher       maps overwrite tokens
 * join.room_for_tokens        2 R: recurrences of both CTAs        loader            tokens overwrite maps
 *
 * end.others_done             15: all warps but the loader         loader            the phase ends
 *
 * A chunk of a pair lies in two slots: in an own slot of the CTA that prepared it, and in a received slot of
 * the other CTA. The recurrences of both CTAs arrive at the own slot's `empty` when they have read the chunk.
 * A round of empty[own] that is over therefore says that both slots are free. In a MapCta another team uses a
 * slot in each round. A team that waited for loaded[own] or normed[own] by the parity alone could pass
 * because of the round two rounds earlier. So a team of a MapCta waits for empty[own] first, which says that
 * the round before is over.
 *
 * Named barriers:
 *
 *   0                    __syncthreads: the mixed schedule before its roles begin, and kernels without roles
 *   TEAM_BARRIER + team  the T warps of a team, between two steps of a chunk's preparation
 *   RECURRENCE_BARRIER   the R warps of the recurrence, before a map is stored over tokens, and in the join
 *
 * The cluster's barrier: in the mixed schedule before the roles begin, after mbarriers were initialised,
 * between the map phase and the join phase, and at the end, so that no CTA ends while the other one of its
 * pair still sends to it. Flags in global memory are in ../segments.h and ../fwd_args.h.
 */
#ifndef FKDA_HOPPER_BARRIERS_CUH
#define FKDA_HOPPER_BARRIERS_CUH

#include "shared.cuh"

namespace fkda
{

/* Initialises barriers number `number`, number + INITIALISING_WARPS, ... of all rings; the table above says
 * what their counts are. One thread of each warp but the loader's calls it, because a single thread would
 * delay the first chunk. */
template <class Block> static __device__ void set_up_barriers(Shared<Block> &shared, int number)
{
    constexpr int INITIALISING_WARPS = FKDA_HOPPER_THREADS / 32 - 1;
#pragma unroll 1
    for (int i = number; i < ITEMS_AHEAD; i += INITIALISING_WARPS) {
        mbarrier_init(&shared.work.ring.full[i], 1);
        mbarrier_init_for_warps(&shared.work.ring.empty[i], /* all but the loader */
                                Block::RECURRENCE_WARPS + Block::AHEAD_WARPS - 1);
        if (i < Block::OWN_SLOTS) {
            mbarrier_init(&shared.chunk_ring.loaded[i], 1);
            if (Block::LOADER_FINDS_NORMS) mbarrier_init_for_warps(&shared.chunk_ring.normed[i], 1);
            mbarrier_init_for_warps(&shared.chunk_ring.ready[i], Block::TEAM_WARPS + 1); /* and the solver */
            mbarrier_init_for_warps(&shared.chunk_ring.empty[i], Block::CTAS * Block::RECURRENCE_WARPS);
        } else if (i < Block::SLOTS) {
            mbarrier_init(&shared.chunk_ring.ready[i], 1); /* the loader, and the bytes of copies */
            mbarrier_init_for_warps(&shared.chunk_ring.empty[i], Block::RECURRENCE_WARPS);
        }
        if (i < Block::TEAMS) {
            mbarrier_init_for_warps(&shared.product_ring.full[i], Block::TEAM_WARPS);
            mbarrier_init_for_warps(&shared.product_ring.empty[i], 1);
            if (FOR_RACECHECK) mbarrier_init_for_warps(&shared.meeting[i], Block::TEAM_WARPS);
        }
        if constexpr (Block::CHECKPOINTS)
            if (i < CHECKPOINTS_AHEAD) {
                mbarrier_init(&shared.checkpoints.ring.full[i], 1);
                mbarrier_init_for_warps(&shared.checkpoints.ring.empty[i], Block::RECURRENCE_WARPS);
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
        /* Few rings have a barrier with this number, so the warp that takes it has little else to do. */
        if (i == ITEMS_AHEAD - 2)
            mbarrier_init_for_warps(&shared.end.others_done, FKDA_HOPPER_THREADS / 32 - 1);
    }
    static_assert(Block::SLOTS <= ITEMS_AHEAD && Block::TEAMS <= ITEMS_AHEAD,
                  "the loop reaches all barriers");
    fence_mbarrier_init();
}

/* Waits until all barriers are initialised, also those of the other CTA. A solo CTA is a cluster of one and
 * uses the cluster's barrier too: roles wait at different places in the code, which synccheck would report as
 * divergence at __syncthreads. Both members do the same here; in WaitForNextPhase (run.cuh) they differ. */
struct WaitForBarriers {
    __device__ void operator()() const
    {
        cluster_sync_relaxed();
    }
    __device__ void without_role() const
    {
        cluster_sync_relaxed();
    }
};

/*
 * The end of a phase: the warps of a CTA pair meet here, after which neither CTA sends anything more to the
 * other.
 *
 * The loader has ended its role long before and watches over the other warps of its CTA: it gives up if they
 * do not end theirs (../ptx/patience.cuh). Warps of a pair wait for each other for ever if the CTAs do not go
 * through equally many chunks, because cu_seqlens or a list changed after one CTA had read it and before the
 * other one did. If both CTAs have ended although they went through unequal numbers of chunks, the loader
 * gives up too, because a chunk may still be on its way to a CTA that ends. The loader arrives at the
 * cluster's barrier before it gives up, so that nobody waits for it.
 */
template <class Block> static __device__ __forceinline__ void end_phase(Shared<Block> &shared)
{
    int cta, thread;
    read_indices(cta, thread); /* read again: otherwise all roles would keep it in a register */
    const bool is_loader = thread / 32 == Block::RECURRENCE_WARPS + Block::PREPARE_WARPS;
    if (Block::CTAS == 2) cluster_arrive();
    if (is_loader) mbarrier_wait_or_give_up(&shared.end.others_done, 0);
    if (Block::CTAS == 2) cluster_wait();
    if (Block::CTAS == 2 && is_loader && shared.end.chunks != shared.end.in_other_cta) give_up();
}

} // namespace fkda

#endif
