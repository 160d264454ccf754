/* kernels/hopper/ compiled for the emulator. */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/hopper/fwd.cu"

template <void kernel(fkda_hopper_fwd_args)> static void run(const void *arguments)
{
    kernel(*static_cast<const fkda_hopper_fwd_args *>(arguments));
}

const emulator::Kernel emulator::hopper_kernels[] = {
    {"fkda_hopper_fwd_128", run<fkda_hopper_fwd_128>},
    {"fkda_hopper_fwd_64", run<fkda_hopper_fwd_64>},
    {},
};
