/* Launches the Hopper kernels as a plan says. */
#ifndef FKDA_HOPPER_LAUNCH_H
#define FKDA_HOPPER_LAUNCH_H

#include "../../../kernels/hopper/fwd_args.h"
#include "../driver.h"
#include "plan.h"

/* Enqueues everything that the plan asks for on the problem's stream. The device's context must be
 * current. */
flash_kda_status fkda_hopper_launch(const fkda_driver *driver, const fkda_problem *problem,
                                    const fkda_hopper_plan *plan);

/* Makes the TMA descriptor of a tensor as fkda_hopper_fwd_args has it, in boxes of `chunk` tokens. */
CUresult fkda_describe_tensor(const fkda_driver *driver, fkda_tma_descriptor *descriptor,
                              const fkda_token_view *tensor, const fkda_shape *shape, int chunk);

#endif
