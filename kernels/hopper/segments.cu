/*
 * The kernels for sequences that are cut into segments:
 *
 *   fkda_hopper_list   lists all segments, if sequences have different lengths (schedule/list.cuh)
 *   fkda_hopper_maps   computes the maps of all inner segments; beside it fwd.cu computes the first segments
 *   fkda_hopper_join   joins the maps; behind it fwd.cu computes the later segments (join/join.cuh)
 *   fkda_hopper_relay  computes all segments in one launch (schedule/relay.cuh)
 *   fkda_hopper_mixed  a relay for long sequences, beside short ones that are not cut (schedule/mixed.cuh)
 *
 * docs/segments.md explains the algorithm, and segments.h has what the kernels and the host share.
 */
#include "block/run.cuh"
#include "join/join.cuh"
#include "schedule/list.cuh"

extern "C" __global__ void __launch_bounds__(FKDA_LIST_THREADS, 1)
    fkda_hopper_list(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::SegmentLister(args.fwd, args.cut).run(reinterpret_cast<long long *>(fkda::cta_memory()));
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_maps(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::MapCta, fkda::EvenShares>>(args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_relay(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_relay<fkda::Arithmetic::USUAL>(args);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_mixed(const __grid_constant__ fkda_hopper_mixed_args args)
{
    fkda::run_mixed<fkda::Arithmetic::USUAL>(args);
}

extern "C" __global__ void __launch_bounds__(FKDA_JOIN_CTA_THREADS, 1)
    fkda_hopper_join(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::join(args.fwd, args.cut, args.work);
}
