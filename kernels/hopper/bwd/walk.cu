/*
 * The walks of the backward pass: what is needed at the borders between segments, before every segment can
 * find its gradients by itself. They are blocks of the forward pass that compute no outputs.
 *
 *   fkda_hopper_walk_states_*     carry the state forwards; there are no queries
 *   fkda_hopper_walk_gradients_*  carry the gradient with respect to the state back, from the gradient with
 *                                 respect to the final state; gradients of outputs are in the place of values
 *
 * Loader, preparation and solver are those of the forward pass, since the way back needs the same decayed
 * tiles and the same T and P (step_back() in ../block/recurrence.cuh). It takes the chunks of a work item
 * from the end (ChunkOrder in ../block/cursors.cuh). What is carried is stored at every border
 * (store_border() in ../block/state_rows.cuh). `checkpoints.states` of the arguments is where the borders
 * are, and its `slots` says how many there are; `initial_state` of the way back is the gradient with respect
 * to the final state, and `v` and its descriptor are of `dout`. docs/backward-kernel.md has the rest.
 *
 * The kernels here have the usual arithmetic; those of general_walk.cu know every option.
 */
#include "../block/run.cuh"
#include "../join/join.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_walk_states_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::StateWalk<fkda::SoloCta>, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_walk_states_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::StateWalk<fkda::PairCta>, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_walk_gradients_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::GradientWalk<fkda::SoloCta>, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_walk_gradients_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<fkda::Block<fkda::GradientWalk<fkda::PairCta>, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(args, threadIdx.x);
}

extern "C" __global__ void __launch_bounds__(FKDA_JOIN_CTA_THREADS, 1)
    fkda_hopper_walk_join(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::join_back(args.fwd, args.cut);
}
