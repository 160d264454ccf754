/*
 * The kernels for calls with checkpoints or with states that have K first. These kernels have the arithmetic
 * of fwd.cu. The kernels of fwd.cu have neither checkpoints nor K-first states, so that a call without these
 * options pays nothing for them.
 */
#include "block/run.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_states_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::SoloCta, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(args,
                                                                                                 threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_states_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::PairCta, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(args,
                                                                                                 threadIdx.x);
}
