/*
 * The backward pass of the kernel "hopper". Two walks leave the state before every chunk of 32 tokens and the
 * gradient with respect to the state after it in the workspace (walks.c). With these all chunks are computed
 * at the same time (kernels/hopper/bwd/chunks), and so are the gradients with respect to initial states
 * (kernels/hopper/bwd/first.cu). Sums over heads and chunks are those of the kernel "portable".
 */
#include "../../../kernels/backward/bwd_shape.h"
#include "../../../kernels/hopper/bwd/chunks/chunk_args.h"
#include "../bwd_args_of.h"
#include "../bwd_waves.h"
#include "../cuda.h"
#include "launch.h"
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
    take(&end, items * FKDA_HOPPER_BORDER_IMAGE);
    plan.gradients_at = take(&end, items * FKDA_HOPPER_BORDER_IMAGE);
    plan.walks_at = take(&end, plan.walks.bytes);
    plan.sums_at = take(&end, p->wants_parameters ? items * 2 * FKDA_DIM * (int64_t)sizeof(float) : 0);
    plan.dq_at = take(&end, parts * (int64_t)sizeof(float));
    plan.dk_at = take(&end, parts * (int64_t)sizeof(float));
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

static size_t workspace_of(const fkda_bwd_problem *p, int sms)
{
    return (size_t)make_plan(p, sms).bytes;
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

static flash_kda_status run(const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    const fkda_driver *driver;
    const chunk_plan plan = make_plan(p, sms);
    unsigned char *const workspace = p->fwd.workspace;
    const fkda_walk_results results = {workspace, workspace + plan.gradients_at, plan.chunks.slots,
                                       workspace + plan.walks_at};
    fkda_hopper_chunk_args args = {
        .bwd = make_args(p, &plan), .states = results.states, .gradients = results.gradients};
    const fkda_bwd_launch chunks = {kernel_for(&p->fwd), plan.chunks.slots * s->heads,
                                    FKDA_HOPPER_CHUNK_THREADS, FKDA_HOPPER_CHUNK_SHARED_BYTES};
    const fkda_bwd_launch first = {0, p->dinitial_state.data ? s->sequences * s->heads : 0, FKDA_BWD_THREADS,
                                   FKDA_BWD_SHARED_BYTES};
    flash_kda_status status = fkda_enter_device(s->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = describe_tensors(driver, p, &args);
    if (status == FLASH_KDA_OK) status = fkda_launch_walks(driver, p, &plan.walks, &results);
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd(driver, &module, p, &chunks, 1, &args);
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd(driver, &first_module, p, &first, 1, &args);
    if (status == FLASH_KDA_OK) status = fkda_launch_bwd_sums(driver, p, &args.bwd);
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
