/*
 * The kernels of sequences that are cut into segments, in the order in which they run: a plan of the segments, the first pass,
 * and the join. The second pass is the ordinary forward pass (fwd.cu), over segments. Where all segments fit on the device at once, one kernel is in the
 * place of all of these (at_once.cuh).
 * segments.h says what they share, docs/segments.md how it works.
 */
#include "block/roles.cuh"
#include "join/join.cuh"
#include "schedule/list.cuh"

extern "C" __global__ void __launch_bounds__(FKDA_LIST_THREADS, 1)
    fkda_hopper_list(const __grid_constant__ fkda_hopper_fwd_args args)
{
    using namespace fkda;
    SegmentLister(args.fwd, args.cut).run(reinterpret_cast<long long *>(cta_memory()));
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_maps(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_one_phase<fkda::Block<fkda::MapCta, fkda::EvenShares>>(args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_relay(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_relay(args);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_mixed(const __grid_constant__ fkda_hopper_mixed_args args)
{
    fkda::run_mixed(args);
}

#define FKDA_DEFINE_JOIN(step, which)                                                                        \
    extern "C" __global__ void __launch_bounds__(FKDA_JOIN_CTA_THREADS, 1)                                   \
        fkda_hopper_join_##step(const __grid_constant__ fkda_hopper_fwd_args args)                           \
    {                                                                                                        \
        fkda::join<fkda::which>(args.fwd, args.cut);                                                         \
    }

FKDA_DEFINE_JOIN(compose, COMPOSE)
FKDA_DEFINE_JOIN(chain, CHAIN)
FKDA_DEFINE_JOIN(expand, EXPAND)
