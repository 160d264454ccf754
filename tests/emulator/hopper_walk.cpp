/* The walks of the backward pass of kernels/hopper/bwd/, compiled for the emulator. */
#include "hopper.h"

#include "../../kernels/hopper/bwd/general_walk.cu"
#include "../../kernels/hopper/bwd/walk.cu"

const emulator::Kernel emulator::hopper_walk_kernels[] = {
    {"fkda_hopper_walk_states_solo", run<fkda_hopper_walk_states_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_walk_states_pair", run<fkda_hopper_walk_states_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_walk_gradients_solo", run<fkda_hopper_walk_gradients_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_walk_gradients_pair", run<fkda_hopper_walk_gradients_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_walk_general_states_solo", run<fkda_hopper_walk_general_states_solo>,
     sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_walk_general_states_pair", run<fkda_hopper_walk_general_states_pair>,
     sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_walk_general_gradients_solo", run<fkda_hopper_walk_general_gradients_solo>,
     sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_walk_general_gradients_pair", run<fkda_hopper_walk_general_gradients_pair>,
     sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_walk_join", run<fkda_hopper_walk_join>, sizeof(fkda_hopper_fwd_args)},
    {},
};
