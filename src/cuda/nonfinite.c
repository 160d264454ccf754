/* Counts values that are not finite on a GPU: launches kernels/nonfinite/count.cu. */
#include "../nonfinite.h"

#include "../../kernels/nonfinite/count_args.h"
#include "../errors.h"
#include "cuda.h"
#include "modules.h"

extern const unsigned char fkda_fatbin_nonfinite[];

static fkda_module module = {
    .image = fkda_fatbin_nonfinite,
    .names = {"fkda_count_nonfinite"},
    .shared_bytes = FKDA_COUNT_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

_Static_assert(FLASH_KDA_CHECKED_OUT <= FKDA_COUNT_TENSORS, "one launch counts all inputs");
_Static_assert(sizeof(flash_kda_nonfinite) == 2 * sizeof(long long), "a record as the kernel has it");

static int64_t bytes_of(const fkda_stretch *s)
{
    return s->elements * (s->is_bf16 ? 2 : 4);
}

/* Each tensor gets CTAs in proportion to its bytes, so that all CTAs run at the same time and end together. A
 * tensor gets at least one CTA, and at most so many CTAs that each of their threads has a load to do. */
static int64_t share_out(const fkda_stretch *stretches, int count, int sms, fkda_count_args *args)
{
    const int64_t most = (int64_t)sms * FKDA_COUNT_CTAS_PER_SM,
                  round = FKDA_COUNT_THREADS * 16 * FKDA_COUNT_VECTORS;
    int64_t total = 1, next = 0;
    for (int t = 0; t < count; t++) total += bytes_of(&stretches[t]);
    *args = (fkda_count_args){.count = count};
    for (int t = 0; t < count; t++) {
        const int64_t bytes = bytes_of(&stretches[t]), rounds = (bytes + round - 1) / round,
                      share = (int64_t)((double)bytes / (double)total * (double)most),
                      ctas = fkda_clamp(rounds < share ? rounds : share, 1, most);
        args->tensors[t] = (fkda_count_tensor){
            .data = stretches[t].data,
            .elements = stretches[t].elements,
            .record = (long long *)&stretches[t].record->count,
            .is_bf16 = stretches[t].is_bf16,
            .first_cta = (int)next,
            .ctas = (int)ctas,
        };
        next += ctas;
    }
    return next;
}

static flash_kda_status count(const fkda_driver *driver, const fkda_problem *p, fkda_counted counted)
{
    enum { WORDS = FLASH_KDA_CHECKED_TENSORS * sizeof(flash_kda_nonfinite) / sizeof(uint32_t) };
    const int ordinal = p->shape.device.index;
    fkda_stretch stretches[FLASH_KDA_CHECKED_TENSORS];
    fkda_count_args args;
    void *pointers[] = {&args};
    int sms;
    flash_kda_status status = fkda_cuda_sms(ordinal, &sms);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, &module, ordinal);
    if (status != FLASH_KDA_OK) return status;
    const int tensors = fkda_counted_stretches(p, counted, stretches);
    const int64_t ctas = share_out(stretches, tensors, sms, &args);
    if (counted == FKDA_INPUTS) { /* the first step of a call sets the records of both */
        const CUresult result =
            driver->cuMemsetD32Async((CUdeviceptr)p->nonfinite, UINT32_MAX, WORDS, (CUstream)p->stream);
        if (result) return fkda_driver_fail("cuMemsetD32Async", result);
    }
    const CUresult result =
        driver->cuLaunchKernel(module.functions[ordinal][0], (unsigned)ctas, 1, 1, FKDA_COUNT_THREADS, 1, 1,
                               FKDA_COUNT_SHARED_BYTES, (CUstream)p->stream, pointers, NULL);
    return result ? fkda_driver_fail("cuLaunchKernel", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_count_nonfinite(const fkda_problem *p, fkda_counted counted)
{
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(p->shape.device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = count(driver, p, counted);
    return fkda_leave_device(driver, status);
}
