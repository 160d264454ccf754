/* kernels/hopper/ compiled for the emulator. */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/hopper/fwd.cu"
#include "../../kernels/hopper/segments.cu"

template <void kernel(fkda_hopper_fwd_args)> static void run(const void *arguments)
{
    kernel(*static_cast<const fkda_hopper_fwd_args *>(arguments));
}

const emulator::Kernel emulator::hopper_kernels[] = {
    {"fkda_hopper_fwd_alone", run<fkda_hopper_fwd_alone>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_fwd_paired", run<fkda_hopper_fwd_paired>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR},
    {"fkda_hopper_plan", run<fkda_hopper_plan>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_maps", run<fkda_hopper_maps>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR},
    {"fkda_hopper_at_once", run<fkda_hopper_at_once>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR},
    {"fkda_hopper_join_compose", run<fkda_hopper_join_compose>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_join_chain", run<fkda_hopper_join_chain>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_join_expand", run<fkda_hopper_join_expand>, sizeof(fkda_hopper_fwd_args)},
    {},
};
