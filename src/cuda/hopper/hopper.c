/* The kernel "hopper": what kernels.c calls. */
#include "../../errors.h"
#include "../../kernel.h"
#include "../cuda.h"
#include "../driver.h"
#include "border_states.h"
#include "launch.h"

flash_kda_status fkda_hopper_make_plan(fkda_plan *plan)
{
    int sms;
    const flash_kda_status status = fkda_cuda_sms(plan->shape.device.index, &sms);
    if (status != FLASH_KDA_OK) return status;
    if (sms < FKDA_HOPPER_PAIR_CTAS)
        return fkda_fail(FLASH_KDA_UNAVAILABLE,
                         "kernel is \"%s\", which needs at least %d SMs; CUDA device %d has %d",
                         plan->shape.kernel->info.name, FKDA_HOPPER_PAIR_CTAS, plan->shape.device.index, sms);
    plan->hopper = fkda_hopper_plan_for(&plan->shape, sms);
    plan->workspace_bytes = plan->hopper.memory.bytes;
    return FLASH_KDA_OK;
}

flash_kda_status fkda_hopper_run(const fkda_problem *problem, const fkda_plan *plan)
{
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(problem->shape.device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    const int64_t every = problem->saved ? fkda_hopper_saved_interval(&problem->shape) : 0;
    if (every) {
        const fkda_border_states states = fkda_border_states_in(problem->saved, &problem->shape, every);
        const fkda_problem saving = fkda_with_border_states(problem, &states);
        status = fkda_hopper_launch(driver, &saving, &plan->hopper);
    } else {
        status = fkda_hopper_launch(driver, problem, &plan->hopper);
    }
    return fkda_leave_device(driver, status);
}
