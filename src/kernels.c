/* The table of kernels, and the choice among them: which one runs on a device. */
#include <stdio.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "cuda/hopper/border_states.h"
#include "errors.h"
#include "kernel.h"
#include "saved.h"

/* What each kernel knows beyond the plainest call. */
enum {
    FKDA_CPU_FEATURES =
        FKDA_ALL_FEATURES | FKDA_DECODE | FKDA_DECODE_LAYER | FKDA_BACKWARD | FKDA_SAVED | FKDA_MAPS,
    FKDA_GPU_FEATURES =
        FKDA_ALL_FEATURES | FKDA_DECODE | FKDA_DECODE_LAYER | FKDA_BACKWARD | FKDA_SAVED | FKDA_MAPS,
};

#define CPU_KERNEL(name, archs, description)                                                                 \
    {                                                                                                        \
        .info = {sizeof(flash_kda_kernel_info), name, FLASH_KDA_CPU, archs, description},                    \
        .features = FKDA_CPU_FEATURES, .plan = fkda_cpu_make_plan, .run = fkda_cpu_run,                      \
        .count_nonfinite = fkda_cpu_count_nonfinite, .decode = fkda_cpu_decode, .apply = fkda_cpu_apply,     \
        .decode_layer = fkda_cpu_decode_layer, .bwd = fkda_cpu_bwd, .bwd_workspace = fkda_cpu_bwd_workspace, \
        .saved_bytes = fkda_saved_bytes, .map = fkda_cpu_map, .map_workspace = fkda_cpu_map_workspace,       \
        .join = fkda_cpu_join, .explain = fkda_cpu_explain, .explain_decode = fkda_cpu_explain_decode,       \
        .explain_apply = fkda_cpu_explain_apply, .explain_decode_layer = fkda_cpu_explain_decode_layer,      \
    }

/* A call that names no kernel runs the first row that the device can run and that knows all features of the
 * call, not only by name. */
