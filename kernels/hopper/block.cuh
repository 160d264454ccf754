/* What a block does: sets up its barriers, and gives each warp its role. */
#ifndef FKDA_HOPPER_BLOCK_CUH
#define FKDA_HOPPER_BLOCK_CUH

#include "load.cuh"
#include "prepare.cuh"
#include "recurrence.cuh"
#include "solve.cuh"

namespace fkda
{

/* Barriers for all that is handed on, by one thread. */
template <class Kind> static __device__ void set_up_barriers(Shared<Kind> &shared)
{
    for (int i = 0; i < Kind::OWN; i++) {
        mbarrier_init(&shared.chunks.loaded[i], 1);
        mbarrier_init_for_warps(&shared.chunks.ready[i], Kind::TEAM_WARPS + 1); /* the solver */
        mbarrier_init_for_warps(&shared.chunks.empty[i], Kind::SHARERS * Kind::RECURRENCE_WARPS);
    }
    for (int i = Kind::OWN; i < Kind::SLOTS; i++) {
        mbarrier_init(&shared.chunks.ready[i], 1); /* the loader, for the copies */
        mbarrier_init_for_warps(&shared.chunks.empty[i], Kind::RECURRENCE_WARPS);
    }
    for (int i = 0; i < Kind::TEAMS; i++) {
        mbarrier_init_for_warps(&shared.product_ring.full[i], Kind::TEAM_WARPS);
        mbarrier_init_for_warps(&shared.product_ring.empty[i], 1);
    }
    for (int i = 0; i < PIECES_AHEAD; i++) {
        mbarrier_init(&shared.pieces.ring.full[i], 1);
        mbarrier_init_for_warps(&shared.pieces.ring.empty[i], /* all but the loader */
                                Kind::RECURRENCE_WARPS + Kind::AHEAD_WARPS - 1);
    }
    fence_mbarrier_init();
}

template <class Kind> static __device__ void run_block(const fkda_hopper_fwd_args &all)
{
    Shared<Kind> &shared = *reinterpret_cast<Shared<Kind> *>(block_memory());
    const int thread = threadIdx.x, warp = thread / 32 - Kind::RECURRENCE_WARPS, lane = thread % 32;
    let_next_kernel_start();
    if (thread == 0) set_up_barriers(shared);
    constexpr int STAGE_UNITS = sizeof shared.stage / 16; /* what is above diagonals stays zero */
    for (int i = thread; i < STAGE_UNITS; i += FKDA_HOPPER_THREADS)
        reinterpret_cast<uint4 *>(shared.stage)[i] = make_uint4(0, 0, 0, 0);
    fence_async_proxy();
    if (Kind::SHARERS == 2)
        cluster_sync(); /* before anything comes from the other block */
    else
        __syncthreads();
    if (warp < 0) {
        take_registers<Kind::RECURRENCE_REGISTERS>();
        Recurrence<Kind>(all.fwd, shared, thread).run();
    } else {
        give_registers<Kind::OTHER_REGISTERS>();
        if (warp < Kind::PREPARE_WARPS)
            Preparation<Kind>(all.fwd, shared).run();
        else if (warp == Kind::PREPARE_WARPS)
            Loader<Kind>(all, shared, lane).run();
        else if (warp == Kind::PREPARE_WARPS + 1)
            solve<Kind>(all.fwd, shared, lane);
    }
    __syncwarp();
    if (Kind::SHARERS == 2) cluster_sync();       /* nothing more comes from the other block */
    if (!Kind::OUTPUTS) wait_for_kernel_before(); /* maps need nothing of it, but are over after it */
}

} // namespace fkda

#endif
