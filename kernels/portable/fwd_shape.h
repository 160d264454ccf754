/* Sizes that the portable forward kernel is compiled for and that the host launches it with. */
#ifndef FKDA_PORTABLE_FWD_SHAPE_H
#define FKDA_PORTABLE_FWD_SHAPE_H

#define FKDA_PORTABLE_PREPARE_THREADS 256 /* two teams of four warps */
#define FKDA_PORTABLE_ROWS_PER_WARP 16    /* of V, in the recurrence */

/* Threads of a CTA that carries `rows` rows of V. */
#define FKDA_PORTABLE_THREADS(rows)                                                                          \
    (FKDA_PORTABLE_PREPARE_THREADS + 32 * (rows) / FKDA_PORTABLE_ROWS_PER_WARP)

/* Dynamic shared memory: sizeof(Shared) in shared.cuh, which asserts it. Every GPU of compute capability 8.0
 * or newer has 99 KB = 101376 bytes. */
#define FKDA_PORTABLE_SHARED_BYTES 100720

#endif
