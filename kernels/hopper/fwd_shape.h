/* The Hopper forward kernel's shape, for its launch and its own code. */
#ifndef FKDA_HOPPER_FWD_SHAPE_H
#define FKDA_HOPPER_FWD_SHAPE_H

#define FKDA_HOPPER_PREPARE_WARPS 6
#define FKDA_HOPPER_HELPER_WARPS 2 /* one loads, one solves */

/* Threads of a block that carries `rows` of V: a warpgroup for 64 rows, and the warps that work ahead of it. */
#define FKDA_HOPPER_THREADS(rows) (2 * (rows) + 32 * (FKDA_HOPPER_PREPARE_WARPS + FKDA_HOPPER_HELPER_WARPS))

#define FKDA_HOPPER_MOST_ORDERED 1024 /* sequences of different length that are taken longest first */

/* sizeof(Shared) in shared.cuh, which asserts it. */
#define FKDA_HOPPER_SHARED_BYTES 230800

#endif
