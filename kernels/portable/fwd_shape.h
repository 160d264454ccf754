/* The portable forward kernel's shape, for its launch and its own code. */
#ifndef FKDA_PORTABLE_FWD_SHAPE_H
#define FKDA_PORTABLE_FWD_SHAPE_H

#define FKDA_PORTABLE_PREPARE_THREADS 256 /* two groups of four warps */
#define FKDA_PORTABLE_ROWS_PER_WARP 16    /* of V, in the recurrence */

/* Threads of a block that carries `rows` of V. */
#define FKDA_PORTABLE_THREADS(rows)                                                                          \
    (FKDA_PORTABLE_PREPARE_THREADS + 32 * (rows) / FKDA_PORTABLE_ROWS_PER_WARP)

/* sizeof(Shared) in shared.cuh, which asserts it. Every GPU from sm_80 on has 99 KB = 101376 bytes. */
#define FKDA_PORTABLE_SHARED_BYTES 100512

#endif
