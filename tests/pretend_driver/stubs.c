/* Every entry of the driver that driver.c leaves out: it fails. */
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
