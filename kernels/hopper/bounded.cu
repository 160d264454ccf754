/*
 * The kernels of fwd.cu and segments.cu for calls with other write strengths, with q and k that are
 * normalised already, with beta in fp32, or without A_log or dt_bias. These kernels look at the options while
 * they run. Their gate is that of fwd.cu.
 */
#include "block/run.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_bounded_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::SoloCta, fkda::EvenShares, fkda::Arithmetic::BOUNDED>>(args,
                                                                                             threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_bounded_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::PairCta, fkda::EvenShares, fkda::Arithmetic::BOUNDED>>(args,
                                                                                             threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_bounded_maps(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::MapCta, fkda::EvenShares, fkda::Arithmetic::BOUNDED>>(args,
                                                                                            threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_bounded_relay(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_relay<fkda::Arithmetic::BOUNDED>(args);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_bounded_mixed(const __grid_constant__ fkda_hopper_mixed_args args)
{
    fkda::run_mixed<fkda::Arithmetic::BOUNDED>(args);
}
