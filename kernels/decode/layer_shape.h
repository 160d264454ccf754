/* Sizes that the kernels of decode_layer are compiled for and that the host launches them with. */
#ifndef FKDA_LAYER_SHAPE_H
#define FKDA_LAYER_SHAPE_H

#include "decode_shape.h"

#define FKDA_LAYER_THREADS 256 /* of a CTA, which has all rows of V of a head */
#define FKDA_LAYER_CTAS_PER_SM 2

/* Dynamic shared memory. */
#define FKDA_LAYER_SMALL_BYTES 128 /* struct LayerSmall in layer_prepare.cuh */
#define FKDA_LAYER_VECTORS 6       /* of a token: decay, key, query, value, output, factor of the output */
#define FKDA_LAYER_SHARED_BYTES(tokens)                                                                      \
    (FKDA_LAYER_SMALL_BYTES + FKDA_LAYER_VECTORS * FKDA_DECODE_VECTOR_BYTES * (tokens))

#endif
