/* What the two ways to run the Hopper kernels share: sequence by sequence (hopper.c), or cut into segments (segments.c). */
#ifndef FKDA_HOPPER_H
#define FKDA_HOPPER_H

#include "../../kernels/hopper/fwd_args.h"
#include "../../kernels/hopper/fwd_shape.h"
#include "modules.h"

/* kernels/hopper/fwd.cu: the forward pass for blocks of 128 and of 64 rows of V. */
extern fkda_module fkda_hopper_fwd_module;

/* How so many heads of sequences, or of segments, are dealt out: from their number and the device alone. */
typedef struct fkda_hopper_layout {
    int rows; /* of V that a block carries: 128, or 64 if every head can then have two multiprocessors */
    int64_t pieces; /* of work: a head, or half of one */
    int blocks;     /* at most one to a multiprocessor; they stay until the pieces are done */
} fkda_hopper_layout;
fkda_hopper_layout fkda_hopper_lay_out(int64_t heads, int multiprocessors);

/* What every kernel gets, but for the counter and the cut. */
flash_kda_status fkda_hopper_arguments(const fkda_driver *driver, const fkda_problem *p,
                                       fkda_hopper_fwd_args *args);

flash_kda_status fkda_hopper_launch(const fkda_driver *driver, const fkda_problem *p,
                                    fkda_hopper_fwd_args *args, CUfunction kernel, int blocks, int threads);

/* Launches the one of a module's first two kernels that is for the layout's rows. */
flash_kda_status fkda_hopper_launch_rows(const fkda_driver *driver, const fkda_problem *p,
                                         fkda_hopper_fwd_args *args, const fkda_module *module,
                                         const fkda_hopper_layout *layout);

#endif
