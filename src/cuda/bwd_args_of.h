/* What the backward passes of the kernels "portable" and "hopper" share on the host: the arguments of a
 * problem, how sequences are cut, and the launches. */
#ifndef FKDA_BWD_ARGS_OF_H
#define FKDA_BWD_ARGS_OF_H

#include "../../kernels/backward/bwd_args.h"
#include "../bwd_problem.h"
#include "driver.h"
#include "modules.h"

/* How many segments there are. */
typedef struct fkda_bwd_segments {
    int64_t row_slots, slots; /* of a row without cu_seqlens, and of all sequences */
    bool cuts;                /* whether a sequence may have more than one */
} fkda_bwd_segments;

fkda_bwd_segments fkda_cut_for_bwd(const fkda_shape *shape, int segment);

/* The arguments but for segments and workspace. */
fkda_bwd_args fkda_bwd_args_of(const fkda_bwd_problem *problem);

typedef struct fkda_bwd_launch {
    int kernel; /* of the module; it is left out if it has no CTAs */
    int64_t ctas;
    unsigned threads, shared_bytes;
} fkda_bwd_launch;

/* Launches kernels of a module one after the other, with one argument struct. */
flash_kda_status fkda_launch_bwd(const fkda_driver *driver, fkda_module *module,
                                 const fkda_bwd_problem *problem, const fkda_bwd_launch *launches,
                                 size_t count, void *args);

/* Launches the kernel for sums over heads and segments. */
flash_kda_status fkda_launch_bwd_sums(const fkda_driver *driver, const fkda_bwd_problem *problem,
                                      fkda_bwd_args *args);

#endif