static const fkda_kernel kernels[] = {
    CPU_KERNEL("cpu", "any 64-bit CPU",
               "chunks of 16 tokens in fp32, SIMD chosen at run time, all cores by default"),
#if defined(__x86_64__)
    CPU_KERNEL("cpu-avx512", "x86-64 with AVX-512 F, BW, DQ, VL",
               "chunks of 16 tokens in fp32, vectors of 16 floats"),
    CPU_KERNEL("cpu-avx2", "x86-64 with AVX2 and FMA", "chunks of 16 tokens in fp32, vectors of 8 floats"),
#endif
    CPU_KERNEL("cpu-portable", "any 64-bit CPU", "chunks of 16 tokens in fp32, vectors of 4 floats"),
#ifdef FKDA_WITH_HOPPER
    {
        .info = {sizeof(flash_kda_kernel_info), "hopper", FLASH_KDA_CUDA, "sm_90",
                 "wgmma with fp16 operands, fp32 state in its accumulators; long sequences cut into segments "
                 "that run in parallel, where that pays"},
        .min_compute_capability = 90,
        .max_compute_capability = 90,
        .features = FKDA_GPU_FEATURES,
        .needs_tma = true,
        .plan = fkda_hopper_make_plan,
        .run = fkda_hopper_run,
        .count_nonfinite = fkda_cuda_count_nonfinite,
        .decode = fkda_cuda_decode,
        .apply = fkda_cuda_apply,
        .decode_layer = fkda_cuda_decode_layer,
        .bwd = fkda_hopper_bwd,
        .bwd_workspace = fkda_hopper_bwd_workspace,
        .saved_bytes = fkda_hopper_saved_bytes,
        .map = fkda_cuda_map,
        .map_workspace = fkda_cuda_map_workspace,
        .join = fkda_cuda_join,
        .explain_decode = fkda_cuda_explain_decode,
        .explain_apply = fkda_cuda_explain_apply,
        .explain_decode_layer = fkda_cuda_explain_decode_layer,
        .explain = fkda_hopper_explain,
    },
#endif
#ifdef FKDA_WITH_CUDA
    {
        .info = {sizeof(flash_kda_kernel_info), "portable", FLASH_KDA_CUDA, "sm_80 and newer",
                 "chunks of 16 tokens through tf32 mma.sync, one launch, fp32 state in registers"},
        .min_compute_capability = 80,
        .features = FKDA_GPU_FEATURES,
        .plan = fkda_portable_make_plan,
        .run = fkda_portable_run,
        .count_nonfinite = fkda_cuda_count_nonfinite,
        .decode = fkda_cuda_decode,
        .apply = fkda_cuda_apply,
        .decode_layer = fkda_cuda_decode_layer,
        .explain_decode = fkda_cuda_explain_decode,
        .explain_apply = fkda_cuda_explain_apply,
        .explain_decode_layer = fkda_cuda_explain_decode_layer,
        .bwd = fkda_cuda_bwd,
        .bwd_workspace = fkda_cuda_bwd_workspace,
        .saved_bytes = fkda_portable_saved_bytes,
        .map = fkda_cuda_map,
        .map_workspace = fkda_cuda_map_workspace,
        .join = fkda_cuda_join,
        .explain = fkda_portable_explain,
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

/* Whether a device of that compute capability (0 on the CPU) can run a kernel. */
static bool runs_on(const fkda_kernel *k, flash_kda_device device, int capability)
{
    if (k->info.device_type != device.type) return false;
    if (device.type == FLASH_KDA_CPU) return fkda_cpu_runs(k->info.name);
    return capability >= k->min_compute_capability &&
           (!k->max_compute_capability || capability <= k->max_compute_capability) &&
           (!k->needs_tma || fkda_cuda_makes_tma_descriptors());
}

static const fkda_kernel *kernel_called(const char *name)
{
    for (int i = 0; i < KERNEL_COUNT; i++)
        if (strcmp(name, kernels[i].info.name) == 0) return &kernels[i];
    return NULL;
}

/* "9.0", "8.0 or newer", "8.0 to 9.0" */
static void capability_range(const fkda_kernel *k, char text[32])
{
    const int min = k->min_compute_capability, max = k->max_compute_capability;
    int used = snprintf(text, 32, "%d.%d", min / 10, min % 10);
    if (max == min) return;
    if (max)
        snprintf(text + used, (size_t)(32 - used), " to %d.%d", max / 10, max % 10);
    else
        snprintf(text + used, (size_t)(32 - used), " or newer");
}

static flash_kda_status refuse_unknown(flash_kda_device device, const char *name)
{
    char names[200] = "";
    for (int i = 0, used = 0; i < KERNEL_COUNT && used < (int)sizeof names; i++)
        if (kernels[i].info.device_type == device.type)
            used += snprintf(names + used, sizeof names - (size_t)used, "%s%s", used ? ", " : "",
                             kernels[i].info.name);
    return fkda_fail(FLASH_KDA_INVALID_VALUE, "kernel is \"%.200s\"; it must be NULL or one of %s", name,
                     names);
}

/* Refuses a kernel that is in the table and that the device cannot run. */
static flash_kda_status refuse_known(flash_kda_device device, int capability, const fkda_kernel *k)
{
    char range[32];
    const char *name = k->info.name;
    if (k->info.device_type != device.type)
        return fkda_fail(FLASH_KDA_UNAVAILABLE, "kernel is \"%s\", which does not run on %s", name,
                         device.type == FLASH_KDA_CPU ? "the CPU" : "a CUDA device");
    if (device.type == FLASH_KDA_CPU)
        return fkda_fail(FLASH_KDA_UNAVAILABLE, "kernel is \"%s\", which needs %s; this CPU is %s", name,
                         k->info.archs, fkda_cpu_arch());
    if (k->needs_tma && capability >= k->min_compute_capability && capability <= k->max_compute_capability)
        return fkda_fail(
            FLASH_KDA_UNAVAILABLE,
            "kernel is \"%s\", which needs an NVIDIA driver of CUDA 12 or newer: this one has no "
            "cuTensorMapEncodeTiled",
            name);
    capability_range(k, range);
    return fkda_fail(FLASH_KDA_UNAVAILABLE,
                     "kernel is \"%s\", which needs compute capability %s; CUDA device %d has %d.%d", name,
                     range, device.index, capability / 10, capability % 10);
}

/* What a caller has to change if a kernel does not know a feature. */
static const char *feature_text(int32_t features)
{
    static const char *const texts[] = {
        "tensors that are not contiguous",
        "state_indices or has_initial_state",
        "checkpoints",
        "more value heads than heads of q and k",
        "the softplus gate",
        "a gate that is activated already",
        "a gate without A_log or dt_bias",
        "g in float32",
        "this beta_kind",
        "q and k that are normalised already",
        "states with K first",
        "beta in float32",
        "flash_kda_decode() and flash_kda_apply()",
        "flash_kda_decode_layer()",
        "flash_kda_bwd(), the backward pass",
        "saved",
        "flash_kda_map() and flash_kda_join()",
    };
    return texts[__builtin_ctz((unsigned)features)];
}

static flash_kda_status refuse_features(const fkda_kernel *k, int32_t missing)
{
    return fkda_fail(FLASH_KDA_UNAVAILABLE, "kernel is \"%s\", which does not take %s", k->info.name,
                     feature_text(missing));
}

/* `k` is the last kernel that the device runs. */
static flash_kda_status refuse_all(const fkda_kernel *k, int32_t missing)
{
    return fkda_fail(FLASH_KDA_UNAVAILABLE,
                     "no kernel of the device takes all that the call asks for; the last of them is \"%s\", "
                     "which does not take %s",
                     k->info.name, feature_text(missing));
}

flash_kda_status fkda_find_kernel(flash_kda_device device, const char *name, int32_t features,
                                  const fkda_kernel **kernel)
{
    const fkda_kernel *unable = NULL; /* a kernel that the device runs, and that lacks a feature */
    int capability;
    flash_kda_status status = device_capability(device, &capability);
    if (status != FLASH_KDA_OK) return status;
    if (device.type == FLASH_KDA_CUDA && !with_cuda)
        return fkda_fail(FLASH_KDA_UNAVAILABLE,
                         "device is CUDA device %d, but the library was built without CUDA kernels; `pip "
                         "install .` in the source folder builds them, and fetches nvcc if there is none",
                         device.index);
    if (name) {
        const fkda_kernel *named = kernel_called(name);
        if (!named) return refuse_unknown(device, name);
        if (!runs_on(named, device, capability)) return refuse_known(device, capability, named);
        if (features & ~named->features) return refuse_features(named, features & ~named->features);
        *kernel = named;
        return FLASH_KDA_OK;
    }
    for (int i = 0; i < KERNEL_COUNT; i++) {
        if (!runs_on(&kernels[i], device, capability)) continue;
        unable = &kernels[i];
        if (features & ~unable->features) continue;
        *kernel = &kernels[i];
        return FLASH_KDA_OK;
    }
    if (unable) return refuse_all(unable, features & ~unable->features);
    return fkda_fail(FLASH_KDA_UNAVAILABLE,
                     "device is CUDA device %d of compute capability %d.%d; the library needs at least 8.0",
                     device.index, capability / 10, capability % 10);
}

/* Why the kernel runs: what comes behind its name. */
static void explain_why(flash_kda_device device, bool is_asked_for, char *text, size_t size)
{
    char where[64] = "the CPU";
    int capability;
    if (device.type == FLASH_KDA_CUDA && fkda_cuda_capability(device.index, &capability) == FLASH_KDA_OK)
        snprintf(where, sizeof where, "CUDA device %d (compute capability %d.%d)", device.index,
                 capability / 10, capability % 10);
    if (is_asked_for)
        snprintf(text, size, "was asked for");
    else
        snprintf(text, size, "is the first in the table that %s can run", where);
}

void fkda_explain_choice(const fkda_shape *shape, char *text, size_t size)
{
    char why[128];
    const flash_kda_kernel_info *info = &shape->kernel->info;
    explain_why(shape->device, shape->kernel_is_asked_for, why, sizeof why);
    snprintf(text, size, "Kernel \"%s\" (%s) %s.", info->name, info->description, why);
}

void fkda_explain_kernel(flash_kda_device device, const fkda_kernel *kernel, bool is_asked_for, char *text,
                         size_t size)
{
    char why[128];
    explain_why(device, is_asked_for, why, sizeof why);
    snprintf(text, size, "Kernel \"%s\" %s.", kernel->info.name, why);
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
