#include "bwd_compare.h"

#include <math.h>

enum { FEW = 1000 };

gradient_bars gradient_bars_of(flash_kda_device device)
{
    const bool is_exact = device.type == FLASH_KDA_CPU;
    return (gradient_bars){
        /* GPUs multiply in tf32, whose operands are rounded to 2^-11 of themselves at most. */
        .f32 = is_exact ? 1e-4 : 1e-3,
        .bf16 = 3.5e-3,
        /* If few elements are nearly all of a gradient, their rounding to bf16 alone is up to 2^-8. */
        .bf16_of_few = 0x1p-8,
        /* With keys that are alike, a row of (I + L)^-1 has many large elements. */
        .beyond_rounding = is_exact ? 1e-4 : 2e-3,
        .cancelling = is_exact ? 1e-2 : 1e-1,
    };
}

double gradient_bar(const gradient_bars *bars, bool narrow, int64_t count)
{
    return !narrow ? bars->f32 : count < FEW ? bars->bf16_of_few : bars->bf16;
}

/* Half of the distance between neighbouring numbers of bf16 around x. */
static double half_step(double x)
{
    int exponent;
    frexp(x, &exponent);
    return ldexp(1.0, exponent - 9);
}

double gradient_error(const double *truth, const void *got, bool narrow, int64_t count, bool beyond_rounding,
                      double least)
{
    double wrong = 0.0, all = least * least * (double)count;
    for (int64_t i = 0; i < count; i++) {
        const double value =
            narrow ? (double)float_from_bf16(((const uint16_t *)got)[i]) : (double)((const float *)got)[i];
        if (!isfinite(value)) return INFINITY;
        const double off = fabs(value - truth[i]) - (beyond_rounding ? half_step(truth[i]) : 0.0);
        if (off > 0.0) wrong += off * off;
        all += truth[i] * truth[i];
    }
    return count ? sqrt(wrong / all) : 0.0;
}

/* How far the terms of dA_log of a head are from 0, together. */
static double size_of_terms(const rate_terms *of, const double *dg, int64_t h)
{
    double sum = 0.0;
    for (int64_t i = 0; i < of->rows * of->heads * DIM; i++) {
        if (i / DIM % of->heads != h) continue;
        const double x = of->g[i] + (of->dt_bias ? (double)of->dt_bias[h * DIM + i % DIM] : 0.0);
        const double by_g = of->gate == FLASH_KDA_GATE_BOUNDED ? x : x > 1.0 ? x : 1.5;
        if (dg[i] != 0.0) sum += fabs(dg[i] * by_g); /* of softplus a little less than that */
    }
    return sum;
}

double rate_error(const rate_terms *of, const double *dg, const double *dA_log, const float *got,
                  double cancelling)
{
    double wrong = 0.0, all = GRADIENT_FLOOR * GRADIENT_FLOOR;
    for (int64_t h = 0; h < of->heads; h++) {
        const double terms = size_of_terms(of, dg, h);
        wrong += pow((double)got[h] - dA_log[h], 2.0);
        all += pow(fmax(fabs(dA_log[h]), cancelling * terms), 2.0);
    }
    return sqrt(wrong / all);
}
