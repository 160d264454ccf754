/* Launches kernels/hopper/fwd.cu. */
#include <stdio.h>

#include "../../kernels/hopper/fwd_args.h"
#include "../../kernels/hopper/fwd_shape.h"
#include "arguments.h"
#include "cuda.h"
#include "modules.h"

extern const unsigned char fkda_fatbin_hopper_fwd[];

/* A kernel for each number of rows of V that a block can carry. */
static fkda_module fwd_module = {
    .image = fkda_fatbin_hopper_fwd,
    .names = {"fkda_hopper_fwd_128", "fkda_hopper_fwd_64"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

/* How a problem is laid out, from its shapes and the device alone. */
typedef struct layout {
    int rows; /* of V that a block carries: 128, or 64 if every head can then have two multiprocessors */
    int64_t pieces;     /* of work: a head of a sequence, or half of one */
    int blocks;         /* at most one to a multiprocessor; they stay until the pieces are done */
    bool draws_numbers; /* pieces differ in length: blocks draw them from a counter, else they take turns */
} layout;

/* Several sequences in one batch row: there is cu_seqlens, also where only shapes are known. */
static bool lengths_differ(const fkda_problem *p)
{
    return p->sequences > p->batch;
}

/* Halves repeat their head's preparation, so a head is only split over multiprocessors that would be idle. Rows of V
 * are independent: results do not change. */
static layout lay_out(const fkda_problem *p, int multiprocessors)
{
    const int64_t tasks = p->sequences * p->heads;
    const int rows = 2 * tasks <= multiprocessors ? 64 : 128;
    const int64_t pieces = tasks * (FKDA_DIM / rows);
    return (layout){
        .rows = rows,
        .pieces = pieces,
        .blocks = (int)(pieces < multiprocessors ? pieces : multiprocessors),
        .draws_numbers = lengths_differ(p) && pieces > multiprocessors,
    };
}

/* The counter that blocks draw from. Whether they do depends on the device; the size does not. */
size_t fkda_cuda_hopper_workspace_size(const fkda_problem *p)
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
                         "the NVIDIA driver is too old for kernel \"hopper\": it has no "
                         "cuTensorMapEncodeTiled, which came with CUDA 12");
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        CUresult result = map_tensor(driver, pairs[i].map, pairs[i].tensor, p);
        if (result) return fkda_driver_fail("cuTensorMapEncodeTiled", result);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status launch(const fkda_driver *driver, const fkda_problem *p, const layout *l)
{
    fkda_hopper_fwd_args args = {.fwd = fkda_kernel_arguments(p)};
    void *arguments[] = {&args};
    CUstream stream = p->stream;
    if (p->batch > 0 && p->tokens > 0) { /* without tokens nothing is read but states */
        flash_kda_status status = map_tensors(driver, &args, p);
        if (status != FLASH_KDA_OK) return status;
    }
    if (l->draws_numbers) {
        args.fwd.counter = p->workspace;
        CUresult result = driver->cuMemsetD32Async((CUdeviceptr)p->workspace, 0, 1, stream);
        if (result) return fkda_driver_fail("cuMemsetD32Async", result);
    }
    CUresult result = driver->cuLaunchKernel(
        fwd_module.functions[p->device.index][l->rows == 128 ? 0 : 1], (unsigned)l->blocks, 1, 1,
        (unsigned)FKDA_HOPPER_THREADS(l->rows), 1, 1, FKDA_HOPPER_SHARED_BYTES, stream, arguments, NULL);
    return result ? fkda_driver_fail("cuLaunchKernel", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_hopper_fwd(const fkda_problem *p)
{
    int multiprocessors;
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(p->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_multiprocessors(driver, p->device.index, &multiprocessors);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, &fwd_module, p->device.index);
    if (status == FLASH_KDA_OK) {
        const layout l = lay_out(p, multiprocessors);
        if (l.pieces) status = launch(driver, p, &l);
    }
    fkda_leave_device(driver);
    return status;
}

void fkda_cuda_hopper_explain(const fkda_problem *p, char *text, size_t size)
{
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) {
        snprintf(text, size, "%s", flash_kda_last_error());
        return;
    }
    const layout l = lay_out(p, multiprocessors);
    snprintf(
        text, size,
        "%d blocks of %d threads, at most one on each of %d multiprocessors, work through %lld pieces of %d "
        "rows of V of a head; %s.",
        l.blocks, FKDA_HOPPER_THREADS(l.rows), multiprocessors, (long long)l.pieces, l.rows,
        l.pieces <= l.blocks                      ? "each block has one"
        : !l.draws_numbers                        ? "they take them in turns"
        : p->sequences > FKDA_HOPPER_MOST_ORDERED ? "they draw them from a counter"
                                                  : "they draw them from a counter, longest sequences first");
}
