/* A checked problem as the struct that the forward kernels take. */
#ifndef FKDA_ARGUMENTS_H
#define FKDA_ARGUMENTS_H

#include "../../kernels/common/fwd_args.h"
#include "../internal.h"

static inline fkda_fwd_args fkda_kernel_arguments(const fkda_problem *p)
{
    const int64_t token_bytes = p->heads * FKDA_DIM * (int64_t)sizeof *p->v;
    return (fkda_fwd_args){
        .q = p->q,
        .k = p->k,
        .v = p->v,
        .g = p->g,
        .beta = p->beta,
        .out = p->out,
        .A_log = p->A_log,
        .dt_bias = p->dt_bias,
        .initial_state = p->initial_state,
        .final_state = p->final_state,
        .cu_seqlens = p->cu_seqlens,
        .tokens = p->tokens,
        .chunk_bytes = 16 * token_bytes,
        .heads = (int)p->heads,
        .sequences = (int)p->sequences,
        .scale = p->scale,
        .lower_bound = p->lower_bound,
        .state_is_bf16 = p->state_is_bf16,
        .cu_seqlens_is_i32 = p->cu_seqlens_is_i32,
    };
}

#endif
