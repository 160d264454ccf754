/* The walks of walk.cu for calls with any option. */
#include "../block/run.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_walk_general_states_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::StateWalk<fkda::SoloCta>, fkda::EvenShares, fkda::Arithmetic::GENERAL>>(
        args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_walk_general_states_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::StateWalk<fkda::PairCta>, fkda::EvenShares, fkda::Arithmetic::GENERAL>>(
        args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_walk_general_gradients_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<
        fkda::Block<fkda::GradientWalk<fkda::SoloCta>, fkda::EvenShares, fkda::Arithmetic::GENERAL>>(
        args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_walk_general_gradients_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<
        fkda::Block<fkda::GradientWalk<fkda::PairCta>, fkda::EvenShares, fkda::Arithmetic::GENERAL>>(
        args, threadIdx.x);
}
