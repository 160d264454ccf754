/* Device memory, copies and timing for programs that bring no CUDA framework of their own. */
#include "cuda.h"
#include "driver.h"

/* Runs one driver call inside a device's context. */
#define IN_DEVICE(ordinal, call_name, call)                                                                  \
    do {                                                                                                     \
        const fkda_driver *driver;                                                                           \
        flash_kda_status status = fkda_enter_device(ordinal, &driver);                                       \
        if (status != FLASH_KDA_OK) return status;                                                           \
        CUresult result = driver->call;                                                                      \
        fkda_leave_device(driver);                                                                           \
        return result ? fkda_driver_fail(call_name, result) : FLASH_KDA_OK;                                  \
    } while (0)

flash_kda_status fkda_cuda_malloc(int ordinal, size_t bytes, void **memory)
{
    CUdeviceptr address = 0;
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(ordinal, &driver);
    if (status != FLASH_KDA_OK) return status;
    CUresult result = driver->cuMemAlloc(&address, bytes ? bytes : 1);
    fkda_leave_device(driver);
    if (result) return fkda_driver_fail("cuMemAlloc", result);
    *memory = (void *)(uintptr_t)address;
    return FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_free(int ordinal, void *memory)
{
    IN_DEVICE(ordinal, "cuMemFree", cuMemFree((CUdeviceptr)(uintptr_t)memory));
}

flash_kda_status fkda_cuda_copy(int ordinal, void *to, const void *from, size_t bytes)
{
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(ordinal, &driver);
    if (status != FLASH_KDA_OK) return status;
    CUresult result = driver->cuMemcpy((CUdeviceptr)(uintptr_t)to, (CUdeviceptr)(uintptr_t)from, bytes);
    /* Small copies from the host and copies on the device return before they are done. */
    if (!result) result = driver->cuStreamSynchronize(NULL);
    fkda_leave_device(driver);
    return result ? fkda_driver_fail("cuMemcpy", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_synchronize(int ordinal, void *stream)
{
    IN_DEVICE(ordinal, "cuStreamSynchronize", cuStreamSynchronize((CUstream)stream));
}

static flash_kda_status time_once(const fkda_driver *driver, const flash_kda_fwd_params *params,
                                  CUevent start, CUevent end, float *milliseconds)
{
    CUresult result = driver->cuEventRecord(start, (CUstream)params->stream);
    if (result) return fkda_driver_fail("cuEventRecord", result);
    flash_kda_status status = flash_kda_fwd(params);
    if (status != FLASH_KDA_OK) return status;
    result = driver->cuEventRecord(end, (CUstream)params->stream);
    if (result) return fkda_driver_fail("cuEventRecord", result);
    result = driver->cuEventSynchronize(end);
    if (result) return fkda_driver_fail("cuEventSynchronize", result);
    result = driver->cuEventElapsedTime(milliseconds, start, end);
    return result ? fkda_driver_fail("cuEventElapsedTime", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_time_fwd(const flash_kda_fwd_params *params, int repeats, float *milliseconds)
{
    const fkda_driver *driver;
    CUevent start = NULL, end = NULL;
    flash_kda_status status = fkda_enter_device(params->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    CUresult result = driver->cuEventCreate(&start, 0);
    if (!result) result = driver->cuEventCreate(&end, 0);
    if (result) status = fkda_driver_fail("cuEventCreate", result);
    for (int i = 0; i < repeats && status == FLASH_KDA_OK; i++)
        status = time_once(driver, params, start, end, &milliseconds[i]);
    if (start) driver->cuEventDestroy(start);
    if (end) driver->cuEventDestroy(end);
    fkda_leave_device(driver);
    return status;
}
