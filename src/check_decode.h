/* The checks of the arguments of flash_kda_decode() and flash_kda_apply(). */
#ifndef FKDA_CHECK_DECODE_H
#define FKDA_CHECK_DECODE_H

#include "decode_problem.h"

/* Turn a caller's struct into a problem, or refuse it in a sentence. The reference needs neither out nor
 * records, and writes to no tensor. */
flash_kda_status fkda_check_decode(const flash_kda_decode_params *params, bool for_reference,
                                   fkda_decode_problem *problem);
flash_kda_status fkda_check_apply(const flash_kda_apply_params *params, fkda_apply_problem *problem);

/* What of these checks needs no memory. */
flash_kda_status fkda_check_decode_shapes(const flash_kda_decode_params *params);
flash_kda_status fkda_check_apply_shapes(const flash_kda_apply_params *params);

/* check_decode_indices.c: the numbers in tensors of integers, for a call on the CPU. */
flash_kda_status fkda_check_decode_indices(const fkda_decode_problem *problem);
flash_kda_status fkda_check_apply_indices(const fkda_apply_problem *problem);

#endif
