/*
 * The KDA forward pass for Hopper (sm_90a), in one launch and one pass over memory. SolverScratch, one to a multiprocessor, walk through
 * heads of sequences chunk by chunk: each for itself, in chunks of 16 tokens, or in clusters of two that share a head, in chunks of 32
 * (kinds.cuh). In a block four roles hand chunks on through rings in shared memory: a warp loads (load.cuh), others prepare
 * (prepare.cuh), one solves (solve.cuh), and a warpgroup or two carry rows of the state (recurrence.cuh). What rows do not differ in
 * the blocks of a cluster prepare by turns, and send each other.
 *
 * The chunk form is in docs/architecture.md, the layout in docs/hopper-kernel.md. Products run on tensor cores with fp32
 * sums: those with the state in fp16, which its scaling keeps in range, those over channels in tf32.
 */
#include "block/roles.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_one_phase<fkda::Block<fkda::SoloCta, fkda::EvenShares>>(args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_one_phase<fkda::Block<fkda::PairCta, fkda::EvenShares>>(args, threadIdx.x);
}
