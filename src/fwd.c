/* The public calls about the forward pass: check the arguments, find the plan, do what it says. */
#include <pthread.h>
#include <stdio.h>

#include "check.h"
#include "cpu/cpu.h"
#include "errors.h"
#include "guard.h"
#include "kernel.h"
#include "plan.h"

/* The problem of a call that asks about shapes alone, and its plan. */
static flash_kda_status plan_shapes(const flash_kda_fwd_params *params, const fkda_plan **plan)
{
    fkda_problem problem;
    const flash_kda_status status = fkda_check(params, FKDA_FOR_SHAPES, &problem);
    return status == FLASH_KDA_OK ? fkda_find_plan(&problem.shape, plan) : status;
}

flash_kda_status flash_kda_fwd_workspace_size(const flash_kda_fwd_params *params, size_t *bytes)
{
    FKDA_GUARD;
    const fkda_plan *plan;
    if (!bytes) return fkda_fail(FLASH_KDA_INVALID_VALUE, "bytes is null; it must point to a size_t");
    const flash_kda_status status = plan_shapes(params, &plan);
    if (status == FLASH_KDA_OK) *bytes = plan->workspace_bytes;
    return status;
}

flash_kda_status flash_kda_fwd_saved_size(const flash_kda_fwd_params *params, size_t *bytes)
{
    FKDA_GUARD;
    fkda_problem problem;
    flash_kda_fwd_params complete;
    if (!bytes) return fkda_fail(FLASH_KDA_INVALID_VALUE, "bytes is null; it must point to a size_t");
    flash_kda_status status = fkda_complete_params(&params, &complete);
    if (status != FLASH_KDA_OK) return status;
    complete = *params;
    complete.struct_size = sizeof complete;
    complete.saved_size = 1; /* asks for a kernel that saves */
    status = fkda_check(&complete, FKDA_FOR_SHAPES, &problem);
    if (status == FLASH_KDA_OK) *bytes = problem.shape.kernel->saved_bytes(&problem.shape);
    return status;
}

flash_kda_status flash_kda_explain(const flash_kda_fwd_params *params, char *text, size_t capacity)
{
    FKDA_GUARD;
    enum { PART = 560 }; /* bytes that each part of the explanation takes at most */
    const fkda_plan *plan;
    char choice[PART], layout[PART];
    if (!text || !capacity)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "text must point to capacity = %zu bytes, at least 1",
                         capacity);
    const flash_kda_status status = plan_shapes(params, &plan);
    if (status != FLASH_KDA_OK) return status;
    fkda_explain_choice(&plan->shape, choice, sizeof choice);
    plan->shape.kernel->explain(plan, layout, sizeof layout);
    snprintf(text, capacity, "%s\n%s\nWorkspace: %zu bytes.\n", choice, layout, plan->workspace_bytes);
    return FLASH_KDA_OK;
}

/* Adds to the last error's sentence what the call has left undefined. Of a call on the CPU that was
 * interrupted the sentence says it already. */
static flash_kda_status also_undefined(flash_kda_status status, const char *what)
{
    char sentence[512];
    if (status == FLASH_KDA_INTERRUPTED) return status;
    snprintf(sentence, sizeof sentence, "%s", flash_kda_last_error());
    return fkda_fail(status, "%s; %s undefined", sentence, what);
}

static flash_kda_status run_and_count(const fkda_problem *p, const fkda_plan *plan)
{
    const fkda_kernel *kernel = plan->shape.kernel;
    flash_kda_status status = kernel->count_nonfinite(p, FKDA_INPUTS);
    if (status == FLASH_KDA_OK) status = kernel->run(p, plan);
    if (status != FLASH_KDA_OK) return also_undefined(status, "nonfinite is");
    status = kernel->count_nonfinite(p, FKDA_OUTPUTS);
    return status == FLASH_KDA_OK ? status : also_undefined(status, "out, final_state and nonfinite are");
}

static flash_kda_status fwd(const flash_kda_fwd_params *params)
{
    FKDA_GUARD;
    fkda_problem problem;
    const fkda_plan *plan;
    flash_kda_status status = fkda_check(params, FKDA_FOR_FWD, &problem);
    if (status == FLASH_KDA_OK) status = fkda_find_plan(&problem.shape, &plan);
    if (status == FLASH_KDA_OK) status = fkda_check_workspace(&problem, plan->workspace_bytes);
    if (status == FLASH_KDA_OK && problem.saved)
        status = fkda_check_saved_size(&problem, problem.shape.kernel->saved_bytes(&problem.shape));
    if (status != FLASH_KDA_OK) return status;
    return problem.nonfinite ? run_and_count(&problem, plan) : plan->shape.kernel->run(&problem, plan);
}

static flash_kda_status reference(const flash_kda_fwd_params *params, double *out64, double *state64,
                                  double *checkpoints64)
{
    FKDA_GUARD;
    fkda_problem problem;
    if (!out64)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "out64 is null; it must point to [B, T, HV, V] doubles");
    const flash_kda_status status = fkda_check(params, FKDA_FOR_REFERENCE, &problem);
    return status == FLASH_KDA_OK ? fkda_cpu_reference(&problem, out64, state64, checkpoints64) : status;
}

/* Both functions are cancellation points, after all work is done and no lock, thread or memory of the call is
 * left. Otherwise a thread that does nothing but call them could never be cancelled. */
flash_kda_status flash_kda_fwd(const flash_kda_fwd_params *params)
{
    const flash_kda_status status = fwd(params);
    pthread_testcancel();
    return status;
}

flash_kda_status flash_kda_reference(const flash_kda_fwd_params *params, double *out64, double *state64,
                                     double *checkpoints64)
{
    const flash_kda_status status = reference(params, out64, state64, checkpoints64);
    pthread_testcancel();
    return status;
}
