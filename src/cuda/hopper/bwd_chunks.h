/* The backward pass of the kernel "hopper" by chunks. */
#ifndef FKDA_HOPPER_BWD_CHUNKS_H
#define FKDA_HOPPER_BWD_CHUNKS_H

#include "../bwd_args_of.h"

/* Whether the kernels for chunks know the call's options. */
bool fkda_hopper_bwd_knows_chunks(const fkda_bwd_problem *problem);

size_t fkda_hopper_bwd_chunks_workspace(const fkda_bwd_problem *problem);

/* Launches everything. The device's context must be current. `reduce` is a function of `sums`. */
flash_kda_status fkda_hopper_bwd_by_chunks(const fkda_driver *driver, const fkda_bwd_problem *problem,
                                           fkda_module *sums, int reduce);

/* The end of a part of the workspace that begins at *end. Returns the beginning. */
static inline int64_t fkda_take_part(int64_t *end, int64_t bytes)
{
    enum { ALIGNMENT = 256 };
    const int64_t begin = *end;
    *end = (begin + bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return begin;
}

#endif
