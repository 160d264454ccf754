/* kernels/hopper/ compiled for the emulator. */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/hopper/fwd.cu"
#include "../../kernels/hopper/segments.cu"

template <class Arguments, void kernel(Arguments)> static void run_with(const void *arguments)
{
    kernel(*static_cast<const Arguments *>(arguments));
}
template <void kernel(fkda_hopper_fwd_args)>
static constexpr auto run = run_with<fkda_hopper_fwd_args, kernel>;

const emulator::Kernel emulator::hopper_kernels[] = {
    {"fkda_hopper_fwd_alone", run<fkda_hopper_fwd_alone>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_fwd_paired", run<fkda_hopper_fwd_paired>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR},
    {"fkda_hopper_plan", run<fkda_hopper_plan>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_maps", run<fkda_hopper_maps>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR},
    {"fkda_hopper_at_once", run<fkda_hopper_at_once>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR},
    {"fkda_hopper_mixture", run_with<fkda_hopper_mixture_args, fkda_hopper_mixture>,
     sizeof(fkda_hopper_mixture_args), FKDA_HOPPER_PAIR},
    {"fkda_hopper_join_compose", run<fkda_hopper_join_compose>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_join_chain", run<fkda_hopper_join_chain>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_join_expand", run<fkda_hopper_join_expand>, sizeof(fkda_hopper_fwd_args)},
    {},
};
