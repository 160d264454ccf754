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

static int64_t bytes_of(const fkda_counted_tensor *t)
{
    return t->elements * (t->is_bf16 ? 2 : 4);
}

/* Whether each run begins at a multiple of 16 bytes, and has as many bytes. */
static bool takes_vectors(const fkda_counted_tensor *t)
{
    const int64_t unit = t->is_bf16 ? 8 : 4;
    bool takes = (uintptr_t)t->data % 16 == 0 && t->run % unit == 0;
    for (int i = 0; i < 3; i++) takes = takes && t->strides[i] % unit == 0;
    return takes;
}

static fkda_count_pool pool_of(const fkda_problem *p, const fkda_counted_tensor *t)
{
    if (!t->pool) return (fkda_count_pool){0};
    return (fkda_count_pool){.state_indices = p->state_indices.data,
                             .has_initial_state = t->pool == &p->initial_state ? p->has_initial_state : NULL,
                             .first_slot = p->first_slot,
                             .slots = t->pool->slots,
                             .indices_are_i32 = p->state_indices.is_i32};
}

/* What a tensor's time is in proportion to. A thread takes about as long for an element by itself as for a
 * vector of 16 bytes. */
static int64_t work_of(const fkda_counted_tensor *t)
{
    const bool is_contiguous = t->run == t->elements && !t->pool;
    return is_contiguous || takes_vectors(t) ? bytes_of(t) : t->elements * 16;
}

/* Each tensor gets CTAs in proportion to its work, so that all CTAs run at the same time and end together. A
 * tensor gets at least one CTA, and at most so many CTAs that each of their threads has a load to do. */
static int64_t share_out(const fkda_problem *p, const fkda_counted_tensor *tensors, int count, int sms,
                         fkda_count_args *args)
{
    const int64_t most = (int64_t)sms * FKDA_COUNT_CTAS_PER_SM,
                  round = FKDA_COUNT_THREADS * 16 * FKDA_COUNT_VECTORS;
    int64_t total = 1, next = 0;
    for (int i = 0; i < count; i++) total += work_of(&tensors[i]);
    *args = (fkda_count_args){.count = count};
    for (int i = 0; i < count; i++) {
        const fkda_counted_tensor *t = &tensors[i];
        const int64_t work = work_of(t), rounds = (work + round - 1) / round,
                      share = (int64_t)((double)work / (double)total * (double)most),
                      ctas = fkda_clamp(rounds < share ? rounds : share, 1, most);
        args->tensors[i] = (fkda_count_tensor){
            .data = t->data,
            .elements = t->elements,
            .run = t->run,
            .sizes = {t->sizes[0], t->sizes[1]},
            .strides = {t->strides[0], t->strides[1], t->strides[2]},
            .pool = pool_of(p, t),
            .record = (long long *)&t->record->count,
            .is_bf16 = t->is_bf16,
            .by_vectors = takes_vectors(t),
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
    fkda_counted_tensor tensors[FLASH_KDA_CHECKED_TENSORS];
    fkda_count_args args;
    void *pointers[] = {&args};
    int sms;
    flash_kda_status status = fkda_cuda_sms(ordinal, &sms);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, &module, ordinal);
    if (status != FLASH_KDA_OK) return status;
    const int found = fkda_counted_tensors(p, counted, tensors);
    const int64_t ctas = share_out(p, tensors, found, sms, &args);
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
