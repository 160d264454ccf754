/* Launches kernels/hopper/fwd.cu. */
#include <math.h>
#include <stdio.h>

#include "arguments.h"
#include "cuda.h"
#include "hopper.h"

extern const unsigned char fkda_fatbin_hopper_fwd[];

fkda_module fkda_hopper_fwd_module = {
    .image = fkda_fatbin_hopper_fwd,
    .names = {"fkda_hopper_solo", "fkda_hopper_pair"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

int64_t fkda_hopper_pairs(int multiprocessors)
{
    return multiprocessors / FKDA_HOPPER_PAIR_CTAS;
}

static size_t flag_bytes(int multiprocessors)
{
    const size_t bytes = (size_t)multiprocessors * FKDA_HANDOFF_FLAGS * sizeof(int);
    return (bytes + 63) / 64 * 64;
}

size_t fkda_hopper_handoff_size(int multiprocessors)
{
    return flag_bytes(multiprocessors) + (size_t)multiprocessors * FKDA_DIM * FKDA_DIM * sizeof(float);
}

fkda_handoff fkda_hopper_handoff(void *memory, int multiprocessors)
{
    return (fkda_handoff){.flags = memory, .states = (float *)((char *)memory + flag_bytes(multiprocessors))};
}

/* How heads of sequences are dealt out, from shapes and the device alone. */
typedef struct layout {
    int64_t heads, workers; /* blocks or pairs of them */
    int chunk;              /* tokens: of which kind they are */
    bool divides;           /* heads between workers */
    double clocks;          /* that it should take, besides beginning and end */
} layout;

/* What takes less time if all sequences are as long, or the longest is as long as is known. As many heads as pairs, or fewer, have one each. Where results must not depend on
 * the batch, heads always have a pair, whole. */
static layout lay_out(const fkda_problem *p, int multiprocessors)
{
    const int64_t heads = p->sequences * p->heads, pairs = fkda_hopper_pairs(multiprocessors);
    const double tokens = p->sequences ? (double)(p->batch * p->tokens) / (double)p->sequences : 0;
    const double longest = fmax((double)p->max_seqlen, tokens);
    const double alone = fmax(longest, tokens * (double)heads / (double)multiprocessors) /
                         FKDA_HOPPER_CHUNK_SOLO * FKDA_CLOCKS_SOLO_CHUNK;
    const double paired = fmax(longest, tokens * (double)heads / (double)pairs) / FKDA_HOPPER_CHUNK_PAIR *
                          FKDA_CLOCKS_PAIR_CHUNK;
    layout l = {.heads = heads};
    l.chunk = p->batch_invariant || heads <= pairs || paired < alone ? FKDA_HOPPER_CHUNK_PAIR
                                                                     : FKDA_HOPPER_CHUNK_SOLO;
    l.workers = l.chunk == FKDA_HOPPER_CHUNK_PAIR ? pairs : multiprocessors;
    l.divides = !p->batch_invariant && heads > l.workers;
    if (heads < l.workers) l.workers = heads;
    l.clocks = paired < alone || heads <= pairs ? paired : alone;
    return l;
}

int64_t fkda_hopper_whole_clocks(const fkda_problem *p, int multiprocessors)
{
    return (int64_t)lay_out(p, multiprocessors).clocks;
}

size_t fkda_cuda_hopper_whole_workspace_size(const fkda_problem *p)
{
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) return 0;
    return lay_out(p, multiprocessors).divides ? fkda_hopper_handoff_size(multiprocessors) : 0;
}

/* Of a tensor [tokens, heads, 128] in bf16, as fkda_hopper_fwd_args wants it. */
static CUresult map_tensor(const fkda_driver *driver, fkda_tma_descriptor *map, const void *tensor,
                           const fkda_problem *p, int chunk)
{
    const uint64_t row = FKDA_DIM * sizeof *p->v; /* bytes */
    const uint64_t sizes[] = {FKDA_DIM / 2, (uint64_t)(p->batch * p->tokens), 2, (uint64_t)p->heads};
    const uint64_t strides[] = {(uint64_t)p->heads * row, row / 2, row};
    const uint32_t box[] = {FKDA_DIM / 2, (uint32_t)chunk, 1, 1}, every[] = {1, 1, 1, 1};
    return driver->cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)tensor, sizes,
                                          strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

static flash_kda_status map_tensors(const fkda_driver *driver, fkda_hopper_fwd_args *args,
                                    const fkda_problem *p, int chunk)
{
    const struct {
        fkda_tma_descriptor *map;
        const void *tensor;
    } pairs[] = {{&args->q, p->q}, {&args->k, p->k}, {&args->g, p->g}, {&args->v, p->v}};
    if (!driver->cuTensorMapEncodeTiled)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR,
                         "the NVIDIA driver is too old for kernel \"%s\": it has no "
                         "cuTensorMapEncodeTiled, which came with CUDA 12",
                         p->kernel->info.name);
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        CUresult result = map_tensor(driver, pairs[i].map, pairs[i].tensor, p, chunk);
        if (result) return fkda_driver_fail("cuTensorMapEncodeTiled", result);
    }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_hopper_arguments(const fkda_driver *driver, const fkda_problem *p,
                                       fkda_hopper_fwd_args *args, int chunk)
{
    *args = (fkda_hopper_fwd_args){.fwd = fkda_kernel_arguments(p)};
    if (p->batch == 0 || p->tokens == 0) return FLASH_KDA_OK; /* nothing is read but states */
    return map_tensors(driver, args, p, chunk);
}

