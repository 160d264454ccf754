/* The backward pass on a GPU: plans the workspace and launches kernels/backward/backward.cu. */
#include "../../kernels/backward/bwd_args.h"
#include "../../kernels/backward/bwd_shape.h"
#include "cuda.h"
#include "kernel_args.h"
#include "modules.h"

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
    int64_t row_slots, slots; /* segments of a row without cu_seqlens, and of all sequences */
    int64_t ctas;             /* of the launch for gradients */
    bool cuts;                /* whether a sequence may have more than one segment */
    bool has_parts;           /* heads of q and k are shared */
    int64_t gradients_at, records_at, sums_at, dq_at, dk_at, floats;
} bwd_plan;

static bwd_plan make_plan(const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    bwd_plan plan = {.row_slots = fkda_clamp((s->tokens + SEGMENT - 1) / SEGMENT, 1, INT64_MAX)};
    plan.slots = s->has_cu_seqlens ? s->tokens / SEGMENT + s->sequences : plan.row_slots * s->sequences;
    plan.cuts = s->tokens > SEGMENT && !(s->max_seqlen && s->max_seqlen <= SEGMENT);
    plan.ctas = fkda_clamp(plan.slots * s->heads, 0, sms);
    plan.has_parts = s->heads != s->qk_heads;
    const int64_t borders = plan.cuts ? plan.slots * s->heads * STATE : 0,
                  parts = plan.has_parts ? s->batch * s->tokens * s->heads * FKDA_DIM : 0;
    plan.gradients_at = borders;
    plan.records_at = plan.gradients_at + borders;
    plan.sums_at = plan.records_at + plan.ctas * (SEGMENT / CHUNK) * FKDA_BWD_RECORD;
    plan.dq_at = plan.sums_at + (p->wants_parameters ? plan.slots * s->heads * SUMS : 0);
    plan.dk_at = plan.dq_at + parts;
    plan.floats = plan.dk_at + parts;
    return plan;
}

/* Without a device the call fails before it needs the workspace. */
static int sms_of(const fkda_bwd_problem *p)
{
    int sms;
    return fkda_cuda_sms(p->fwd.shape.device.index, &sms) == FLASH_KDA_OK ? sms : 1;
}

size_t fkda_cuda_bwd_workspace(const fkda_bwd_problem *p)
{
    return (size_t)make_plan(p, sms_of(p)).floats * sizeof(float);
}

static fkda_bwd_args make_args(const fkda_bwd_problem *p, const bwd_plan *plan)
{
    float *const workspace = p->fwd.workspace;
    fkda_bwd_args args = {
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
        .segment = SEGMENT,
        .row_slots = (int)plan->row_slots,
        .slots = plan->slots,
        .states = workspace,
        .gradients = workspace + plan->gradients_at,
        .records = workspace + plan->records_at,
    };
    if (p->wants_parameters) args.sums = workspace + plan->sums_at;
    if (plan->has_parts) args.dq_parts = workspace + plan->dq_at, args.dk_parts = workspace + plan->dk_at;
    return args;
}

typedef struct bwd_launch {
    int kernel;
    int64_t ctas;
    unsigned threads, shared_bytes;
} bwd_launch;

static flash_kda_status launch(const fkda_driver *driver, const fkda_bwd_problem *p, const bwd_plan *plan)
{
    enum { ROWS = FKDA_BWD_REDUCE_THREADS / 32 }; /* of a CTA of the reduction */
    const fkda_shape *s = &p->fwd.shape;
    const int ordinal = s->device.index;
    const int64_t rows = plan->has_parts ? s->batch * s->tokens * s->qk_heads : 0;
    fkda_bwd_args args = make_args(p, plan);
    void *pointers[] = {&args};
    const bwd_launch launches[] = {
        {WALK, plan->cuts ? 2 * s->sequences * s->heads : 0, FKDA_BWD_THREADS, FKDA_BWD_SHARED_BYTES},
        {GRADIENTS, plan->ctas, FKDA_BWD_THREADS, FKDA_BWD_SHARED_BYTES},
        {REDUCE, (p->wants_parameters ? s->heads : 0) + (rows + ROWS - 1) / ROWS, FKDA_BWD_REDUCE_THREADS,
         FKDA_DIM * sizeof(double)},
    };
    const flash_kda_status status = fkda_load_module(driver, &module, ordinal);
    if (status != FLASH_KDA_OK) return status;
    for (size_t i = 0; i < sizeof launches / sizeof *launches; i++) {
        const bwd_launch *l = &launches[i];
        if (!l->ctas) continue;
        const CUresult result =
            driver->cuLaunchKernel(module.functions[ordinal][l->kernel], (unsigned)l->ctas, 1, 1, l->threads,
                                   1, 1, l->shared_bytes, (CUstream)p->fwd.stream, pointers, NULL);
        if (result) return fkda_driver_fail("cuLaunchKernel", result);
    }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_cuda_bwd(const fkda_bwd_problem *p)
{
    const fkda_driver *driver;
    const bwd_plan plan = make_plan(p, sms_of(p));
    flash_kda_status status = fkda_enter_device(p->fwd.shape.device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = launch(driver, p, &plan);
    return fkda_leave_device(driver, status);
}
