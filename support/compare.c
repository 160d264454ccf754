#include "compare.h"

#include <math.h>
#include <string.h>

double relative_rms(const double *truth, const void *got, flash_kda_dtype dtype, int64_t count)
{
    double error = 0.0, size = 0.0, largest = 0.0;
    for (int64_t i = 0; i < count; i++) {
        double x =
            dtype == FLASH_KDA_BF16 ? float_from_bf16(((const uint16_t *)got)[i]) : ((const float *)got)[i];
        if (!isfinite(x)) return INFINITY;
        error += (x - truth[i]) * (x - truth[i]);
        size += truth[i] * truth[i];
        if (fabs(x) > largest) largest = fabs(x);
    }
    if (size == 0.0) return largest == 0.0 ? 0.0 : INFINITY;
    double ratio = sqrt(error / size);
    return isnan(ratio) ? INFINITY : ratio;
}

int64_t first_difference(const void *a, const void *b, size_t element_size, int64_t count)
{
    const char *x = a, *y = b;
    for (int64_t i = 0; i < count; i++)
        if (memcmp(x + (size_t)i * element_size, y + (size_t)i * element_size, element_size) != 0) return i;
    return -1;
}
