/* Launches the kernels of kernels/hopper as a plan says: those of fwd.cu and segments.cu, or others that know
 * the call's options (choose_kernels). */
#include "launch.h"

#include "../../errors.h"
#include "../kernel_args.h"
#include "../modules.h"
#include "costs.h"
#include "workspace.h"

extern const unsigned char fkda_fatbin_hopper_fwd[], fkda_fatbin_hopper_segments[],
    fkda_fatbin_hopper_general_fwd[], fkda_fatbin_hopper_general_segments[], fkda_fatbin_hopper_states_fwd[],
    fkda_fatbin_hopper_states_segments[], fkda_fatbin_hopper_bounded[], fkda_fatbin_hopper_softplus[],
    fkda_fatbin_hopper_activated[], fkda_fatbin_hopper_fp32_gates[];

enum { SOLO, PAIR };
static fkda_module fwd_module = {
    .image = fkda_fatbin_hopper_fwd,
    .names = {[SOLO] = "fkda_hopper_solo", [PAIR] = "fkda_hopper_pair"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};
static fkda_module general_fwd_module = {
    .image = fkda_fatbin_hopper_general_fwd,
    .names = {[SOLO] = "fkda_hopper_general_solo", [PAIR] = "fkda_hopper_general_pair"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};
static fkda_module states_fwd_module = {
    .image = fkda_fatbin_hopper_states_fwd,
    .names = {[SOLO] = "fkda_hopper_states_solo", [PAIR] = "fkda_hopper_states_pair"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum { RELAY, MIXED, MAPS, LIST, JOIN };
static fkda_module segments_module = {
    .image = fkda_fatbin_hopper_segments,
    .names = {[MAPS] = "fkda_hopper_maps",
              [RELAY] = "fkda_hopper_relay",
              [MIXED] = "fkda_hopper_mixed",
              [LIST] = "fkda_hopper_list",
              [JOIN] = "fkda_hopper_join"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};
static fkda_module general_segments_module = {
    .image = fkda_fatbin_hopper_general_segments,
    .names = {[MAPS] = "fkda_hopper_general_maps",
              [RELAY] = "fkda_hopper_general_relay",
              [MIXED] = "fkda_hopper_general_mixed"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

static fkda_module states_segments_module = {
    .image = fkda_fatbin_hopper_states_segments,
    .names = {[RELAY] = "fkda_hopper_states_relay", [MIXED] = "fkda_hopper_states_mixed"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

/* Each of the next modules has all kernels of one gate, or of every gate in fp32: first those for whole
 * sequences, SOLO and PAIR, and from SEGMENTS on those for segments. */
enum { SEGMENTS = PAIR + 1 };
static fkda_module bounded_module = {
    .image = fkda_fatbin_hopper_bounded,
    .names = {[SOLO] = "fkda_hopper_bounded_solo",
              [PAIR] = "fkda_hopper_bounded_pair",
              [SEGMENTS + RELAY] = "fkda_hopper_bounded_relay",
              [SEGMENTS + MIXED] = "fkda_hopper_bounded_mixed",
              [SEGMENTS + MAPS] = "fkda_hopper_bounded_maps"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};
static fkda_module softplus_module = {
    .image = fkda_fatbin_hopper_softplus,
    .names = {[SOLO] = "fkda_hopper_softplus_solo",
              [PAIR] = "fkda_hopper_softplus_pair",
              [SEGMENTS + RELAY] = "fkda_hopper_softplus_relay",
              [SEGMENTS + MIXED] = "fkda_hopper_softplus_mixed",
              [SEGMENTS + MAPS] = "fkda_hopper_softplus_maps"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};
static fkda_module activated_module = {
    .image = fkda_fatbin_hopper_activated,
    .names = {[SOLO] = "fkda_hopper_activated_solo",
              [PAIR] = "fkda_hopper_activated_pair",
              [SEGMENTS + RELAY] = "fkda_hopper_activated_relay",
              [SEGMENTS + MIXED] = "fkda_hopper_activated_mixed",
              [SEGMENTS + MAPS] = "fkda_hopper_activated_maps"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};
static fkda_module fp32_gates_module = {
    .image = fkda_fatbin_hopper_fp32_gates,
    .names = {[SOLO] = "fkda_hopper_fp32_gates_solo",
              [PAIR] = "fkda_hopper_fp32_gates_pair",
              [SEGMENTS + RELAY] = "fkda_hopper_fp32_gates_relay",
              [SEGMENTS + MIXED] = "fkda_hopper_fp32_gates_mixed",
              [SEGMENTS + MAPS] = "fkda_hopper_fp32_gates_maps"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

/* The modules of a call. */
typedef struct kernels {
    fkda_module *fwd, *segments, *maps;
    int first; /* kernel of `segments` and `maps` in these modules */
} kernels;

/* The usual kernels if the call has the usual arithmetic; with checkpoints or states with K first, those of
 * the usual kernels that know these options. Otherwise the kernels for the call's gate if there are such
 * kernels; they know neither checkpoints nor states with K first. The general kernels for all other calls. */
static kernels choose_kernels(int32_t features)
{
    const int32_t gate = features & FKDA_HOPPER_GATE_FEATURES;
    const bool states = features & FKDA_HOPPER_STATES_FEATURES;
    fkda_module *one = NULL;
    if (!(features & FKDA_HOPPER_GENERAL_FEATURES)) {
        if (states) return (kernels){&states_fwd_module, &states_segments_module, &segments_module, 0};
        return (kernels){&fwd_module, &segments_module, &segments_module, 0};
    }
    if (!states && gate == 0) one = &bounded_module;
    if (!states && gate == FKDA_SOFTPLUS) one = &softplus_module;
    if (!states && gate == FKDA_ACTIVATED) one = &activated_module;
    if (!states && gate & FKDA_FP32_GATES) one = &fp32_gates_module;
    if (one) return (kernels){one, one, one, SEGMENTS};
    return (kernels){&general_fwd_module, &general_segments_module, &general_segments_module, 0};
}

flash_kda_status fkda_hopper_find_maps(const fkda_driver *driver, int32_t features, int ordinal,
                                       CUfunction *maps, CUfunction *join)
{
    const kernels use = choose_kernels(features);
    flash_kda_status status = fkda_load_module(driver, &segments_module, ordinal);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, use.maps, ordinal);
    if (status != FLASH_KDA_OK) return status;
    *maps = use.maps->functions[ordinal][use.first + MAPS];
    *join = segments_module.functions[ordinal][JOIN];
    return FLASH_KDA_OK;
}

enum { CHUNK = FKDA_HOPPER_CHUNK_PAIR };

/* What all steps of one call need. */
typedef struct call {
    const fkda_driver *driver;
    const fkda_problem *problem;
    const fkda_hopper_plan *plan;
    const CUfunction *fwd, *segments; /* SOLO and PAIR; RELAY and MIXED */
    const CUfunction *maps;           /* MAPS */
    const CUfunction *lists;          /* those that do not look at tokens: LIST and JOIN */
    int *launches;                    /* of this call so far */
} call;

/* Returns whether `ctas` CTAs, one on each SM, can run at the same time on the call's stream. They cannot if
 * the stream belongs to a green context with fewer SMs. The driver refuses a cooperative launch of that many
 * CTAs by itself, except in a capture: the replay of such a capture would wait for ever. */
static bool can_run_together(const fkda_driver *driver, CUstream stream, int64_t ctas)
{
    CUgreenCtx context = NULL;
    fkda_device_resource part = {0};
    if (!driver->cuStreamGetGreenCtx || !driver->cuGreenCtxGetDevResource) return true;
    if (driver->cuStreamGetGreenCtx(stream, &context) || !context) return true;
    if (driver->cuGreenCtxGetDevResource(context, &part, CU_DEV_RESOURCE_TYPE_SM)) return false;
    return ctas <= part.sms;
}

/* The one place that launches. */
CUresult fkda_hopper_launch_kernel(const fkda_driver *driver, CUstream stream, CUfunction kernel, void *args,
                                   fkda_grid grid, fkda_start when)
{
    enum { TOO_LARGE = 720, NOT_SUPPORTED = 801 };
    void *pointers[] = {args};
    fkda_launch_attribute attribute = {0};
    if (when == FKDA_TOGETHER && !can_run_together(driver, stream, grid.ctas)) return TOO_LARGE;
    if (when == FKDA_EARLY) {
        attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmatic_stream_serialization_allowed = 1;
    } else if (when == FKDA_TOGETHER) {
        attribute.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
        attribute.value.cooperative = 1;
    }
    if (!driver->cuLaunchKernelEx) {
        if (when == FKDA_TOGETHER) return NOT_SUPPORTED;
        return driver->cuLaunchKernel(kernel, (unsigned)grid.ctas, 1, 1, (unsigned)grid.threads, 1, 1,
                                      (unsigned)grid.shared_bytes, stream, pointers, NULL);
    }
    const fkda_launch_config config = {
        .grid_x = (unsigned)grid.ctas,
        .grid_y = 1,
        .grid_z = 1,
        .block_x = (unsigned)grid.threads,
        .block_y = 1,
        .block_z = 1,
        .shared_bytes = (unsigned)grid.shared_bytes,
        .stream = stream,
        .attributes = &attribute,
        .attribute_count = when != FKDA_IN_ORDER,
    };
    return driver->cuLaunchKernelEx(&config, kernel, pointers, NULL);
}

static CUresult launch(const call *c, CUfunction kernel, void *args, int64_t ctas, int threads,
                       fkda_start when)
{
    const fkda_grid grid = {ctas, threads, FKDA_HOPPER_SHARED_BYTES};
    return fkda_hopper_launch_kernel(c->driver, c->problem->stream, kernel, args, grid, when);
}

/* Says what failed and, if kernels of the call were launched before, what that means for its results. */
static flash_kda_status fail(const call *c, const char *function, CUresult result)
{
    if (*c->launches == 0) return fkda_driver_fail(function, result);
    return fkda_fail(
        FLASH_KDA_DEVICE_ERROR,
        "%s failed with %s (%d) after %d launches of this call; out and final_state are undefined", function,
        fkda_result_name(result), result, *c->launches);
}

static flash_kda_status launch_or_fail(const call *c, CUfunction kernel, fkda_hopper_fwd_args *args,
                                       int64_t ctas, int threads, fkda_start when)
{
    const char *function = fkda_launching_function(c->driver);
    const CUresult result = launch(c, kernel, args, ctas, threads, when);
    if (!result) {
        ++*c->launches;
        return FLASH_KDA_OK;
    }
    return fail(c, function, result);
}

static flash_kda_status clear_flags(const call *c, int *flags, int64_t count)
{
    const CUresult result =
        c->driver->cuMemsetD32Async((CUdeviceptr)flags, 0, (size_t)count, c->problem->stream);
    return result ? fail(c, "cuMemsetD32Async", result) : FLASH_KDA_OK;
}

CUresult fkda_describe_tensor(const fkda_driver *driver, fkda_tma_descriptor *descriptor,
                              const fkda_token_view *t, const fkda_shape *shape, int chunk)
{
    enum { HALF = FKDA_DIM / 2, BYTES = 2 };
    const uint64_t sizes[] = {FKDA_DIM, (uint64_t)shape->tokens, (uint64_t)t->heads, (uint64_t)shape->batch};
    const uint64_t strides[] = {(uint64_t)t->token_stride * BYTES, (uint64_t)t->head_stride * BYTES,
                                (uint64_t)t->batch_stride * BYTES};
    const uint32_t box[] = {HALF, (uint32_t)chunk, 1, 1}, every[] = {1, 1, 1, 1};
    return driver->cuTensorMapEncodeTiled(descriptor, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, t->data, sizes,
                                          strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

/* What every kernel gets, for chunks of `chunk` tokens. */
static flash_kda_status make_args(const call *c, int chunk, fkda_hopper_fwd_args *args)
{
    const fkda_problem *p = c->problem;
    *args = (fkda_hopper_fwd_args){.fwd = fkda_kernel_args(p)};
    if (args->fwd.checkpoints.states.data && chunk == FKDA_HOPPER_CHUNK_PAIR)
        args->piece_states = (char *)p->workspace + c->plan->memory.piece_states;
    if (p->shape.batch * p->shape.tokens == 0)
        return FLASH_KDA_OK; /* only states are read, and a descriptor of nothing is an error */
    const struct {
        fkda_tma_descriptor *descriptor;
        const fkda_token_view *tensor;
    } all[] = {{&args->q, &p->q}, {&args->k, &p->k}, {&args->g, &p->g}, {&args->v, &p->v}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (all[i].tensor->dtype == FLASH_KDA_F32) continue; /* kernels load gates in fp32 without TMA */
        const CUresult result =
            fkda_describe_tensor(c->driver, all[i].descriptor, all[i].tensor, &p->shape, chunk);
        if (result) return fkda_driver_fail("cuTensorMapEncodeTiled", result);
    }
    return FLASH_KDA_OK;
}

/* A pass of the even-share schedule: `items` heads of sequences or segments at most, in CTAs for chunks of
 * `chunk` tokens. More items than workers are divided where args->handoff has room for states. */
static flash_kda_status launch_even_shares(const call *c, fkda_hopper_fwd_args *args, int chunk,
                                           int64_t items, fkda_start when)
{
    const bool paired = chunk == FKDA_HOPPER_CHUNK_PAIR;
    const int64_t workers = fkda_hopper_workers(chunk, items, c->plan->sms);
    const int64_t ctas = workers * (paired ? FKDA_HOPPER_PAIR_CTAS : 1);
    if (items == workers) args->handoff = (fkda_handoff){0};
    if (args->handoff.flags) {
        const flash_kda_status status =
            clear_flags(c, args->handoff.flags, fkda_hopper_handoff_flags(c->plan->sms));
        if (status != FLASH_KDA_OK) return status;
        when = FKDA_IN_ORDER; /* the flags must be clear before the kernel starts */
    }
    return launch_or_fail(c, c->fwd[paired ? PAIR : SOLO], args, ctas, FKDA_HOPPER_THREADS, when);
}

static flash_kda_status run_whole(const call *c)
{
    const fkda_hopper_whole *w = &c->plan->whole;
    fkda_hopper_fwd_args args;
    const flash_kda_status status = make_args(c, w->chunk, &args);
    if (status != FLASH_KDA_OK) return status;
    if (w->divides) args.handoff = fkda_hopper_handoff(c->problem->workspace, c->plan->sms);
    return launch_even_shares(c, &args, w->chunk, w->heads, FKDA_IN_ORDER);
}

/* Work items of each pass, at most. If lengths differ, the host assumes that one sequence is cut, which
 * leaves the most inner segments, and `slots` bounds the segments of all sequences. */
typedef struct item_counts {
    int64_t first, inner, later;
} item_counts;

static item_counts count_items(const call *c)
{
    const fkda_shape *s = &c->problem->shape;
    const bool equal = fkda_equal_lengths(s);
    const int64_t slots = c->plan->slots, cut = equal ? s->sequences : fkda_least(s->sequences, slots / 2);
    const int64_t first_and_last = equal ? 2 * cut : 2;
    return (item_counts){
        .first = cut * s->heads,
        .inner = (slots - first_and_last) * s->heads,
        .later = (slots + s->sequences - first_and_last) * s->heads,
    };
}

/* Each step of the join has a CTA for each of its items, up to the number of SMs. */
static flash_kda_status launch_join(const call *c, fkda_hopper_fwd_args *args, int64_t cut_heads)
{
    const int64_t row_groups = FKDA_DIM / FKDA_JOIN_ROWS;
    const int64_t grouped = c->plan->groups * c->problem->shape.heads * row_groups;
    const int64_t items[] = {[FKDA_JOIN_COMPOSE] = 2 * grouped,
                             [FKDA_JOIN_CHAIN] = cut_heads * row_groups,
                             [FKDA_JOIN_EXPAND] = grouped};
    const bool in_groups = c->plan->groups > 0 && c->plan->slots > FKDA_MAPS_CHAINED + 2;
    flash_kda_status status = FLASH_KDA_OK;
    for (int step = FKDA_JOIN_COMPOSE; step <= FKDA_JOIN_EXPAND && status == FLASH_KDA_OK; step++) {
        if (step != FKDA_JOIN_CHAIN && !in_groups) continue;
        args->work = step;
        status = launch_or_fail(c, c->lists[JOIN], args, fkda_least(items[step], c->plan->sms),
                                FKDA_JOIN_CTA_THREADS, FKDA_EARLY);
    }
    return status;
}

/* The map pass and the join may start early: maps are computed beside the first segments, and the CTAs of the
 * join have their code and inputs when what they wait for is over. The later pass starts early too, unless
 * handoff flags must be cleared before it. Each kernel ends only after the one before it, so that what an
 * earlier kernel has written is there too. */
static flash_kda_status run_passes(const call *c, fkda_hopper_fwd_args *args)
{
    const item_counts items = count_items(c);
    const fkda_hopper_plan *plan = c->plan;
    flash_kda_status status = FLASH_KDA_OK;
    if (!args->cut.equal_lengths)
        status = launch_or_fail(c, c->lists[LIST], args, 1, FKDA_LIST_THREADS, FKDA_IN_ORDER);
    if (status != FLASH_KDA_OK) return status;

    args->work = FKDA_FIRST_SEGMENTS;
    status = launch_even_shares(c, args, CHUNK, items.first, FKDA_IN_ORDER);
    if (status != FLASH_KDA_OK) return status;

    if (items.inner) {
        const int64_t ctas = FKDA_HOPPER_PAIR_CTAS * fkda_hopper_workers(CHUNK, items.inner, plan->sms);
        args->work = FKDA_INNER_SEGMENTS;
        status = launch_or_fail(c, c->maps[MAPS], args, ctas, FKDA_HOPPER_THREADS, FKDA_EARLY);
        if (status == FLASH_KDA_OK) status = launch_join(c, args, items.first);
        if (status != FLASH_KDA_OK) return status;
    }

    args->work = FKDA_LATER_SEGMENTS;
    if (!c->problem->shape.batch_invariant)
        args->handoff = fkda_hopper_handoff((char *)c->problem->workspace + plan->memory.handoff, plan->sms);
    return launch_even_shares(c, args, CHUNK, items.later, FKDA_EARLY);
}

/* CTAs cannot be launched together where the process or the stream may use only a part of the device. Then,
 * or if the launch fails for another reason, the passes do the same work in the same workspace. */
static flash_kda_status run_relay(const call *c, fkda_hopper_fwd_args *args)
{
    const flash_kda_status status = clear_flags(c, args->cut.flags, c->plan->memory.relay_flags);
    if (status != FLASH_KDA_OK) return status;
    const int64_t ctas = FKDA_HOPPER_PAIR_CTAS * (int64_t)c->plan->relay_pairs;
    if (launch(c, c->segments[RELAY], args, ctas, FKDA_HOPPER_THREADS, FKDA_TOGETHER) == 0)
        return FLASH_KDA_OK;
    args->cut.relay = (fkda_relay){0};
    return run_passes(c, args);
}

/* If the CTAs cannot be launched together, no sequence is cut. */
static flash_kda_status run_mixed(const call *c, const fkda_hopper_fwd_args *pair)
{
    const fkda_hopper_memory *m = &c->plan->memory;
    fkda_hopper_mixed_args args = {.pair = *pair, .mixed = c->plan->mixed};
    flash_kda_status status = make_args(c, FKDA_HOPPER_CHUNK_SOLO, &args.solo);
    if (status != FLASH_KDA_OK) return status;
    /* The flags of the handoff are right behind the flags of the relay, so that one call clears them all. */
    char *base = c->problem->workspace;
    int *flags = (int *)(base + m->flags);
    args.pair.handoff = fkda_hopper_handoff(base + m->handoff, c->plan->sms);
    args.pair.handoff.flags = (int *)(base + m->flags + (size_t)m->relay_flags * sizeof *flags);
    args.solo.cut = args.pair.cut, args.solo.handoff = args.pair.handoff;
    status = clear_flags(c, flags, m->relay_flags + m->mixed_handoff_flags);
    if (status != FLASH_KDA_OK) return status;
    const int64_t ctas = FKDA_HOPPER_PAIR_CTAS * (int64_t)c->plan->mixed.pairs;
    if (launch(c, c->segments[MIXED], &args, ctas, FKDA_HOPPER_THREADS, FKDA_TOGETHER) == 0)
        return FLASH_KDA_OK;
    return run_whole(c);
}

flash_kda_status fkda_hopper_launch(const fkda_driver *driver, const fkda_problem *problem,
                                    const fkda_hopper_plan *plan)
{
    const int ordinal = problem->shape.device.index;
    const kernels use = choose_kernels(problem->shape.features);
    int launches = 0;
    const call c = {.driver = driver,
                    .problem = problem,
                    .plan = plan,
                    .fwd = use.fwd->functions[ordinal],
                    .segments = use.segments->functions[ordinal] + use.first,
                    .maps = use.maps->functions[ordinal] + use.first,
                    .lists = segments_module.functions[ordinal],
                    .launches = &launches};
    flash_kda_status status = fkda_load_module(driver, use.fwd, ordinal);
    if (status != FLASH_KDA_OK) return status;
    if (plan->strategy == FKDA_HOPPER_WHOLE) return run_whole(&c);

    fkda_hopper_fwd_args args;
    status = fkda_load_module(driver, &segments_module, ordinal);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, use.segments, ordinal);
    if (status == FLASH_KDA_OK) status = make_args(&c, CHUNK, &args);
    if (status != FLASH_KDA_OK) return status;
    args.cut = fkda_hopper_cut(problem, plan);
    switch (plan->strategy) {
    case FKDA_HOPPER_RELAY: return run_relay(&c, &args);
    case FKDA_HOPPER_MIXED: return run_mixed(&c, &args);
    default: return run_passes(&c, &args);
    }
}
