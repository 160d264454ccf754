/* kernels/hopper/bwd/chunks/ compiled for the emulator. */
#define fkda fkda_hopper_chunks /* other kernels have some of its names too */
#include "instructions.h"
#include "kernels.h"
#include <stdio.h>

#include "../../kernels/hopper/bwd/chunks/chunks.cu"

template <void kernel(fkda_hopper_chunk_args)> static void run(const void *arguments)
{
    kernel(*static_cast<const fkda_hopper_chunk_args *>(arguments));
}

const emulator::Kernel emulator::hopper_chunk_kernels[] = {
    {"fkda_hopper_bwd_chunks", run<fkda_hopper_bwd_chunks>, sizeof(fkda_hopper_chunk_args)},
    {"fkda_hopper_bwd_bounded_chunks", run<fkda_hopper_bwd_bounded_chunks>, sizeof(fkda_hopper_chunk_args)},
    {"fkda_hopper_bwd_general_chunks", run<fkda_hopper_bwd_general_chunks>, sizeof(fkda_hopper_chunk_args)},
    {},
};
