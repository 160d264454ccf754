/* The Hopper forward kernel's shape, for its launch and its own code. */
#ifndef FKDA_HOPPER_FWD_SHAPE_H
#define FKDA_HOPPER_FWD_SHAPE_H

#define FKDA_HOPPER_PREPARE_THREADS 256 /* groups of four warps */

/* Threads of a block that carries `rows` of V: a warpgroup for 64 rows. */
#define FKDA_HOPPER_THREADS(rows) (FKDA_HOPPER_PREPARE_THREADS + 2 * (rows))

/* sizeof(Shared) in shared.cuh, which asserts it. */
#define FKDA_HOPPER_SHARED_BYTES 88128

#endif
