/* What a block does: sets up its barriers, and gives each warp its role. */
#ifndef FKDA_HOPPER_BLOCK_CUH
#define FKDA_HOPPER_BLOCK_CUH

#include "load.cuh"
#include "prepare.cuh"
#include "recurrence.cuh"
#include "solve.cuh"

namespace fkda
{

/* Barriers for all that is handed on: those with number `first` and every WORKERS-th after it, by one thread of each warp but the loader's.
 * One alone takes a microsecond. */
template <class Kind> static __device__ void set_up_barriers(Shared<Kind> &shared, int first)
{
    constexpr int WORKERS = FKDA_HOPPER_THREADS / 32 - 1;
#pragma unroll 1
    for (int i = first; i < PIECES_AHEAD; i += WORKERS) {
        mbarrier_init(&shared.pieces.ring.full[i], 1);
        mbarrier_init_for_warps(&shared.pieces.ring.empty[i], /* all but the loader */
                                Kind::RECURRENCE_WARPS + Kind::AHEAD_WARPS - 1);
        if (i < Kind::OWN) {
            mbarrier_init(&shared.chunks.loaded[i], 1);
            mbarrier_init_for_warps(&shared.chunks.ready[i], Kind::TEAM_WARPS + 1); /* the solver */
            mbarrier_init_for_warps(&shared.chunks.empty[i], Kind::SHARERS * Kind::RECURRENCE_WARPS);
        } else if (i < Kind::SLOTS) {
            mbarrier_init(&shared.chunks.ready[i], 1); /* the loader, for the copies */
            mbarrier_init_for_warps(&shared.chunks.empty[i], Kind::RECURRENCE_WARPS);
        }
        if (i < Kind::TEAMS) {
            mbarrier_init_for_warps(&shared.product_ring.full[i], Kind::TEAM_WARPS);
            mbarrier_init_for_warps(&shared.product_ring.empty[i], 1);
        }
    }
    static_assert(Kind::SLOTS <= PIECES_AHEAD && Kind::TEAMS <= PIECES_AHEAD, "the loop has them all");
    fence_mbarrier_init();
}

/* Until all barriers are there, in the other block too; a block alone is a cluster of one. Each role has its own, which of a barrier
 * of the block synccheck takes for divergence. */
static __device__ void wait_for_barriers()
{
    cluster_sync_relaxed();
}

/* What a role can do before that, it does: the first chunk's way through all of them is what short problems take. The compiler leaves roles in
 * this order, and their loops share the instruction cache: those of the recurrence, the solver and the preparation side by side,
 * which takes up to a tenth less than the others (docs/log.md). */
template <class Kind> static __device__ void run_block(const fkda_hopper_fwd_args &all)
{
    Shared<Kind> &shared = *reinterpret_cast<Shared<Kind> *>(block_memory());
    const int thread = threadIdx.x, warp = thread / 32 - Kind::RECURRENCE_WARPS, lane = thread % 32;
    let_next_kernel_start();
    if (lane == 0 && warp != Kind::PREPARE_WARPS)
        set_up_barriers(shared, thread / 32 - (warp > Kind::PREPARE_WARPS));
    __syncwarp();
    if (warp < 0) {
        take_registers<Kind::RECURRENCE_REGISTERS>();
        wait_for_barriers();
        Recurrence<Kind>(all.fwd, shared, thread).run();
    } else if (warp == Kind::PREPARE_WARPS + 1) {
        give_registers<Kind::OTHER_REGISTERS>();
        wait_for_barriers();
        solve<Kind>(all.fwd, shared, lane);
    } else if (static_cast<unsigned>(warp) < Kind::PREPARE_WARPS) {
        give_registers<Kind::OTHER_REGISTERS>();
        wait_for_barriers();
        Preparation<Kind>(all.fwd, shared).run();
    } else if (warp == Kind::PREPARE_WARPS) {
        give_registers<Kind::OTHER_REGISTERS>();
        Loader<Kind>::prefetch_maps(all, lane);
        Loader<Kind>(all, shared, lane).run(wait_for_barriers);
    } else {
        give_registers<Kind::OTHER_REGISTERS>();
        wait_for_barriers();
    }
    __syncwarp();
    if (Kind::SHARERS == 2) cluster_sync();       /* nothing more comes from the other block */
    if (!Kind::OUTPUTS) wait_for_kernel_before(); /* maps need nothing of it, but are over after it */
}

} // namespace fkda

#endif
