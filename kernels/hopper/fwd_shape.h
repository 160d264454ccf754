/* The Hopper forward kernel's shape, for its launch and its own code. */
#ifndef FKDA_HOPPER_FWD_SHAPE_H
#define FKDA_HOPPER_FWD_SHAPE_H

/* For a block that carries `rows` of V, 64 or 128: warps that prepare, two to a chunk, and warps that solve. With the one
 * that loads they fill warpgroups, the last warp perhaps idle. A warpgroup carries 64 rows. */
#define FKDA_HOPPER_PREPARE_WARPS(rows) ((rows) == 128 ? 6 : 8)
#define FKDA_HOPPER_SOLVE_WARPS(rows) ((rows) == 128 ? 1 : 2)
#define FKDA_HOPPER_AHEAD_WARPS(rows) (FKDA_HOPPER_PREPARE_WARPS(rows) + FKDA_HOPPER_SOLVE_WARPS(rows) + 1)
#define FKDA_HOPPER_THREADS(rows) (2 * (rows) + (FKDA_HOPPER_AHEAD_WARPS(rows) + 3) / 4 * 128)

#define FKDA_HOPPER_MOST_ORDERED 1024 /* sequences of different length that are taken longest first */

#define FKDA_PLAN_THREADS 512
#define FKDA_JOIN_THREADS 256
#define FKDA_JOIN_ROWS 16 /* of V that a block carries through the maps of a sequence */

/* All that a block can have: at least sizeof(Shared<rows>) in shared.cuh, which asserts it. */
#define FKDA_HOPPER_SHARED_BYTES 232448

#endif
