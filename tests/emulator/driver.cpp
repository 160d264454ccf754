/*
 * A libcuda.so.1 whose GPU is this machine's CPU: memory is the host's, streams do their work at once, and kernels are those
 * of kernels.h, run by machine.cpp. What the GPU is like is said by the environment as for ../pretend_driver; EMULATOR_SEED
 * chooses another order among all that nothing puts in order.
 */
#include <chrono>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>

#include "kernels.h"
#include "tensor_map.h"

extern "C" {

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };

CUresult cuDeviceGetAttribute(int *value, int attribute, int device);

static std::mutex lock;
static std::map<CUdeviceptr, size_t> mappings;
static uint64_t launches;

/* Memory ends, as near as its alignment lets it, where the process may not go. */
static size_t mapped_bytes(size_t bytes)
{
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return (bytes + page - 1) / page * page + page;
}

CUresult cuMemAlloc_v2(CUdeviceptr *memory, size_t bytes)
{
    constexpr size_t ALIGNMENT = 256;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), all = mapped_bytes(bytes);
    void *base =
        mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(static_cast<unsigned char *>(base) + all - page, page, PROT_NONE);
    const size_t slack = (all - page - bytes) / ALIGNMENT * ALIGNMENT;
    *memory = reinterpret_cast<CUdeviceptr>(base) + slack;
    const std::lock_guard<std::mutex> guard(lock);
    mappings[*memory] = all;
    return 0;
}

CUresult cuMemFree_v2(CUdeviceptr memory)
{
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = mappings.find(memory);
    if (found == mappings.end()) return INVALID_VALUE;
    const CUdeviceptr page = static_cast<CUdeviceptr>(sysconf(_SC_PAGESIZE));
    munmap(reinterpret_cast<void *>(memory / page * page), found->second);
    mappings.erase(found);
    return 0;
}

CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
    memcpy(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), bytes);
    return 0;
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, void *)
{
    for (size_t i = 0; i < count; i++) reinterpret_cast<unsigned *>(to)[i] = value;
    return 0;
}

CUresult cuDevicePrimaryCtxRetain(void **context, int)
{
    *context = &lock;
    return 0;
}
CUresult cuCtxPushCurrent_v2(void *)
{
    return 0;
}
CUresult cuCtxPopCurrent_v2(void **)
{
    return 0;
}
CUresult cuStreamSynchronize(void *)
{
    return 0;
}

/* Events are times, in seconds. */
CUresult cuEventCreate(void **event, unsigned)
{
    *event = calloc(1, sizeof(double));
    return *event ? 0 : OUT_OF_MEMORY;
}
CUresult cuEventDestroy_v2(void *event)
{
    free(event);
    return 0;
}
CUresult cuEventRecord(void *event, void *)
{
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    *static_cast<double *>(event) = std::chrono::duration<double>(now).count();
    return 0;
}
CUresult cuEventSynchronize(void *)
{
    return 0;
}
CUresult cuEventElapsedTime(float *milliseconds, void *start, void *end)
{
    *milliseconds = static_cast<float>(1e3 * (*static_cast<double *>(end) - *static_cast<double *>(start)));
    return 0;
}

/* Kernels are found by name alone. */
CUresult cuModuleLoadData(void **module, const void *)
{
    *module = &lock;
    return 0;
}
CUresult cuModuleGetFunction(const void **function, void *, const char *name)
{
    static const emulator::Kernel *const tables[] = {
        emulator::portable_kernels,
#ifdef FKDA_WITH_HOPPER
        emulator::hopper_kernels,
#endif
    };
    for (const emulator::Kernel *table : tables)
        for (const emulator::Kernel *k = table; k->name; k++)
            if (strcmp(k->name, name) == 0) {
                *function = k;
                return 0;
            }
    return NOT_FOUND;
}
CUresult cuFuncSetAttribute(void *, int, int)
{
    return 0;
}

CUresult cuLaunchKernel(const void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, void *,
                        void **arguments, void **)
{
    const auto *kernel = static_cast<const emulator::Kernel *>(function);
    const void *argument = arguments[0];
    const char *seed = getenv("EMULATOR_SEED");
    int multiprocessors;
    if (!grid_x || grid_y != 1 || grid_z != 1 || !block_x || block_x > 1024 || block_y != 1 || block_z != 1)
        return INVALID_VALUE;
    if (grid_x % static_cast<unsigned>(kernel->cluster)) return INVALID_VALUE;
    if (cuDeviceGetAttribute(&multiprocessors, 16, 0)) return INVALID_VALUE;
    emulator::launch([=] { kernel->run(argument); }, {grid_x, 1, 1}, {block_x, 1, 1}, kernel->cluster,
                     shared_bytes, multiprocessors,
                     (seed ? strtoull(seed, nullptr, 10) : 0) * 1000003 + ++launches * 7919);
    return 0;
}

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    const void *attributes;
    unsigned attribute_count;
};
CUresult cuLaunchKernelEx(const LaunchConfig *config, const void *function, void **arguments, void **extra)
{
    return cuLaunchKernel(function, config->grid[0], config->grid[1], config->grid[2], config->block[0],
                          config->block[1], config->block[2], config->shared_bytes, config->stream, arguments,
                          extra);
}

CUresult cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *tensor, const uint64_t *sizes,
                                const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                                int interleave, int swizzle, int, int fill)
{
    static_assert(sizeof(emulator::TensorMap) <= 128, "the size of a CUtensorMap");
    emulator::TensorMap made = {static_cast<const unsigned char *>(tensor), {}, {}, {}};
    if (type != 9 || rank != 4 || interleave || swizzle != 3 || fill || 2 * box[0] != 128)
        return INVALID_VALUE;
    if (reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(tensor) % 16)
        return INVALID_VALUE;
    for (int i = 0; i < 4; i++) {
        if (!sizes[i] || sizes[i] >> 32 || !box[i] || box[i] > 256 || element_strides[i] != 1)
            return INVALID_VALUE;
        if (i && (strides[i - 1] % 16 || strides[i - 1] >> 40)) return INVALID_VALUE;
        made.sizes[i] = sizes[i], made.box[i] = box[i];
        if (i) made.strides[i - 1] = strides[i - 1];
    }
    memcpy(map, &made, sizeof made);
    return 0;
}

} // extern "C"
