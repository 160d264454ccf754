/* The public call that lists the devices of this machine. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "errors.h"
#include "guard.h"
#include "kernel.h"

/* The CPU's name from the line "model name : ..." of /proc/cpuinfo, or "CPU" where there is no such file. */
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
    if (fkda_find_kernel(info->device, NULL, 0, &kernel) == FLASH_KDA_OK)
        snprintf(info->kernel, sizeof info->kernel, "%s", kernel->info.name);
    else
        snprintf(info->reason, sizeof info->reason, "%s", flash_kda_last_error());
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_list_devices(flash_kda_device_info *infos, int32_t capacity, int32_t *count,
                                        const char **no_cuda)
{
    FKDA_GUARD;
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
