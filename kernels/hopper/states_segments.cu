/* The kernels of segments.cu that write the caller's states, for calls with checkpoints or with states that
 * have K first, as states_fwd.cu has those of fwd.cu. The list, the maps and the join are the same for all.
 * */
#include "block/run.cuh"

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_states_relay(const __grid_constant__ fkda_hopper_fwd_args args)
{
    fkda::run_relay<fkda::Arithmetic::USUAL, true>(args);
}

extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_PAIR_CTAS, 1, 1)
    __launch_bounds__(FKDA_HOPPER_THREADS, 1)
        fkda_hopper_states_mixed(const __grid_constant__ fkda_hopper_mixed_args args)
{
    fkda::run_mixed<fkda::Arithmetic::USUAL, true>(args);
}
