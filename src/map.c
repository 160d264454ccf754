/* The public calls about pieces of sequences: check the arguments, run the kernel. */
#include <pthread.h>

#include "check_map.h"
#include "cpu/cpu.h"
#include "errors.h"
#include "guard.h"
#include "kernel.h"

flash_kda_status flash_kda_map_workspace_size(const flash_kda_map_params *params, size_t *bytes)
{
    FKDA_GUARD;
    fkda_map_problem problem;
    if (!bytes) return fkda_fail(FLASH_KDA_INVALID_VALUE, "bytes is null; it must point to a size_t");
    const flash_kda_status status = fkda_check_map(params, FKDA_FOR_SHAPES, &problem);
    if (status == FLASH_KDA_OK) *bytes = problem.fwd.shape.kernel->map_workspace(&problem);
    return status;
}

static flash_kda_status map(const flash_kda_map_params *params)
{
    FKDA_GUARD;
    fkda_map_problem problem;
    flash_kda_status status = fkda_check_map(params, FKDA_FOR_FWD, &problem);
    if (status != FLASH_KDA_OK) return status;
    const fkda_kernel *kernel = problem.fwd.shape.kernel;
    status = fkda_check_workspace(&problem.fwd, kernel->map_workspace(&problem));
    return status == FLASH_KDA_OK ? kernel->map(&problem) : status;
}

static flash_kda_status reference(const flash_kda_map_params *params, double *map64, double *state64)
{
    FKDA_GUARD;
    fkda_map_problem problem;
    if (!map64 && !state64)
        return fkda_fail(FLASH_KDA_INVALID_VALUE,
                         "map64 and state64 are null; at least one of them must point to doubles");
    const flash_kda_status status = fkda_check_map(params, FKDA_FOR_REFERENCE, &problem);
    return status == FLASH_KDA_OK ? fkda_cpu_map_reference(&problem, map64, state64) : status;
}

static flash_kda_status join(const flash_kda_join_params *params)
{
    FKDA_GUARD;
    fkda_join_problem problem;
    const flash_kda_status status = fkda_check_join(params, true, &problem);
    return status == FLASH_KDA_OK ? problem.kernel->join(&problem) : status;
}

flash_kda_status flash_kda_check_join(const flash_kda_join_params *params)
{
    FKDA_GUARD;
    fkda_join_problem problem;
    return fkda_check_join(params, false, &problem);
}

/* These functions are cancellation points, after all work is done and no lock, thread or memory of the call
 * is left (fwd.c). */
flash_kda_status flash_kda_map(const flash_kda_map_params *params)
{
    const flash_kda_status status = map(params);
    pthread_testcancel();
    return status;
}

flash_kda_status flash_kda_map_reference(const flash_kda_map_params *params, double *map64, double *state64)
{
    const flash_kda_status status = reference(params, map64, state64);
    pthread_testcancel();
    return status;
}

flash_kda_status flash_kda_join(const flash_kda_join_params *params)
{
    const flash_kda_status status = join(params);
    pthread_testcancel();
    return status;
}
