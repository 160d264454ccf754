/* The checks of the arguments of flash_kda_decode_layer(). */
#ifndef FKDA_CHECK_DECODE_LAYER_H
#define FKDA_CHECK_DECODE_LAYER_H

#include "decode_layer_problem.h"

/* Turns a caller's struct into a problem, or refuses it in a sentence. The reference needs neither out nor
 * records nor conv_windows, and writes to no tensor. */
flash_kda_status fkda_check_decode_layer(const flash_kda_decode_layer_params *params, bool for_reference,
                                         fkda_decode_layer_problem *problem);

/* What needs no memory: options, dtypes, shapes and the kernel. The problem's pointers may lead nowhere. */
flash_kda_status fkda_check_decode_layer_shapes(const flash_kda_decode_layer_params *params,
                                                fkda_decode_layer_problem *problem);

#endif
