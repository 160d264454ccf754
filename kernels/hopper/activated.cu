/*
 * The kernels of fwd.cu and segments.cu for calls whose gate is activated already and whose g is in bf16.
 * These kernels look at the options of bounded.cu while they run.
 */
#include "block/run.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_activated_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::SoloCta, fkda::EvenShares, fkda::Arithmetic::ACTIVATED>>(args,
                                                                                               threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_activated_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::PairCta, fkda::EvenShares, fkda::Arithmetic::ACTIVATED>>(args,
                                                                                               threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_activated_maps(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::MapCta, fkda::EvenShares, fkda::Arithmetic::ACTIVATED>>(args,
                                                                                              threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_activated_relay(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_relay<fkda::Arithmetic::ACTIVATED>(args);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_activated_mixed(const __grid_constant__ fkda_hopper_mixed_args args)
{
    fkda::run_mixed<fkda::Arithmetic::ACTIVATED>(args);
}
