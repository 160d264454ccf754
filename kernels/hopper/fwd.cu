/*
 * The KDA forward pass for Hopper (sm_90a), in one launch and one pass over memory. A block to each multiprocessor
 * walks through heads of sequences, chunk by chunk of 16 tokens, in four roles that hand chunks on through rings in
 * shared memory: a warp loads (load.cuh), six or eight prepare (prepare.cuh), one or two solve (solve.cuh), and one or two
 * warpgroups carry the state (recurrence.cuh).
 *
 * The chunk form is in docs/architecture.md, the layout in docs/hopper-kernel.md. Products run on tensor cores with fp32
 * sums: those with the state in fp16, which its scaling keeps in range, those over channels in tf32.
 */
#include "load.cuh"
#include "prepare.cuh"
#include "recurrence.cuh"
#include "solve.cuh"

/* A block for `rows` rows of V of a head: all 128, or 64 where there are too few heads to fill the GPU. */
template <int rows> static __device__ void forward(const fkda_hopper_fwd_args &all)
{
    using namespace fkda;
    const fkda_fwd_args &args = all.fwd;
    Shared<rows> &shared = *reinterpret_cast<Shared<rows> *>(block_memory());
    const int thread = threadIdx.x, warp = thread / 32 - rows / 16, lane = thread % 32;
    const bool ordered = args.counter && args.tasks / args.heads <= FKDA_HOPPER_MOST_ORDERED;
    if (thread == 0) {
        for (int i = 0; i < SLOTS; i++) {
            mbarrier_init(&shared.chunks.loaded[i], 1);
            mbarrier_init_for_warps(&shared.chunks.ready[i], TEAM_WARPS + 1); /* the solver */
            mbarrier_init_for_warps(&shared.chunks.empty[i], rows / 16);
        }
        for (int i = 0; i < Shared<rows>::TEAMS; i++) {
            mbarrier_init_for_warps(&shared.product_ring.full[i], TEAM_WARPS);
            mbarrier_init_for_warps(&shared.product_ring.empty[i], 1);
        }
        for (int i = 0; i < PIECES_AHEAD; i++) {
            mbarrier_init(&shared.pieces.ring.full[i], 1);
            mbarrier_init_for_warps(&shared.pieces.ring.empty[i],
                                    rows / 16 + FKDA_HOPPER_AHEAD_WARPS(rows) - 1); /* all but the loader */
        }
        fence_mbarrier_init();
    }
    if (ordered) order_sequences(args, reinterpret_cast<int *>(shared.stage), shared.order);
    __syncthreads();
    if (thread < 2 * rows) { /* all 65536 registers are dealt out: 8 x 152 + 8 x 104, 4 x 176 + 12 x 112 */
        take_registers<rows == 128 ? 152 : 176>();
        Recurrence<rows>(args, shared, thread).run();
    } else {
        give_registers<rows == 128 ? 104 : 112>();
        if (warp < FKDA_HOPPER_PREPARE_WARPS(rows))
            Preparation<rows>(args, shared, warp, lane).run();
        else if (warp == FKDA_HOPPER_PREPARE_WARPS(rows))
            Loader<rows>(all, shared, ordered ? shared.order : nullptr, lane).run();
        else if (warp < FKDA_HOPPER_AHEAD_WARPS(rows))
            solve(args, shared, warp - FKDA_HOPPER_PREPARE_WARPS(rows) - 1, lane);
    }
}

#define FKDA_DEFINE_KERNEL(rows)                                                                             \
    extern "C" __global__ void __launch_bounds__(FKDA_HOPPER_THREADS(rows), 1)                               \
        fkda_hopper_fwd_##rows(const __grid_constant__ fkda_hopper_fwd_args args)                            \
    {                                                                                                        \
        forward<rows>(args);                                                                                 \
    }

FKDA_DEFINE_KERNEL(128)
FKDA_DEFINE_KERNEL(64)
