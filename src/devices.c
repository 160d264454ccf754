/* The public calls about devices: listing them, their memory, timing on them. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "internal.h"

/* "model name : ..." of /proc/cpuinfo, where there is such a thing. */
static void cpu_name(char *name, size_t size)
{
    char line[256];
    snprintf(name, size, "CPU");
    FILE *file = fopen("/proc/cpuinfo", "r");
    if (!file) return;
    while (fgets(line, sizeof line, file)) {
        const char *value = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !value) continue;
        snprintf(name, size, "%.*s", (int)strcspn(value + 2, "\n"), value + 2);
        break;
    }
    fclose(file);
}

static void describe_cpu(flash_kda_device_info *info)
{
    cpu_name(info->name, sizeof info->name);
    snprintf(info->arch, sizeof info->arch, "%s", fkda_cpu_arch());
    info->device = (flash_kda_device){FLASH_KDA_CPU, 0};
    info->units = fkda_cpu_count();
    info->memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
}

static flash_kda_status describe(int i, flash_kda_device_info *info)
{
    memset(info, 0, sizeof *info);
    info->struct_size = sizeof *info;
    if (i == 0) {
        describe_cpu(info);
    } else {
        flash_kda_status status = fkda_cuda_describe(i - 1, info);
        if (status != FLASH_KDA_OK) return status;
    }
    const fkda_kernel *kernel;
    if (fkda_find_kernel(info->device, NULL, &kernel) == FLASH_KDA_OK)
        snprintf(info->kernel, sizeof info->kernel, "%s", kernel->info.name);
    else
        snprintf(info->reason, sizeof info->reason, "%s", flash_kda_last_error());
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_list_devices(flash_kda_device_info *infos, int32_t capacity, int32_t *count,
                                        const char **no_cuda)
{
    const char *reason = "";
    if (!count) return fkda_fail(FLASH_KDA_INVALID_VALUE, "count is null; it must point to an int32_t");
    if (capacity < 0 || (capacity > 0 && !infos))
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "infos must point to capacity = %d entries", capacity);
    int total = 1 + fkda_cuda_device_count(&reason);
    const int32_t written = capacity < total ? capacity : total;
    for (int i = 0; i < written; i++)
        if (infos[i].struct_size != sizeof *infos)
            return fkda_fail(FLASH_KDA_INVALID_VALUE, "infos[%d].struct_size is %zu; it must be %zu", i,
                             infos[i].struct_size, sizeof *infos);
    for (int i = 0; i < written; i++) {
        flash_kda_status status = describe(i, &infos[i]);
        if (status != FLASH_KDA_OK) return status;
    }
    *count = total;
    if (no_cuda) *no_cuda = reason;
    return FLASH_KDA_OK;
}

static flash_kda_status check_device_type(flash_kda_device device)
{
    if (device.type == FLASH_KDA_CPU || device.type == FLASH_KDA_CUDA) return FLASH_KDA_OK;
    return fkda_fail(FLASH_KDA_INVALID_VALUE, "device type is %d; it must be FLASH_KDA_CPU or FLASH_KDA_CUDA",
                     device.type);
}

flash_kda_status flash_kda_malloc(flash_kda_device device, size_t bytes, void **memory)
{
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
    flash_kda_status status = check_device_type(device);
    if (status != FLASH_KDA_OK || !memory) return status;
    if (device.type == FLASH_KDA_CUDA) return fkda_cuda_free(device.index, memory);
    free(memory);
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_copy(flash_kda_device to_device, void *to, flash_kda_device from_device,
                                const void *from, size_t bytes)
{
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
    flash_kda_status status = check_device_type(device);
    if (status != FLASH_KDA_OK || device.type == FLASH_KDA_CPU) return status;
    return fkda_cuda_synchronize(device.index, stream);
}

static double now_milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

flash_kda_status flash_kda_time_fwd(const flash_kda_fwd_params *params, int32_t repeats, float *milliseconds)
{
    if (repeats < 1)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "repeats is %d; it must be at least 1", repeats);
    if (!milliseconds)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "milliseconds is null; it must point to %d floats",
                         repeats);
    if (params && params->device.type == FLASH_KDA_CUDA)
        return fkda_cuda_time_fwd(params, repeats, milliseconds);
    for (int i = 0; i < repeats; i++) {
        double start = now_milliseconds();
        flash_kda_status status = flash_kda_fwd(params);
        if (status != FLASH_KDA_OK) return status;
        milliseconds[i] = (float)(now_milliseconds() - start);
    }
    return FLASH_KDA_OK;
}
