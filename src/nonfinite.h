/* The option "nonfinite" of a call: which memory is looked at for values that are NaN or infinite. */
#ifndef FKDA_NONFINITE_H
#define FKDA_NONFINITE_H

#include "problem.h"

/* Which tensors are counted: inputs before the forward pass, outputs after it. */
typedef enum fkda_counted { FKDA_INPUTS, FKDA_OUTPUTS } fkda_counted;

/* A tensor as runs of elements that are neighbours in memory. A contiguous tensor is one run. The elements of
 * run r have the indices r * run to (r + 1) * run - 1. */
typedef struct fkda_counted_tensor {
    const void *data;
    int64_t elements; /* a multiple of run; 0 if the tensor is absent or empty */
    int64_t run;      /* elements of a run, at least 1 */
    /* Run (i * sizes[0] + j) * sizes[1] + k begins i * strides[0] + j * strides[1] + k * strides[2] elements
     * behind the data. */
    int64_t sizes[2], strides[3];
    /* Not NULL: run n is the slot where sequence n starts or ends, which may be none. Its elements count with
     * their indices in all slots. */
    const fkda_state_view *pool;
    bool is_bf16; /* else fp32 */
    flash_kda_nonfinite *record;
} fkda_counted_tensor;

/* Describes all tensors of that kind, absent ones included, and returns how many there are. */
int fkda_counted_tensors(const fkda_problem *problem, fkda_counted counted,
                         fkda_counted_tensor tensors[FLASH_KDA_CHECKED_TENSORS]);

#endif
