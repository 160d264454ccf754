#include "stretches.h"

#include "costs.h"

bool fkda_can_be_stretched(const fkda_shape *s)
{
    return !s->has_cu_seqlens && !s->batch_invariant;
}

fkda_stretches fkda_make_stretches(const fkda_shape *s, int64_t count, int64_t unit)
{
    const int64_t units = fkda_ceil_div(s->tokens, unit), of_each = fkda_ceil_div(units, count);
    if (count <= 1 || units <= 1) return (fkda_stretches){1, s->tokens};
    return (fkda_stretches){fkda_ceil_div(units, of_each), of_each * unit};
}

static void take_tokens(fkda_token_view *t, int64_t first)
{
    const int64_t bytes = t->dtype == FLASH_KDA_F32 ? sizeof(float) : sizeof(uint16_t);
    if (t->data) t->data = (char *)t->data + first * t->token_stride * bytes;
}

fkda_bwd_problem fkda_stretch_of(const fkda_bwd_problem *p, const fkda_stretches *stretches, int64_t i)
{
    fkda_bwd_problem part = *p;
    const int64_t first = i * stretches->tokens, left = p->fwd.shape.tokens - first;
    const bool is_last = i == stretches->count - 1;
    fkda_token_view *const views[] = {&part.fwd.q,    &part.fwd.k, &part.fwd.v, &part.fwd.g,
                                      &part.fwd.beta, &part.dout,  &part.dq,    &part.dk,
                                      &part.dv,       &part.dg,    &part.dbeta};
    if (stretches->count == 1) return part; /* sequences may have any lengths */
    for (size_t j = 0; j < sizeof views / sizeof *views; j++) take_tokens(views[j], first);
    part.fwd.shape.tokens = is_last ? left : stretches->tokens;
    if (part.fwd.shape.max_seqlen) part.fwd.shape.max_seqlen = part.fwd.shape.tokens;
    if (i > 0) part.fwd.initial_state = part.dinitial_state = (fkda_state_view){0};
    if (!is_last) part.dfinal_state = (fkda_state_view){0};
    return part;
}
