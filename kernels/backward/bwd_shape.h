/* Sizes that the kernels of the backward pass are compiled for and that the host launches them with. */
#ifndef FKDA_BWD_SHAPE_H
#define FKDA_BWD_SHAPE_H

#define FKDA_BWD_THREADS 256

/* Dynamic shared memory of a CTA: sizeof(Shared) in shared.cuh, which asserts it. */
#define FKDA_BWD_SHARED_BYTES 100976

/* Numbers of a chunk's record: the state before it, and two numbers for each value. */
#define FKDA_BWD_RECORD (128 * 128 + 2 * 16 * 128)

/* Threads of a CTA of the reduction, and its dynamic shared memory. */
#define FKDA_BWD_REDUCE_THREADS 1024
#define FKDA_BWD_REDUCE_SHARED_BYTES 32768

#endif
