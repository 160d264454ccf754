/*
 * Calls of flash_kda_map() and flash_kda_join() after their arguments were checked, as problem.h has it for
 * the forward pass. Everything below check_map.c takes these structs.
 */
#ifndef FKDA_MAP_PROBLEM_H
#define FKDA_MAP_PROBLEM_H

#include "problem.h"

typedef struct fkda_map_problem {
    /* A forward pass over the same tokens without outputs. Its q is k, since maps need no queries and every
     * chunk has some. Its final_state is the call's `state`. */
    fkda_problem fwd;
    fkda_state_view map; /* `data` is NULL if the map is not wanted */
    bool wants_map;      /* also in a size call, in which no pointer is set */
    bool wants_state;
    bool initial_is_bf16; /* there is an initial state, in bf16; also in a size call */
} fkda_map_problem;

typedef struct fkda_join_problem {
    const fkda_kernel *kernel;
    flash_kda_device device;
    void *stream;
    int64_t pieces, heads;
    int32_t threads;
    bool backwards, state_k_first;
    fkda_state_view maps, states;          /* [P, HV, ..]; the slots are pieces */
    fkda_state_view initial_state;         /* [1, HV, ..], or absent: zeros */
    fkda_state_view entering, final_state; /* absent where they are not wanted */
} fkda_join_problem;

#endif
