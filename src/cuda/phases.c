/* More heads than pairs of multiprocessors, fewer than multiprocessors: blocks that carry a head each would leave some of those
 * idle all the time. So heads take turns: in each of a few phases one group of them is shared by pairs of blocks, which go
 * through a head faster, beside all others in blocks of their own; then every head has come as far, and no
 * multiprocessor was idle. In between states are in the workspace. */
#include <stdio.h>

#include "cuda.h"
#include "hopper.h"

/* Clocks that a phase takes to begin and to end, measured on an H100 (docs/log.md). */
enum {
    PHASE = 33000,
    MOST_PHASES = 4,
    CHUNK = 16, /* tokens */
    /* How far heads come in the same time, beside each other: shared by pairs, and alone in a block. */
    PAIRED = 1990,
    SINGLE = 1200,
};

/* Sequences must be known to have one length, and results must not depend on the batch if that is asked for. */
fkda_phase_plan fkda_plan_phases(const fkda_problem *p, int multiprocessors)
{
    const int64_t tasks = p->sequences * p->heads, spare = multiprocessors - tasks;
    const fkda_phase_plan none = {0};
    if (p->sequences != p->batch || p->batch_invariant || spare <= 0 ||
        tasks <= fkda_hopper_places(64, multiprocessors))
        return none;
    const int64_t groups = (tasks + spare - 1) / spare;
    const int64_t chunks = p->tokens / CHUNK;
    /* As many chunks in a phase as both kinds of blocks need the same time for. */
    const double phase =
        (double)chunks / (1.0 / FKDA_HOPPER_CHUNK_64 + (double)(groups - 1) / FKDA_HOPPER_CHUNK_128);
    if (groups > MOST_PHASES ||
        (double)groups * (phase + PHASE) > 0.97 * (double)chunks * FKDA_HOPPER_CHUNK_128)
        return none;
    return (fkda_phase_plan){groups, (tasks + groups - 1) / groups};
}

size_t fkda_phases_workspace_size(const fkda_problem *p)
{
    return (size_t)(p->sequences * p->heads) * FKDA_DIM * FKDA_DIM * sizeof(float);
}

flash_kda_status fkda_run_phases(const fkda_driver *driver, const fkda_problem *p,
                                 const fkda_phase_plan *plan)
{
    const CUfunction *kernels = fkda_hopper_fwd_module.functions[p->device.index];
    const int64_t tasks = p->sequences * p->heads;
    fkda_hopper_fwd_args args;
    flash_kda_status status = fkda_hopper_arguments(driver, p, &args);
    args.phases = (fkda_phases){
        .states = p->workspace,
        .groups = (int)plan->groups,
        .group_tasks = (int)plan->group_tasks,
        .paired = PAIRED,
        .single = SINGLE,
    };
    for (int phase = 0; phase < plan->groups && status == FLASH_KDA_OK; phase++) {
        const int64_t left = tasks - phase * plan->group_tasks;
        const int64_t paired = left < plan->group_tasks ? left : plan->group_tasks;
        args.phases.phase = phase;
        status = fkda_hopper_launch(driver, p, &args, kernels[1], (int)(2 * paired), FKDA_HOPPER_THREADS(64));
        if (status == FLASH_KDA_OK)
            status = fkda_hopper_launch_beside(driver, p, &args, kernels[0], (int)(tasks - paired),
                                               FKDA_HOPPER_THREADS(128));
    }
    return status;
}

void fkda_explain_phases(const fkda_problem *p, const fkda_phase_plan *plan, char *text, size_t size)
{
    const int64_t tasks = p->sequences * p->heads;
    snprintf(text, size,
             "%lld phases: in each, %lld heads of sequences are shared by two blocks, and the other %lld "
             "have a block each.",
             (long long)plan->groups, (long long)plan->group_tasks, (long long)(tasks - plan->group_tasks));
}
