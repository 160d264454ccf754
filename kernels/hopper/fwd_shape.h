/* The Hopper forward kernel's shape, for its launch and its own code. */
#ifndef FKDA_HOPPER_FWD_SHAPE_H
#define FKDA_HOPPER_FWD_SHAPE_H

/* Warps that prepare, two to a chunk, and with the one that loads and the one that solves. */
#define FKDA_HOPPER_PREPARE_WARPS 6
#define FKDA_HOPPER_AHEAD_WARPS 8
/* Of a block that carries `rows` of V, 64 or 128: a warpgroup for 64 rows. */
#define FKDA_HOPPER_THREADS(rows) (2 * (rows) + 32 * FKDA_HOPPER_AHEAD_WARPS)

/* Blocks of a cluster that share the preparation of a head: the halves of its rows or, in the first pass over segments, a segment's
 * map and state. */
#define FKDA_HOPPER_SHARERS(rows, first_pass) ((rows) == 64 || (first_pass) ? 2 : 1)

#define FKDA_HOPPER_MOST_ORDERED 1024 /* sequences of different length that are taken longest first */

#define FKDA_PLAN_THREADS 512
#define FKDA_JOIN_THREADS 256
#define FKDA_JOIN_ROWS 16 /* of V that a block carries through the maps of a sequence */

/* All that a block can have: at least sizeof(Shared<rows>) in shared.cuh, which asserts it. */
#define FKDA_HOPPER_SHARED_BYTES 232448

#endif
