/* How the CPU backend divides a call among threads. */
#ifndef FKDA_CPU_PLAN_H
#define FKDA_CPU_PLAN_H

#include "variant.h"

typedef struct fkda_cpu_plan {
    const fkda_cpu_variant *variant; /* the instruction set */
    int split;                       /* pieces that the 128 rows of V of a head are divided into: 1, 2 or 4 */
    int threads;
    size_t
        first_rows_at; /* bytes of the workspace before the rows of checkpoints, i64 [N] if there are any */
} fkda_cpu_plan;

#endif
