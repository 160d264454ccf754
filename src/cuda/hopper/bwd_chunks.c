/*
 * The backward pass of the kernel "hopper" by chunks: every chunk of 32 tokens has the state before it and the
 * gradient with respect to the state after it in the workspace, so that all chunks can be computed at the same
 * time (kernels/hopper/bwd/chunks).
 */
#include "bwd_chunks.h"
#include "../../../kernels/hopper/bwd/bwd_args.h"
#include "../../../kernels/hopper/bwd/bwd_shape.h"
#include "../cuda.h"
#include "launch.h"
#include "walks.h"

extern const unsigned char fkda_fatbin_hopper_bwd_chunks[];

enum { USUAL, BOUNDED, GENERAL };

static fkda_module module = {
    .image = fkda_fatbin_hopper_bwd_chunks,
    .names = {[USUAL] = "fkda_hopper_bwd_chunks",
              [BOUNDED] = "fkda_hopper_bwd_bounded_chunks",
              [GENERAL] = "fkda_hopper_bwd_general_chunks"},
    .shared_bytes = FKDA_HOPPER_CHUNK_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum { CHUNK = FKDA_HOPPER_BWD_CHUNK };

/* Where each part of the workspace begins, in bytes. */
typedef struct chunk_plan {
    fkda_bwd_segments chunks;
    fkda_walks_plan walks;
    int64_t gradients_at, walks_at, sums_at, dq_at, dk_at, bytes;
} chunk_plan;

static chunk_plan make_plan(const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    chunk_plan plan = {.chunks = fkda_cut_for_bwd(s, CHUNK), .walks = fkda_plan_walks(s, sms)};
    const int64_t items = plan.chunks.slots * s->heads,
                  parts = s->heads != s->qk_heads ? s->batch * s->tokens * s->heads * FKDA_DIM : 0;
    int64_t end = 0;
    fkda_take_part(&end, items * FKDA_HOPPER_BORDER_IMAGE);
    plan.gradients_at = fkda_take_part(&end, items * FKDA_HOPPER_BORDER_IMAGE);
    plan.walks_at = fkda_take_part(&end, plan.walks.bytes);
    plan.sums_at =
        fkda_take_part(&end, p->wants_parameters ? items * 2 * FKDA_DIM * (int64_t)sizeof(float) : 0);
    plan.dq_at = fkda_take_part(&end, parts * (int64_t)sizeof(float));
    plan.dk_at = fkda_take_part(&end, parts * (int64_t)sizeof(float));
    plan.bytes = end;
    return plan;
}

static int kernel_for(const fkda_problem *p)
{
    if (p->shape.features & FKDA_HOPPER_GATE_FEATURES) return GENERAL;
    return p->A_log && p->dt_bias && p->beta.dtype != FLASH_KDA_F32 && !p->qk_is_normalised &&
                   p->beta_kind == FLASH_KDA_BETA_SIGMOID
               ? USUAL
               : BOUNDED;
}

bool fkda_hopper_bwd_knows_chunks(const fkda_bwd_problem *p)
{
    (void)p;
    return true;
}

/* Without a device the call fails before it needs the workspace. */
static int sms_of(const fkda_bwd_problem *p)
{
    int sms;
    return fkda_cuda_sms(p->fwd.shape.device.index, &sms) == FLASH_KDA_OK ? sms : 1;
}

size_t fkda_hopper_bwd_chunks_workspace(const fkda_bwd_problem *p)
{
    return (size_t)make_plan(p, sms_of(p)).bytes;
}

static fkda_bwd_args make_args(const fkda_bwd_problem *p, const chunk_plan *plan)
{
    unsigned char *const workspace = p->fwd.workspace;
    fkda_bwd_args args = fkda_bwd_args_of(p);
    args.segment = CHUNK;
    args.row_slots = (int)plan->chunks.row_slots;
    args.slots = plan->chunks.slots;
    if (p->wants_parameters) args.sums = (float *)(workspace + plan->sums_at);
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

flash_kda_status fkda_hopper_bwd_by_chunks(const fkda_driver *driver, const fkda_bwd_problem *p,
                                           fkda_module *sums, int reduce)
{
    const fkda_shape *s = &p->fwd.shape;
    const chunk_plan plan = make_plan(p, sms_of(p));
    unsigned char *const workspace = p->fwd.workspace;
    const fkda_walk_results results = {workspace, workspace + plan.gradients_at, plan.chunks.slots,
                                       workspace + plan.walks_at};
    fkda_hopper_chunk_args args = {
        .bwd = make_args(p, &plan), .states = results.states, .gradients = results.gradients};
    fkda_hopper_bwd_args sum_args = {.bwd = args.bwd};
    const fkda_bwd_launch launch = {kernel_for(&p->fwd), plan.chunks.slots * s->heads,
                                    FKDA_HOPPER_CHUNK_THREADS, FKDA_HOPPER_CHUNK_SHARED_BYTES},
                          reduction = fkda_bwd_reduction(p, reduce);
    flash_kda_status status = describe_tensors(driver, p, &args);
    if (status == FLASH_KDA_OK) status = fkda_launch_walks(driver, p, &plan.walks, &results);
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd(driver, &module, p, &launch, 1, &args);
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd(driver, sums, p, &reduction, 1, &sum_args);
    return status;
}
