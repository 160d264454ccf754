/* Launches the Hopper kernels as a plan says. */
#ifndef FKDA_HOPPER_LAUNCH_H
#define FKDA_HOPPER_LAUNCH_H

#include "../driver.h"
#include "plan.h"

/* Enqueues everything that the plan asks for on the problem's stream. The device's context must be
 * current. */
flash_kda_status fkda_hopper_launch(const fkda_driver *driver, const fkda_problem *problem,
                                    const fkda_hopper_plan *plan);

#endif
