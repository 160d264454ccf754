/* A libcuda.so.1 for machines without a GPU: as many multiprocessors of such a compute capability as PRETEND_GPU says,
 * "90:132", and nothing behind them. What the library chooses for a GPU can be asked with it, but not run. */
#include <stdio.h>
#include <stdlib.h>

#include "../../src/cuda/driver.h"

#define DECLARE(name, symbol, arguments) CUresult name arguments __asm__(symbol);
FKDA_DRIVER_FUNCTIONS(DECLARE)

static int capability, multiprocessors;

CUresult cuInit(unsigned flags)
{
    const char *gpu = getenv("PRETEND_GPU");
    char *end;
    if (flags || !gpu) return 1;
    capability = (int)strtol(gpu, &end, 10);
    if (*end != ':') return 1;
    multiprocessors = (int)strtol(end + 1, &end, 10);
    return *end != 0;
}

CUresult cuDeviceGetCount(int *count)
{
    *count = 1;
    return 0;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return ordinal != 0;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    snprintf(name, (size_t)length, "Pretended GPU");
    return device != 0;
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device)
{
    *bytes = (size_t)80 << 30;
    return device != 0;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; return device != 0;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; return device != 0;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; return device != 0;
    default: return 1;
    }
}
