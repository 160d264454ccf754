/* The checks of the arguments of flash_kda_bwd(). */
#ifndef FKDA_CHECK_BWD_H
#define FKDA_CHECK_BWD_H

#include "bwd_problem.h"
#include "check.h"

/* As fkda_complete_params(). */
flash_kda_status fkda_complete_bwd_params(const flash_kda_bwd_params **params,
                                          flash_kda_bwd_params *complete);

/* Turns a caller's struct into a problem, or refuses it in a sentence. `purpose` is FKDA_FOR_FWD for the call
 * itself. The reference looks at no gradient that is written. Whether the workspace is large enough is
 * checked by fkda_check_workspace(). */
flash_kda_status fkda_check_bwd(const flash_kda_bwd_params *params, fkda_purpose purpose,
                                fkda_bwd_problem *problem);

#endif
