/* The usual kernels of kernels/hopper/, compiled for the emulator. */
#include "hopper.h"

#include "../../kernels/hopper/fwd.cu"
#include "../../kernels/hopper/segments.cu"

const emulator::Kernel emulator::hopper_kernels[] = {
    {"fkda_hopper_solo", run<fkda_hopper_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_pair", run<fkda_hopper_pair>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_list", run<fkda_hopper_list>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_maps", run<fkda_hopper_maps>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_relay", run<fkda_hopper_relay>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_mixed>, sizeof(fkda_hopper_mixed_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_join", run<fkda_hopper_join>, sizeof(fkda_hopper_fwd_args)},
    {},
};
