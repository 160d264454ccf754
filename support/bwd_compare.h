/* How far gradients are from the truth, and how far they may be. */
#ifndef SUPPORT_BWD_COMPARE_H
#define SUPPORT_BWD_COMPARE_H

#include "util.h"

/* Gradients whose RMS is far below this are as good as 0: some of their factors are at the end of fp32. */
#define GRADIENT_FLOOR 1e-28

/* Relative RMS that a device's gradients may have. */
typedef struct gradient_bars {
    double f32, bf16;
    double bf16_of_few;     /* of few elements in bf16: their rounding alone may be as large */
    double beyond_rounding; /* of what gradients in bf16 are off beyond their own rounding */
    double cancelling;      /* dA_log of a head may be a millionth of its terms, which cancel. It is then held
                               to this part of them. */
} gradient_bars;

gradient_bars gradient_bars_of(flash_kda_device device);

/* The bar of a gradient of `count` elements that is none of dA_log; `narrow`: in bf16. */
double gradient_bar(const gradient_bars *bars, bool narrow, int64_t count);

/* The relative RMS of a gradient; `beyond_rounding` without the largest error that rounding to bf16 makes.
 * The truth counts as no smaller than an RMS of `least`. */
double gradient_error(const double *truth, const void *got, bool narrow, int64_t count, bool beyond_rounding,
                      double least);

/* What the terms of dA_log are made of. */
typedef struct rate_terms {
    const double *g;      /* [rows, heads, DIM] */
    const float *dt_bias; /* [heads, DIM] or NULL */
    int64_t rows, heads;
    flash_kda_gate gate;
} rate_terms;

/* The relative RMS of dA_log, held to a part of its terms at least. dg and dA_log are the truth. */
double rate_error(const rate_terms *of, const double *dg, const double *dA_log, const float *got,
                  double cancelling);

#endif
