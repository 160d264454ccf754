/*
 * The kernels of sequences that are cut into segments, in the order in which they run: a plan of the segments, the first pass,
 * and the join. The second pass is the ordinary forward pass (fwd.cu), over segments. Where all segments fit on the device at once, one kernel is in the
 * place of all of these (at_once.cuh).
 * segments.h says what they share, docs/segments.md how it works.
 */
#include "block.cuh"
#include "join.cuh"
#include "plan.cuh"

extern "C" __global__ void __launch_bounds__(FKDA_LIST_THREADS, 1)
    fkda_hopper_list(const __grid_constant__ fkda_hopper_fwd_args args)
{
    using namespace fkda;
    Plan(args.fwd, args.cut).run(reinterpret_cast<long long *>(block_memory()));
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_maps(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Maps>(args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_relay(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block_at_once(args);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_mixed(const __grid_constant__ fkda_hopper_mixed_args args)
{
    fkda::run_block_of_mixture(args);
}

extern "C" __global__ void __launch_bounds__(FKDA_JOIN_CTA_THREADS, 1)
    fkda_hopper_join(const __grid_constant__ fkda_hopper_fwd_args args)
{
    using namespace fkda;
    if (args.work == FKDA_JOIN_COMPOSE)
        join<COMPOSE>(args.fwd, args.cut);
    else if (args.work == FKDA_JOIN_CHAIN)
        join<CHAIN>(args.fwd, args.cut);
    else
        join<EXPAND>(args.fwd, args.cut);
}
