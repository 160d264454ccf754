/* What the files share that compile kernels/hopper/ for the emulator. */
#ifndef FKDA_EMULATOR_HOPPER_H
#define FKDA_EMULATOR_HOPPER_H

#include "instructions.h"
#include "kernels.h"

#include "../../kernels/hopper/block/run.cuh"

template <class Arguments, void kernel(Arguments)> static void run_with(const void *arguments)
{
    kernel(*static_cast<const Arguments *>(arguments));
}
template <void kernel(fkda_hopper_fwd_args)>
static constexpr auto run = run_with<fkda_hopper_fwd_args, kernel>;

#endif
