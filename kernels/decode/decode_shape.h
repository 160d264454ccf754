/* Sizes that the decode kernels are compiled for and that the host launches them with. */
#ifndef FKDA_DECODE_SHAPE_H
#define FKDA_DECODE_SHAPE_H

#define FKDA_DECODE_MAX_TOKENS 16 /* of a sequence; flash_kda.h has the same number */
#define FKDA_DECODE_THREADS 256   /* of a CTA that has all rows of V; at most */
#define FKDA_DECODE_CTAS_PER_SM 2 /* of that many threads, for which __launch_bounds__ leaves registers */

/* Dynamic shared memory. A vector has 128 fp32. A call has T tokens of a sequence, rounded up to an even
 * number: the chunk kernels compute two tokens at a time. */
#define FKDA_DECODE_VECTOR_BYTES 512
#define FKDA_DECODE_SMALL_BYTES 3072    /* struct Small in prepare.cuh */
#define FKDA_DECODE_VECTORS_OF_A_STEP 4 /* decay, key, query, value */
#define FKDA_DECODE_VECTORS_OF_A_CHUNK 7
#define FKDA_DECODE_APPLY_BYTES (FKDA_DECODE_SMALL_BYTES + FKDA_DECODE_VECTOR_BYTES * 33) /* struct ToApply */
#define FKDA_DECODE_EVEN(tokens) (((tokens) + 1) / 2 * 2)
#define FKDA_DECODE_SHARED_BYTES(vectors, tokens)                                                            \
    (FKDA_DECODE_SMALL_BYTES + FKDA_DECODE_VECTOR_BYTES * (vectors)*FKDA_DECODE_EVEN(tokens))

#endif
