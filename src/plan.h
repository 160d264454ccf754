/*
 * Plans: what a call runs, decided once.
 *
 * A plan is a plain value that depends on the shape alone (problem.h). The size call, the explanation, the
 * launch and the tests read the same plan, so they cannot disagree. Plans are kept in a small cache, so that
 * a repeated shape costs a lookup: making a plan for the Hopper kernels takes tens of microseconds, which is
 * longer than launching them.
 */
#ifndef FKDA_PLAN_H
#define FKDA_PLAN_H

#include "cpu/plan.h"
#include "cuda/hopper/plan.h"
#include "cuda/portable/plan.h"
#include "problem.h"

typedef struct fkda_plan {
    fkda_shape shape;
    size_t workspace_bytes;
    union { /* the member that belongs to the shape's kernel */
        fkda_cpu_plan cpu;
        fkda_portable_plan portable;
        fkda_hopper_plan hopper;
    };
} fkda_plan;

/* The plan of a shape, from the calling thread's cache or made anew. The plan stays valid until the thread's
 * next call of this function. */
flash_kda_status fkda_find_plan(const fkda_shape *shape, const fkda_plan **plan);

#endif
