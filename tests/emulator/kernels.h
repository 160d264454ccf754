/* The tables of kernels that the emulator can launch, by the names that the kernels have on a GPU. */
#ifndef FKDA_EMULATOR_KERNELS_H
#define FKDA_EMULATOR_KERNELS_H

#include <stddef.h>

namespace emulator
{

struct Kernel {
    const char *name;
    void (*run)(const void *arguments); /* runs one thread of a CTA */
    size_t argument_bytes;              /* of the kernel's one argument */
    int cluster = 1;                    /* CTAs of a cluster */
};

extern const Kernel backward_kernels[], decode_kernels[], hopper_kernels[], hopper_chunk_kernels[],
    hopper_first_kernels[], hopper_gate_kernels[], hopper_general_kernels[], hopper_walk_kernels[],
    layer_kernels[], map_kernels[], nonfinite_kernels[],
    portable_kernels[]; /* the last entry has a null name */

} // namespace emulator

#endif
