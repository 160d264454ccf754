/* What a block does: sets up its barriers, and gives each warp its role. */
#ifndef FKDA_HOPPER_BLOCK_CUH
#define FKDA_HOPPER_BLOCK_CUH

#include "load.cuh"
#include "prepare.cuh"
#include "recurrence.cuh"
#include "solve.cuh"

namespace fkda
{

/* For `rows` rows of V of a head: all 128, or 64 where there are too few heads to fill the GPU. mixed: of some pieces only states
 * are wanted. */
template <int rows, bool mixed> static __device__ void run_block(const fkda_hopper_fwd_args &all)
{
    const fkda_fwd_args &args = all.fwd;
    Shared<rows> &shared = *reinterpret_cast<Shared<rows> *>(block_memory());
    const int thread = threadIdx.x, warp = thread / 32 - rows / 16, lane = thread % 32;
    const int rank = sharer_rank<rows, mixed>();
    const bool ordered =
        args.counter && !all.cut.counts && args.tasks / args.heads <= FKDA_HOPPER_MOST_ORDERED;
    if (rows == 64) let_next_kernel_start(); /* in a phase: the one with blocks of 128 rows */
    if (thread == 0) {
        for (int i = 0; i < SLOTS; i++) {
            const bool own = SHARERS<rows, mixed> == 1 || i % 2 == rank;
            mbarrier_init(&shared.chunks.loaded[i], 1);
            if (own)
                mbarrier_init_for_warps(&shared.chunks.ready[i], TEAM_WARPS + 1); /* the solver */
            else
                mbarrier_init(&shared.chunks.ready[i], 1); /* the loader, for the copies */
            mbarrier_init_for_warps(&shared.chunks.empty[i], rows / 16 * (own ? SHARERS<rows, mixed> : 1));
        }
        for (int i = 0; i < TEAMS; i++) {
            mbarrier_init_for_warps(&shared.product_ring.full[i], TEAM_WARPS);
            mbarrier_init_for_warps(&shared.product_ring.empty[i], 1);
        }
        for (int i = 0; i < PIECES_AHEAD; i++) {
            mbarrier_init(&shared.pieces.ring.full[i], 1);
            mbarrier_init_for_warps(&shared.pieces.ring.empty[i],
                                    rows / 16 + FKDA_HOPPER_AHEAD_WARPS - 1); /* all but the loader */
        }
        fence_mbarrier_init();
    }
    if (ordered) order_sequences(args, reinterpret_cast<int *>(shared.stage), shared.order);
    __syncthreads();
    if (SHARERS<rows, mixed> == 2) cluster_sync(); /* before anything comes from the other block */
    if (thread < 2 * rows) { /* all registers are dealt out: 8 x (152 + 104), 4 x 200 + 8 x 152 */
        take_registers<rows == 64 ? 200 : 152>();
        Recurrence<rows, mixed>(args, shared, thread).run();
    } else {
        give_registers<rows == 64 ? 152 : 104>();
        if (warp < FKDA_HOPPER_PREPARE_WARPS)
            Preparation<rows, mixed>(args, shared, warp, lane).run();
        else if (warp == FKDA_HOPPER_PREPARE_WARPS)
            Loader<rows, mixed>(all, shared, ordered ? shared.order : nullptr, lane).run();
        else
            solve<rows, mixed>(args, shared, lane);
    }
    __syncwarp();
    if (SHARERS<rows, mixed> == 2) cluster_sync(); /* nothing more comes from the other block */
    if (rows == 128) wait_for_kernel_before();     /* in a phase: so that this one ends last */
}

} // namespace fkda

#endif
