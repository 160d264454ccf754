/* Launches kernels/portable/fwd.cu. */
#include <stdio.h>

#include "../../kernels/portable/fwd_shape.h"
#include "arguments.h"
#include "cuda.h"
#include "modules.h"

extern const unsigned char fkda_fatbin_portable_fwd[];

/* A kernel for each number of rows of V that a block can carry: 128, 64, 32. */
static fkda_module fwd_module = {
    .image = fkda_fatbin_portable_fwd,
    .names = {"fkda_portable_fwd_128", "fkda_portable_fwd_64", "fkda_portable_fwd_32"},
    .shared_bytes = FKDA_PORTABLE_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

/* Into how many blocks a head is split, as a power of two. Blocks that share a head repeat its preparation, so it
 * is only split over multiprocessors that would be idle. Rows of V are independent: results do not change. */
static int choose_split(int64_t heads, int multiprocessors)
{
    return 4 * heads <= multiprocessors ? 2 : 2 * heads <= multiprocessors ? 1 : 0;
}

size_t fkda_cuda_portable_workspace_size(const fkda_problem *problem)
{
    (void)problem;
    return 0;
}

flash_kda_status fkda_cuda_portable_fwd(const fkda_problem *p)
{
    fkda_fwd_args args = fkda_kernel_arguments(p);
    const int64_t heads = p->sequences * p->heads;
    int multiprocessors;
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(p->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_multiprocessors(driver, p->device.index, &multiprocessors);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, &fwd_module, p->device.index);
    if (status == FLASH_KDA_OK) {
        const int split = choose_split(heads, multiprocessors);
        const unsigned blocks = (unsigned)(heads << split);
        const unsigned threads = FKDA_PORTABLE_THREADS(FKDA_DIM >> split);
        void *arguments[] = {&args};
        CUresult result =
            driver->cuLaunchKernel(fwd_module.functions[p->device.index][split], blocks, 1, 1, threads, 1, 1,
                                   FKDA_PORTABLE_SHARED_BYTES, (CUstream)p->stream, arguments, NULL);
        if (result) status = fkda_driver_fail("cuLaunchKernel", result);
    }
    fkda_leave_device(driver);
    return status;
}

void fkda_cuda_portable_explain(const fkda_problem *p, char *text, size_t size)
{
    const int64_t heads = p->sequences * p->heads;
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) {
        snprintf(text, size, "%s", flash_kda_last_error());
        return;
    }
    const int split = choose_split(heads, multiprocessors), rows = FKDA_DIM >> split;
    const long long blocks = heads << split;
    snprintf(
        text, size,
        "%lld blocks of %d threads on %d multiprocessors, one block on each at a time: a head is %s, %d rows "
        "of V a block.",
        blocks, FKDA_PORTABLE_THREADS(rows), multiprocessors,
        split == 0   ? "not split"
        : split == 1 ? "split into 2 blocks"
                     : "split into 4 blocks",
        rows);
}
