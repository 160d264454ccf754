/* kernels/hopper/bwd/ compiled for the emulator. */
#define fkda fkda_hopper_backward /* other kernels have some of its names too */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/hopper/bwd/bwd.cu"

template <void kernel(fkda_hopper_bwd_args)> static void run(const void *arguments)
{
    kernel(*static_cast<const fkda_hopper_bwd_args *>(arguments));
}

const emulator::Kernel emulator::hopper_backward_kernels[] = {
    {"fkda_hopper_bwd_walk", run<fkda_hopper_bwd_walk>, sizeof(fkda_hopper_bwd_args)},
    {"fkda_hopper_bwd_walk_chunks", run<fkda_hopper_bwd_walk_chunks>, sizeof(fkda_hopper_bwd_args)},
    {"fkda_hopper_bwd_gradients", run<fkda_hopper_bwd_gradients>, sizeof(fkda_hopper_bwd_args)},
    {"fkda_hopper_bwd_reduce", run<fkda_hopper_bwd_reduce>, sizeof(fkda_hopper_bwd_args)},
    {},
};
