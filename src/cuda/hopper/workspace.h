/* Where things are in the workspace of the kernel "hopper". */
#ifndef FKDA_HOPPER_WORKSPACE_H
#define FKDA_HOPPER_WORKSPACE_H

#include "plan.h"

/* Lays out the workspace of a plan for whole sequences. */
fkda_hopper_memory fkda_hopper_lay_out_whole(const fkda_shape *shape, const fkda_hopper_plan *plan);

/* Lays out the workspace of a plan that cuts sequences. */
fkda_hopper_memory fkda_hopper_lay_out(const fkda_shape *shape, const fkda_hopper_plan *plan);

/* The handoff area that begins at `memory`: flags, then states, for as many workers as there are SMs. */
fkda_handoff fkda_hopper_handoff(void *memory, int sms);
/* The number of flags of a handoff area. */
int64_t fkda_hopper_handoff_flags(int sms);

/* The plan's memory as the kernels take it. */
fkda_cut fkda_hopper_cut(const fkda_problem *problem, const fkda_hopper_plan *plan);

#endif
