/* Sizes that the decode kernels are compiled for and that the host launches them with. */
#ifndef FKDA_DECODE_SHAPE_H
#define FKDA_DECODE_SHAPE_H

#define FKDA_DECODE_MAX_TOKENS 16 /* of a sequence; flash_kda.h has the same number */
#define FKDA_DECODE_THREADS 256   /* of a CTA that has all rows of V; at most */
#define FKDA_DECODE_CTAS_PER_SM 2 /* CTAs of 256 threads for which __launch_bounds__ leaves registers */

/* Decode of one token (one.cuh). Lanes that share a row, and threads that have a head. A thread copies 4 x 4
 * fp32 or 8 x 8 bf16 at a time. */
#define FKDA_DECODE_LANES_OF_A_ROW(k_first) ((k_first) ? 4 : 8)
#define FKDA_DECODE_THREADS_OF_ONE(is_bf16, k_first)                                                         \
    (((is_bf16) ? 16 : 32) * FKDA_DECODE_LANES_OF_A_ROW(k_first))
#define FKDA_DECODE_BYTES_OF_ONE(is_bf16) ((is_bf16) ? 32768 : 65536) /* of shared memory, for a head */
/* CTAs of one.cuh, each with 32 KB of states, for which __launch_bounds__ leaves registers on an SM. */
#define FKDA_DECODE_CTAS_OF_ONE(is_bf16) ((is_bf16) ? 5 : 6)

/* Apply (apply.cuh) has the threads of `one`, the part of a state that they have, and the records of `tokens`
 * tokens: decays and keys, and u of the CTA's rows. CTAs of 32 KB of a state leave registers for this many on
 * an SM. */
#define FKDA_DECODE_CTAS_OF_APPLY 5
#define FKDA_DECODE_APPLY_BYTES(is_bf16, tokens, split)                                                      \
    ((FKDA_DECODE_BYTES_OF_ONE(is_bf16) >> (split)) + FKDA_DECODE_VECTOR_BYTES * (1 + 2 * (tokens)) +        \
     (FKDA_DECODE_VECTOR_BYTES >> (split)) * (tokens))

/* Dynamic shared memory of the others. A vector has 128 fp32. */
#define FKDA_DECODE_VECTOR_BYTES 512
#define FKDA_DECODE_SMALL_BYTES 3072    /* struct Small in prepare.cuh */
#define FKDA_DECODE_VECTORS_OF_A_STEP 4 /* decay, key, query, value */
#define FKDA_DECODE_STEPS_BYTES(tokens)                                                                      \
    (FKDA_DECODE_SMALL_BYTES + FKDA_DECODE_VECTOR_BYTES * FKDA_DECODE_VECTORS_OF_A_STEP * (tokens))

/* The chunk kernels have vectors for `tokens` tokens, at most 16, four at a time. `each`: the state after
 * each token is written. CTAS: of 256 threads, for which __launch_bounds__ leaves registers on an SM. */
#define FKDA_DECODE_CTAS_OF_CHUNK(is_bf16) ((is_bf16) ? 3 : 4)
#define FKDA_DECODE_VECTORS_OF_A_CHUNK(each) ((each) ? 6 : 5)
#define FKDA_DECODE_ROOM_OF_A_CHUNK(tokens) (((tokens) + 3) / 4 * 4)
#define FKDA_DECODE_PLACES_OF_A_CHUNK 4 /* for parts of a state, of 8 KB for all rows of V */
#define FKDA_DECODE_CHUNK_BYTES(tokens, each, is_bf16, split)                                                \
    (FKDA_DECODE_SMALL_BYTES +                                                                               \
     FKDA_DECODE_VECTOR_BYTES * FKDA_DECODE_VECTORS_OF_A_CHUNK(each) * FKDA_DECODE_ROOM_OF_A_CHUNK(tokens) + \
     (8192 * ((each) && !(is_bf16) ? 8 : FKDA_DECODE_PLACES_OF_A_CHUNK) >> (split)))

/* A chunk kernel that applies tokens of earlier records has their decays, keys and u, too (past.cuh). */
#define FKDA_DECODE_CTAS_OF_PAST(is_bf16) ((is_bf16) ? 2 : 3)
#define FKDA_DECODE_PAST_BYTES(tokens, split)                                                                \
    (((tokens) + 7) / 8 * 8 * (2 * FKDA_DECODE_VECTOR_BYTES + (FKDA_DECODE_VECTOR_BYTES >> (split))))

/* Of any kernel. */
#define FKDA_DECODE_MOST_SHARED_BYTES                                                                        \
    (FKDA_DECODE_CHUNK_BYTES(FKDA_DECODE_MAX_TOKENS, 0, 0, 0) +                                              \
     FKDA_DECODE_PAST_BYTES(FKDA_DECODE_MAX_TOKENS, 0))

#endif
