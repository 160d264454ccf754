/* kernels/hopper/bwd/first.cu compiled for the emulator. */
#define fkda fkda_hopper_first /* other kernels have some of its names too */
#include "instructions.h"
#include "kernels.h"
#include <stdio.h>

#include "../../kernels/hopper/bwd/first.cu"

static void run(const void *arguments)
{
    fkda_hopper_bwd_first(*static_cast<const fkda_hopper_chunk_args *>(arguments));
}

const emulator::Kernel emulator::hopper_first_kernels[] = {
    {"fkda_hopper_bwd_first", run, sizeof(fkda_hopper_chunk_args)},
    {},
};
