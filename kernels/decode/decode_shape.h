/* Sizes that the decode kernels are compiled for and that the host launches them with. */
#ifndef FKDA_DECODE_SHAPE_H
#define FKDA_DECODE_SHAPE_H

#define FKDA_DECODE_MAX_TOKENS 16 /* of a sequence; flash_kda.h has the same number */
#define FKDA_DECODE_THREADS 256   /* of a CTA that has all rows of V; at most */
#define FKDA_DECODE_CTAS_PER_SM 2 /* of that many threads, for which __launch_bounds__ leaves registers */

/* Dynamic shared memory. A vector has 128 fp32. */
#define FKDA_DECODE_VECTOR_BYTES 512
#define FKDA_DECODE_SMALL_BYTES 3072    /* struct Small in prepare.cuh */
#define FKDA_DECODE_VECTORS_OF_A_STEP 4 /* decay, key, query, value */
#define FKDA_DECODE_VECTORS_OF_A_CHUNK 8
#define FKDA_DECODE_VECTORS_FOR_LAST_STATE 2                                              /* besides these */
#define FKDA_DECODE_APPLY_BYTES (FKDA_DECODE_SMALL_BYTES + FKDA_DECODE_VECTOR_BYTES * 33) /* struct ToApply */
#define FKDA_DECODE_STEPS_BYTES(tokens)                                                                      \
    (FKDA_DECODE_SMALL_BYTES + FKDA_DECODE_VECTOR_BYTES * FKDA_DECODE_VECTORS_OF_A_STEP * (tokens))

/* The chunk kernels compute eight tokens at a time. */
#define FKDA_DECODE_EIGHTS(tokens) (((tokens) + 7) / 8 * 8)
#define FKDA_DECODE_CHUNK_BYTES(tokens, writes_last)                                                         \
    (FKDA_DECODE_SMALL_BYTES +                                                                               \
     FKDA_DECODE_VECTOR_BYTES * FKDA_DECODE_EIGHTS(tokens) *                                                 \
         (FKDA_DECODE_VECTORS_OF_A_CHUNK + ((writes_last) ? FKDA_DECODE_VECTORS_FOR_LAST_STATE : 0)))

#endif
