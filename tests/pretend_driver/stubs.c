/* Every entry of the driver that no other file of this library defines: it fails with
 * CUDA_ERROR_NOT_SUPPORTED. */
#include "../../src/cuda/driver.h"

#pragma GCC diagnostic ignored "-Wunused-parameter"

enum { NOT_SUPPORTED = 801 };

#define STUB(name, symbol, arguments)                                                                        \
    __attribute__((weak)) CUresult name arguments __asm__(symbol);                                           \
    CUresult name arguments                                                                                  \
    {                                                                                                        \
        return NOT_SUPPORTED;                                                                                \
    }
FKDA_DRIVER_FUNCTIONS(STUB)
