/* Device memory and copies. */
#include "../errors.h"
#include "cuda.h"
#include "driver.h"

/* Runs one driver call inside a device's context. */
#define IN_DEVICE(ordinal, call_name, call)                                                                  \
    do {                                                                                                     \
        const fkda_driver *driver;                                                                           \
        flash_kda_status status = fkda_enter_device(ordinal, &driver);                                       \
        if (status != FLASH_KDA_OK) return status;                                                           \
        CUresult result = driver->call;                                                                      \
        if (result) status = fkda_driver_fail(call_name, result);                                            \
        return fkda_leave_device(driver, status);                                                            \
    } while (0)

flash_kda_status fkda_cuda_malloc(int ordinal, size_t bytes, void **memory)
{
    CUdeviceptr address = 0;
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(ordinal, &driver);
    if (status != FLASH_KDA_OK) return status;
    const CUresult result = driver->cuMemAlloc(&address, bytes ? bytes : 1);
    if (result) status = fkda_driver_fail("cuMemAlloc", result);
    status = fkda_leave_device(driver, status);
    if (status == FLASH_KDA_OK) *memory = (void *)(uintptr_t)address;
    return status;
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
    const char *call = "cuMemcpy";
    CUresult result = driver->cuMemcpy((CUdeviceptr)(uintptr_t)to, (CUdeviceptr)(uintptr_t)from, bytes);
    /* cuMemcpy returns before a small copy from the host or a copy within the device is done. */
    if (!result) {
        call = "cuStreamSynchronize";
        result = driver->cuStreamSynchronize(NULL);
    }
    if (result) status = fkda_driver_fail(call, result);
    return fkda_leave_device(driver, status);
}

flash_kda_status fkda_cuda_synchronize(int ordinal, void *stream)
{
    IN_DEVICE(ordinal, "cuStreamSynchronize", cuStreamSynchronize((CUstream)stream));
}
