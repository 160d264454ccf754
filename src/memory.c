/* The public calls about memory and streams, for programs that bring no framework of their own. */
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"
#include "errors.h"
#include "guard.h"

static flash_kda_status check_device_type(flash_kda_device device)
{
    if (device.type == FLASH_KDA_CPU || device.type == FLASH_KDA_CUDA) return FLASH_KDA_OK;
    return fkda_fail(FLASH_KDA_INVALID_VALUE, "device type is %d; it must be FLASH_KDA_CPU or FLASH_KDA_CUDA",
                     device.type);
}

flash_kda_status flash_kda_malloc(flash_kda_device device, size_t bytes, void **memory)
{
    FKDA_GUARD;
    if (!memory) return fkda_fail(FLASH_KDA_INVALID_VALUE, "memory is null; it must point to a pointer");
    flash_kda_status status = check_device_type(device);
    if (status != FLASH_KDA_OK) return status;
    if (device.type == FLASH_KDA_CUDA) return fkda_cuda_malloc(device.index, bytes, memory);
    if (posix_memalign(memory, 64, bytes ? bytes : 1) != 0)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR, "bytes is %zu, more than the CPU's memory has", bytes);
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_free(flash_kda_device device, void *memory)
{
    FKDA_GUARD;
    flash_kda_status status = check_device_type(device);
    if (status != FLASH_KDA_OK || !memory) return status;
    if (device.type == FLASH_KDA_CUDA) return fkda_cuda_free(device.index, memory);
    free(memory);
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_copy(flash_kda_device to_device, void *to, flash_kda_device from_device,
                                const void *from, size_t bytes)
{
    FKDA_GUARD;
    flash_kda_status status = check_device_type(to_device);
    if (status == FLASH_KDA_OK) status = check_device_type(from_device);
    if (status != FLASH_KDA_OK || bytes == 0) return status;
    if (!to || !from)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "%s is null; it must point to %zu bytes",
                         to ? "from" : "to", bytes);
    if (to_device.type == FLASH_KDA_CUDA) return fkda_cuda_copy(to_device.index, to, from, bytes);
    if (from_device.type == FLASH_KDA_CUDA) return fkda_cuda_copy(from_device.index, to, from, bytes);
    memmove(to, from, bytes);
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_synchronize(flash_kda_device device, void *stream)
{
    FKDA_GUARD;
    flash_kda_status status = check_device_type(device);
    if (status != FLASH_KDA_OK || device.type == FLASH_KDA_CPU) return status;
    return fkda_cuda_synchronize(device.index, stream);
}
