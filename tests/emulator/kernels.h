/* The kernels that the emulator has, by the names that they have on a GPU. */
#ifndef FKDA_EMULATOR_KERNELS_H
#define FKDA_EMULATOR_KERNELS_H

#include <stddef.h>

namespace emulator
{

struct Kernel {
    const char *name;
    void (*run)(const void *arguments); /* as one of a block's threads */
    size_t argument_bytes;              /* of its one argument */
    int cluster = 1;                    /* blocks */
};

extern const Kernel hopper_kernels[], portable_kernels[]; /* up to a null name */

} // namespace emulator

#endif
