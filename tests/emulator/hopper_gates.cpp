/* The kernels of kernels/hopper/ for some of the gates, compiled for the emulator. */
#include "hopper.h"

#include "../../kernels/hopper/bounded.cu"
#include "../../kernels/hopper/fp32_gates.cu"
#include "../../kernels/hopper/unbounded.cu"

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
    {"fkda_hopper_unbounded_solo", run<fkda_hopper_unbounded_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_unbounded_pair", run<fkda_hopper_unbounded_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_unbounded_maps", run<fkda_hopper_unbounded_maps>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_unbounded_relay", run<fkda_hopper_unbounded_relay>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_unbounded_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_unbounded_mixed>,
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
