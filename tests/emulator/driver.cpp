/*
 * A libcuda.so.1 whose GPU is this machine's CPU.
 *
 * Memory is the host's. Kernels are those of kernels.h, and machine.cpp runs them; a kernel that was launched
 * to start early runs beside the previous kernel. All work is done when the context is popped.
 *
 * After a trap of a kernel that a thread has launched, the thread's launches fail with
 * CUDA_ERROR_LAUNCH_FAILED until it has called cuStreamSynchronize, which gives this result too. A real
 * context stays unusable; this one recovers, so that tests can look at memory and go on.
 *
 * Environment variables say what the GPU is like, as for ../pretend_driver. Three more belong to the
 * emulator:
 *   EMULATOR_SEED              another seed, so another order among everything that nothing puts in order
 *   EMULATOR_REFUSES_TOGETHER  if set, cooperative launches fail
 *   EMULATOR_GREEN_SMS         if set, all streams belong to a green context of so many SMs. A cooperative
 *                              launch of more CTAs ends the process: replayed from a CUDA graph it would wait
 *                              for ever
 */
#include <chrono>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "descriptor.h"
#include "kernels.h"

extern "C" {

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

CUresult cuDeviceGetAttribute(int *value, int attribute, int device);

static std::mutex lock;
[[maybe_unused]] static std::map<CUdeviceptr, size_t> mappings;
static uint64_t launches;

/* Behind each allocation, as near as its alignment lets it be, lies a page that the process may not touch. */
[[maybe_unused]] static size_t mapped_bytes(size_t bytes)
{
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return (bytes + page - 1) / page * page + page;
}

#if defined(__SANITIZE_ADDRESS__)
/* AddressSanitizer has red zones on both sides of what it allocates. */
CUresult cuMemAlloc_v2(CUdeviceptr *memory, size_t bytes)
{
    void *base = nullptr;
    if (posix_memalign(&base, 256, bytes)) return OUT_OF_MEMORY;
    *memory = reinterpret_cast<CUdeviceptr>(base);
    return 0;
}

CUresult cuMemFree_v2(CUdeviceptr memory)
{
    free(reinterpret_cast<void *>(memory));
    return 0;
}
#else
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
#endif

/* Kernels that this thread has launched. Each may have started before the previous one was over. All of them
 * are over when the context is popped. */
struct Launched {
    std::thread runner;
    std::shared_ptr<std::atomic<bool>> over, trapped;
};
static thread_local std::vector<Launched> under_way;
static thread_local CUresult failure; /* LAUNCH_FAILED after a trap, until cuStreamSynchronize */

static CUresult finish()
{
    for (Launched &l : under_way) {
        l.runner.join();
        if (*l.trapped) failure = LAUNCH_FAILED;
    }
    under_way.clear();
    return failure;
}

CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
    memcpy(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), bytes);
    return 0;
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, void *)
{
    if (finish()) return failure;
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
    finish();
    return 0;
}
CUresult cuStreamSynchronize(void *)
{
    const CUresult result = finish();
    failure = 0;
    return result;
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

/* Kernels are found by their names alone. */
CUresult cuModuleLoadData(void **module, const void *)
{
    *module = &lock;
    return 0;
}
CUresult cuModuleGetFunction(const void **function, void *, const char *name)
{
    static const emulator::Kernel *const tables[] = {
        emulator::map_kernels,          emulator::portable_kernels,       emulator::nonfinite_kernels,
        emulator::decode_kernels,       emulator::layer_kernels,          emulator::backward_kernels,
#ifdef FKDA_WITH_HOPPER
        emulator::hopper_kernels,
#endif
#ifdef EMULATOR_WITH_OPTIONS
        emulator::hopper_gate_kernels,  emulator::hopper_general_kernels, emulator::hopper_walk_kernels,
        emulator::hopper_chunk_kernels, emulator::hopper_first_kernels,
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

static CUresult start(const void *function, const unsigned (&grid)[3], const unsigned (&block)[3],
                      unsigned shared_bytes, void *const *arguments, bool early)
{
    const auto *kernel = static_cast<const emulator::Kernel *>(function);
    const char *seed = getenv("EMULATOR_SEED");
    int sms;
    if (!grid[0] || grid[1] != 1 || grid[2] != 1 || !block[0] || block[0] > 1024 || block[1] != 1 ||
        block[2] != 1)
        return INVALID_VALUE;
    if (grid[0] % static_cast<unsigned>(kernel->cluster)) return INVALID_VALUE;
    if (cuDeviceGetAttribute(&sms, 16, 0)) return INVALID_VALUE;
    if (!early) finish();
    if (failure) return failure;
    constexpr size_t ALIGNMENT = 64;
    const size_t bytes = (kernel->argument_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const std::shared_ptr<void> argument(aligned_alloc(ALIGNMENT, bytes),
                                         free); /* the caller may change its own */
    if (!argument) return OUT_OF_MEMORY;
    memcpy(argument.get(), arguments[0], kernel->argument_bytes);
    const auto before = under_way.empty() ? nullptr : under_way.back().over;
    const auto over = std::make_shared<std::atomic<bool>>(false),
               trapped = std::make_shared<std::atomic<bool>>(false);
    const emulator::Dim3 ctas = {grid[0], 1, 1}, threads = {block[0], 1, 1};
    const uint64_t order = (seed ? strtoull(seed, nullptr, 10) : 0) * 1000003 + ++launches * 7919;
    under_way.push_back({std::thread([=] {
                             *trapped =
                                 !emulator::launch([=] { kernel->run(argument.get()); }, ctas, threads,
                                                   kernel->cluster, shared_bytes, sms, order, before.get());
                             *over = true;
                         }),
                         over, trapped});
    return 0;
}

CUresult cuLaunchKernel(const void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, void *,
                        void **arguments, void **)
{
    return start(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, arguments,
                 false);
}

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    const struct {
        int id, padding, value[16];
    } * attributes;
    unsigned attribute_count;
};
/* The SMs of the green context that streams belong to, or 0. */
static unsigned green_sms()
{
    const char *text = getenv("EMULATOR_GREEN_SMS");
    return text ? static_cast<unsigned>(atoi(text)) : 0;
}

CUresult cuStreamGetGreenCtx(void *, void **context)
{
    static char green;
    *context = green_sms() ? &green : nullptr;
    return 0;
}

CUresult cuGreenCtxGetDevResource(void *, void *resource, int type)
{
    enum { SM = 1, PLACE_OF_SMS = 96 };
    if (type != SM) return INVALID_VALUE;
    const unsigned sms = green_sms();
    memcpy(static_cast<char *>(resource) + PLACE_OF_SMS, &sms, sizeof sms);
    return 0;
}

CUresult cuLaunchKernelEx(const LaunchConfig *config, const void *function, void **arguments, void **)
{
    enum { COOPERATIVE = 2, PROGRAMMATIC = 6, TOO_LARGE = 720 };
    bool early = false;
    for (unsigned i = 0; i < config->attribute_count; i++) {
        const auto &attribute = config->attributes[i];
        int sms;
        if (cuDeviceGetAttribute(&sms, 16, 0)) return INVALID_VALUE;
        if (attribute.id == COOPERATIVE &&
            (config->grid[0] > static_cast<unsigned>(sms) || getenv("EMULATOR_REFUSES_TOGETHER")))
            return TOO_LARGE;
        if (attribute.id == COOPERATIVE && green_sms() && config->grid[0] > green_sms()) {
            fprintf(stderr, "%u CTAs at once in a green context of %u SMs\n", config->grid[0], green_sms());
            abort();
        }
        early |= attribute.id == PROGRAMMATIC && attribute.value[0];
    }
    return start(function, config->grid, config->block, config->shared_bytes, arguments, early);
}

CUresult cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *tensor, const uint64_t *sizes,
                                const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                                int interleave, int swizzle, int, int fill)
{
    static_assert(sizeof(emulator::Descriptor) <= 128, "the size of a CUtensorMap");
    emulator::Descriptor made = {static_cast<const unsigned char *>(tensor), {}, {}, {}};
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
