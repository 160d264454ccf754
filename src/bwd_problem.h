/*
 * A call of the backward pass after its arguments were checked, as problem.h has it for the forward pass.
 * Everything below check_bwd.c takes this struct.
 */
#ifndef FKDA_BWD_PROBLEM_H
#define FKDA_BWD_PROBLEM_H

#include "problem.h"

/* A view whose `data` is NULL is of a gradient that is absent: zeros as an input, not wanted as an output. */
typedef struct fkda_bwd_problem {
    /* The forward pass whose gradients are asked for: inputs, options, workspace and interrupt. It has no
     * outputs, no pool and no checkpoints. */
    fkda_problem fwd;
    fkda_token_view dout;
    fkda_state_view dfinal_state;
    fkda_token_view dq, dk, dv, dg, dbeta;
    bool has_saved; /* fwd.saved has states, which are read; the pointer is NULL in a size call */
    /* Where a kernel has set them for itself: the states in fwd.saved, and how many tokens they are apart. */
    fkda_state_view saved_states;
    int64_t saved_every;
    bool wants_parameters;    /* whether dA_log or ddt_bias is wanted; the pointers are NULL in a size call */
    float *dA_log, *ddt_bias; /* [HV], [HV, K], or NULL */
    fkda_state_view dinitial_state;
    size_t workspace_limit; /* bytes of workspace that a call on a GPU should need at most; 0: the default */
} fkda_bwd_problem;

/* Sequence n has state n in all tensors of states. */
static inline int64_t fkda_bwd_slot(const fkda_state_view *states, int64_t n)
{
    return states->data ? n : FKDA_NO_SLOT;
}

#endif
