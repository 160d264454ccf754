/* The option "nonfinite" of a call: which memory is looked at for values that are NaN or infinite. */
#ifndef FKDA_NONFINITE_H
#define FKDA_NONFINITE_H

#include "problem.h"

/* Which tensors are counted: inputs before the forward pass, outputs after it. */
typedef enum fkda_counted { FKDA_INPUTS, FKDA_OUTPUTS } fkda_counted;

/* A tensor as the one stretch of memory that its elements fill. */
typedef struct fkda_stretch {
    const void *data;
    int64_t elements; /* 0 if the tensor is absent or empty */
    bool is_bf16;     /* else fp32 */
    flash_kda_nonfinite *record;
} fkda_stretch;

/* Writes the stretches of all tensors of that kind, absent ones included, and returns how many there are. */
int fkda_counted_stretches(const fkda_problem *problem, fkda_counted counted,
                           fkda_stretch stretches[FLASH_KDA_CHECKED_TENSORS]);

#endif