static fkda_launch_config launch_config(const fkda_problem *p, int blocks, int threads,
                                        fkda_launch_attribute *attribute)
{
    return (fkda_launch_config){
        (unsigned)blocks, 1, 1, (unsigned)threads, 1, 1, FKDA_HOPPER_SHARED_BYTES, p->stream, attribute, 1};
}

flash_kda_status fkda_hopper_launch(const fkda_driver *driver, const fkda_problem *p,
                                    fkda_hopper_fwd_args *args, CUfunction kernel, int blocks, int threads,
                                    bool early)
{
    void *arguments[] = {args};
    fkda_launch_attribute attribute = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                       .value.programmatic_stream_serialization_allowed = 1};
    const fkda_launch_config config = launch_config(p, blocks, threads, &attribute);
    if (early && driver->cuLaunchKernelEx) {
        CUresult result = driver->cuLaunchKernelEx(&config, kernel, arguments, NULL);
        return result ? fkda_driver_fail("cuLaunchKernelEx", result) : FLASH_KDA_OK;
    }
    CUresult result = driver->cuLaunchKernel(kernel, (unsigned)blocks, 1, 1, (unsigned)threads, 1, 1,
                                             FKDA_HOPPER_SHARED_BYTES, p->stream, arguments, NULL);
    return result ? fkda_driver_fail("cuLaunchKernel", result) : FLASH_KDA_OK;
}

bool fkda_hopper_launch_together(const fkda_driver *driver, const fkda_problem *p, void *args,
                                 CUfunction kernel, int blocks)
{
    void *arguments[] = {args};
    fkda_launch_attribute attribute = {.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE, .value.cooperative = 1};
    const fkda_launch_config config = launch_config(p, blocks, FKDA_HOPPER_THREADS, &attribute);
    return driver->cuLaunchKernelEx && driver->cuLaunchKernelEx(&config, kernel, arguments, NULL) == 0;
}

flash_kda_status fkda_hopper_launch_fwd(const fkda_driver *driver, const fkda_problem *p,
                                        fkda_hopper_fwd_args *args, int chunk, int64_t pieces,
                                        int multiprocessors, bool early)
{
    const bool paired = chunk == FKDA_HOPPER_CHUNK_PAIR;
    const int64_t workers = paired ? fkda_hopper_pairs(multiprocessors) : multiprocessors;
    const int blocks = (int)(pieces < workers ? pieces : workers) * (paired ? FKDA_HOPPER_PAIR_CTAS : 1);
    if (pieces <= workers) args->handoff = (fkda_handoff){0};
    if (args->handoff.flags) {
        CUresult result = driver->cuMemsetD32Async((CUdeviceptr)args->handoff.flags, 0,
                                                   flag_bytes(multiprocessors) / sizeof(int), p->stream);
        if (result) return fkda_driver_fail("cuMemsetD32Async", result);
        early = false; /* that must be over */
    }
    return fkda_hopper_launch(driver, p, args, fkda_hopper_fwd_module.functions[p->device.index][paired],
                              blocks, FKDA_HOPPER_THREADS, early);
}

static flash_kda_status run(const fkda_driver *driver, const fkda_problem *p, int multiprocessors)
{
    fkda_hopper_fwd_args args;
    const layout l = lay_out(p, multiprocessors);
    if (!l.heads) return FLASH_KDA_OK;
    flash_kda_status status = fkda_hopper_arguments(driver, p, &args, l.chunk);
    if (status != FLASH_KDA_OK) return status;
    if (l.divides) args.handoff = fkda_hopper_handoff(p->workspace, multiprocessors);
    return fkda_hopper_launch_fwd(driver, p, &args, l.chunk, l.heads, multiprocessors, false);
}

flash_kda_status fkda_cuda_hopper_whole_fwd(const fkda_problem *p)
{
    int multiprocessors;
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(p->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_multiprocessors(driver, p->device.index, &multiprocessors);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, &fkda_hopper_fwd_module, p->device.index);
    if (status == FLASH_KDA_OK) status = run(driver, p, multiprocessors);
    fkda_leave_device(driver);
    return status;
}

void fkda_cuda_hopper_whole_explain(const fkda_problem *p, char *text, size_t size)
{
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) {
        snprintf(text, size, "%s", flash_kda_last_error());
        return;
    }
    const layout l = lay_out(p, multiprocessors);
    const bool paired = l.chunk == FKDA_HOPPER_CHUNK_PAIR;
    const char *each = paired           ? l.workers == 1 ? "pair of blocks, half of the rows of V in each"
                                                         : "pairs of blocks, half of the rows of V in each"
                       : l.workers == 1 ? "block"
                                        : "blocks";
    snprintf(text, size,
             "%lld %s, and chunks of %d tokens; a block to a multiprocessor, %d threads. Heads of sequences: "
             "%lld; %s.",
             (long long)l.workers, each, l.chunk, FKDA_HOPPER_THREADS, (long long)l.heads,
             l.heads <= l.workers ? "each has one"
             : l.divides
                 ? "their tokens are shared out evenly, and the state of a head that two have parts of is "
                   "handed on"
                 : "each has some, as evenly as whole ones can be shared out");
}
