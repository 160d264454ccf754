/* Timing with CUDA events. */
#include "../errors.h"
#include "cuda.h"
#include "driver.h"

static flash_kda_status time_once(const fkda_driver *driver, CUstream stream, flash_kda_status (*run)(void *),
                                  void *argument, const CUevent events[2], float *milliseconds)
{
    CUresult result = driver->cuEventRecord(events[0], stream);
    if (result) return fkda_driver_fail("cuEventRecord", result);
    const flash_kda_status status = run(argument);
    if (status != FLASH_KDA_OK) return status;
    result = driver->cuEventRecord(events[1], stream);
    if (result) return fkda_driver_fail("cuEventRecord", result);
    result = driver->cuEventSynchronize(events[1]);
    if (result) return fkda_driver_fail("cuEventSynchronize", result);
    result = driver->cuEventElapsedTime(milliseconds, events[0], events[1]);
    return result ? fkda_driver_fail("cuEventElapsedTime", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_time(int ordinal, void *stream, flash_kda_status (*run)(void *), void *argument,
                                int repeats, float *milliseconds)
{
    const fkda_driver *driver;
    CUevent events[2] = {NULL, NULL}; /* before and after */
    flash_kda_status status = fkda_enter_device(ordinal, &driver);
    if (status != FLASH_KDA_OK) return status;
    for (int i = 0; i < 2 && status == FLASH_KDA_OK; i++) {
        const CUresult result = driver->cuEventCreate(&events[i], 0);
        if (result) status = fkda_driver_fail("cuEventCreate", result);
    }
    for (int i = 0; i < repeats && status == FLASH_KDA_OK; i++)
        status = time_once(driver, stream, run, argument, events, &milliseconds[i]);
    for (int i = 0; i < 2; i++) {
        const CUresult result = events[i] ? driver->cuEventDestroy(events[i]) : 0;
        if (result && status == FLASH_KDA_OK) status = fkda_driver_fail("cuEventDestroy", result);
    }
    return fkda_leave_device(driver, status);
}
