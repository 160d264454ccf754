/* The public calls about the backward pass: check the arguments, run the kernel. */
#include <pthread.h>

#include "check_bwd.h"
#include "cpu/cpu.h"
#include "errors.h"
#include "guard.h"
#include "kernel.h"

flash_kda_status flash_kda_bwd_workspace_size(const flash_kda_bwd_params *params, size_t *bytes)
{
    FKDA_GUARD;
    fkda_bwd_problem problem;
    if (!bytes) return fkda_fail(FLASH_KDA_INVALID_VALUE, "bytes is null; it must point to a size_t");
    const flash_kda_status status = fkda_check_bwd(params, FKDA_FOR_SHAPES, &problem);
    if (status == FLASH_KDA_OK) *bytes = problem.fwd.shape.kernel->bwd_workspace(&problem);
    return status;
}

static flash_kda_status bwd(const flash_kda_bwd_params *params)
{
    FKDA_GUARD;
    fkda_bwd_problem problem;
    flash_kda_status status = fkda_check_bwd(params, FKDA_FOR_FWD, &problem);
    if (status != FLASH_KDA_OK) return status;
    const fkda_kernel *kernel = problem.fwd.shape.kernel;
    status = fkda_check_workspace(&problem.fwd, kernel->bwd_workspace(&problem));
    if (status == FLASH_KDA_OK && problem.fwd.saved)
        status = fkda_check_saved_size(&problem.fwd, kernel->saved_bytes(&problem.fwd.shape));
    return status == FLASH_KDA_OK ? kernel->bwd(&problem) : status;
}

static flash_kda_status reference(const flash_kda_bwd_params *params, const flash_kda_gradients64 *gradients)
{
    FKDA_GUARD;
    fkda_bwd_problem problem;
    if (!gradients)
        return fkda_fail(FLASH_KDA_INVALID_VALUE,
                         "gradients is null; it must point to a flash_kda_gradients64");
    if (gradients->struct_size != sizeof *gradients)
        return fkda_fail(FLASH_KDA_INVALID_VALUE,
                         "gradients->struct_size is %zu; it must be sizeof(flash_kda_gradients64) = %zu",
                         gradients->struct_size, sizeof *gradients);
    const flash_kda_status status = fkda_check_bwd(params, FKDA_FOR_REFERENCE, &problem);
    return status == FLASH_KDA_OK ? fkda_cpu_bwd_reference(&problem, gradients) : status;
}

/* Both functions are cancellation points, after all work is done and no lock, thread or memory of the call is
 * left (fwd.c). */
flash_kda_status flash_kda_bwd(const flash_kda_bwd_params *params)
{
    const flash_kda_status status = bwd(params);
    pthread_testcancel();
    return status;
}

flash_kda_status flash_kda_bwd_reference(const flash_kda_bwd_params *params,
                                         const flash_kda_gradients64 *gradients)
{
    const flash_kda_status status = reference(params, gradients);
    pthread_testcancel();
    return status;
}
