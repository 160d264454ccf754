/* Launches kernels/hopper/fwd.cu. */
#include <stdio.h>

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

static flash_kda_status launch(const fkda_driver *driver, const fkda_problem *p, const layout *l)
{
    fkda_fwd_args args = fkda_kernel_arguments(p);
    void *arguments[] = {&args};
    CUstream stream = p->stream;
    if (l->draws_numbers) {
        args.counter = p->workspace;
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
