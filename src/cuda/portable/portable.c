/* The kernel "portable": plans and launches kernels/portable/fwd.cu. */
#include <stdio.h>

#include "../../../kernels/portable/fwd_shape.h"
#include "../cuda.h"
#include "../kernel_args.h"
#include "../modules.h"

extern const unsigned char fkda_fatbin_portable_fwd[];

enum {
    SPLITS = 3,
    EVERY_KERNEL_KNOWS = FKDA_STRIDES | FKDA_POOL | FKDA_GROUPED | FKDA_NO_PARAMETER, /* features */
};

/* A kernel for each number of rows of V that a CTA can carry, in the order of fkda_portable_plan.split; then
 * the same kernels for calls with any option. */
static fkda_module module = {
    .image = fkda_fatbin_portable_fwd,
    .names = {"fkda_portable_fwd_128", "fkda_portable_fwd_64", "fkda_portable_fwd_32",
              "fkda_portable_general_128", "fkda_portable_general_64", "fkda_portable_general_32"},
    .shared_bytes = FKDA_PORTABLE_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

/* The log2 of the CTAs that a head is divided among. CTAs that share a head each prepare all of its chunks,
 * so a head is divided only among SMs that would be idle. Rows of V do not depend on each other, so results
 * do not change. */
static int choose_split(int64_t heads, int sms)
{
    return 4 * heads <= sms ? 2 : 2 * heads <= sms ? 1 : 0;
}

flash_kda_status fkda_portable_make_plan(fkda_plan *plan)
{
    const int64_t heads = plan->shape.sequences * plan->shape.heads;
    fkda_portable_plan *p = &plan->portable;
    const flash_kda_status status = fkda_cuda_sms(plan->shape.device.index, &p->sms);
    if (status != FLASH_KDA_OK) return status;
    p->split = choose_split(heads, p->sms);
    p->is_general = (plan->shape.features & ~EVERY_KERNEL_KNOWS) != 0;
    p->rows = FKDA_DIM >> p->split;
    p->threads = FKDA_PORTABLE_THREADS(p->rows);
    p->ctas = heads << p->split;
    return FLASH_KDA_OK;
}

static flash_kda_status launch(const fkda_driver *driver, const fkda_problem *p,
                               const fkda_portable_plan *plan)
{
    fkda_fwd_args args = fkda_kernel_args(p);
    void *pointers[] = {&args};
    const int ordinal = p->shape.device.index;
    const flash_kda_status status = fkda_load_module(driver, &module, ordinal);
    if (status != FLASH_KDA_OK) return status;
    const CUresult result = driver->cuLaunchKernel(
        module.functions[ordinal][plan->split + SPLITS * plan->is_general], (unsigned)plan->ctas, 1, 1,
        (unsigned)plan->threads, 1, 1, FKDA_PORTABLE_SHARED_BYTES, (CUstream)p->stream, pointers, NULL);
    return result ? fkda_driver_fail("cuLaunchKernel", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_portable_run(const fkda_problem *p, const fkda_plan *plan)
{
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(p->shape.device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = launch(driver, p, &plan->portable);
    return fkda_leave_device(driver, status);
}

void fkda_portable_explain(const fkda_plan *plan, char *text, size_t size)
{
    static const char *const divided[] = {"not divided", "divided among 2 CTAs", "divided among 4 CTAs"};
    const fkda_portable_plan *p = &plan->portable;
    snprintf(text, size,
             "%lld CTAs of %d threads on %d SMs, one CTA on an SM at a time. A head is %s, and a CTA carries "
             "%d rows of V.",
             (long long)p->ctas, p->threads, p->sms, divided[p->split], p->rows);
}
