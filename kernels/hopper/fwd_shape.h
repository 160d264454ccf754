/* The Hopper forward kernels' shape, for their launch and their own code. */
#ifndef FKDA_HOPPER_FWD_SHAPE_H
#define FKDA_HOPPER_FWD_SHAPE_H

/* Tokens of a chunk: in blocks that have a head to themselves, and in pairs of blocks that share one. A cluster of blocks is a pair. */
#define FKDA_HOPPER_CHUNK_ALONE 16
#define FKDA_HOPPER_CHUNK_PAIRED 32
#define FKDA_HOPPER_PAIR 2

/* What such a chunk of a head takes, in clocks (fitted to times on an H100: BENCHMARK_H100.md). */
enum { FKDA_HOPPER_CLOCKS_ALONE = 1990, FKDA_HOPPER_CLOCKS_PAIRED = 2100 };

/* Threads of a block: four warps to each quarter of a multiprocessor, which get the same registers each. */
#define FKDA_HOPPER_THREADS 512

#define FKDA_PLAN_THREADS 512
#define FKDA_JOIN_ROWS 16                      /* of V that a block carries through the maps of a sequence */
#define FKDA_JOIN_THREADS (8 * FKDA_JOIN_ROWS) /* that compute; a warp more brings the maps */
#define FKDA_JOIN_BLOCK (FKDA_JOIN_THREADS + 32)

/* All that a block can have: at least sizeof(Shared<Kind>) in shared.cuh, which asserts it. */
#define FKDA_HOPPER_SHARED_BYTES 232448

#endif
