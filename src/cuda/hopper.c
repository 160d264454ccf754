/* Launches kernels/hopper/fwd.cu. */
#include <stdio.h>

#include "arguments.h"
#include "cuda.h"
#include "hopper.h"

extern const unsigned char fkda_fatbin_hopper_fwd[];

/* A kernel for each number of rows of V that a block can carry. */
fkda_module fkda_hopper_fwd_module = {
    .image = fkda_fatbin_hopper_fwd,
    .names = {"fkda_hopper_fwd_128", "fkda_hopper_fwd_64"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

/* Several sequences in one batch row: there is cu_seqlens, also where only shapes are known. */
static bool lengths_differ(const fkda_problem *p)
{
    return p->sequences > p->batch;
}

int64_t fkda_hopper_places(int rows, int multiprocessors)
{
    return multiprocessors / FKDA_HOPPER_SHARERS(rows, false);
}

fkda_hopper_layout fkda_hopper_lay_out(int64_t heads, int rows, int multiprocessors)
{
    const int64_t places = fkda_hopper_places(rows, multiprocessors);
    return (fkda_hopper_layout){
        .rows = rows,
        .heads = heads,
        .blocks = (int)(heads < places ? heads : places) * FKDA_HOPPER_SHARERS(rows, false),
    };
}

/* A head is split where that keeps multiprocessors busy which would be idle. Rows of V are independent: results do not
 * change. */
static fkda_hopper_layout lay_out(const fkda_problem *p, int multiprocessors)
{
    const int64_t heads = p->sequences * p->heads;
    return fkda_hopper_lay_out(heads, heads <= fkda_hopper_places(64, multiprocessors) ? 64 : 128,
                               multiprocessors);
}

/* Heads differ in length: blocks draw them from a counter, else they take turns. */
static bool draws_numbers(const fkda_problem *p, const fkda_hopper_layout *l)
{
    return lengths_differ(p) && l->heads > l->blocks;
}

/* The counter that blocks draw from. Whether they do depends on the device; the size does not. */
size_t fkda_cuda_hopper_whole_workspace_size(const fkda_problem *p)
{
    return lengths_differ(p) ? 64 : 0;
}

/* Of a tensor [tokens, heads, 128] in bf16, as fkda_hopper_fwd_args wants it. */
static CUresult map_tensor(const fkda_driver *driver, fkda_tensor_map *map, const void *tensor,
                           const fkda_problem *p)
{
    const uint64_t row = FKDA_DIM * sizeof *p->v; /* bytes */
    const uint64_t sizes[] = {FKDA_DIM / 2, (uint64_t)(p->batch * p->tokens), 2, (uint64_t)p->heads};
    const uint64_t strides[] = {(uint64_t)p->heads * row, row / 2, row};
    const uint32_t box[] = {FKDA_DIM / 2, 16, 1, 1}, every[] = {1, 1, 1, 1};
    return driver->cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)tensor, sizes,
                                          strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

static flash_kda_status map_tensors(const fkda_driver *driver, fkda_hopper_fwd_args *args,
                                    const fkda_problem *p)
{
    const struct {
        fkda_tensor_map *map;
        const void *tensor;
    } pairs[] = {{&args->q, p->q}, {&args->k, p->k}, {&args->g, p->g}, {&args->v, p->v}};
    if (!driver->cuTensorMapEncodeTiled)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR,
                         "the NVIDIA driver is too old for kernel \"%s\": it has no "
                         "cuTensorMapEncodeTiled, which came with CUDA 12",
                         p->kernel->info.name);
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        CUresult result = map_tensor(driver, pairs[i].map, pairs[i].tensor, p);
        if (result) return fkda_driver_fail("cuTensorMapEncodeTiled", result);
    }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_hopper_arguments(const fkda_driver *driver, const fkda_problem *p,
                                       fkda_hopper_fwd_args *args)
{
    *args = (fkda_hopper_fwd_args){.fwd = fkda_kernel_arguments(p)};
    if (p->batch == 0 || p->tokens == 0) return FLASH_KDA_OK; /* nothing is read but states */
    return map_tensors(driver, args, p);
}

flash_kda_status fkda_hopper_launch(const fkda_driver *driver, const fkda_problem *p,
                                    fkda_hopper_fwd_args *args, CUfunction kernel, int blocks, int threads)
{
    void *arguments[] = {args};
    CUresult result = driver->cuLaunchKernel(kernel, (unsigned)blocks, 1, 1, (unsigned)threads, 1, 1,
                                             FKDA_HOPPER_SHARED_BYTES, p->stream, arguments, NULL);
    return result ? fkda_driver_fail("cuLaunchKernel", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_hopper_launch_beside(const fkda_driver *driver, const fkda_problem *p,
                                           fkda_hopper_fwd_args *args, CUfunction kernel, int blocks,
                                           int threads)
{
    void *arguments[] = {args};
    fkda_launch_attribute beside = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                    .value.programmatic_stream_serialization_allowed = 1};
    const fkda_launch_config config = {
        (unsigned)blocks, 1, 1, (unsigned)threads, 1, 1, FKDA_HOPPER_SHARED_BYTES, p->stream, &beside, 1};
    if (!driver->cuLaunchKernelEx) return fkda_hopper_launch(driver, p, args, kernel, blocks, threads);
    CUresult result = driver->cuLaunchKernelEx(&config, kernel, arguments, NULL);
    return result ? fkda_driver_fail("cuLaunchKernelEx", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_hopper_launch_fwd(const fkda_driver *driver, const fkda_problem *p,
                                        fkda_hopper_fwd_args *args, const fkda_hopper_layout *layout)
{
    return fkda_hopper_launch(driver, p, args,
                              fkda_hopper_fwd_module.functions[p->device.index][layout->rows == 128 ? 0 : 1],
                              layout->blocks, FKDA_HOPPER_THREADS(layout->rows));
}

static flash_kda_status run(const fkda_driver *driver, const fkda_problem *p, int multiprocessors)
{
    fkda_hopper_fwd_args args;
    const fkda_hopper_layout layout = lay_out(p, multiprocessors);
    if (!layout.heads) return FLASH_KDA_OK;
    flash_kda_status status = fkda_hopper_arguments(driver, p, &args);
    if (status != FLASH_KDA_OK) return status;
    if (draws_numbers(p, &layout)) {
        args.fwd.counter = p->workspace;
        CUresult result = driver->cuMemsetD32Async((CUdeviceptr)p->workspace, 0, 1, p->stream);
        if (result) return fkda_driver_fail("cuMemsetD32Async", result);
    }
    return fkda_hopper_launch_fwd(driver, p, &args, &layout);
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
    const fkda_hopper_layout l = lay_out(p, multiprocessors);
    snprintf(text, size,
             "%d blocks of %d threads, at most one on each of %d multiprocessors, work through %lld heads of "
             "sequences; %s.",
             l.blocks, FKDA_HOPPER_THREADS(l.rows), multiprocessors, (long long)l.heads,
             l.rows == 64            ? "two blocks share a head, with 64 rows of V each"
             : l.heads <= l.blocks   ? "each block has one"
             : !draws_numbers(p, &l) ? "they take them in turns"
             : p->sequences > FKDA_HOPPER_MOST_ORDERED
                 ? "they draw them from a counter"
                 : "they draw them from a counter, longest sequences first");
}
