/* How far a result is from the truth. */
#ifndef SUPPORT_COMPARE_H
#define SUPPORT_COMPARE_H

#include "util.h"

/* sqrt(sum((got - truth)^2) / sum(truth^2)), summed in double. The dtype is that of got, bf16 or f32. The
 * result is infinity if got has a NaN or an infinity anywhere. If the truth is 0 throughout, the result is 0
 * if got is 0 throughout, and else infinity. */
double relative_rms(const double *truth, const void *got, flash_kda_dtype dtype, int64_t count);

/* The index of the first element whose bits differ; -1 if none. */
int64_t first_difference(const void *a, const void *b, size_t element_size, int64_t count);

#endif
