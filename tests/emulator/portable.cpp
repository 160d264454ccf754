/* kernels/portable/ compiled for the emulator. */
#define fkda fkda_portable /* kernels/hopper/ has some of its names too */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/portable/fwd.cu"

template <void kernel(fkda_fwd_args)> static void run(const void *arguments)
{
    kernel(*static_cast<const fkda_fwd_args *>(arguments));
}

const emulator::Kernel emulator::portable_kernels[] = {
    {"fkda_portable_fwd_128", run<fkda_portable_fwd_128>, sizeof(fkda_fwd_args)},
    {"fkda_portable_fwd_64", run<fkda_portable_fwd_64>, sizeof(fkda_fwd_args)},
    {"fkda_portable_fwd_32", run<fkda_portable_fwd_32>, sizeof(fkda_fwd_args)},
    {"fkda_portable_general_128", run<fkda_portable_general_128>, sizeof(fkda_fwd_args)},
    {"fkda_portable_general_64", run<fkda_portable_general_64>, sizeof(fkda_fwd_args)},
    {"fkda_portable_general_32", run<fkda_portable_general_32>, sizeof(fkda_fwd_args)},
    {},
};
