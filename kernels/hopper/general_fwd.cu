/*
 * The kernels of fwd.cu for calls with another gate, other write strengths, inputs in fp32, or q and k that
 * are normalised already: with every option that concerns arithmetic. They look at the options while they
 * run. The kernels of fwd.cu know none of them, so that the usual call pays nothing for them.
 */
#include "block/run.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_general_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::SoloCta, fkda::EvenShares, fkda::Arithmetic::GENERAL>>(args,
                                                                                             threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_general_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::PairCta, fkda::EvenShares, fkda::Arithmetic::GENERAL>>(args,
                                                                                             threadIdx.x);
}
