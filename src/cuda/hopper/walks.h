/* Plans and launches the walks of the backward pass, which find the state before each chunk and the gradient
 * with respect to the state after it (kernels/hopper/bwd/walk.cu). */
#ifndef FKDA_HOPPER_WALKS_H
#define FKDA_HOPPER_WALKS_H

#include "../../bwd_problem.h"
#include "../driver.h"
#include "plan.h"

/* Both walks have one plan. */
typedef struct fkda_walks_plan {
    fkda_hopper_whole whole; /* how whole sequences are shared out, as in a forward pass of the same shape */
    int sms;
    int parts; /* of each sequence, that are walked at the same time; 1: sequences stay whole */
    int64_t states_at, gradients_at, maps_at; /* offsets in the workspace, in bytes */
    int64_t bytes;                            /* of the workspace, besides the images */
} fkda_walks_plan;

fkda_walks_plan fkda_plan_walks(const fkda_shape *shape, int sms);

/* The plan in which no sequence is cut. */
fkda_walks_plan fkda_plan_whole_walks(const fkda_shape *shape, int sms);

/* Where the walks put what they find, as kernels/hopper/bwd/chunks/chunk_args.h has it. */
typedef struct fkda_walk_results {
    void *states, *gradients; /* [slots, HV] border images */
    int64_t slots;
    fkda_state_view dinitial_state; /* fp32, as the walk back has it; data NULL: it is not stored */
    void *workspace;
} fkda_walk_results;

/* Enqueues both walks on the problem's stream. The device's context must be current. */
flash_kda_status fkda_launch_walks(const fkda_driver *driver, const fkda_bwd_problem *problem,
                                   const fkda_walks_plan *plan, const fkda_walk_results *results);

/* Enqueues the walk over states alone, by a plan of fkda_plan_whole_walks(). It leaves no images but the
 * states behind the sequences, in fp32. */
flash_kda_status fkda_launch_states_walk(const fkda_driver *driver, const fkda_bwd_problem *problem,
                                         const fkda_walks_plan *plan, void *workspace,
                                         const fkda_state_view *final_state);

#endif
