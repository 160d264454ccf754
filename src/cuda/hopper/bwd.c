/*
 * The backward pass of the kernel "hopper". Two walks leave the state before every chunk of 32 tokens and the
 * gradient with respect to the state after it in the workspace (walks.c). With these all chunks are computed
 * at the same time (kernels/hopper/bwd/chunks), and so are the gradients with respect to initial states
 * (kernels/hopper/bwd/first.cu). Sums over heads and chunks are those of the kernel "portable".
 *
 * The walks' results take more memory than all inputs. If this is more than the call may have, sequences of
 * equal lengths are computed in stretches of tokens from the last one to the first one, after a walk over the
 * states alone has found the state before each stretch.
 */
#include "../../../kernels/backward/bwd_shape.h"
#include "../../../kernels/hopper/bwd/chunks/chunk_args.h"
#include "../bwd_args_of.h"
#include "../bwd_waves.h"
#include "../cuda.h"
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

/* Stretches take turns at the first part of the workspace. Behind it lies what they hand over: the states
 * before all of them but the first one, and D, the gradient with respect to one of these states; and sums
 * over chunks for dA_log and ddt_bias. */
typedef struct bwd_plan {
    fkda_stretches stretches;
    int64_t states_at, gradient_at, sums_at, bytes;
} bwd_plan;

