/* A problem as the struct that every forward kernel takes. */
#ifndef FKDA_KERNEL_ARGS_H
#define FKDA_KERNEL_ARGS_H

#include "../../kernels/common/fwd_args.h"
#include "../problem.h"

static inline fkda_token_strides fkda_strides_of(const fkda_token_view *t)
{
    return (fkda_token_strides){t->batch_stride, t->token_stride, t->head_stride};
}

static inline fkda_state_args fkda_state_args_of(const fkda_state_view *s)
{
    return (fkda_state_args){s->data, s->slots, s->slot_stride};
}

static inline fkda_checkpoint_args fkda_checkpoint_args_of(const fkda_checkpoints *c)
{
    if (!c->wanted) return (fkda_checkpoint_args){0};
    return (fkda_checkpoint_args){
        .states = fkda_state_args_of(&c->states),
        .offsets = c->offsets.data,
        .indices = c->indices.data,
        .starts = c->starts.data,
        .every = c->every,
        .columns = (int)c->columns,
        .is_bf16 = c->states.dtype == FLASH_KDA_BF16,
        .offsets_are_i32 = c->offsets.is_i32,
        .indices_are_i32 = c->indices.is_i32,
        .starts_are_i32 = c->starts.is_i32,
    };
}

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
        .q_strides = fkda_strides_of(&p->q),
        .k_strides = fkda_strides_of(&p->k),
        .v_strides = fkda_strides_of(&p->v),
        .g_strides = fkda_strides_of(&p->g),
        .beta_strides = fkda_strides_of(&p->beta),
        .out_strides = fkda_strides_of(&p->out),
        .A_log = p->A_log,
        .dt_bias = p->dt_bias,
        .initial_state = fkda_state_args_of(&p->initial_state),
        .final_state = fkda_state_args_of(&p->final_state),
        .cu_seqlens = p->cu_seqlens,
        .state_indices = p->state_indices.data,
        .has_initial_state = p->has_initial_state,
        .first_slot = p->first_slot,
        .checkpoints = fkda_checkpoint_args_of(&p->checkpoints),
        .tokens = p->shape.tokens,
        .chunk_bytes = 16 * p->out.token_stride * (int64_t)sizeof(uint16_t),
        .heads = (int)p->shape.heads,
        .group = (int)(p->shape.heads / p->shape.qk_heads),
        .sequences = (int)p->shape.sequences,
        .scale = p->scale,
        .lower_bound = p->lower_bound,
        .state_is_bf16 = state->dtype == FLASH_KDA_BF16,
        .cu_seqlens_is_i32 = p->cu_seqlens_is_i32,
        .state_indices_are_i32 = p->state_indices.is_i32,
        .gate = p->gate,
        .beta_kind = p->beta_kind,
        .g_is_f32 = p->g.dtype == FLASH_KDA_F32,
        .beta_is_f32 = p->beta.dtype == FLASH_KDA_F32,
        .qk_is_normalised = p->qk_is_normalised,
        .state_k_first = p->state_k_first,
    };
}

#endif
