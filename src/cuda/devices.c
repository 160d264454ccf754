/* CUDA devices: counting and describing them, and entering a device's primary context. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#include "cuda.h"
#include "modules.h"

/* The primary contexts, retained by the first use of each device and kept: PyTorch and the CUDA runtime
 * use the same ones. */
static _Atomic(CUcontext) contexts[FKDA_MAX_DEVICES];
static pthread_mutex_t contexts_lock = PTHREAD_MUTEX_INITIALIZER;

int fkda_cuda_device_count(const char **reason)
{
    const fkda_driver *driver = fkda_driver_open(reason);
    int count = 0;
    if (!driver) return 0;
    static _Thread_local char failure[160];
    CUresult result = driver->cuDeviceGetCount(&count);
    if (result)
        snprintf(failure, sizeof failure,
                 "the NVIDIA driver gave %s; a process forked after CUDA was first used cannot use it",
                 fkda_result_name(result));
    if (result || count == 0) {
        if (reason) *reason = result ? failure : "the NVIDIA driver reports no device";
        return 0;
    }
    return count < FKDA_MAX_DEVICES ? count : FKDA_MAX_DEVICES;
}

static flash_kda_status check_ordinal(int ordinal, const fkda_driver **driver)
{
    const char *reason;
    int count = fkda_cuda_device_count(&reason);
    if (count == 0)
        return fkda_fail(FLASH_KDA_UNAVAILABLE, "device is CUDA device %d, but CUDA cannot be used: %s",
                         ordinal, reason);
    if (ordinal < 0 || ordinal >= count)
        return fkda_fail(FLASH_KDA_INVALID_VALUE,
                         "device index is %d; it must be in [0, %d], the CUDA devices there are", ordinal,
                         count - 1);
    *driver = fkda_driver_open(NULL);
    return FLASH_KDA_OK;
}

static int attribute(const fkda_driver *driver, CUdevice device, int which)
{
    int value = 0;
    driver->cuDeviceGetAttribute(&value, which, device);
    return value;
}

flash_kda_status fkda_cuda_capability(int ordinal, int *capability)
{
    const fkda_driver *driver;
    CUdevice device;
    flash_kda_status status = check_ordinal(ordinal, &driver);
    if (status != FLASH_KDA_OK) return status;
    driver->cuDeviceGet(&device, ordinal);
    *capability = 10 * attribute(driver, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                  attribute(driver, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_describe(int ordinal, flash_kda_device_info *info)
{
    const fkda_driver *driver;
    int capability;
    CUdevice device;
    size_t memory = 0;
    flash_kda_status status = check_ordinal(ordinal, &driver);
    if (status == FLASH_KDA_OK) status = fkda_cuda_capability(ordinal, &capability);
    if (status != FLASH_KDA_OK) return status;
    driver->cuDeviceGet(&device, ordinal);
    driver->cuDeviceGetName(info->name, sizeof info->name, device);
    driver->cuDeviceTotalMem(&memory, device);
    info->device = (flash_kda_device){FLASH_KDA_CUDA, ordinal};
    snprintf(info->arch, sizeof info->arch, "sm_%d", capability);
    info->units = attribute(driver, device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    info->memory = memory;
    return FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_multiprocessors(int ordinal, int *count)
{
    const fkda_driver *driver = NULL;
    flash_kda_status status = check_ordinal(ordinal, &driver);
    return driver ? fkda_multiprocessors(driver, ordinal, count) : status;
}

flash_kda_status fkda_enter_device(int ordinal, const fkda_driver **driver_out)
{
    const fkda_driver *driver = fkda_driver_open(NULL);
    CUcontext context = NULL;
    CUresult result = 0;
    if (driver && ordinal >= 0 && ordinal < FKDA_MAX_DEVICES)
        context = atomic_load_explicit(&contexts[ordinal], memory_order_acquire);
    if (!context) {
        flash_kda_status status = check_ordinal(ordinal, &driver);
        if (status != FLASH_KDA_OK) return status;
        pthread_mutex_lock(&contexts_lock);
        context = atomic_load(&contexts[ordinal]);
        if (!context) {
            CUdevice device;
            result = driver->cuDeviceGet(&device, ordinal);
            if (!result) result = driver->cuDevicePrimaryCtxRetain(&context, device);
            if (!result) atomic_store_explicit(&contexts[ordinal], context, memory_order_release);
        }
        pthread_mutex_unlock(&contexts_lock);
        if (result) return fkda_driver_fail("cuDevicePrimaryCtxRetain", result);
    }
    result = driver->cuCtxPushCurrent(context);
    if (result) return fkda_driver_fail("cuCtxPushCurrent", result);
    *driver_out = driver;
    return FLASH_KDA_OK;
}

void fkda_leave_device(const fkda_driver *driver)
{
    CUcontext context;
    driver->cuCtxPopCurrent(&context);
}

flash_kda_status fkda_multiprocessors(const fkda_driver *driver, int ordinal, int *count)
{
    CUdevice device;
    CUresult result = driver->cuDeviceGet(&device, ordinal);
    if (!result)
        result = driver->cuDeviceGetAttribute(count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
    return result ? fkda_driver_fail("cuDeviceGetAttribute", result) : FLASH_KDA_OK;
}
