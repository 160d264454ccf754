/*
 * Plans and launches the walks of the backward pass: states before chunks, forwards, and gradients with
 * respect to states behind chunks, backwards.
 *
 * A walk is a forward pass without outputs. Neither walk needs the other one, so each kernel may start as
 * soon as all CTAs of the kernel before it run and SMs are free; the kernels wait for each other at their
 * ends (run_block() in kernels/hopper/block/run.cuh). With few heads both walks run side by side.
 *
 * If CTA pairs are left over, sequences of equal lengths are cut into parts, as the forward pass cuts them
 * into segments (docs/segments.md):
 *
 *   1. Side by side: the states of the first part, the gradients of the last part, the maps of all other
 *      parts with the states that they make of zeros, and the gradients that they make of zeros.
 *   2. The join of the states, and that of the gradients, for which a part has the transpose of the same map.
 *   3. Side by side: the states and the gradients of all parts that were not final in step 1.
 */
#include "walks.h"

#include "../kernel_args.h"
#include "../modules.h"
#include "costs.h"
#include "launch.h"
#include "workspace.h"

extern const unsigned char fkda_fatbin_hopper_walk[], fkda_fatbin_hopper_general_walk[];

enum { STATES, GRADIENTS, WALKS };
enum { SOLO, PAIR, KERNELS, JOIN_BACK = KERNELS * WALKS };

