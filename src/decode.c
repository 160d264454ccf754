/* The public calls about decode: check the arguments, run the kernel. */
#include <pthread.h>

#include "check_decode.h"
#include "cpu/cpu.h"
#include "errors.h"
#include "guard.h"
#include "kernel.h"

static flash_kda_status decode(const flash_kda_decode_params *params)
{
    FKDA_GUARD;
    fkda_decode_problem problem;
    const flash_kda_status status = fkda_check_decode(params, false, &problem);
    return status == FLASH_KDA_OK ? problem.kernel->decode(&problem) : status;
}

static flash_kda_status apply(const flash_kda_apply_params *params)
{
    FKDA_GUARD;
    fkda_apply_problem problem;
    const flash_kda_status status = fkda_check_apply(params, &problem);
    return status == FLASH_KDA_OK ? problem.kernel->apply(&problem) : status;
}

static flash_kda_status reference(const flash_kda_decode_params *params, double *out64, double *states64)
{
    FKDA_GUARD;
    fkda_decode_problem problem;
    if (!out64)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "out64 is null; it must point to [N, T, HV, V] doubles");
    const flash_kda_status status = fkda_check_decode(params, true, &problem);
    return status == FLASH_KDA_OK ? fkda_cpu_decode_reference(&problem, out64, states64) : status;
}

flash_kda_status flash_kda_check_decode(const flash_kda_decode_params *params)
{
    FKDA_GUARD;
    fkda_decode_problem problem;
    return fkda_check_decode_shapes(params, &problem);
}

flash_kda_status flash_kda_check_apply(const flash_kda_apply_params *params)
{
    FKDA_GUARD;
    fkda_apply_problem problem;
    return fkda_check_apply_shapes(params, &problem);
}

/* The other functions are cancellation points, after all work is done and no lock, thread or memory of the
 * call is left (fwd.c). */
flash_kda_status flash_kda_decode(const flash_kda_decode_params *params)
{
    const flash_kda_status status = decode(params);
    pthread_testcancel();
    return status;
}

flash_kda_status flash_kda_apply(const flash_kda_apply_params *params)
{
    const flash_kda_status status = apply(params);
    pthread_testcancel();
    return status;
}

flash_kda_status flash_kda_decode_reference(const flash_kda_decode_params *params, double *out64,
                                            double *states64)
{
    const flash_kda_status status = reference(params, out64, states64);
    pthread_testcancel();
    return status;
}
