#include "stretches.h"

#include "../../../kernels/hopper/bwd/chunks/chunk_args.h"
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

/* In fifths of the time that a CTA takes. Beginning a stretch takes three of them. */
static int64_t time_of(const fkda_shape *s, int64_t chunks_of_each, int64_t ctas)
{
    const int64_t heads = s->sequences * s->heads, chunks = fkda_ceil_div(s->tokens, FKDA_HOPPER_BWD_CHUNK),
                  full = chunks / chunks_of_each, rest = chunks % chunks_of_each;
    return full * (5 * fkda_ceil_div(chunks_of_each * heads, ctas) + 3) +
           (rest ? 5 * fkda_ceil_div(rest * heads, ctas) + 3 : 0);
}

fkda_stretches fkda_fill_gpu(const fkda_shape *s, fkda_stretches stretches, int64_t ctas)
{
    const int64_t heads = s->sequences * s->heads, chunks = stretches.tokens / FKDA_HOPPER_BWD_CHUNK,
                  that_fill = heads ? chunks * heads / ctas * ctas / heads : 0;
    if (stretches.count == 1 || that_fill == 0 || time_of(s, that_fill, ctas) >= time_of(s, chunks, ctas))
        return stretches;
    const int64_t tokens = that_fill * FKDA_HOPPER_BWD_CHUNK;
    return (fkda_stretches){fkda_ceil_div(s->tokens, tokens), tokens};
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
