/*
 * The KDA backward pass for compute capability 8.0 and newer, in three launches: states and their gradients
 * at the borders between segments (walk.cuh), all gradients of each segment (gradients.cuh), and sums over
 * heads and segments (reduce.cuh). docs/backward-kernel.md has the algorithm and the layout.
 *
 * Products run on tensor cores in tf32 with fp32 sums, and everything else is fp32.
 */
#include "gradients.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(FKDA_BWD_THREADS, 2)
    fkda_bwd_walk(const __grid_constant__ fkda_bwd_args args)
{
    fkda::walk(args);
}

extern "C" __global__ void __launch_bounds__(FKDA_BWD_THREADS, 1)
    fkda_bwd_gradients(const __grid_constant__ fkda_bwd_args args)
{
    fkda::find_gradients(args);
}

extern "C" __global__ void __launch_bounds__(FKDA_BWD_REDUCE_THREADS)
    fkda_bwd_reduce(const __grid_constant__ fkda_bwd_args args)
{
    fkda::reduce(args);
}
