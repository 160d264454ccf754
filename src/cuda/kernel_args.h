/* A problem as the struct that every forward kernel takes. */
#ifndef FKDA_KERNEL_ARGS_H
#define FKDA_KERNEL_ARGS_H

#include "../../kernels/common/fwd_args.h"
#include "../problem.h"

static inline fkda_fwd_args fkda_kernel_args(const fkda_problem *p)
{
    const fkda_state_view *state = p->initial_state.data ? &p->initial_state : &p->final_state;
    return (fkda_fwd_args){
        .q = p->q.data,
        .k = p->k.data,
        .v = p->v.data,
        .g = p->g.data,
        .beta = p->beta.data,
        .out = p->out.data,
        .A_log = p->A_log,
        .dt_bias = p->dt_bias,
        .initial_state = p->initial_state.data,
        .final_state = p->final_state.data,
        .cu_seqlens = p->cu_seqlens,
        .tokens = p->shape.tokens,
        .chunk_bytes = 16 * p->out.token_stride * (int64_t)sizeof(uint16_t),
        .heads = (int)p->shape.heads,
        .sequences = (int)p->shape.sequences,
        .scale = p->scale,
        .lower_bound = p->lower_bound,
        .state_is_bf16 = state->dtype == FLASH_KDA_BF16,
        .cu_seqlens_is_i32 = p->cu_seqlens_is_i32,
    };
}

#endif
