/* The kernels of kernels/hopper/ for some of the gates, compiled for the emulator. */
#include "hopper.h"

#include "../../kernels/hopper/activated.cu"
#include "../../kernels/hopper/bounded.cu"
#include "../../kernels/hopper/fp32_gates.cu"
#include "../../kernels/hopper/softplus.cu"

#define KERNEL(name, ctas) emulator::Kernel({#name, run<name>, sizeof(fkda_hopper_fwd_args), ctas})
#define MIXED_KERNEL(name)                                                                                   \
    emulator::Kernel({#name, run_with<fkda_hopper_mixed_args, name>, sizeof(fkda_hopper_mixed_args),         \
                      FKDA_HOPPER_PAIR_CTAS})
/* The kernels whose names begin so. */
#define KERNELS_OF(start)                                                                                    \
    KERNEL(start##_solo, 1), KERNEL(start##_pair, FKDA_HOPPER_PAIR_CTAS),                                    \
        KERNEL(start##_maps, FKDA_HOPPER_PAIR_CTAS), KERNEL(start##_relay, FKDA_HOPPER_PAIR_CTAS),           \
        MIXED_KERNEL(start##_mixed)

const emulator::Kernel emulator::hopper_gate_kernels[] = {
    KERNELS_OF(fkda_hopper_bounded),
    KERNELS_OF(fkda_hopper_softplus),
    KERNELS_OF(fkda_hopper_activated),
    KERNELS_OF(fkda_hopper_fp32_gates),
    {},
};
