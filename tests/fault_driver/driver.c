/*
 * A libcuda.so.1 in front of the emulator, of which one call fails: the FAULT_CALL-th call of the function
 * FAULT_FUNCTION gives CUDA_ERROR_UNKNOWN and does nothing else. Without FAULT_FUNCTION every call goes
 * through. The environment is read at each call, so a program can switch faults on and off.
 *
 * Compiled with WITHOUT_NEW_FUNCTIONS the library lacks the functions that came with CUDA 12, as an older
 * driver does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../src/cuda/driver.h"

enum { UNKNOWN = 999 };

static void *real(const char *symbol)
{
    static void *library;
    if (!library) library = dlopen(REAL_DRIVER, RTLD_NOW | RTLD_LOCAL);
    void *function = library ? dlsym(library, symbol) : NULL;
    if (!function) {
        fprintf(stderr, "the fault driver finds no %s in %s\n", symbol, REAL_DRIVER);
        abort();
    }
    return function;
}

/* Whether this call of the function is the one that fails. Only calls while the fault is switched on
 * count. */
static int fails(const char *name, int *calls)
{
    const char *function = getenv("FAULT_FUNCTION"), *call = getenv("FAULT_CALL");
    if (!function || strcmp(function, name) != 0) return 0;
    return ++*calls == (call ? strtol(call, NULL, 10) : 1);
}

/* Defines the driver's function `name` from the arguments of FKDA_DRIVER_FUNCTIONS and their bare names. */
#define FORWARD(name, symbol, arguments, names)                                                              \
    CUresult name arguments __asm__(symbol);                                                                 \
    CUresult name arguments                                                                                  \
    {                                                                                                        \
        static int calls;                                                                                    \
        static CUresult(*real_function) arguments;                                                           \
        if (fails(#name, &calls)) return UNKNOWN;                                                            \
        if (!real_function) *(void **)&real_function = real(symbol);                                         \
        return real_function names;                                                                          \
    }

FORWARD(cuInit, "cuInit", (unsigned flags), (flags))
FORWARD(cuDeviceGetCount, "cuDeviceGetCount", (int *count), (count))
FORWARD(cuDeviceGet, "cuDeviceGet", (CUdevice * device, int ordinal), (device, ordinal))
FORWARD(cuDeviceGetName, "cuDeviceGetName", (char *name, int length, CUdevice device), (name, length, device))
FORWARD(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *value, int attribute, CUdevice device),
        (value, attribute, device))
FORWARD(cuDeviceTotalMem, "cuDeviceTotalMem_v2", (size_t * bytes, CUdevice device), (bytes, device))
FORWARD(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext * context, CUdevice device),
        (context, device))
FORWARD(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext context), (context))
FORWARD(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext * context), (context))
FORWARD(cuModuleLoadData, "cuModuleLoadData", (CUmodule * module, const void *image), (module, image))
FORWARD(cuModuleUnload, "cuModuleUnload", (CUmodule module), (module))
FORWARD(cuModuleGetFunction, "cuModuleGetFunction",
        (CUfunction * function, CUmodule module, const char *name), (function, module, name))
FORWARD(cuFuncSetAttribute, "cuFuncSetAttribute", (CUfunction function, int attribute, int value),
        (function, attribute, value))
FORWARD(cuLaunchKernel, "cuLaunchKernel",
        (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
         unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void **arguments,
         void **extra),
        (function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, stream, arguments, extra))
FORWARD(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr * memory, size_t bytes), (memory, bytes))
FORWARD(cuMemFree, "cuMemFree_v2", (CUdeviceptr memory), (memory))
FORWARD(cuMemcpy, "cuMemcpy", (CUdeviceptr to, CUdeviceptr from, size_t bytes), (to, from, bytes))
FORWARD(cuMemsetD32Async, "cuMemsetD32Async", (CUdeviceptr to, unsigned value, size_t count, CUstream stream),
        (to, value, count, stream))
FORWARD(cuStreamSynchronize, "cuStreamSynchronize", (CUstream stream), (stream))
FORWARD(cuEventCreate, "cuEventCreate", (CUevent * event, unsigned flags), (event, flags))
FORWARD(cuEventRecord, "cuEventRecord", (CUevent event, CUstream stream), (event, stream))
FORWARD(cuEventSynchronize, "cuEventSynchronize", (CUevent event), (event))
FORWARD(cuEventElapsedTime, "cuEventElapsedTime", (float *milliseconds, CUevent start, CUevent end),
        (milliseconds, start, end))
FORWARD(cuEventDestroy, "cuEventDestroy_v2", (CUevent event), (event))
FORWARD(cuGetErrorName, "cuGetErrorName", (CUresult result, const char **name), (result, name))
#ifndef WITHOUT_NEW_FUNCTIONS
FORWARD(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled",
        (void *map, int type, uint32_t rank, void *tensor, const uint64_t *sizes, const uint64_t *strides,
         const uint32_t *box, const uint32_t *element_strides, int interleave, int swizzle, int promotion,
         int fill),
        (map, type, rank, tensor, sizes, strides, box, element_strides, interleave, swizzle, promotion, fill))
FORWARD(cuLaunchKernelEx, "cuLaunchKernelEx",
        (const fkda_launch_config *config, CUfunction function, void **arguments, void **extra),
        (config, function, arguments, extra))
FORWARD(cuStreamGetGreenCtx, "cuStreamGetGreenCtx", (CUstream stream, CUgreenCtx *context), (stream, context))
FORWARD(cuGreenCtxGetDevResource, "cuGreenCtxGetDevResource",
        (CUgreenCtx context, fkda_device_resource *resource, int type), (context, resource, type))
#endif