enum {
    STATE_BYTES = FKDA_DIM * FKDA_DIM * (int)sizeof(float),
    SUM_BYTES = 2 * FKDA_DIM * (int)sizeof(float),
    /* Tokens of a stretch, at least: each has launches of its own. */
    SHORTEST_STRETCH = 256,
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

static bwd_plan plan_stretches(const fkda_bwd_problem *p, int sms, int64_t count)
{
    const fkda_shape *s = &p->fwd.shape;
    bwd_plan plan = {.stretches = fkda_make_stretches(s, count)};
    const fkda_stretches *stretches = &plan.stretches;
    const int64_t last = s->tokens - (stretches->count - 1) * stretches->tokens,
                  states = s->sequences * s->heads * STATE_BYTES;
    const int64_t lengths[] = {stretches->tokens, last};
    int64_t end = 0, most = 0;
    for (int i = 0; i < 2; i++) {
        fkda_shape part = *s;
        part.tokens = lengths[i];
        if (stretches->count > 1 && s->max_seqlen) part.max_seqlen = part.tokens; /* as when they run */
        const int64_t bytes = plan_stretch(&part, sms).bytes,
                      whole = stretches->count > 1 ? fkda_plan_whole_walks(&part, sms).bytes : 0;
        most = fkda_most(most, fkda_most(bytes, whole));
    }
    take(&end, most);
    plan.states_at = take(&end, (stretches->count - 1) * states);
    plan.gradient_at = take(&end, stretches->count > 1 ? states : 0);
    plan.sums_at =
        take(&end, p->wants_parameters ? slots_of(s, stretches, stretches->count) * s->heads * SUM_BYTES : 0);
    plan.bytes = end;
    return plan;
}

/* As few stretches as the limit allows. If no number of them does, there is one, and fewer heads
 * (bwd_waves.c) have to do. */
static bwd_plan make_plan(const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    const bwd_plan at_once = plan_stretches(p, sms, 1);
    const int64_t limit = p->workspace_limit < INT64_MAX ? (int64_t)p->workspace_limit : INT64_MAX;
    if (at_once.bytes <= limit || !fkda_can_be_stretched(s)) return at_once;
    for (int64_t count = fkda_most(at_once.bytes / limit, 2); s->tokens / count >= SHORTEST_STRETCH;
         count++) {
        const bwd_plan plan = plan_stretches(p, sms, count);
        if (plan.bytes <= limit) return plan;
    }
    return at_once;
}

static int kernel_for(const fkda_problem *p)
{
    if (p->shape.features & FKDA_HOPPER_GATE_FEATURES) return GENERAL;
    return p->A_log && p->dt_bias && p->beta.dtype != FLASH_KDA_F32 && !p->qk_is_normalised &&
                   p->beta_kind == FLASH_KDA_BETA_SIGMOID
               ? USUAL
               : BOUNDED;
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
    const fkda_bwd_launch chunks = {kernel_for(&p->fwd), plan.chunks.slots * s->heads,
                                    FKDA_HOPPER_CHUNK_THREADS, FKDA_HOPPER_CHUNK_SHARED_BYTES};
    const fkda_bwd_launch first = {0, p->dinitial_state.data ? s->sequences * s->heads : 0, FKDA_BWD_THREADS,
                                   FKDA_BWD_SHARED_BYTES};
    fkda_bwd_problem heads_alone = *p;
    heads_alone.wants_parameters = false;
    flash_kda_status status = describe_tensors(driver, p, &args);
    if (status == FLASH_KDA_OK) status = fkda_launch_walks(driver, p, &plan.walks, &results);
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd(driver, &module, p, &chunks, 1, &args);
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd(driver, &first_module, p, &first, 1, &args);
    args.bwd.sums = NULL;
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd_sums(driver, &heads_alone, &args.bwd);
    return status;
}

/* ---- The pass ------------------------------------------------------------------------------------------ */

/* The states that stretches hand over are [B, HV, V, K], in fp32. */
static fkda_state_view handed_over(const fkda_shape *s, unsigned char *at)
{
    return (fkda_state_view){.data = at,
                             .slots = s->sequences,
                             .slot_stride = s->heads * FKDA_DIM * FKDA_DIM,
                             .head_stride = FKDA_DIM * FKDA_DIM,
                             .heads = s->heads,
                             .dtype = FLASH_KDA_F32};
}

static fkda_state_view state_before(const fkda_bwd_problem *p, const bwd_plan *plan, int64_t stretch)
{
    const fkda_shape *s = &p->fwd.shape;
    if (stretch == 0) return p->fwd.initial_state;
    return handed_over(s, (unsigned char *)p->fwd.workspace + plan->states_at +
                              (stretch - 1) * s->sequences * s->heads * STATE_BYTES);
}

/* The states before all stretches, from the first one on. */
static flash_kda_status find_states(const fkda_driver *driver, const fkda_bwd_problem *p,
                                    const bwd_plan *plan, int sms)
{
    flash_kda_status status = FLASH_KDA_OK;
    for (int64_t i = 0; i + 1 < plan->stretches.count && status == FLASH_KDA_OK; i++) {
        fkda_bwd_problem part = fkda_stretch_of(p, &plan->stretches, i);
        const fkda_walks_plan walk = fkda_plan_whole_walks(&part.fwd.shape, sms);
        const fkda_state_view after = state_before(p, plan, i + 1);
        part.fwd.initial_state = state_before(p, plan, i);
        status = fkda_launch_states_walk(driver, &part, &walk, p->fwd.workspace, &after);
    }
    return status;
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
    flash_kda_status status = fkda_enter_device(s->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = find_states(driver, p, &plan, sms);
    for (int64_t i = stretches->count - 1; i >= 0 && status == FLASH_KDA_OK; i--) {
        fkda_bwd_problem part = fkda_stretch_of(p, stretches, i);
        part.fwd.initial_state = state_before(p, &plan, i);
        if (i + 1 < stretches->count) part.dfinal_state = gradient;
        status = run_stretch(driver, &part, sms,
                             sums ? sums + slots_of(s, stretches, i) * s->heads * 2 * FKDA_DIM : NULL,
                             i ? &gradient : &nowhere);
    }
    if (status == FLASH_KDA_OK) status = add_sums(driver, p, &plan, sums);
    return fkda_leave_device(driver, status);
}

static const fkda_bwd_kernel hopper = {workspace_of, run};

size_t fkda_hopper_bwd_workspace(const fkda_bwd_problem *p)
{
    return fkda_bwd_waves_workspace(&hopper, p);
}

flash_kda_status fkda_hopper_bwd(const fkda_bwd_problem *p)
{
    return fkda_run_bwd_waves(&hopper, p);
}
