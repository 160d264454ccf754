/* How far what decode writes is from the truth. */
#ifndef SUPPORT_DECODE_COMPARE_H
#define SUPPORT_DECODE_COMPARE_H

#include <stdint.h>

/* Steps between neighbours of bf16 that an element may be off which is rounded once. */
#define DECODE_TO_NEAREST 0.51
#define DECODE_AT_RANDOM 1.01

/* The distance between neighbours of bf16 around x. */
double bf16_step(double x);

double rms_of(const double *x, int64_t count);

/* How many times as far off as it may be an element is. `size` is the usual one of elements beside it, of
 * which it may be off 1e-5. `steps` of bf16 come from rounding; in fp32 there are none. */
double decode_excess(double truth, double got, double size, double steps);

#endif
