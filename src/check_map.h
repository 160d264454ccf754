/* The checks of the arguments of flash_kda_map() and flash_kda_join(). */
#ifndef FKDA_CHECK_MAP_H
#define FKDA_CHECK_MAP_H

#include "check.h"
#include "map_problem.h"

/* As fkda_complete_params(). */
flash_kda_status fkda_complete_map_params(const flash_kda_map_params **params,
                                          flash_kda_map_params *complete);

/* Turns a caller's struct into a problem, or refuses it in a sentence. `purpose` is FKDA_FOR_FWD for the call
 * itself. The reference looks at no tensor that is written. Whether the workspace is large enough is checked
 * by fkda_check_workspace(). */
flash_kda_status fkda_check_map(const flash_kda_map_params *params, fkda_purpose purpose,
                                fkda_map_problem *problem);

/* Likewise. Without `with_memory` no address is looked at, and an optional tensor counts if its data is not
 * NULL. */
flash_kda_status fkda_check_join(const flash_kda_join_params *params, bool with_memory,
                                 fkda_join_problem *problem);

#endif
