/* The public call that times the forward pass. */
#define _POSIX_C_SOURCE 200809L
#include <time.h>

#include "cuda/cuda.h"
#include "errors.h"
#include "guard.h"

static flash_kda_status run_once(void *params)
{
    return flash_kda_fwd(params);
}

static double now_milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

flash_kda_status flash_kda_time_fwd(const flash_kda_fwd_params *params, int32_t repeats, float *milliseconds)
{
    FKDA_GUARD;
    if (repeats < 1)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "repeats is %d; it must be at least 1", repeats);
    if (!milliseconds)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "milliseconds is null; it must point to %d floats",
                         repeats);
    if (params && params->device.type == FLASH_KDA_CUDA)
        return fkda_cuda_time(params->device.index, params->stream, run_once, (void *)params, repeats,
                              milliseconds);
    for (int i = 0; i < repeats; i++) {
        double start = now_milliseconds();
        flash_kda_status status = flash_kda_fwd(params);
        if (status != FLASH_KDA_OK) return status;
        milliseconds[i] = (float)(now_milliseconds() - start);
    }
    return FLASH_KDA_OK;
}
