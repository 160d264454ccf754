/* kernels/hopper/ compiled for the emulator. */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/hopper/activated.cu"
#include "../../kernels/hopper/bounded.cu"
#include "../../kernels/hopper/fwd.cu"
#include "../../kernels/hopper/general_fwd.cu"
#include "../../kernels/hopper/general_segments.cu"
#include "../../kernels/hopper/segments.cu"
#include "../../kernels/hopper/softplus.cu"
#include "../../kernels/hopper/states_fwd.cu"
#include "../../kernels/hopper/states_segments.cu"

template <class Arguments, void kernel(Arguments)> static void run_with(const void *arguments)
{
    kernel(*static_cast<const Arguments *>(arguments));
}
template <void kernel(fkda_hopper_fwd_args)>
static constexpr auto run = run_with<fkda_hopper_fwd_args, kernel>;

const emulator::Kernel emulator::hopper_kernels[] = {
    {"fkda_hopper_solo", run<fkda_hopper_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_pair", run<fkda_hopper_pair>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_list", run<fkda_hopper_list>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_maps", run<fkda_hopper_maps>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_relay", run<fkda_hopper_relay>, sizeof(fkda_hopper_fwd_args), FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_mixed>, sizeof(fkda_hopper_mixed_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_join", run<fkda_hopper_join>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_general_solo", run<fkda_hopper_general_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_general_pair", run<fkda_hopper_general_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_general_maps", run<fkda_hopper_general_maps>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_general_relay", run<fkda_hopper_general_relay>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_general_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_general_mixed>,
     sizeof(fkda_hopper_mixed_args), FKDA_HOPPER_PAIR_CTAS},
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
    {"fkda_hopper_activated_solo", run<fkda_hopper_activated_solo>, sizeof(fkda_hopper_fwd_args)},
    {"fkda_hopper_activated_pair", run<fkda_hopper_activated_pair>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_activated_maps", run<fkda_hopper_activated_maps>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_activated_relay", run<fkda_hopper_activated_relay>, sizeof(fkda_hopper_fwd_args),
     FKDA_HOPPER_PAIR_CTAS},
    {"fkda_hopper_activated_mixed", run_with<fkda_hopper_mixed_args, fkda_hopper_activated_mixed>,
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
