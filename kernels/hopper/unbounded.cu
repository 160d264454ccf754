/*
 * The kernels of fwd.cu and segments.cu for calls whose g is in bf16 and whose gate has no bound: softplus,
 * or activated already. These kernels look at which of the two it is and at the options of bounded.cu while
 * they run.
 */
#include "block/run.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_unbounded_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::SoloCta, fkda::EvenShares, fkda::Arithmetic::UNBOUNDED>>(args,
                                                                                               threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_unbounded_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::PairCta, fkda::EvenShares, fkda::Arithmetic::UNBOUNDED>>(args,
                                                                                               threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_unbounded_maps(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::MapCta, fkda::EvenShares, fkda::Arithmetic::UNBOUNDED>>(args,
                                                                                              threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_unbounded_relay(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_relay<fkda::Arithmetic::UNBOUNDED>(args);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_unbounded_mixed(const __grid_constant__ fkda_hopper_mixed_args args)
{
    fkda::run_mixed<fkda::Arithmetic::UNBOUNDED>(args);
}
