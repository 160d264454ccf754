/* The public calls that compute: check the arguments, then run on a backend. */
#include <stdio.h>

#include "cpu/cpu.h"
#include "internal.h"

flash_kda_status flash_kda_fwd_workspace_size(const flash_kda_fwd_params *params, size_t *bytes)
{
    fkda_problem problem;
    if (!bytes) return fkda_fail(FLASH_KDA_INVALID_VALUE, "bytes is null; it must point to a size_t");
    flash_kda_status status = fkda_check(params, FKDA_FOR_SHAPES, &problem);
    if (status == FLASH_KDA_OK) *bytes = problem.kernel->workspace_size(&problem);
    return status;
}

flash_kda_status flash_kda_explain(const flash_kda_fwd_params *params, char *text, size_t capacity)
{
    enum { LINE = 512 };
    fkda_problem problem;
    char choice[LINE], layout[LINE] = "";
    if (!text || !capacity)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "text must point to capacity = %zu bytes, at least 1",
                         capacity);
    flash_kda_status status = fkda_check(params, FKDA_FOR_SHAPES, &problem);
    if (status != FLASH_KDA_OK) return status;
    fkda_explain_choice(&problem, choice, sizeof choice);
    if (problem.kernel->explain) problem.kernel->explain(&problem, layout, sizeof layout);
    snprintf(text, capacity, "%s\n%s%sWorkspace: %zu bytes.\n", choice, layout, *layout ? "\n" : "",
             problem.kernel->workspace_size(&problem));
    return FLASH_KDA_OK;
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
