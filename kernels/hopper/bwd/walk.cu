/*
 * The walks of the backward pass, which find what every chunk of 32 tokens needs before it can find its
 * gradients by itself. The walks are blocks of the forward pass that compute no outputs.
 *
 *   fkda_hopper_walk_states_*     carry the state forwards and store it before each chunk
 *   fkda_hopper_walk_gradients_*  carry the gradient with respect to the state back and store it behind each
 *                                 chunk; gradients of outputs are in the place of values
 *   fkda_hopper_walk_join         carries such gradients through the maps of segments (join_back() in
 *                                 ../join/join.cuh), for sequences that are cut
 *
 * Loader, preparation and solver are those of the forward pass, since the way back needs the same decayed
 * tiles and the same T and P (step_back() in ../block/recurrence.cuh). The way back takes the chunks of a
 * work item from the end (ChunkOrder in ../block/cursors.cuh).
 *
 * In the arguments, `checkpoints.states` is where the images of chunks go, and its `slots` says how many
 * there are. On the way back `initial_state` is the gradient with respect to the final state, and `v` and its
 * descriptor are of `dout`.
 *
 * The kernels here have the usual arithmetic; those of general_walk.cu know every option.
 */
#include "../block/run.cuh"
#include "../join/join.cuh"

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_walk_states_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<
        fkda::Block<fkda::StateWalk<fkda::SoloCta>, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(
        args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_walk_states_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<
        fkda::Block<fkda::StateWalk<fkda::PairCta>, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(
        args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(FKDA_HOPPER_THREADS, 1)
    fkda_hopper_walk_gradients_solo(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<
        fkda::Block<fkda::GradientWalk<fkda::SoloCta>, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(
        args, threadIdx.x);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_walk_gradients_pair(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_block<
        fkda::Block<fkda::GradientWalk<fkda::PairCta>, fkda::EvenShares, fkda::Arithmetic::USUAL, true>>(
        args, threadIdx.x);
}

extern "C" __global__ void __launch_bounds__(FKDA_JOIN_CTA_THREADS, 1)
    fkda_hopper_walk_join(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::join_back(args.fwd, args.cut);
}
