/*
 * Plans and launches the walks of the backward pass: states at borders between segments, forwards, and
 * gradients with respect to them, backwards. A walk is a forward pass without outputs, and runs by the plan
 * of one. Neither walk needs the other, so the second one starts as soon as SMs are free.
 */
#include "walks.h"

#include "../kernel_args.h"
#include "../modules.h"
#include "launch.h"
#include "workspace.h"

extern const unsigned char fkda_fatbin_hopper_walk[], fkda_fatbin_hopper_general_walk[];

enum { STATES, GRADIENTS, WALKS };
enum { SOLO, PAIR, KERNELS };

static fkda_module usual_module = {
    .image = fkda_fatbin_hopper_walk,
    .names = {[KERNELS * STATES + SOLO] = "fkda_hopper_walk_states_solo",
              [KERNELS * STATES + PAIR] = "fkda_hopper_walk_states_pair",
              [KERNELS * GRADIENTS + SOLO] = "fkda_hopper_walk_gradients_solo",
              [KERNELS * GRADIENTS + PAIR] = "fkda_hopper_walk_gradients_pair"},
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

/* The kernels for the usual arithmetic take states in every layout and type. */
static bool is_usual(const fkda_problem *p)
{
    return p->gate == FLASH_KDA_GATE_BOUNDED && p->A_log && p->dt_bias && !p->qk_is_normalised &&
           p->beta_kind == FLASH_KDA_BETA_SIGMOID && p->g.dtype == FLASH_KDA_BF16 &&
           p->beta.dtype == FLASH_KDA_BF16;
}

fkda_walks_plan fkda_plan_walks(const fkda_shape *shape, int sms)
{
    fkda_shape s = *shape;
    s.cut = FLASH_KDA_CUT_NEVER;
    const fkda_hopper_plan plan = fkda_hopper_plan_for(&s, sms);
    return (fkda_walks_plan){.plan = plan, .bytes = (int64_t)plan.memory.bytes};
}

/* What the kernels of both walks get. */
static fkda_hopper_fwd_args common_args(const fkda_bwd_problem *p, const fkda_walk_results *results)
{
    fkda_hopper_fwd_args args = {.fwd = fkda_kernel_args(&p->fwd)};
    args.fwd.checkpoints = (fkda_checkpoint_args){.states = {.slots = results->borders}};
    args.fwd.out = NULL;
    args.fwd.final_state = (fkda_state_args){0};
    return args;
}

static fkda_hopper_fwd_args args_of_states(const fkda_bwd_problem *p, const fkda_walk_results *results)
{
    fkda_hopper_fwd_args args = common_args(p, results);
    args.fwd.checkpoints.states.data = results->states;
    args.fwd.state_is_bf16 = p->fwd.initial_state.dtype == FLASH_KDA_BF16;
    return args;
}

/* The way back begins with the gradient with respect to the final state, and has gradients of outputs in the
 * place of values. */
static fkda_hopper_fwd_args args_of_gradients(const fkda_bwd_problem *p, const fkda_walk_results *results)
{
    fkda_hopper_fwd_args args = common_args(p, results);
    args.fwd.checkpoints.states.data = results->gradients;
    args.fwd.initial_state = fkda_state_args_of(&p->dfinal_state);
    args.fwd.state_is_bf16 = p->dfinal_state.dtype == FLASH_KDA_BF16;
    args.fwd.v = p->dout.data;
    args.fwd.v_strides = fkda_strides_of(&p->dout);
    return args;
}

static CUresult describe_inputs(const fkda_driver *driver, const fkda_bwd_problem *p,
                                const fkda_token_view *values, int chunk, fkda_hopper_fwd_args *args)
{
    const struct {
        fkda_tma_descriptor *descriptor;
        const fkda_token_view *tensor;
    } all[] = {{&args->q, &p->fwd.q}, {&args->k, &p->fwd.k}, {&args->g, &p->fwd.g}, {&args->v, values}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (!all[i].tensor->data || all[i].tensor->dtype == FLASH_KDA_F32) continue;
        const CUresult result =
            fkda_hopper_describe(driver, all[i].descriptor, all[i].tensor, &p->fwd.shape, chunk);
        if (result) return result;
    }
    return 0;
}

flash_kda_status fkda_launch_walks(const fkda_driver *driver, const fkda_bwd_problem *p,
                                   const fkda_walks_plan *walks, const fkda_walk_results *results)
{
    const fkda_hopper_plan *plan = &walks->plan;
    const int ordinal = p->fwd.shape.device.index, chunk = plan->whole.chunk;
    const bool paired = chunk == FKDA_HOPPER_CHUNK_PAIR;
    const CUstream stream = p->fwd.stream;
    fkda_module *const module = is_usual(&p->fwd) ? &usual_module : &general_module;
    fkda_hopper_fwd_args args[WALKS] = {[STATES] = args_of_states(p, results),
                                        [GRADIENTS] = args_of_gradients(p, results)};
    const fkda_token_view *const values[WALKS] = {[STATES] = &p->fwd.v, [GRADIENTS] = &p->dout};
    CUresult result = 0;
    flash_kda_status status = fkda_load_module(driver, module, ordinal);
    if (status != FLASH_KDA_OK) return status;
    for (int i = 0; i < WALKS; i++) {
        result = describe_inputs(driver, p, values[i], chunk, &args[i]);
        if (result) return fkda_driver_fail("cuTensorMapEncodeTiled", result);
        if (!plan->whole.divides) continue;
        args[i].handoff =
            fkda_hopper_handoff((char *)results->workspace + i * walks->bytes, plan->sms);
        result = driver->cuMemsetD32Async((CUdeviceptr)args[i].handoff.flags, 0,
                                          (size_t)fkda_hopper_handoff_flags(plan->sms), stream);
        if (result) return fkda_driver_fail("cuMemsetD32Async", result);
    }
    for (int i = 0; i < WALKS; i++) {
        result = fkda_hopper_launch_kernel(
            driver, stream, module->functions[ordinal][KERNELS * i + (paired ? PAIR : SOLO)], &args[i],
            plan->whole.workers * (paired ? FKDA_HOPPER_PAIR_CTAS : 1), FKDA_HOPPER_THREADS,
            i == STATES ? FKDA_IN_ORDER : FKDA_EARLY);
        if (result)
            return fkda_driver_fail(driver->cuLaunchKernelEx ? "cuLaunchKernelEx" : "cuLaunchKernel", result);
    }
    return FLASH_KDA_OK;
}
