/* The heads of a backward pass in waves, so that all of them share the workspace of a few. */
#ifndef FKDA_BWD_WAVES_H
#define FKDA_BWD_WAVES_H

#include "../bwd_problem.h"
#include "../errors.h"

/* A kernel's backward pass over all heads of a problem at once. The problem's limit of the workspace is that
 * of the whole call: a kernel that can may compute sequences in stretches to keep it. */
typedef struct fkda_bwd_kernel {
    size_t (*workspace)(const fkda_bwd_problem *problem, int sms);
    flash_kda_status (*run)(const fkda_bwd_problem *problem, int sms);
} fkda_bwd_kernel;

/* The bytes of workspace that a wave needs: at most the problem's limit, unless a single head of q and k
 * needs more. */
size_t fkda_bwd_waves_workspace(const fkda_bwd_kernel *kernel, const fkda_bwd_problem *problem);

/* Enqueues the waves one after the other on the problem's stream. */
flash_kda_status fkda_run_bwd_waves(const fkda_bwd_kernel *kernel, const fkda_bwd_problem *problem);

#endif
