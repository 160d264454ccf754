/* The recurrence in fp64, as the references of the forward pass and of decode run it (reference.c). A state S
 * is kept as [K][V], so that the inner loops run along memory. */
#ifndef FKDA_CPU_REFERENCE_H
#define FKDA_CPU_REFERENCE_H

#include "../problem.h"

/* Element i of a tensor of bf16, fp32 or fp64. */
double fkda_reference_value(const void *data, int32_t dtype, int64_t i);

/* S becomes the state of head h in that slot, or zeros for FKDA_NO_SLOT. */
void fkda_reference_load(const fkda_state_view *from, int64_t slot, int64_t h, bool k_first,
                         double S[FKDA_DIM][FKDA_DIM]);

/* `to` becomes S as [V][K]. */
void fkda_reference_store(double S[FKDA_DIM][FKDA_DIM], double *to);

/* One token of head h; `out` is its row of V numbers. Of the problem only what belongs to tokens is looked
 * at. */
void fkda_reference_step(const fkda_problem *problem, int64_t row, int64_t token, int64_t h,
                         double S[FKDA_DIM][FKDA_DIM], double *out);

#endif
