/*
 * The part of the CUDA driver API that the library uses. It is declared here and resolved with dlopen, so
 * that the library builds without CUDA headers and loads where there is no driver. Names, types and values
 * are those of NVIDIA's cuda.h.
 */
#ifndef FKDA_DRIVER_H
#define FKDA_DRIVER_H

#include <stddef.h>

#include "../problem.h"

typedef int CUresult;
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgreenCtx_st *CUgreenCtx;
typedef unsigned long long CUdeviceptr;

enum {
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
    CU_TENSOR_MAP_INTERLEAVE_NONE = 0,
    CU_TENSOR_MAP_SWIZZLE_128B = 3,
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3,
    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0,
    CU_DEV_RESOURCE_TYPE_SM = 1,
    CU_LAUNCH_ATTRIBUTE_COOPERATIVE = 2,
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
};

/* CUlaunchAttribute and CUlaunchConfig, with the attribute values that the library uses. */
typedef struct fkda_launch_attribute {
    int id;
    char padding[8 - sizeof(int)];
    union {
        char padding[64];
        int cooperative, programmatic_stream_serialization_allowed;
    } value;
} fkda_launch_attribute;

typedef struct fkda_launch_config {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    CUstream stream;
    fkda_launch_attribute *attributes;
    unsigned attribute_count;
} fkda_launch_config;

/* CUdevResource of type CU_DEV_RESOURCE_TYPE_SM, with room for what later drivers may add. */
typedef struct fkda_device_resource {
    int type;
    char padding[92];
    unsigned sms;
    char rest[156];
} fkda_device_resource;

/* Functions without which the library uses no GPU: if one is missing, fkda_driver_open() fails and names it.
 * Every entry: the function's name, its symbol in libcuda, its parameters. */
#define FKDA_DRIVER_FUNCTIONS(X)                                                                             \
    X(cuInit, "cuInit", (unsigned flags))                                                                    \
    X(cuDeviceGetCount, "cuDeviceGetCount", (int *count))                                                    \
    X(cuDeviceGet, "cuDeviceGet", (CUdevice * device, int ordinal))                                          \
    X(cuDeviceGetName, "cuDeviceGetName", (char *name, int length, CUdevice device))                         \
    X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *value, int attribute, CUdevice device))            \
    X(cuDeviceTotalMem, "cuDeviceTotalMem_v2", (size_t * bytes, CUdevice device))                            \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext * context, CUdevice device))          \
    X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext context))                                          \
    X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext * context))                                          \
    X(cuModuleLoadData, "cuModuleLoadData", (CUmodule * module, const void *image))                          \
    X(cuModuleUnload, "cuModuleUnload", (CUmodule module))                                                   \
    X(cuModuleGetFunction, "cuModuleGetFunction",                                                            \
      (CUfunction * function, CUmodule module, const char *name))                                            \
    X(cuFuncSetAttribute, "cuFuncSetAttribute", (CUfunction function, int attribute, int value))             \
    X(cuLaunchKernel, "cuLaunchKernel",                                                                      \
      (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,             \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void **arguments,         \
       void **extra))                                                                                        \
    X(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr * memory, size_t bytes))                                     \
    X(cuMemFree, "cuMemFree_v2", (CUdeviceptr memory))                                                       \
    X(cuMemcpy, "cuMemcpy", (CUdeviceptr to, CUdeviceptr from, size_t bytes))                                \
    X(cuMemsetD32Async, "cuMemsetD32Async", (CUdeviceptr to, unsigned value, size_t count, CUstream stream)) \
    X(cuStreamSynchronize, "cuStreamSynchronize", (CUstream stream))                                         \
    X(cuEventCreate, "cuEventCreate", (CUevent * event, unsigned flags))                                     \
    X(cuEventRecord, "cuEventRecord", (CUevent event, CUstream stream))                                      \
    X(cuEventSynchronize, "cuEventSynchronize", (CUevent event))                                             \
    X(cuEventElapsedTime, "cuEventElapsedTime", (float *milliseconds, CUevent start, CUevent end))           \
    X(cuEventDestroy, "cuEventDestroy_v2", (CUevent event))                                                  \
    X(cuGetErrorName, "cuGetErrorName", (CUresult result, const char **name))

/* Functions that drivers before CUDA 12 do not have, and those of green contexts, which drivers before CUDA
 * 12.4 do not have. Their pointers are NULL there. */
#define FKDA_NEW_DRIVER_FUNCTIONS(X)                                                                         \
    X(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled",                                                      \
      (void *map, int type, uint32_t rank, void *tensor, const uint64_t *sizes, const uint64_t *strides,     \
       const uint32_t *box, const uint32_t *element_strides, int interleave, int swizzle, int promotion,     \
       int fill))                                                                                            \
    X(cuLaunchKernelEx, "cuLaunchKernelEx",                                                                  \
      (const fkda_launch_config *config, CUfunction function, void **arguments, void **extra))               \
    X(cuStreamGetGreenCtx, "cuStreamGetGreenCtx", (CUstream stream, CUgreenCtx * context))                   \
    X(cuGreenCtxGetDevResource, "cuGreenCtxGetDevResource",                                                  \
      (CUgreenCtx context, fkda_device_resource * resource, int type))

typedef struct fkda_driver {
#define DECLARE(name, symbol, arguments) CUresult(*name) arguments;
    FKDA_DRIVER_FUNCTIONS(DECLARE)
    FKDA_NEW_DRIVER_FUNCTIONS(DECLARE)
#undef DECLARE
} fkda_driver;

/* The driver, opened and initialised by the first call that succeeds. NULL if it cannot be opened now:
 * *reason then says why, until the thread's next call, and the next call tries again. */
const fkda_driver *fkda_driver_open(const char **reason);

/* "CUDA_ERROR_..." */
const char *fkda_result_name(CUresult result);

/* Stores a sentence about a driver call that failed. */
flash_kda_status fkda_driver_fail(const char *call, CUresult result);

/* context.c: makes the primary context of a device current for the calling thread, until
 * fkda_leave_device(). */
flash_kda_status fkda_enter_device(int ordinal, const fkda_driver **driver);

/* context.c: makes the context current again that was current before. Returns `status`, the status of what
 * was done in between, or the failure to leave if `status` is FLASH_KDA_OK. */
flash_kda_status fkda_leave_device(const fkda_driver *driver, flash_kda_status status);

#endif
