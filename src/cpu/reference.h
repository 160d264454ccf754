/* The recurrence in fp64, as the references of the forward pass, of the backward pass and of decode run it
 * (reference.c). A state S is kept as [K][V], so that the inner loops run along memory. */
#ifndef FKDA_CPU_REFERENCE_H
#define FKDA_CPU_REFERENCE_H

#include "../problem.h"

/* Element i of a tensor of bf16, fp32 or fp64. */
double fkda_reference_value(const void *data, int32_t dtype, int64_t i);

double fkda_reference_sigmoid(double x);

/* The natural logarithm of the decay of channel i of head h, from element g of the gate tensor. */
double fkda_reference_log_decay(const fkda_problem *problem, int64_t h, int i, double g);

/* From an element of beta. */
double fkda_reference_write_strength(const fkda_problem *problem, double beta);

/* A row of 128 of q or k, as the recurrence takes it. */
void fkda_reference_unit(const fkda_problem *problem, const fkda_token_view *t, int64_t offset, double *unit);

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
