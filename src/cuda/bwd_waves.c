/*
 * Heads have nothing to do with each other in the backward pass, except that value heads which share a head
 * of q and k add up their gradients of it. So a wave is a problem of its own, with some of the heads of q and
 * k, and the value heads that use them. The waves of a call are equally large but for the last one.
 */
#include "bwd_waves.h"

#include "cuda.h"

enum {
    /* Bytes of q, k, v and g of a small call, which has fewer, and of the workspace that it may have. A
     * smaller limit would make small calls slow, whose walks need many heads to fill a GPU, and save little
     * memory. */
    SMALL_INPUTS = 128 << 20,
    SMALL_WORKSPACE = 96 << 20,
};

/* Half of the bytes of q, k, v and g, or SMALL_WORKSPACE for a small call. */
static size_t default_limit(const fkda_shape *s)
{
    const size_t gate_bytes = s->features & FKDA_FP32_GATES ? 4 : 2, tokens = (size_t)(s->batch * s->tokens),
                 of_token = 2 * 2 * (size_t)s->qk_heads + (2 + gate_bytes) * (size_t)s->heads,
                 inputs = tokens * FKDA_DIM * of_token;
    return inputs < SMALL_INPUTS ? SMALL_WORKSPACE : inputs / 2;
}

/* The most bytes that a wave needs if waves have `heads` heads of q and k. The last one may have fewer, and
 * may need more, since a walk of few heads is cut into more parts. */
static size_t wave_bytes(const fkda_bwd_kernel *kernel, const fkda_bwd_problem *p, int sms, int64_t heads)
{
    const int64_t all = p->fwd.shape.qk_heads, group = p->fwd.shape.heads / all;
    const int64_t sizes[] = {heads, all % heads};
    size_t most = 0;
    for (int i = 0; i < 2; i++) {
        fkda_bwd_problem wave = *p;
        wave.fwd.shape.qk_heads = sizes[i];
        wave.fwd.shape.heads = sizes[i] * group;
        const size_t bytes = sizes[i] ? kernel->workspace(&wave, sms) : 0;
        if (bytes > most) most = bytes;
    }
    return most;
}

/* The heads of q and k in a wave, of as few waves as the limit allows. */
static int64_t choose_heads(const fkda_bwd_kernel *kernel, const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    const size_t limit = p->workspace_limit;
    for (int64_t waves = 1;;) {
        const int64_t heads = (s->qk_heads + waves - 1) / waves;
        const size_t bytes = wave_bytes(kernel, p, sms, heads);
        if (bytes <= limit || heads <= 1) return heads;
        /* Bytes are about proportional to heads. */
        waves = fkda_clamp(waves * (int64_t)(bytes / limit), waves + 1, s->qk_heads);
    }
}

/* The same problem, whose kernel knows the limit of the whole call. */
static fkda_bwd_problem with_limit(const fkda_bwd_problem *p)
{
    fkda_bwd_problem limited = *p;
    if (!p->workspace_limit) limited.workspace_limit = default_limit(&p->fwd.shape);
    return limited;
}

/* Without a device the call fails before it needs the workspace. */
static int sms_of(const fkda_bwd_problem *p)
{
    int sms;
    return fkda_cuda_sms(p->fwd.shape.device.index, &sms) == FLASH_KDA_OK ? sms : 1;
}

size_t fkda_bwd_waves_workspace(const fkda_bwd_kernel *kernel, const fkda_bwd_problem *problem)
{
    const int sms = sms_of(problem);
    const fkda_bwd_problem p = with_limit(problem);
    return wave_bytes(kernel, &p, sms, choose_heads(kernel, &p, sms));
}

static size_t element_bytes(int32_t dtype)
{
    return dtype == FLASH_KDA_F32 ? sizeof(float) : sizeof(uint16_t);
}

static void take_heads(fkda_token_view *t, int64_t first, int64_t count)
{
    if (t->data) t->data = (char *)t->data + first * t->head_stride * (int64_t)element_bytes(t->dtype);
    t->heads = count;
}

static void take_state_heads(fkda_state_view *s, int64_t first, int64_t count)
{
    if (s->data) s->data = (char *)s->data + first * s->head_stride * (int64_t)element_bytes(s->dtype);
    s->heads = count;
}

/* The problem with `count` heads of q and k, from the first one on, and their value heads. */
static fkda_bwd_problem wave_of(const fkda_bwd_problem *p, int64_t first, int64_t count)
{
    fkda_bwd_problem wave = *p;
    const int64_t group = p->fwd.shape.heads / p->fwd.shape.qk_heads;
    const int64_t first_v = first * group, count_v = count * group;
    fkda_token_view *const of_qk[] = {&wave.fwd.q, &wave.fwd.k, &wave.dq, &wave.dk};
    fkda_token_view *const of_v[] = {&wave.fwd.v, &wave.fwd.g, &wave.fwd.beta, &wave.dout,
                                     &wave.dv,    &wave.dg,    &wave.dbeta};
    fkda_state_view *const states[] = {&wave.fwd.initial_state, &wave.saved_states, &wave.dfinal_state,
                                       &wave.dinitial_state};
    for (size_t i = 0; i < sizeof of_qk / sizeof *of_qk; i++) take_heads(of_qk[i], first, count);
    for (size_t i = 0; i < sizeof of_v / sizeof *of_v; i++) take_heads(of_v[i], first_v, count_v);
    for (size_t i = 0; i < sizeof states / sizeof *states; i++) take_state_heads(states[i], first_v, count_v);
    if (p->fwd.A_log) wave.fwd.A_log += first_v;
    if (p->fwd.dt_bias) wave.fwd.dt_bias += first_v * FKDA_DIM;
    if (p->dA_log) wave.dA_log += first_v;
    if (p->ddt_bias) wave.ddt_bias += first_v * FKDA_DIM;
    wave.fwd.shape.heads = count_v;
    wave.fwd.shape.qk_heads = count;
    return wave;
}

flash_kda_status fkda_run_bwd_waves(const fkda_bwd_kernel *kernel, const fkda_bwd_problem *problem)
{
    const int sms = sms_of(problem);
    const fkda_bwd_problem p = with_limit(problem);
    const int64_t all = p.fwd.shape.qk_heads, heads = choose_heads(kernel, &p, sms);
    flash_kda_status status = FLASH_KDA_OK;
    for (int64_t first = 0; first < all && status == FLASH_KDA_OK; first += heads) {
        const int64_t left = all - first;
        const fkda_bwd_problem wave = wave_of(&p, first, left < heads ? left : heads);
        status = kernel->run(&wave, sms);
    }
    return status;
}
