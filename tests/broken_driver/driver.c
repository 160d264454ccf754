/* A libcuda.so.1 that is no driver: like the stub of a CUDA toolkit, in which every function fails, or with
 * ONLY_INIT, like a driver that is too old to have the other functions. */
#include "../../src/cuda/driver.h"

#pragma GCC diagnostic ignored "-Wunused-parameter"

enum { STUB_LIBRARY = 34 };

#define STUB(name, symbol, arguments)                                                                        \
    CUresult name arguments __asm__(symbol);                                                                 \
    CUresult name arguments                                                                                  \
    {                                                                                                        \
        return STUB_LIBRARY;                                                                                 \
    }
#ifdef ONLY_INIT
STUB(cuInit, "cuInit", (unsigned flags))
#else
FKDA_DRIVER_FUNCTIONS(STUB)
#endif
