/* What the ways to run the Hopper kernels share: whole sequences (hopper.c), in phases (phases.c), or cut into segments (segments.c). */
#ifndef FKDA_HOPPER_H
#define FKDA_HOPPER_H

#include "../../kernels/hopper/fwd_args.h"
#include "../../kernels/hopper/fwd_shape.h"
#include "modules.h"

/* kernels/hopper/fwd.cu: the forward pass for blocks of 128 and of 64 rows of V. */
extern fkda_module fkda_hopper_fwd_module;

/* How so many heads of sequences, or of segments, are dealt out: from their number and the device alone. */
typedef struct fkda_hopper_layout {
    int rows; /* of V that a block carries: 128, or 64 if two blocks share a head */
    int64_t heads;
    int blocks; /* at most one to a multiprocessor; they stay until the heads are done */
} fkda_hopper_layout;
fkda_hopper_layout fkda_hopper_lay_out(int64_t heads, int rows, int multiprocessors);

/* Heads of a sequence or a segment that are under way at once, one to a block or to two that share it. */
int64_t fkda_hopper_places(int rows, int multiprocessors);

/* What a chunk of 16 tokens of a head takes, in clocks (fitted to times on an H100: BENCHMARK_H100.md). */
enum { FKDA_HOPPER_CHUNK_128 = 1990, FKDA_HOPPER_CHUNK_64 = 1160 };

/* What every kernel gets, but for the counter and the cut. */
flash_kda_status fkda_hopper_arguments(const fkda_driver *driver, const fkda_problem *p,
                                       fkda_hopper_fwd_args *args);

flash_kda_status fkda_hopper_launch(const fkda_driver *driver, const fkda_problem *p,
                                    fkda_hopper_fwd_args *args, CUfunction kernel, int blocks, int threads);

/* The same, beside the kernel before as soon as that lets it. */
flash_kda_status fkda_hopper_launch_beside(const fkda_driver *driver, const fkda_problem *p,
                                           fkda_hopper_fwd_args *args, CUfunction kernel, int blocks,
                                           int threads);

/* Launches the forward kernel that is for the layout's rows. */
flash_kda_status fkda_hopper_launch_fwd(const fkda_driver *driver, const fkda_problem *p,
                                        fkda_hopper_fwd_args *args, const fkda_hopper_layout *layout);

/* phases.c: heads by turns in pairs of blocks and in blocks of their own. groups: 0 where that does not pay. */
typedef struct fkda_phase_plan {
    int64_t groups, group_tasks;
} fkda_phase_plan;
fkda_phase_plan fkda_plan_phases(const fkda_problem *p, int multiprocessors);
size_t fkda_phases_workspace_size(const fkda_problem *p);
flash_kda_status fkda_run_phases(const fkda_driver *driver, const fkda_problem *p,
                                 const fkda_phase_plan *plan);
void fkda_explain_phases(const fkda_problem *p, const fkda_phase_plan *plan, char *text, size_t size);

#endif
