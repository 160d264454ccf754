/*
 * The KDA forward pass for Hopper (sm_90a): one launch that reads every input once.
 *
 * Algorithm. A CTA, one on each SM, goes through heads of sequences chunk by chunk. Four roles hand chunks on
 * through rings in shared memory: the loader, one warp, brings inputs (block/loader.cuh); teams of two or
 * four warps prepare chunks in turn (block/prepare.cuh); one warp solves each chunk (block/solve.cuh); one or
 * two warpgroups carry the state through all chunks (block/recurrence.cuh). A solo CTA has a head for itself.
 * The CTAs of a pair share a head: each carries half of the state's rows, prepares every second chunk and
 * sends it to the other one.
 *
 * The entry points here are fkda_hopper_solo and fkda_hopper_pair. segments.cu has the entry points for
 * sequences that are cut: fkda_hopper_list, maps, join, relay and mixed.
 *
 * Products run on tensor cores with fp32 sums: in fp16 where the state takes part, whose rows are scaled to
 * stay in the range of fp16, and in tf32 over channels inside a subchunk. docs/overview.md has the chunk
 * form, and docs/hopper-kernel.md has the layout.
 */
#include "block/run.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::SoloCta, fkda::EvenShares>>(args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::PairCta, fkda::EvenShares>>(args, threadIdx.x);
}
