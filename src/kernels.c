/* The table of kernels and the choice among them: which one runs for a device. */
#include <string.h>

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "internal.h"

#define CPU_KERNEL(name, archs, description)                                                                 \
    {                                                                                                        \
        .info = {sizeof(flash_kda_kernel_info), name, FLASH_KDA_CPU, archs, description},                    \
        .workspace_size = fkda_cpu_workspace_size, .fwd = fkda_cpu_fwd,                                      \
    }

/* The default for a device is the first that it can run. */
static const fkda_kernel kernels[] = {
    CPU_KERNEL("cpu", "any 64-bit CPU",
               "chunks of 16 tokens in fp32, SIMD chosen at run time, all cores by default"),
#if defined(__x86_64__)
    CPU_KERNEL("cpu-avx512", "x86-64 with AVX-512 F, BW, DQ, VL", "the same with vectors of 16 floats"),
    CPU_KERNEL("cpu-avx2", "x86-64 with AVX2 and FMA", "the same with vectors of 8 floats"),
#endif
    CPU_KERNEL("cpu-portable", "any 64-bit CPU", "the same with vectors of 4 floats"),
#ifdef FKDA_WITH_CUDA
    {
        .info = {sizeof(flash_kda_kernel_info), "portable", FLASH_KDA_CUDA, "sm_80 and newer",
                 "chunks of 16 tokens through tf32 mma.sync, one launch, state in registers in fp32"},
        .min_compute_capability = 80,
        .workspace_size = fkda_cuda_portable_workspace_size,
        .fwd = fkda_cuda_portable_fwd,
    },
#endif
};
enum { KERNEL_COUNT = sizeof kernels / sizeof *kernels };

#ifdef FKDA_WITH_CUDA
static const bool with_cuda = true;
#else
static const bool with_cuda = false;
#endif

static flash_kda_status device_capability(flash_kda_device device, int *capability)
{
    *capability = 0;
    if (device.type == FLASH_KDA_CPU) {
        if (device.index == 0) return FLASH_KDA_OK;
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "device index is %d; the CPU's must be 0", device.index);
    }
    if (device.type == FLASH_KDA_CUDA) return fkda_cuda_capability(device.index, capability);
    return fkda_fail(FLASH_KDA_INVALID_VALUE, "device type is %d; it must be FLASH_KDA_CPU or FLASH_KDA_CUDA",
                     device.type);
}

flash_kda_status fkda_find_kernel(flash_kda_device device, const char *name, const fkda_kernel **kernel)
{
    int capability;
    flash_kda_status status = device_capability(device, &capability);
    if (status != FLASH_KDA_OK) return status;
    const fkda_kernel *named = NULL;
    for (int i = 0; i < KERNEL_COUNT; i++) {
        if (name && strcmp(name, kernels[i].info.name) != 0) continue;
        if (name) named = &kernels[i];
        if (kernels[i].info.device_type != device.type || capability < kernels[i].min_compute_capability)
            continue;
        if (device.type == FLASH_KDA_CPU && !fkda_cpu_runs(kernels[i].info.name))
            return fkda_fail(FLASH_KDA_UNAVAILABLE, "kernel is \"%s\", which needs %s; this CPU is %s", name,
                             kernels[i].info.archs, fkda_cpu_arch());
        *kernel = &kernels[i];
        return FLASH_KDA_OK;
    }
    if (name && !named)
        return fkda_fail(FLASH_KDA_INVALID_VALUE,
                         "kernel is \"%s\"; it must be NULL or a name that flash_kda_list_kernels() gives",
                         name);
    if (named && named->info.device_type != device.type)
        return fkda_fail(FLASH_KDA_UNAVAILABLE, "kernel is \"%s\", which does not run on %s", name,
                         device.type == FLASH_KDA_CPU ? "the CPU" : "a CUDA device");
    if (!with_cuda)
        return fkda_fail(FLASH_KDA_UNAVAILABLE,
                         "device is CUDA device %d, but the library was built without CUDA kernels",
                         device.index);
    return fkda_fail(FLASH_KDA_UNAVAILABLE,
                     "device is CUDA device %d of compute capability %d.%d; %s%s%s needs at least 8.0",
                     device.index, capability / 10, capability % 10, name ? "kernel \"" : "the library",
                     name ? name : "", name ? "\"" : "");
}

flash_kda_status flash_kda_list_kernels(flash_kda_kernel_info *infos, int32_t capacity, int32_t *count)
{
    if (!count) return fkda_fail(FLASH_KDA_INVALID_VALUE, "count is null; it must point to an int32_t");
    if (capacity < 0 || (capacity > 0 && !infos))
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "infos must point to capacity = %d entries", capacity);
    const int32_t written = capacity < KERNEL_COUNT ? capacity : KERNEL_COUNT;
    for (int i = 0; i < written; i++)
        if (infos[i].struct_size != sizeof *infos)
            return fkda_fail(FLASH_KDA_INVALID_VALUE, "infos[%d].struct_size is %zu; it must be %zu", i,
                             infos[i].struct_size, sizeof *infos);
    for (int i = 0; i < written; i++) infos[i] = kernels[i].info;
    *count = KERNEL_COUNT;
    return FLASH_KDA_OK;
}
