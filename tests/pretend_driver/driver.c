/*
 * The GPU that a libcuda.so.1 for machines without a GPU describes. The environment variable PRETEND_GPU
 * gives its compute capability and its number of SMs: "90:132" is compute capability 9.0 with 132 SMs. The
 * pretended driver (calls.c) and the emulator (../emulator) share this description.
 */
#include <stdio.h>
#include <stdlib.h>

#include "../../src/cuda/driver.h"
#include "counts.h"

#define DECLARE(name, symbol, arguments) CUresult name arguments __asm__(symbol);
FKDA_DRIVER_FUNCTIONS(DECLARE)

enum { INVALID_VALUE = 1, INVALID_DEVICE = 101 };

static int capability, sms;

pretended_counts *pretended_counts_of_thread(void)
{
    static _Thread_local pretended_counts counts;
    return &counts;
}

/* Counts a call that names a device, and returns its result: this driver has device 0 alone. */
static CUresult called_for(CUdevice device)
{
    pretended_counts_of_thread()->calls++;
    return device == 0 ? 0 : INVALID_DEVICE;
}

CUresult cuInit(unsigned flags)
{
    const char *gpu = getenv("PRETEND_GPU");
    char *end;
    if (flags || !gpu) return INVALID_VALUE;
    capability = (int)strtol(gpu, &end, 10);
    if (*end != ':') return INVALID_VALUE;
    sms = (int)strtol(end + 1, &end, 10);
    return *end == 0 ? 0 : INVALID_VALUE;
}

CUresult cuDeviceGetCount(int *count)
{
    pretended_counts_of_thread()->calls++;
    *count = 1;
    return 0;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return called_for(ordinal);
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    snprintf(name, (size_t)length, "Pretended GPU");
    return called_for(device);
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device)
{
    *bytes = (size_t)80 << 30;
    return called_for(device);
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = sms; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; break;
    default: return INVALID_VALUE;
    }
    return called_for(device);
}
