/* The backward pass on a GPU: plans the workspace and launches kernels/backward/backward.cu. */
#include "../../kernels/backward/bwd_shape.h"
#include "bwd_args_of.h"
#include "bwd_waves.h"
#include "cuda.h"
#include "kernel_args.h"

extern const unsigned char fkda_fatbin_backward[];

enum { WALK, GRADIENTS, REDUCE };

static fkda_module module = {
    .image = fkda_fatbin_backward,
    .names = {"fkda_bwd_walk", "fkda_bwd_gradients", "fkda_bwd_reduce"},
    .shared_bytes = FKDA_BWD_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum {
    CHUNK = 16,
    /* Tokens of a segment, a multiple of CHUNK: a CTA keeps a state at every border between segments. Longer
     * segments need fewer such states, more room for what a CTA keeps of each chunk, and leave fewer CTAs
     * with work. make_plan() makes everything of this number that depends on it, and the kernels get it as
     * fkda_bwd_args.segment. docs/backward-kernel.md names sizes that follow from it. Group `segments` of
     * tests/c/test_backward.c finds mistakes at borders of segments of 128, 256 and 512 tokens. */
    SEGMENT = 128,
    STATE = FKDA_DIM * FKDA_DIM,
    SUMS = 2 * FKDA_DIM,
};

/* Where each part of the workspace begins, in floats, and how the work is divided. It depends on the shape,
 * the device and which gradients there are. */
typedef struct bwd_plan {
    fkda_bwd_segments segments;
    int64_t ctas;   /* of the launch for gradients */
    bool has_parts; /* heads of q and k are shared */
    int64_t gradients_at, records_at, sums_at, dq_at, dk_at, floats;
} bwd_plan;

static bwd_plan make_plan(const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    bwd_plan plan = {.segments = fkda_cut_for_bwd(s, SEGMENT)};
    const int64_t slots = plan.segments.slots;
    plan.ctas = fkda_clamp(slots * s->heads, 0, sms);
    plan.has_parts = s->heads != s->qk_heads;
    const int64_t borders = plan.segments.cuts ? slots * s->heads * STATE : 0,
                  parts = plan.has_parts ? s->batch * s->tokens * s->heads * FKDA_DIM : 0;
    plan.gradients_at = borders;
    plan.records_at = plan.gradients_at + borders;
    plan.sums_at = plan.records_at + plan.ctas * (SEGMENT / CHUNK) * FKDA_BWD_RECORD;
    plan.dq_at = plan.sums_at + (p->wants_parameters ? slots * s->heads * SUMS : 0);
    plan.dk_at = plan.dq_at + parts;
    plan.floats = plan.dk_at + parts;
    return plan;
}

static size_t workspace_of(const fkda_bwd_problem *p, int sms)
{
    return (size_t)make_plan(p, sms).floats * sizeof(float);
}

fkda_bwd_args fkda_bwd_args_of(const fkda_bwd_problem *p)
{
    return (fkda_bwd_args){
        .fwd = fkda_kernel_args(&p->fwd),
        .dout = p->dout.data,
        .dout_strides = fkda_strides_of(&p->dout),
        .dfinal_state = fkda_state_args_of(&p->dfinal_state),
        .initial_is_bf16 = p->fwd.initial_state.dtype == FLASH_KDA_BF16,
        .dfinal_is_bf16 = p->dfinal_state.dtype == FLASH_KDA_BF16,
        .dq = p->dq.data,
        .dk = p->dk.data,
        .dv = p->dv.data,
        .dg = p->dg.data,
        .dbeta = p->dbeta.data,
        .dq_strides = fkda_strides_of(&p->dq),
        .dk_strides = fkda_strides_of(&p->dk),
        .dv_strides = fkda_strides_of(&p->dv),
        .dg_strides = fkda_strides_of(&p->dg),
        .dbeta_strides = fkda_strides_of(&p->dbeta),
        .dinitial_state = fkda_state_args_of(&p->dinitial_state),
        .dA_log = p->dA_log,
        .ddt_bias = p->ddt_bias,
    };
}

fkda_bwd_segments fkda_cut_for_bwd(const fkda_shape *s, int segment)
{
    fkda_bwd_segments cut = {.row_slots = fkda_clamp((s->tokens + segment - 1) / segment, 1, INT64_MAX)};
    cut.slots = s->has_cu_seqlens ? s->tokens / segment + s->sequences : cut.row_slots * s->sequences;
    cut.cuts = s->tokens > segment && !(s->max_seqlen && s->max_seqlen <= segment);
    return cut;
}

/* The launch of the kernel for sums over heads and segments. */
static fkda_bwd_launch reduction_of(const fkda_bwd_problem *p)
{
    enum { ROWS = FKDA_BWD_REDUCE_THREADS / 32 }; /* of a CTA */
    const fkda_shape *s = &p->fwd.shape;
    const int64_t rows = s->heads != s->qk_heads ? s->batch * s->tokens * s->qk_heads : 0;
    return (fkda_bwd_launch){REDUCE, (p->wants_parameters ? s->heads : 0) + (rows + ROWS - 1) / ROWS,
                             FKDA_BWD_REDUCE_THREADS, FKDA_BWD_REDUCE_SHARED_BYTES};
}

flash_kda_status fkda_launch_bwd(const fkda_driver *driver, fkda_module *kernels, const fkda_bwd_problem *p,
                                 const fkda_bwd_launch *launches, size_t count, void *args)
{
    const int ordinal = p->fwd.shape.device.index;
    void *pointers[] = {args};
    const flash_kda_status status = fkda_load_module(driver, kernels, ordinal);
    if (status != FLASH_KDA_OK) return status;
    for (size_t i = 0; i < count; i++) {
        const fkda_bwd_launch *l = &launches[i];
        if (!l->ctas) continue;
        const CUresult result = driver->cuLaunchKernel(
            kernels->functions[ordinal][l->kernel], (unsigned)l->ctas, 1, 1, l->threads, 1, 1,
            l->shared_bytes, (CUstream)p->fwd.stream, pointers, NULL);
        if (result) return fkda_driver_fail("cuLaunchKernel", result);
    }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_launch_bwd_sums(const fkda_driver *driver, const fkda_bwd_problem *p,
                                      fkda_bwd_args *args)
{
    const fkda_bwd_launch launch = reduction_of(p);
    return fkda_launch_bwd(driver, &module, p, &launch, 1, args);
}

static fkda_bwd_args make_args(const fkda_bwd_problem *p, const bwd_plan *plan)
{
    float *const workspace = p->fwd.workspace;
    fkda_bwd_args args = fkda_bwd_args_of(p);
    args.segment = SEGMENT;
    args.row_slots = (int)plan->segments.row_slots;
    args.slots = plan->segments.slots;
    args.states = workspace;
    args.gradients = workspace + plan->gradients_at;
    args.records = workspace + plan->records_at;
    if (p->wants_parameters) args.sums = workspace + plan->sums_at;
    if (plan->has_parts) args.dq_parts = workspace + plan->dq_at, args.dk_parts = workspace + plan->dk_at;
    return args;
}

static flash_kda_status run(const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    const fkda_driver *driver;
    const bwd_plan plan = make_plan(p, sms);
    fkda_bwd_args args = make_args(p, &plan);
    const fkda_bwd_launch launches[] = {
        {WALK, plan.segments.cuts ? 2 * s->sequences * s->heads : 0, FKDA_BWD_THREADS, FKDA_BWD_SHARED_BYTES},
        {GRADIENTS, plan.ctas, FKDA_BWD_THREADS, FKDA_BWD_SHARED_BYTES},
        reduction_of(p),
    };
    flash_kda_status status = fkda_enter_device(s->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_launch_bwd(driver, &module, p, launches, sizeof launches / sizeof *launches, &args);
    return fkda_leave_device(driver, status);
}

static const fkda_bwd_kernel portable = {workspace_of, run};

size_t fkda_cuda_bwd_workspace(const fkda_bwd_problem *p)
{
    return fkda_bwd_waves_workspace(&portable, p);
}

flash_kda_status fkda_cuda_bwd(const fkda_bwd_problem *p)
{
    return fkda_run_bwd_waves(&portable, p);
}

size_t fkda_portable_saved_bytes(const fkda_shape *shape)
{
    (void)shape;
    return 0;
}
