/* The backward pass of the kernel "hopper": plans the workspace and launches kernels/hopper/bwd/bwd.cu. */
#include "../../../kernels/hopper/bwd/bwd_args.h"
#include "../../../kernels/hopper/bwd/bwd_shape.h"
#include "../bwd_args_of.h"
#include "../cuda.h"
#include "../modules.h"
#include "bwd_chunks.h"

extern const unsigned char fkda_fatbin_hopper_bwd[];

enum { WALK, GRADIENTS, REDUCE };

static fkda_module module = {
    .image = fkda_fatbin_hopper_bwd,
    .names = {"fkda_hopper_bwd_walk", "fkda_hopper_bwd_gradients", "fkda_hopper_bwd_reduce"},
    .shared_bytes = FKDA_HOPPER_BWD_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum { CHUNK = 16, SEGMENT = FKDA_HOPPER_BWD_SEGMENT };

/* Where each part of the workspace begins, in bytes. */
typedef struct hopper_bwd_plan {
    fkda_bwd_segments segments;
    int64_t ctas;          /* of the launch for gradients */
    int64_t record_chunks; /* chunks of a CTA's records */
    int64_t gradients_at, state_units_at, gradient_units_at, records_at, sums_at, dq_at, dk_at, bytes;
} hopper_bwd_plan;

static hopper_bwd_plan make_plan(const fkda_bwd_problem *p, int sms)
{
    const fkda_shape *s = &p->fwd.shape;
    hopper_bwd_plan plan = {.segments = fkda_cut_for_bwd(s, SEGMENT)};
    const int64_t items = plan.segments.slots * s->heads, turns = (items + sms - 1) / sms,
                  borders = plan.segments.cuts ? s->batch * s->tokens / SEGMENT * s->heads : 0,
                  parts = s->heads != s->qk_heads ? s->batch * s->tokens * s->heads * FKDA_DIM : 0;
    const int64_t longest = s->max_seqlen && s->max_seqlen < s->tokens ? s->max_seqlen : s->tokens;
    plan.record_chunks = ((longest < SEGMENT ? longest : SEGMENT) + CHUNK - 1) / CHUNK;
    /* No more CTAs than it takes for that many turns: each has records of its own. */
    plan.ctas = turns ? (items + turns - 1) / turns : 0;
    int64_t end = 0;
    fkda_take_part(&end, borders * FKDA_HOPPER_BWD_IMAGE);
    plan.gradients_at = fkda_take_part(&end, borders * FKDA_HOPPER_BWD_IMAGE);
    plan.state_units_at = fkda_take_part(&end, borders * (int64_t)sizeof(float));
    plan.gradient_units_at = fkda_take_part(&end, borders * (int64_t)sizeof(float));
    plan.records_at = fkda_take_part(&end, plan.ctas * plan.record_chunks * FKDA_HOPPER_BWD_RECORD);
    plan.sums_at = fkda_take_part(&end, p->wants_parameters ? items * 2 * FKDA_DIM * (int64_t)sizeof(float) : 0);
    plan.dq_at = fkda_take_part(&end, parts * (int64_t)sizeof(float));
    plan.dk_at = fkda_take_part(&end, parts * (int64_t)sizeof(float));
    plan.bytes = end;
    return plan;
}

/* Without a device the call fails before it needs the workspace. */
static int sms_of(const fkda_bwd_problem *p)
{
    int sms;
    return fkda_cuda_sms(p->fwd.shape.device.index, &sms) == FLASH_KDA_OK ? sms : 1;
}

size_t fkda_hopper_bwd_workspace(const fkda_bwd_problem *p)
{
    if (fkda_hopper_bwd_knows_chunks(p)) return fkda_hopper_bwd_chunks_workspace(p);
    return (size_t)make_plan(p, sms_of(p)).bytes;
}

static fkda_hopper_bwd_args make_args(const fkda_bwd_problem *p, const hopper_bwd_plan *plan)
{
    unsigned char *const workspace = p->fwd.workspace;
    fkda_hopper_bwd_args args = {
        .bwd = fkda_bwd_args_of(p),
        .states = plan->segments.cuts ? workspace : NULL,
        .gradients = plan->segments.cuts ? workspace + plan->gradients_at : NULL,
        .state_units = (float *)(workspace + plan->state_units_at),
        .gradient_units = (float *)(workspace + plan->gradient_units_at),
        .records = workspace + plan->records_at,
        .record_chunks = (int)plan->record_chunks,
    };
    args.bwd.segment = SEGMENT;
    args.bwd.row_slots = (int)plan->segments.row_slots;
    args.bwd.slots = plan->segments.slots;
    if (p->wants_parameters) args.bwd.sums = (float *)(workspace + plan->sums_at);
    if (p->fwd.shape.heads != p->fwd.shape.qk_heads) {
        args.bwd.dq_parts = (float *)(workspace + plan->dq_at);
        args.bwd.dk_parts = (float *)(workspace + plan->dk_at);
    }
    return args;
}

flash_kda_status fkda_hopper_bwd(const fkda_bwd_problem *p)
{
    const fkda_shape *s = &p->fwd.shape;
    const fkda_driver *driver;
    const hopper_bwd_plan plan = make_plan(p, sms_of(p));
    const unsigned threads = FKDA_HOPPER_BWD_THREADS, shared = FKDA_HOPPER_BWD_SHARED_BYTES;
    fkda_hopper_bwd_args args = make_args(p, &plan);
    const fkda_bwd_launch launches[] = {
        {WALK, plan.segments.cuts ? 2 * s->sequences * s->heads : 0, threads, shared},
        {GRADIENTS, plan.ctas, threads, shared},
        fkda_bwd_reduction(p, REDUCE),
    };
    flash_kda_status status = fkda_enter_device(s->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    if (fkda_hopper_bwd_knows_chunks(p))
        status = fkda_hopper_bwd_by_chunks(driver, p, &module, REDUCE);
    else
        status = fkda_launch_bwd(driver, &module, p, launches, sizeof launches / sizeof *launches, &args);
    return fkda_leave_device(driver, status);
}
