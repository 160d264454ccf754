/* The checks of a call's arguments. */
#ifndef FKDA_CHECK_H
#define FKDA_CHECK_H

#include "problem.h"

typedef enum fkda_purpose {
    FKDA_FOR_FWD,
    FKDA_FOR_REFERENCE,
    FKDA_FOR_SHAPES, /* nothing is read or written, so pointers may be missing */
} fkda_purpose;

/* A caller built with an older header passes a shorter struct. `*params` then becomes a copy in `complete`,
 * in which the missing fields are zero. */
flash_kda_status fkda_complete_params(const flash_kda_fwd_params **params, flash_kda_fwd_params *complete);

/* Turns a caller's struct into a problem, or refuses it in a sentence. Whether the workspace is large enough
 * is checked by fkda_check_workspace(), once the plan says how large it must be. */
flash_kda_status fkda_check(const flash_kda_fwd_params *params, fkda_purpose purpose, fkda_problem *problem);

flash_kda_status fkda_check_workspace(const fkda_problem *problem, size_t bytes_needed);

/* Refuses a `saved` of fewer than bytes_needed bytes, which is what the kernel's saved_bytes() says. A
 * problem without `saved` passes. */
flash_kda_status fkda_check_saved_size(const fkda_problem *problem, size_t bytes_needed);

#endif