static fkda_module usual_module = {
    .image = fkda_fatbin_hopper_walk,
    .names = {[KERNELS * STATES + SOLO] = "fkda_hopper_walk_states_solo",
              [KERNELS * STATES + PAIR] = "fkda_hopper_walk_states_pair",
              [KERNELS * GRADIENTS + SOLO] = "fkda_hopper_walk_gradients_solo",
              [KERNELS * GRADIENTS + PAIR] = "fkda_hopper_walk_gradients_pair",
              [JOIN_BACK] = "fkda_hopper_walk_join"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};
static fkda_module general_module = {
    .image = fkda_fatbin_hopper_general_walk,
    .names = {[KERNELS * STATES + SOLO] = "fkda_hopper_walk_general_states_solo",
              [KERNELS * STATES + PAIR] = "fkda_hopper_walk_general_states_pair",
              [KERNELS * GRADIENTS + SOLO] = "fkda_hopper_walk_general_gradients_solo",
              [KERNELS * GRADIENTS + PAIR] = "fkda_hopper_walk_general_gradients_pair"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

/* ---- The plan ------------------------------------------------------------------------------------------ */

enum {
    CHUNK = FKDA_HOPPER_CHUNK_PAIR,
    /* Tokens of a part, at least. */
    SHORTEST_PART = 512,
    ALIGNMENT = 256,
};

/* An estimate in clocks, for parts of which both walks have a CTA pair each at the same time. */
static int64_t clocks_in_parts(int64_t chunks, int64_t parts)
{
    return fkda_ceil_div(chunks, parts) * (FKDA_CLOCKS_MAP_CHUNK + FKDA_CLOCKS_PAIR_CHUNK) +
           2 * (FKDA_CLOCKS_WORK_ITEM + FKDA_CLOCKS_LAUNCHES + FKDA_CLOCKS_JOIN_STEP * (parts - 2));
}

/* The best number of parts. Heads that have no four pairs to themselves gain nothing from parts, because
 * nearly all tokens are walked over twice. */
static int choose_parts(const fkda_shape *s, int sms)
{
    const int64_t heads = s->sequences * s->heads, chunks = fkda_ceil_div(s->tokens, CHUNK);
    int best = 1;
    int64_t clocks = chunks * FKDA_CLOCKS_PAIR_CHUNK * FKDA_PERCENT_WORTH_CUTTING / 100;
    if (!fkda_equal_lengths(s) || heads == 0 || s->batch_invariant) return 1;
    const int64_t most = fkda_least(fkda_hopper_pairs(sms) / (WALKS * heads) + 1, FKDA_MAPS_CHAINED + 2);
    for (int parts = 3; parts <= most && s->tokens / parts >= SHORTEST_PART; parts++) {
        const int64_t now = clocks_in_parts(chunks, parts);
        if (now < clocks) best = parts, clocks = now;
    }
    return best;
}

static int64_t take(int64_t *end, int64_t bytes)
{
    const int64_t begin = *end;
    *end = fkda_ceil_div(begin + bytes, ALIGNMENT) * ALIGNMENT;
    return begin;
}

fkda_walks_plan fkda_plan_whole_walks(const fkda_shape *shape, int sms)
{
    fkda_shape s = *shape;
    s.cut = FLASH_KDA_CUT_NEVER;
    const fkda_hopper_plan whole = fkda_hopper_plan_for(&s, sms);
    fkda_walks_plan plan = {.whole = whole.whole, .sms = sms, .parts = 1};
    int64_t end = 0;
    plan.states_at = take(&end, (int64_t)whole.memory.bytes);
    plan.gradients_at = take(&end, (int64_t)whole.memory.bytes);
    plan.bytes = end;
    return plan;
}

fkda_walks_plan fkda_plan_walks(const fkda_shape *s, int sms)
{
    fkda_walks_plan plan = fkda_plan_whole_walks(s, sms);
    plan.parts = choose_parts(s, sms);
    if (plan.parts == 1) return plan;
    const int64_t matrices =
        plan.parts * s->sequences * s->heads * FKDA_DIM * FKDA_DIM * (int64_t)sizeof(float);
    int64_t end = 0;
    plan.states_at = take(&end, matrices);
    plan.gradients_at = take(&end, matrices);
    plan.maps_at = take(&end, matrices);
    plan.bytes = end;
    return plan;
}

/* ---- Arguments ----------------------------------------------------------------------------------------- */

/* What all steps of one call need. */
typedef struct call {
    const fkda_driver *driver;
    const fkda_bwd_problem *problem;
    const fkda_walks_plan *plan;
    const fkda_walk_results *results;
    const CUfunction *kernels; /* of the walks */
    fkda_hopper_fwd_args args[WALKS];
} call;

/* What the kernels of both walks get. `checkpoints` says where images go. */
static fkda_hopper_fwd_args common_args(const call *c, void *images)
{
    fkda_hopper_fwd_args args = {.fwd = fkda_kernel_args(&c->problem->fwd)};
    args.fwd.checkpoints = (fkda_checkpoint_args){.states = {images, c->results->slots, 0}};
    args.fwd.out = NULL;
    args.fwd.final_state = (fkda_state_args){0};
    return args;
}

/* The way back begins with the gradient with respect to the final state, and has gradients of outputs in the
 * place of values. */
static void fill_args(call *c)
{
    const fkda_bwd_problem *p = c->problem;
    fkda_hopper_fwd_args *states = &c->args[STATES], *gradients = &c->args[GRADIENTS];
    *states = common_args(c, c->results->states);
    states->fwd.state_is_bf16 = p->fwd.initial_state.dtype == FLASH_KDA_BF16;
    *gradients = common_args(c, c->results->gradients);
    gradients->fwd.initial_state = fkda_state_args_of(&p->dfinal_state);
    gradients->fwd.final_state = fkda_state_args_of(&c->results->dinitial_state);
    gradients->fwd.state_is_bf16 = p->dfinal_state.dtype == FLASH_KDA_BF16;
    gradients->fwd.v = p->dout.data;
    gradients->fwd.v_strides = fkda_strides_of(&p->dout);
}

static flash_kda_status describe_inputs(call *c, int walk, int chunk)
{
    const fkda_problem *p = &c->problem->fwd;
    fkda_hopper_fwd_args *args = &c->args[walk];
    const struct {
        fkda_tma_descriptor *descriptor;
        const fkda_token_view *tensor;
    } all[] = {{&args->q, &p->q},
               {&args->k, &p->k},
               {&args->g, &p->g},
               {&args->v, walk == STATES ? &p->v : &c->problem->dout}};
    if (p->shape.batch * p->shape.tokens == 0) return FLASH_KDA_OK; /* only states are read */
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (!all[i].tensor->data || all[i].tensor->dtype == FLASH_KDA_F32) continue;
        const CUresult result =
            fkda_describe_tensor(c->driver, all[i].descriptor, all[i].tensor, &p->shape, chunk);
        if (result) return fkda_driver_fail("cuTensorMapEncodeTiled", result);
    }
    return FLASH_KDA_OK;
}

/* ---- Launches ------------------------------------------------------------------------------------------ */

static flash_kda_status launch(const call *c, CUfunction kernel, const fkda_hopper_fwd_args *args, int work,
                               int64_t ctas, int threads, fkda_start when)
{
    fkda_hopper_fwd_args own = *args;
    own.work = work;
    const fkda_grid grid = {ctas, threads, FKDA_HOPPER_SHARED_BYTES};
    const CUresult result =
        fkda_hopper_launch_kernel(c->driver, c->problem->fwd.stream, kernel, &own, grid, when);
    return result ? fkda_driver_fail(fkda_launching_function(c->driver), result) : FLASH_KDA_OK;
}

/* The walk over states, or both of them. */
static flash_kda_status run_whole(call *c, int walks)
{
    const fkda_hopper_whole *whole = &c->plan->whole;
    const bool paired = whole->chunk == FKDA_HOPPER_CHUNK_PAIR;
    const int64_t places[WALKS] = {[STATES] = c->plan->states_at, [GRADIENTS] = c->plan->gradients_at};
    flash_kda_status status = FLASH_KDA_OK;
    for (int i = 0; i < walks && status == FLASH_KDA_OK && whole->divides; i++) {
        c->args[i].handoff = fkda_hopper_handoff((char *)c->results->workspace + places[i], c->plan->sms);
        const CUresult result = c->driver->cuMemsetD32Async((CUdeviceptr)c->args[i].handoff.flags, 0,
                                                            (size_t)fkda_hopper_handoff_flags(c->plan->sms),
                                                            c->problem->fwd.stream);
        if (result) status = fkda_driver_fail("cuMemsetD32Async", result);
    }
    for (int i = 0; i < walks && status == FLASH_KDA_OK; i++)
        status = launch(c, c->kernels[KERNELS * i + (paired ? PAIR : SOLO)], &c->args[i], FKDA_SEQUENCES,
                        whole->workers * (paired ? FKDA_HOPPER_PAIR_CTAS : 1), FKDA_HOPPER_THREADS,
                        i == STATES ? FKDA_IN_ORDER : FKDA_EARLY);
    return status;
}

/* A walk over first, inner or later parts. */
static flash_kda_status launch_walk(const call *c, int walk, int work, int64_t parts, fkda_start when)
{
    const fkda_shape *s = &c->problem->fwd.shape;
    const int64_t workers = fkda_hopper_workers(CHUNK, parts * s->sequences * s->heads, c->plan->sms);
    return launch(c, c->kernels[KERNELS * walk + PAIR], &c->args[walk], work, FKDA_HOPPER_PAIR_CTAS * workers,
                  FKDA_HOPPER_THREADS, when);
}

static flash_kda_status run_in_parts(call *c, CUfunction maps, CUfunction join, CUfunction join_back)
{
    const fkda_shape *s = &c->problem->fwd.shape;
    const fkda_walks_plan *plan = c->plan;
    const int64_t heads = s->sequences * s->heads, inner = plan->parts - 2;
    char *const memory = c->results->workspace;
    const int64_t places[WALKS] = {[STATES] = plan->states_at, [GRADIENTS] = plan->gradients_at};
    for (int i = 0; i < WALKS; i++)
        c->args[i].cut = (fkda_cut){
            .states = (float *)(memory + places[i]),
            .maps = (float *)(memory + plan->maps_at),
            .shortest = (int)(s->tokens / plan->parts),
            .slots = plan->parts * (int)s->sequences,
            .equal_lengths = 1,
            .segments = s->has_cu_seqlens ? 0 : plan->parts,
        };

    flash_kda_status status = launch_walk(c, STATES, FKDA_FIRST_SEGMENTS, 1, FKDA_IN_ORDER);
    if (status == FLASH_KDA_OK) status = launch_walk(c, GRADIENTS, FKDA_FIRST_SEGMENTS, 1, FKDA_EARLY);
    if (status == FLASH_KDA_OK)
        status = launch(c, maps, &c->args[STATES], FKDA_INNER_SEGMENTS,
                        FKDA_HOPPER_PAIR_CTAS * fkda_hopper_workers(CHUNK, inner * heads, plan->sms),
                        FKDA_HOPPER_THREADS, FKDA_EARLY);
    if (status == FLASH_KDA_OK) status = launch_walk(c, GRADIENTS, FKDA_INNER_SEGMENTS, inner, FKDA_EARLY);

    const int64_t joining = fkda_least(heads * (FKDA_DIM / FKDA_JOIN_ROWS), plan->sms);
    if (status == FLASH_KDA_OK)
        status =
            launch(c, join, &c->args[STATES], FKDA_JOIN_CHAIN, joining, FKDA_JOIN_CTA_THREADS, FKDA_EARLY);
    if (status == FLASH_KDA_OK)
        status = launch(c, join_back, &c->args[GRADIENTS], FKDA_JOIN_CHAIN, joining, FKDA_JOIN_CTA_THREADS,
                        FKDA_EARLY);

    /* In order: states come from the joins, and the kernels of walks do not wait for them. */
    if (status == FLASH_KDA_OK)
        status = launch_walk(c, STATES, FKDA_LATER_SEGMENTS, inner + 1, FKDA_IN_ORDER);
    if (status == FLASH_KDA_OK)
        status = launch_walk(c, GRADIENTS, FKDA_LATER_SEGMENTS, inner + 1, FKDA_EARLY);
    return status;
}

/* Loads the kernels and describes the inputs of the walk over states, or of both. */
static flash_kda_status prepare(call *c, int walks)
{
    const fkda_problem *p = &c->problem->fwd;
    const int ordinal = p->shape.device.index;
    fkda_module *const module =
        p->shape.features & FKDA_HOPPER_GENERAL_FEATURES ? &general_module : &usual_module;
    flash_kda_status status = fkda_load_module(c->driver, module, ordinal);
    c->kernels = module->functions[ordinal];
    fill_args(c);
    for (int i = 0; i < walks && status == FLASH_KDA_OK; i++)
        status = describe_inputs(c, i, c->plan->parts > 1 ? CHUNK : c->plan->whole.chunk);
    return status;
}

flash_kda_status fkda_launch_walks(const fkda_driver *driver, const fkda_bwd_problem *p,
                                   const fkda_walks_plan *plan, const fkda_walk_results *results)
{
    const int ordinal = p->fwd.shape.device.index;
    call c = {.driver = driver, .problem = p, .plan = plan, .results = results};
    if (!plan->whole.workers) return FLASH_KDA_OK; /* there is no sequence */
    flash_kda_status status = prepare(&c, WALKS);
    if (status != FLASH_KDA_OK) return status;
    if (plan->parts == 1) return run_whole(&c, WALKS);

    CUfunction maps, join;
    status = fkda_load_module(driver, &usual_module, ordinal); /* which has the join back */
    if (status == FLASH_KDA_OK)
        status = fkda_hopper_find_maps(driver, p->fwd.shape.features & FKDA_HOPPER_GENERAL_FEATURES, ordinal,
                                       &maps, &join);
    if (status != FLASH_KDA_OK) return status;
    return run_in_parts(&c, maps, join, usual_module.functions[ordinal][JOIN_BACK]);
}

flash_kda_status fkda_launch_states_walk(const fkda_driver *driver, const fkda_bwd_problem *p,
                                         const fkda_walks_plan *plan, void *workspace,
                                         const fkda_state_view *final_state)
{
    const fkda_walk_results results = {.workspace = workspace};
    call c = {.driver = driver, .problem = p, .plan = plan, .results = &results};
    const flash_kda_status status = prepare(&c, STATES + 1);
    if (status != FLASH_KDA_OK) return status;
    c.args[STATES].fwd.final_state = fkda_state_args_of(final_state);
    return run_whole(&c, STATES + 1);
}
