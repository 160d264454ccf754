/* Launches kernels/portable/fwd.cu. */
#include "../../kernels/portable/fwd_args.h"
#include "../../kernels/portable/fwd_shape.h"
#include "cuda.h"
#include "modules.h"

extern const unsigned char fkda_fatbin_portable_fwd[];

/* One kernel for each number of rows of V that a block can carry. */
#define FWD_FUNCTION(rows)                                                                                   \
    {                                                                                                        \
        .image = fkda_fatbin_portable_fwd, .name = "fkda_portable_fwd_" #rows,                               \
        .shared_bytes = FKDA_PORTABLE_SHARED_BYTES, .lock = PTHREAD_MUTEX_INITIALIZER                        \
    }
static fkda_function fwd_128 = FWD_FUNCTION(128), fwd_64 = FWD_FUNCTION(64), fwd_32 = FWD_FUNCTION(32);

/* Blocks that share a head repeat its preparation, so a head is only split over multiprocessors that
 * would be idle. Rows of V are independent: the split does not change results. */
static fkda_function *choose_rows(int64_t heads, int multiprocessors, int *rows)
{
    *rows = 4 * heads <= multiprocessors ? 32 : 2 * heads <= multiprocessors ? 64 : 128;
    return *rows == 32 ? &fwd_32 : *rows == 64 ? &fwd_64 : &fwd_128;
}

size_t fkda_cuda_portable_workspace_size(const fkda_problem *problem)
{
    (void)problem;
    return 0;
}

flash_kda_status fkda_cuda_portable_fwd(const fkda_problem *p)
{
    fkda_portable_args args = {
        .q = p->q,
        .k = p->k,
        .v = p->v,
        .g = p->g,
        .beta = p->beta,
        .out = p->out,
        .A_log = p->A_log,
        .dt_bias = p->dt_bias,
        .initial_state = p->initial_state,
        .final_state = p->final_state,
        .cu_seqlens = p->cu_seqlens,
        .tokens = p->tokens,
        .heads = (int)p->heads,
        .scale = p->scale,
        .lower_bound = p->lower_bound,
        .state_is_bf16 = p->state_is_bf16,
        .cu_seqlens_is_i32 = p->cu_seqlens_is_i32,
    };
    int rows, multiprocessors;
    const int64_t heads = p->sequences * p->heads;
    const fkda_driver *driver;
    CUfunction function;
    flash_kda_status status = fkda_enter_device(p->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_multiprocessors(driver, p->device.index, &multiprocessors);
    if (status == FLASH_KDA_OK)
        status = fkda_load_function(driver, choose_rows(heads, multiprocessors, &rows), p->device.index,
                                    &function);
    if (status == FLASH_KDA_OK) {
        void *arguments[] = {&args};
        unsigned blocks = (unsigned)(heads * (FKDA_DIM / rows));
        CUresult result =
            driver->cuLaunchKernel(function, blocks, 1, 1, (unsigned)FKDA_PORTABLE_THREADS(rows), 1, 1,
                                   FKDA_PORTABLE_SHARED_BYTES, (CUstream)p->stream, arguments, NULL);
        if (result) status = fkda_driver_fail("cuLaunchKernel", result);
    }
    fkda_leave_device(driver);
    return status;
}
