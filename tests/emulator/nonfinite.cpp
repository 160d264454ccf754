/* kernels/nonfinite/ compiled for the emulator. */
#define fkda fkda_nonfinite /* other kernels have some of its names too */
#include "instructions.h"
#include "kernels.h"

#include "../../kernels/nonfinite/count.cu"

static void run(const void *arguments)
{
    fkda_count_nonfinite(*static_cast<const fkda_count_args *>(arguments));
}

const emulator::Kernel emulator::nonfinite_kernels[] = {
    {"fkda_count_nonfinite", run, sizeof(fkda_count_args)},
    {},
};
