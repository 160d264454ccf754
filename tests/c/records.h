/* What the option "nonfinite" of a call must count, by a plain loop over what its tensors hold. */
#ifndef TESTS_RECORDS_H
#define TESTS_RECORDS_H

#include "harness.h"

/* The records of the inputs. For before the call: it may write to its initial state. */
void records_of_inputs(const call *c, flash_kda_nonfinite inputs[FLASH_KDA_CHECKED_TENSORS]);

/* Holds what the call has counted to the inputs' records and to its outputs. */
void check_records(const call *c, const flash_kda_nonfinite inputs[FLASH_KDA_CHECKED_TENSORS]);

#endif
