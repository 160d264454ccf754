/* A problem as the struct that every decode kernel takes. */
#ifndef FKDA_DECODE_ARGS_OF_H
#define FKDA_DECODE_ARGS_OF_H

#include "../../kernels/decode/decode_args.h"
#include "../decode_problem.h"
#include "kernel_args.h"

static inline fkda_index_args fkda_index_args_of(const fkda_index_view *t, int64_t columns)
{
    return (fkda_index_args){t->data, t->is_i32, (int)columns};
}

static inline fkda_past_args fkda_past_args_of(const fkda_apply_problem *p)
{
    return (fkda_past_args){
        .records = p->records,
        .columns = (int)p->record_columns,
        .num_accepted_tokens = fkda_index_args_of(&p->num_accepted_tokens, 1),
        .accepted = fkda_index_args_of(&p->accepted, p->accepted_columns),
    };
}

/* All but `past`, `split` and `room`. */
static inline fkda_decode_args fkda_decode_args_of(const fkda_decode_problem *p)
{
    const fkda_index_view none = {0};
    return (fkda_decode_args){
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
        .state = fkda_state_args_of(&p->state),
        .state_indices = fkda_index_args_of(&p->state_indices, p->slot_columns),
        .num_accepted_tokens =
            fkda_index_args_of(p->past_records ? &none : &p->num_accepted_tokens, 1), /* where they start */
        .cu_seqlens = fkda_index_args_of(&p->cu_seqlens, 1),
        .parents = fkda_index_args_of(&p->parents, p->parent_columns),
        .written = fkda_state_args_of(&p->written),
        .written_indices = fkda_index_args_of(&p->written_indices, p->written_columns),
        .has_written_states = p->has_written_states,
        .records = p->records,
        .rounding = (const long long *)p->rounding,
        .first_slot = p->first_slot,
        .tokens = p->tokens,
        .record_columns = (int)p->record_columns,
        .heads = (int)p->heads,
        .group = (int)(p->heads / p->qk_heads),
        .sequences = (int)p->sequences,
        .scale = p->scale,
        .lower_bound = p->lower_bound,
        .write_states = p->write_states,
        .state_is_bf16 = p->state.dtype == FLASH_KDA_BF16,
        .state_k_first = p->state_k_first,
        .gate = p->gate,
        .beta_kind = p->beta_kind,
        .g_is_f32 = p->g.dtype == FLASH_KDA_F32,
        .beta_is_f32 = p->beta.dtype == FLASH_KDA_F32,
        .qk_is_normalised = p->qk_is_normalised,
    };
}

#endif
