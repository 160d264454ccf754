/* The public calls about decode_layer: check the arguments, run the kernel. */
#include <pthread.h>

#include "check_decode_layer.h"
#include "cpu/cpu.h"
#include "errors.h"
#include "guard.h"
#include "kernel.h"

static flash_kda_status decode_layer(const flash_kda_decode_layer_params *params)
{
    FKDA_GUARD;
    fkda_decode_layer_problem problem;
    const flash_kda_status status = fkda_check_decode_layer(params, false, &problem);
    return status == FLASH_KDA_OK ? problem.decode.kernel->decode_layer(&problem) : status;
}

static flash_kda_status reference(const flash_kda_decode_layer_params *params, double *out64,
                                  double *states64)
{
    FKDA_GUARD;
    fkda_decode_layer_problem problem;
    if (!out64)
        return fkda_fail(FLASH_KDA_INVALID_VALUE, "out64 is null; it must point to [N, T, H, V] doubles");
    const flash_kda_status status = fkda_check_decode_layer(params, true, &problem);
    return status == FLASH_KDA_OK ? fkda_cpu_decode_layer_reference(&problem, out64, states64) : status;
}

flash_kda_status flash_kda_check_decode_layer(const flash_kda_decode_layer_params *params)
{
    FKDA_GUARD;
    fkda_decode_layer_problem problem;
    return fkda_check_decode_layer_shapes(params, &problem);
}

/* The other functions are cancellation points, after all work is done and no lock, thread or memory of the
 * call is left (fwd.c). */
flash_kda_status flash_kda_decode_layer(const flash_kda_decode_layer_params *params)
{
    const flash_kda_status status = decode_layer(params);
    pthread_testcancel();
    return status;
}

flash_kda_status flash_kda_decode_layer_reference(const flash_kda_decode_layer_params *params, double *out64,
                                                  double *states64)
{
    const flash_kda_status status = reference(params, out64, states64);
    pthread_testcancel();
    return status;
}
