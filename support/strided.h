/* Elements of tensors with strides. */
#ifndef SUPPORT_STRIDED_H
#define SUPPORT_STRIDED_H

#include "util.h"

int64_t elements_of(const flash_kda_tensor *t);

/* Copy a tensor between memory with its strides and contiguous memory. */
void gather(const flash_kda_tensor *t, const unsigned char *strided, unsigned char *contiguous);
void scatter(const flash_kda_tensor *t, unsigned char *strided, const unsigned char *contiguous);

/* Sets the strides of [B, T, H, D] or [B, T, H] so that the dimensions `order` lie in memory from outermost
 * to innermost, each with a gap of that many elements after its last element. Returns the elements in all. */
int64_t lay_out(flash_kda_tensor *t, const int *order, const int64_t *gaps);

#endif
