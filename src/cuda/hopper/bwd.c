/*
 * The backward pass of the kernel "hopper". Two walks leave the state before every chunk of 32 tokens and the
 * gradient with respect to the state after it in the workspace (walks.c). With these all chunks are computed
 * at the same time (kernels/hopper/bwd/chunks), and so are the gradients with respect to initial states
 * (kernels/hopper/bwd/first.cu). Sums over heads and chunks are those of the kernel "portable".
 *
 * The walks' results take more memory than all inputs. If this is more than the call may have, sequences of
 * equal lengths are computed in stretches of tokens from the last one to the first one. The states before all
 * stretches were saved by the forward pass, or they are found first.
 */
#include "../../../kernels/backward/bwd_shape.h"
#include "../../../kernels/hopper/bwd/chunks/chunk_args.h"
#include "../bwd_args_of.h"
#include "../bwd_waves.h"
#include "../cuda.h"
#include "border_states.h"
#include "costs.h"
#include "launch.h"
#include "stretches.h"
#include "walks.h"

extern const unsigned char fkda_fatbin_hopper_bwd_chunks[], fkda_fatbin_hopper_bwd_first[];

enum { USUAL, BOUNDED, GENERAL };

static fkda_module module = {
    .image = fkda_fatbin_hopper_bwd_chunks,
    .names = {[USUAL] = "fkda_hopper_bwd_chunks",
              [BOUNDED] = "fkda_hopper_bwd_bounded_chunks",
              [GENERAL] = "fkda_hopper_bwd_general_chunks"},
    .shared_bytes = FKDA_HOPPER_CHUNK_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

static fkda_module first_module = {
    .image = fkda_fatbin_hopper_bwd_first,
    .names = {"fkda_hopper_bwd_first"},
    .shared_bytes = FKDA_BWD_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum { CHUNK = FKDA_HOPPER_BWD_CHUNK, ALIGNMENT = 256 };

/* The end of a part of the workspace that begins at *end. Returns the beginning. */
static int64_t take(int64_t *end, int64_t bytes)
{
    const int64_t begin = *end;
    *end = (begin + bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return begin;
}

/* ---- The plan ------------------------------------------------------------------------------------------ */

/* Where each part of a stretch's workspace begins, in bytes. */
typedef struct stretch_plan {
    fkda_bwd_segments chunks;
    fkda_walks_plan walks;
    int64_t gradients_at, walks_at, dq_at, dk_at, bytes;
} stretch_plan;

static stretch_plan plan_stretch(const fkda_shape *s, int sms)
{
    stretch_plan plan = {.chunks = fkda_cut_for_bwd(s, CHUNK), .walks = fkda_plan_walks(s, sms)};
    const int64_t images = plan.chunks.slots * s->heads * FKDA_HOPPER_BORDER_IMAGE,
                  parts = s->heads != s->qk_heads
                              ? s->batch * s->tokens * s->heads * FKDA_DIM * (int64_t)sizeof(float)
                              : 0;
    int64_t end = 0;
    take(&end, images);
    plan.gradients_at = take(&end, images);
    plan.walks_at = take(&end, plan.walks.bytes);
    plan.dq_at = take(&end, parts);
    plan.dk_at = take(&end, parts);
    plan.bytes = end;
    return plan;
}

/* Where the states before stretches come from. A forward pass can compute segments of a sequence in parallel.
 * Where it would not, a walk over states alone is faster, since it has no outputs. A single stretch has its
 * state from the caller, which counts as saved. */
typedef enum state_source { SAVED, FROM_WALKS, FROM_FORWARD_PASS } state_source;

/* What finds the states before stretches and the stretches themselves take turns at the first part of the
 * workspace. Behind it lies what they hand over: these states, unless they were saved; D, the gradient with
 * respect to one of these states; and sums over chunks for dA_log and ddt_bias. */
typedef struct bwd_plan {
    fkda_stretches stretches;
    state_source source;
    int64_t outputs_at; /* of a forward pass, up to states_at: nobody reads them */
    int64_t states_at, gradient_at, sums_at, bytes;
} bwd_plan;

enum {
    STATE_BYTES = FKDA_DIM * FKDA_DIM * (int)sizeof(float),
    SUM_BYTES = 2 * FKDA_DIM * (int)sizeof(float),
    OUTPUT_BYTES = FKDA_DIM * (int)sizeof(uint16_t), /* of a token and head */
    /* Tokens of a stretch, at least: each has launches of its own. */
    SHORTEST_STRETCH = 256,
    CTAS_ON_SM = 2, /* of the kernel for chunks */
};

/* The chunks of the first `count` stretches. */
static int64_t slots_of(const fkda_shape *s, const fkda_stretches *stretches, int64_t count)
{
    fkda_shape part = *s;
    int64_t slots = 0;
    part.tokens = stretches->tokens;
    if (count == stretches->count) {
        count--;
        part.tokens = s->tokens - count * stretches->tokens;
        slots = fkda_cut_for_bwd(&part, CHUNK).slots;
        part.tokens = stretches->tokens;
    }
    return slots + (count ? count * fkda_cut_for_bwd(&part, CHUNK).slots : 0);
}

/* The shape of the forward pass that finds the states before stretches: all tokens but those of the last
 * stretch. */
static fkda_shape shape_before_last(const fkda_shape *shape, const fkda_stretches *stretches)
{
    fkda_shape s = *shape;
    s.tokens = (stretches->count - 1) * stretches->tokens;
    s.max_seqlen = 0; /* all sequences are as long as that */
    s.features |= FKDA_CHECKPOINTS;
    return s;
}

/* In `count` stretches, or about as many, of multiples of `unit` tokens. */
static bwd_plan plan_stretches(const fkda_bwd_problem *p, int sms, int64_t count, int64_t unit,
                               bool are_saved)
{
    const fkda_shape *s = &p->fwd.shape;
    bwd_plan plan = {.stretches = fkda_make_stretches(s, count, unit)};
    if (!are_saved) plan.stretches = fkda_fill_gpu(s, plan.stretches, (int64_t)CTAS_ON_SM * sms);
    const fkda_stretches *stretches = &plan.stretches;
    const bool stretched = stretches->count > 1;
    const int64_t lengths[] = {stretches->tokens, s->tokens - (stretches->count - 1) * stretches->tokens};
    int64_t end = 0, most = 0;
    if (stretched && !are_saved) {
        const fkda_shape before = shape_before_last(s, stretches);
        const fkda_hopper_plan forward = fkda_hopper_plan_for(&before, sms);
        plan.source = forward.strategy == FKDA_HOPPER_WHOLE ? FROM_WALKS : FROM_FORWARD_PASS;
        take(&most, (int64_t)forward.memory.bytes);
        plan.outputs_at = take(&most, s->batch * s->heads * OUTPUT_BYTES);
    }
    for (int i = 0; i < 2; i++) {
        fkda_shape part = *s;
        part.tokens = lengths[i];
        if (stretched && s->max_seqlen) part.max_seqlen = part.tokens; /* as when they run */
        most = fkda_most(most, plan_stretch(&part, sms).bytes);
        if (plan.source == FROM_WALKS) most = fkda_most(most, fkda_plan_whole_walks(&part, sms).bytes);
    }
    take(&end, most);
    const int64_t states = s->sequences * s->heads * STATE_BYTES;
    plan.states_at = take(&end, plan.source == SAVED ? 0 : (stretches->count - 1) * states);
    plan.gradient_at = take(&end, stretched ? states : 0);
    plan.sums_at =
        take(&end, p->wants_parameters ? slots_of(s, stretches, stretches->count) * s->heads * SUM_BYTES : 0);
    plan.bytes = end;
    return plan;
}

/* As few stretches as the limit allows. If no number of them does, there is one, and fewer heads
 * (bwd_waves.c) have to do. A stretch that begins with a saved state has as many tokens as saved states are
 * apart, or a multiple of them. If the limit allows no such stretch, the states are found anew. */
static bwd_plan make_plan(const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    const bwd_plan at_once = plan_stretches(p, sms, 1, CHUNK, true);
    const int64_t limit = p->workspace_limit < INT64_MAX ? (int64_t)p->workspace_limit : INT64_MAX,
                  least = fkda_most(at_once.bytes / limit, 2);
    if (at_once.bytes <= limit || !fkda_can_be_stretched(s)) return at_once;
    for (int are_saved = p->saved_every > 0; are_saved >= 0; are_saved--) {
        const int64_t unit = are_saved ? p->saved_every : CHUNK,
                      most = are_saved ? fkda_ceil_div(s->tokens, unit) : s->tokens / SHORTEST_STRETCH;
        for (int64_t count = least; count <= most; count++) {
            const bwd_plan plan = plan_stretches(p, sms, count, unit, are_saved);
            if (plan.bytes <= limit) return plan;
        }
    }
    return at_once;
}

static int kernel_for(int32_t features)
{
    if (features & FKDA_HOPPER_GATE_FEATURES) return GENERAL;
    return features & FKDA_HOPPER_GENERAL_FEATURES ? BOUNDED : USUAL;
}

static size_t workspace_of(const fkda_bwd_problem *p, int sms)
{
    return (size_t)make_plan(p, sms).bytes;
}

/* ---- A stretch ----------------------------------------------------------------------------------------- */

static fkda_bwd_args make_args(const fkda_bwd_problem *p, const stretch_plan *plan, float *sums)
{
    unsigned char *const workspace = p->fwd.workspace;
    fkda_bwd_args args = fkda_bwd_args_of(p);
    args.segment = CHUNK;
    args.row_slots = (int)plan->chunks.row_slots;
    args.slots = plan->chunks.slots;
    args.sums = sums;
    if (p->fwd.shape.heads != p->fwd.shape.qk_heads) {
        args.dq_parts = (float *)(workspace + plan->dq_at);
        args.dk_parts = (float *)(workspace + plan->dk_at);
    }
    return args;
}

static flash_kda_status describe_tensors(const fkda_driver *driver, const fkda_bwd_problem *p,
                                         fkda_hopper_chunk_args *args)
{
    const struct {
        fkda_tma_descriptor *descriptor;
        const fkda_token_view *tensor;
    } all[] = {{&args->q, &p->fwd.q},
               {&args->k, &p->fwd.k},
               {&args->g, &p->fwd.g},
               {&args->v, &p->fwd.v},
               {&args->dout, &p->dout}};
    if (p->fwd.shape.batch * p->fwd.shape.tokens == 0) return FLASH_KDA_OK; /* none is read */
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (!all[i].tensor->data || all[i].tensor->dtype == FLASH_KDA_F32) continue;
        const CUresult result =
            fkda_describe_tensor(driver, all[i].descriptor, all[i].tensor, &p->fwd.shape, CHUNK);
        if (result) return fkda_driver_fail("cuTensorMapEncodeTiled", result);
    }
    return FLASH_KDA_OK;
}

/* The gradients with respect to initial states, by few CTAs, and beside them those of chunks. */
static flash_kda_status launch_gradients(const fkda_driver *driver, const fkda_bwd_problem *p,
                                         fkda_hopper_chunk_args *args)
{
    const fkda_shape *s = &p->fwd.shape;
    const int ordinal = s->device.index;
    const fkda_bwd_launch first = {0, p->dinitial_state.data ? s->sequences * s->heads : 0, FKDA_BWD_THREADS,
                                   FKDA_BWD_SHARED_BYTES};
    const fkda_grid chunks = {args->bwd.slots * s->heads, FKDA_HOPPER_CHUNK_THREADS,
                              FKDA_HOPPER_CHUNK_SHARED_BYTES};
    flash_kda_status status = describe_tensors(driver, p, args);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, &module, ordinal);
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd(driver, &first_module, p, &first, 1, args);
    if (status != FLASH_KDA_OK || !chunks.ctas) return status;
    const CUresult result =
        fkda_hopper_launch_kernel(driver, p->fwd.stream, module.functions[ordinal][kernel_for(s->features)],
                                  args, chunks, first.ctas ? FKDA_EARLY : FKDA_IN_ORDER);
    return result ? fkda_driver_fail(fkda_launching_function(driver), result) : FLASH_KDA_OK;
}

/* All of a stretch but the sums over chunks for dA_log and ddt_bias, whose terms it leaves in `sums`. The
 * walk back leaves D before the stretch in `before`. */
static flash_kda_status run_stretch(const fkda_driver *driver, const fkda_bwd_problem *p, int sms,
                                    float *sums, const fkda_state_view *before)
{
    const fkda_shape *s = &p->fwd.shape;
    const stretch_plan plan = plan_stretch(s, sms);
    unsigned char *const workspace = p->fwd.workspace;
    const fkda_walk_results results = {workspace, workspace + plan.gradients_at, plan.chunks.slots, *before,
                                       workspace + plan.walks_at};
    fkda_hopper_chunk_args args = {
        .bwd = make_args(p, &plan, sums), .states = results.states, .gradients = results.gradients};
    fkda_bwd_problem heads_alone = *p;
    heads_alone.wants_parameters = false;
    flash_kda_status status = fkda_launch_walks(driver, p, &plan.walks, &results);
    if (status == FLASH_KDA_OK) status = launch_gradients(driver, p, &args);
    args.bwd.sums = NULL;
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd_sums(driver, &heads_alone, &args.bwd);
    return status;
}

/* ---- The pass ------------------------------------------------------------------------------------------ */

/* D before a stretch, [B, HV, V, K] in fp32. */
static fkda_state_view handed_over(const fkda_shape *s, unsigned char *at)
{
    return (fkda_state_view){.data = at,
                             .slots = s->sequences,
                             .slot_stride = s->heads * FKDA_DIM * FKDA_DIM,
                             .head_stride = FKDA_DIM * FKDA_DIM,
                             .heads = s->heads,
                             .dtype = FLASH_KDA_F32};
}

/* Where the states before stretches are: in `saved`, or in the workspace once they are found. */
static fkda_border_states states_of(const fkda_bwd_problem *p, const bwd_plan *plan)
{
    if (plan->stretches.count == 1) return (fkda_border_states){0};
    if (plan->source == SAVED)
        return (fkda_border_states){p->saved_states, p->saved_every, p->fwd.shape.tokens / p->saved_every};
    const fkda_shape before = shape_before_last(&p->fwd.shape, &plan->stretches);
    return fkda_border_states_in((unsigned char *)p->fwd.workspace + plan->states_at, &before,
                                 plan->stretches.tokens);
}

/* Where the forward pass writes its outputs. If there is no room, all tokens of a head have one place, where
 * each write waits for the one before it. */
static fkda_token_view outputs_of(const fkda_problem *forward, const bwd_plan *plan)
{
    const fkda_shape *s = &forward->shape;
    const bool fit = s->batch * s->tokens * s->heads * OUTPUT_BYTES <= plan->states_at - plan->outputs_at;
    const int64_t stride = s->heads * FKDA_DIM;
    return (fkda_token_view){.data = (unsigned char *)forward->workspace + plan->outputs_at,
                             .batch_stride = fit ? s->tokens * stride : stride,
                             .token_stride = fit ? stride : 0,
                             .head_stride = FKDA_DIM,
                             .heads = s->heads,
                             .dtype = FLASH_KDA_BF16};
}

static flash_kda_status run_forward_pass(const fkda_driver *driver, const fkda_bwd_problem *p,
                                         const bwd_plan *plan, const fkda_border_states *states, int sms)
{
    fkda_problem forward = fkda_with_border_states(&p->fwd, states);
    forward.shape = shape_before_last(&p->fwd.shape, &plan->stretches);
    forward.out = outputs_of(&forward, plan);
    const fkda_hopper_plan of_forward = fkda_hopper_plan_for(&forward.shape, sms);
    return fkda_hopper_launch(driver, &forward, &of_forward);
}

/* Walks over the states of all stretches but the last one. */
static flash_kda_status run_walks(const fkda_driver *driver, const fkda_bwd_problem *p, const bwd_plan *plan,
                                  const fkda_border_states *states, int sms)
{
    const fkda_stretches *const stretches = &plan->stretches;
    flash_kda_status status = FLASH_KDA_OK;
    for (int64_t i = 0; i + 1 < stretches->count && status == FLASH_KDA_OK; i++) {
        fkda_bwd_problem part = fkda_stretch_of(p, stretches, i);
        const fkda_walks_plan walk = fkda_plan_whole_walks(&part.fwd.shape, sms);
        const fkda_state_view after = fkda_border_state(states, (i + 1) * stretches->tokens);
        if (i > 0) part.fwd.initial_state = fkda_border_state(states, i * stretches->tokens);
        status = fkda_launch_states_walk(driver, &part, &walk, p->fwd.workspace, &after);
    }
    return status;
}

static flash_kda_status find_states(const fkda_driver *driver, const fkda_bwd_problem *p,
                                    const bwd_plan *plan, const fkda_border_states *states, int sms)
{
    switch (plan->source) {
    case FROM_WALKS: return run_walks(driver, p, plan, states, sms);
    case FROM_FORWARD_PASS: return run_forward_pass(driver, p, plan, states, sms);
    default: return FLASH_KDA_OK;
    }
}

/* The sums over the chunks of all stretches. */
static flash_kda_status add_sums(const fkda_driver *driver, const fkda_bwd_problem *p, const bwd_plan *plan,
                                 float *sums)
{
    fkda_bwd_problem parameters_alone = *p;
    parameters_alone.fwd.shape.qk_heads = p->fwd.shape.heads;
    fkda_bwd_args args = fkda_bwd_args_of(p);
    args.sums = sums;
    args.slots = slots_of(&p->fwd.shape, &plan->stretches, plan->stretches.count);
    return sums ? fkda_launch_bwd_sums(driver, &parameters_alone, &args) : FLASH_KDA_OK;
}

static flash_kda_status run(const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    const fkda_driver *driver;
    const bwd_plan plan = make_plan(p, sms);
    const fkda_stretches *const stretches = &plan.stretches;
    unsigned char *const workspace = p->fwd.workspace;
    float *const sums = p->wants_parameters ? (float *)(workspace + plan.sums_at) : NULL;
    const fkda_state_view gradient = handed_over(s, workspace + plan.gradient_at), nowhere = {0};
    const fkda_border_states states = states_of(p, &plan);
    flash_kda_status status = fkda_enter_device(s->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = find_states(driver, p, &plan, &states, sms);
    for (int64_t i = stretches->count - 1; i >= 0 && status == FLASH_KDA_OK; i--) {
        fkda_bwd_problem part = fkda_stretch_of(p, stretches, i);
        if (i > 0) part.fwd.initial_state = fkda_border_state(&states, i * stretches->tokens);
        if (i + 1 < stretches->count) part.dfinal_state = gradient;
        status = run_stretch(driver, &part, sms,
                             sums ? sums + slots_of(s, stretches, i) * s->heads * 2 * FKDA_DIM : NULL,
                             i ? &gradient : &nowhere);
    }
    if (status == FLASH_KDA_OK) status = add_sums(driver, p, &plan, sums);
    return fkda_leave_device(driver, status);
}

static const fkda_bwd_kernel hopper = {workspace_of, run};

/* The same problem, with the states that its forward pass has saved. */
static fkda_bwd_problem with_saved_states(const fkda_bwd_problem *problem)
{
    fkda_bwd_problem p = *problem;
    p.saved_every = p.has_saved ? fkda_hopper_saved_interval(&p.fwd.shape) : 0;
    if (!p.saved_every) return p;
    p.saved_states = fkda_border_states_in(p.fwd.saved, &p.fwd.shape, p.saved_every).rows;
    return p;
}

size_t fkda_hopper_bwd_workspace(const fkda_bwd_problem *problem)
{
    const fkda_bwd_problem p = with_saved_states(problem);
    return fkda_bwd_waves_workspace(&hopper, &p);
}

flash_kda_status fkda_hopper_bwd(const fkda_bwd_problem *problem)
{
    const fkda_bwd_problem p = with_saved_states(problem);
    return fkda_run_bwd_waves(&hopper, &p);
}
