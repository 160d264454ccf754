/* A call of the backward pass, ready to run, as call.h has it for the forward pass; and gradients in fp64. */
#ifndef SUPPORT_BWD_CALL_H
#define SUPPORT_BWD_CALL_H

#include "call.h"

/* The gradients that a call reads, then those that it writes. */
typedef enum gradient {
    GRAD_OUT,
    GRAD_FINAL_STATE,
    READ_GRADIENTS,
    GRAD_Q = READ_GRADIENTS,
    GRAD_K,
    GRAD_V,
    GRAD_G,
    GRAD_BETA,
    GRAD_A_LOG,
    GRAD_DT_BIAS,
    GRAD_INITIAL_STATE,
    GRADIENTS,
} gradient;
extern const char *const gradient_names[GRADIENTS];

/* What is differentiated. The problem has no pool and no checkpoints. */
typedef struct bwd_problem {
    problem *forward;
    uint16_t *dout;      /* bf16 [B, T, HV, DIM] */
    float *dfinal_state; /* [N, HV, DIM, DIM], V before K; every value is exact in bf16 too */
    bool without_dout, without_dfinal_state, without_initial_state; /* The call does not get the tensor. */
} bwd_problem;

/* Takes over the forward problem, and fills both gradients. */
bwd_problem *bwd_problem_create(problem *forward, uint64_t seed);
void bwd_problem_free(bwd_problem *b);

/* The tensors in CPU memory as arguments, without gradients that are written. */
flash_kda_bwd_params bwd_problem_params(const bwd_problem *b);

/* Elements of a gradient. */
int64_t gradient_elements(const bwd_problem *b, gradient which);

/* The gradients that flash_kda_bwd_reference() gives; those that are read are NULL. */
typedef struct bwd_answer {
    double *of[GRADIENTS];
} bwd_answer;
bwd_answer bwd_problem_solve(const bwd_problem *b);
void bwd_answer_free(bwd_answer *a);

typedef struct bwd_options {
    call_options forward;      /* of the inputs; `mode` and what is about outputs mean nothing */
    layout layouts[GRADIENTS]; /* contiguous, padded or head-major; of states: padded or not */
    bool bf16_dfinal_state;
    bool saves; /* a forward pass saves states, which the call reads */
    bool batch_invariant;
    size_t workspace_limit;
    int absent; /* a bit for each gradient that is not wanted */
} bwd_options;

typedef struct bwd_call {
    call inputs;
    const bwd_problem *problem; /* must outlive the call */
    bwd_options options;
    flash_kda_bwd_params params;
    tensor_place places[GRADIENTS]; /* ndim 0: absent. States as [.., V, K], whatever their order */
    buffer buffers[GRADIENTS], workspace, saved;
} bwd_call;

/* Puts everything in place, with NaN in what is written and around it. Ends the program if there is no
 * memory. Returns the status of flash_kda_bwd_workspace_size(). On anything but FLASH_KDA_OK there is nothing
 * to close. */
flash_kda_status bwd_call_open(bwd_call *c, const bwd_problem *b, bwd_options options);
void bwd_call_close(bwd_call *c);

flash_kda_status bwd_call_run(bwd_call *c);

/* The bits of a gradient, contiguous, states as [.., V, K]. The caller frees them. */
void *bwd_call_read(const bwd_call *c, gradient which);

/* The name of a tensor of which a byte was written that no call may write; NULL if there is none. */
const char *bwd_call_damage(const bwd_call *c);

/* Whether all tensors are as before the call. */
bool bwd_call_untouched(const bwd_call *c);

#endif
