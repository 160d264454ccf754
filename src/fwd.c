/* The public calls that compute: check the arguments, then run on a backend. */
#include "cpu/cpu.h"
#include "internal.h"

flash_kda_status flash_kda_fwd_workspace_size(const flash_kda_fwd_params *params, size_t *bytes)
{
    fkda_problem problem;
    if (!bytes) return fkda_fail(FLASH_KDA_INVALID_VALUE, "bytes is null; it must point to a size_t");
    flash_kda_status status = fkda_check(params, FKDA_FOR_WORKSPACE, &problem);
    if (status == FLASH_KDA_OK) *bytes = problem.kernel->workspace_size(&problem);
    return status;
}

flash_kda_status flash_kda_fwd(const flash_kda_fwd_params *params)
{
    fkda_problem problem;
    flash_kda_status status = fkda_check(params, FKDA_FOR_FWD, &problem);
    return status == FLASH_KDA_OK ? problem.kernel->fwd(&problem) : status;
}

flash_kda_status flash_kda_reference(const flash_kda_fwd_params *params, double *out64, double *state64)
{
    fkda_problem problem;
    if (!out64)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "out64 is null; it must point to [B, T, H, V] doubles");
    flash_kda_status status = fkda_check(params, FKDA_FOR_REFERENCE, &problem);
    return status == FLASH_KDA_OK ? fkda_cpu_reference(&problem, out64, state64) : status;
}
