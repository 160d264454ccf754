/* Sizes that the Hopper kernels are compiled for and that the host launches them with. */
#ifndef FKDA_HOPPER_FWD_SHAPE_H
#define FKDA_HOPPER_FWD_SHAPE_H

/* CTAs of a CTA pair: a cluster in which the CTAs share the preparation of a head's chunks. */
#define FKDA_HOPPER_PAIR_CTAS 2

/* Tokens of a chunk: in a solo CTA, which carries all 128 rows of a head's state, and in a CTA pair, whose
 * CTAs carry 64 rows each. Both are macros because the preprocessor compares them. */
#define FKDA_HOPPER_CHUNK_SOLO 16
#define FKDA_HOPPER_CHUNK_PAIR 32

/* Threads of a CTA: 16 warps, four in each quarter of an SM. A quarter has 512 registers a lane to share out
 * among them. */
#define FKDA_HOPPER_THREADS 512

/* Threads of the kernel that lists segments: one CTA. */
#define FKDA_LIST_THREADS 512

/* The join: rows of a state or map that one CTA carries through the maps of a sequence, the threads that
 * multiply, and the threads of a CTA, of which the last warp only fetches maps. */
#define FKDA_JOIN_ROWS 16
#define FKDA_JOIN_THREADS (8 * FKDA_JOIN_ROWS)
#define FKDA_JOIN_CTA_THREADS (FKDA_JOIN_THREADS + 32)

/* Dynamic shared memory of every Hopper kernel, in bytes: all that a CTA can have on compute capability 9.0.
 * The kernels assert that what they place there fits. */
#define FKDA_HOPPER_SHARED_BYTES 232448

#endif
