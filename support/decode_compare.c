#include "decode_compare.h"

#include <math.h>

double bf16_step(double x)
{
    return ldexp(1.0, (x != 0.0 ? ilogb(x) : -126) - 7);
}

double rms_of(const double *x, int64_t count)
{
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) sum += x[i] * x[i];
    return sqrt(sum / (double)count);
}

double decode_excess(double truth, double got, double size, double steps)
{
    const double from_rounding = steps > 0.0 ? steps * bf16_step(truth) : 0.0;
    return fabs(got - truth) / (from_rounding + 1e-5 * size + 1e-37);
}
