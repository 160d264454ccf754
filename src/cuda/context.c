/* CUDA devices: counting and describing them, what is known of each, and entering a device's primary
 * context. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#include "../errors.h"
#include "cuda.h"
#include "modules.h"

/* What the library has learnt of each device. The values of a device do not change while the process lives,
 * so that they are asked for once: a forward call then asks the driver nothing before it launches. */
static struct {
    /* The primary context, which PyTorch and the CUDA runtime use too. It is retained by the first use of the
     * device and never released. NULL: not retained yet. */
    _Atomic(CUcontext) context;
    _Atomic(int) capability; /* 10 * major + minor; 0: not asked for yet */
    _Atomic(int) sms;        /* 0: not asked for yet */
} devices[FKDA_MAX_DEVICES];
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
                 "cuDeviceGetCount gave %s; a process forked after CUDA was first used cannot use it",
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

static flash_kda_status ask_attribute(const fkda_driver *driver, int ordinal, int which, int *value)
{
    CUdevice device;
    *value = 0;
    CUresult result = driver->cuDeviceGet(&device, ordinal);
    if (result) return fkda_driver_fail("cuDeviceGet", result);
    result = driver->cuDeviceGetAttribute(value, which, device);
    return result ? fkda_driver_fail("cuDeviceGetAttribute", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_capability(int ordinal, int *capability)
{
    const fkda_driver *driver = NULL;
    int major, minor;
    if (ordinal >= 0 && ordinal < FKDA_MAX_DEVICES) {
        *capability = atomic_load_explicit(&devices[ordinal].capability, memory_order_relaxed);
        if (*capability) return FLASH_KDA_OK;
    }
    flash_kda_status status = check_ordinal(ordinal, &driver);
    if (status == FLASH_KDA_OK)
        status = ask_attribute(driver, ordinal, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major);
    if (status == FLASH_KDA_OK)
        status = ask_attribute(driver, ordinal, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor);
    if (status != FLASH_KDA_OK) return status;
    *capability = 10 * major + minor;
    atomic_store_explicit(&devices[ordinal].capability, *capability, memory_order_relaxed);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_sms(int ordinal, int *sms)
{
    const fkda_driver *driver = NULL;
    if (ordinal >= 0 && ordinal < FKDA_MAX_DEVICES) {
        *sms = atomic_load_explicit(&devices[ordinal].sms, memory_order_relaxed);
        if (*sms) return FLASH_KDA_OK;
    }
    flash_kda_status status = check_ordinal(ordinal, &driver);
    if (status == FLASH_KDA_OK)
        status = ask_attribute(driver, ordinal, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, sms);
    if (status != FLASH_KDA_OK) return status;
    atomic_store_explicit(&devices[ordinal].sms, *sms, memory_order_relaxed);
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
    if (status == FLASH_KDA_OK) status = fkda_cuda_sms(ordinal, &info->units);
    if (status != FLASH_KDA_OK) return status;
    CUresult result = driver->cuDeviceGet(&device, ordinal);
    if (result) return fkda_driver_fail("cuDeviceGet", result);
    result = driver->cuDeviceGetName(info->name, sizeof info->name, device);
    if (result) return fkda_driver_fail("cuDeviceGetName", result);
    result = driver->cuDeviceTotalMem(&memory, device);
    if (result) return fkda_driver_fail("cuDeviceTotalMem", result);
    info->device = (flash_kda_device){FLASH_KDA_CUDA, ordinal};
    snprintf(info->arch, sizeof info->arch, "sm_%d", capability);
    info->memory = memory;
    return FLASH_KDA_OK;
}

/* The device's primary context, retained now unless an earlier call has. */
static flash_kda_status retain_context(int ordinal, CUcontext *context)
{
    const fkda_driver *driver;
    const flash_kda_status status = check_ordinal(ordinal, &driver);
    if (status != FLASH_KDA_OK) return status;
    CUdevice device;
    const char *call = "cuDeviceGet";
    CUresult result = 0;
    pthread_mutex_lock(&contexts_lock);
    *context = atomic_load(&devices[ordinal].context);
    if (!*context) {
        result = driver->cuDeviceGet(&device, ordinal);
        if (!result) {
            call = "cuDevicePrimaryCtxRetain";
            result = driver->cuDevicePrimaryCtxRetain(context, device);
        }
        if (!result) atomic_store_explicit(&devices[ordinal].context, *context, memory_order_release);
    }
    pthread_mutex_unlock(&contexts_lock);
    return result ? fkda_driver_fail(call, result) : FLASH_KDA_OK;
}

flash_kda_status fkda_enter_device(int ordinal, const fkda_driver **driver_out)
{
    const fkda_driver *driver = fkda_driver_open(NULL);
    CUcontext context = NULL;
    if (driver && ordinal >= 0 && ordinal < FKDA_MAX_DEVICES)
        context = atomic_load_explicit(&devices[ordinal].context, memory_order_acquire);
    if (!context) {
        const flash_kda_status status = retain_context(ordinal, &context);
        if (status != FLASH_KDA_OK) return status;
        driver = fkda_driver_open(NULL);
    }
    const CUresult result = driver->cuCtxPushCurrent(context);
    if (result) {
        /* A forked process has its parent's context, which the driver refuses there. */
        const char *reason;
        if (fkda_cuda_device_count(&reason) == 0)
            return fkda_fail(FLASH_KDA_UNAVAILABLE, "device is CUDA device %d, but CUDA cannot be used: %s",
                             ordinal, reason);
        return fkda_driver_fail("cuCtxPushCurrent", result);
    }
    *driver_out = driver;
    return FLASH_KDA_OK;
}

flash_kda_status fkda_leave_device(const fkda_driver *driver, flash_kda_status status)
{
    CUcontext context;
    const CUresult result = driver->cuCtxPopCurrent(&context);
    return result && status == FLASH_KDA_OK ? fkda_driver_fail("cuCtxPopCurrent", result) : status;
}
