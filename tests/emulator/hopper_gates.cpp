/* The kernels of kernels/hopper/ with one gate each or with g in fp32, compiled for the emulator. */
#include "hopper.h"

#include "../../kernels/hopper/bounded.cu"
#include "../../kernels/hopper/fp32_gates.cu"
#include "../../kernels/hopper/softplus.cu"

const emulator::Kernel emulator::hopper_gate_kernels[] = {
    {"fkda_hopper_bounded_solo", run<fkda_hopper_bounded_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_bounded_pair", run<fkda_hopper_bounded_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_bounded_maps", run<fkda_hopper_bounded_maps>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_bounded_relay", run<fkda_hopper_bounded_relay>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_bounded_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_bounded_mixed>,
     sizeof(fkda_hopper_mixed_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_softplus_solo", run<fkda_hopper_softplus_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_softplus_pair", run<fkda_hopper_softplus_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_softplus_maps", run<fkda_hopper_softplus_maps>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_softplus_relay", run<fkda_hopper_softplus_relay>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_softplus_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_softplus_mixed>,
     sizeof(fkda_hopper_mixed_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_fp32_gates_solo", run<fkda_hopper_fp32_gates_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_fp32_gates_pair", run<fkda_hopper_fp32_gates_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_fp32_gates_maps", run<fkda_hopper_fp32_gates_maps>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_fp32_gates_relay", run<fkda_hopper_fp32_gates_relay>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_fp32_gates_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_fp32_gates_mixed>,
     sizeof(fkda_hopper_mixed_args), FKDA_HOPPER_PAIR_CTAS},
    {},
};
