/* The checks of a call's arguments. */
#ifndef FKDA_CHECK_H
#define FKDA_CHECK_H

#include "problem.h"

typedef enum fkda_purpose {
    FKDA_FOR_FWD,
    FKDA_FOR_REFERENCE,
    FKDA_FOR_SHAPES, /* nothing is read or written, so pointers may be missing */
} fkda_purpose;

/* Turns a caller's struct into a problem, or refuses it in a sentence. Whether the workspace is large enough
 * is checked by fkda_check_workspace(), once the plan says how large it must be. */
flash_kda_status fkda_check(const flash_kda_fwd_params *params, fkda_purpose purpose, fkda_problem *problem);

flash_kda_status fkda_check_workspace(const fkda_problem *problem, size_t bytes_needed);

#endif
