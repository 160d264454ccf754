/* The kernels of kernels/hopper/ for all other options, compiled for the emulator. */
#include "hopper.h"

#include "../../kernels/hopper/general_fwd.cu"
#include "../../kernels/hopper/general_segments.cu"
#include "../../kernels/hopper/states_fwd.cu"
#include "../../kernels/hopper/states_segments.cu"

const emulator::Kernel emulator::hopper_general_kernels[] = {
    {"fkda_hopper_general_solo", run<fkda_hopper_general_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_general_pair", run<fkda_hopper_general_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_general_maps", run<fkda_hopper_general_maps>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_general_relay", run<fkda_hopper_general_relay>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_general_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_general_mixed>,
     sizeof(fkda_hopper_mixed_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_states_solo", run<fkda_hopper_states_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_states_pair", run<fkda_hopper_states_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_states_relay", run<fkda_hopper_states_relay>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_states_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_states_mixed>,
     sizeof(fkda_hopper_mixed_args), FKDA_HOPPER_PAIR_CTAS},
    {},
};
