/* kernels/backward/ compiled for the emulator. */
#define fkda fkda_backward /* other kernels have some of its names too */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/backward/backward.cu"

template <void kernel(fkda_bwd_args)> static void run(const void *arguments)
{
    kernel(*static_cast<const fkda_bwd_args *>(arguments));
}

const emulator::Kernel emulator::backward_kernels[] = {
    {"fkda_bwd_walk", run<fkda_bwd_walk>, sizeof(fkda_bwd_args)},
    {"fkda_bwd_gradients", run<fkda_bwd_gradients>, sizeof(fkda_bwd_args)},
    {"fkda_bwd_reduce", run<fkda_bwd_reduce>, sizeof(fkda_bwd_args)},
    {},
};
