/*
 * Maps of pieces of sequences on a GPU, with the kernels "portable" and "hopper".
 *
 * The forward pass of a kernel gives both results: `state` as its final state, and `map` as the final state
 * of identities if v is zeros. Nobody reads the outputs, so all tokens of a head have one place for theirs.
 */
#include "../../kernels/map/map_args.h"
#include "../errors.h"
#include "../kernel.h"
#include "cuda.h"
#include "driver.h"
#include "modules.h"

extern const unsigned char fkda_fatbin_map[];

enum { JOIN, STATES };

static fkda_module module = {
    .image = fkda_fatbin_map,
    .names = {[JOIN] = "fkda_join_maps", [STATES] = "fkda_states"},
    .shared_bytes = FKDA_JOIN_MAP_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum { MATRIX = FKDA_DIM * FKDA_DIM, ROW_BYTES = FKDA_DIM * (int)sizeof(uint16_t), ALIGNMENT = 256 };

/* Offsets into the workspace, in bytes. */
typedef struct map_memory {
    size_t outputs, zeros; /* [HV, V], [V] */
    size_t identities;     /* [HV, K, K], which all sequences begin with */
    size_t initial;        /* [N, HV, ..], the caller's initial state in fp32, if it is in bf16 */
    size_t forward;        /* the workspace of a forward pass */
    size_t bytes;
} map_memory;

static size_t take(size_t *end, size_t bytes)
{
    const size_t begin = *end;
    *end = (begin + bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return begin;
}

static map_memory lay_out(const fkda_map_problem *p, size_t forward_bytes)
{
    const size_t heads = (size_t)p->fwd.shape.heads;
    map_memory m = {0};
    m.outputs = take(&m.bytes, heads * ROW_BYTES);
    m.zeros = take(&m.bytes, p->wants_map ? ROW_BYTES : 0);
    m.identities = take(&m.bytes, p->wants_map ? heads * MATRIX * sizeof(float) : 0);
    m.initial = take(&m.bytes, p->wants_state && p->initial_is_bf16
                                   ? (size_t)p->fwd.shape.sequences * heads * MATRIX * sizeof(float)
                                   : 0);
    m.forward = take(&m.bytes, forward_bytes);
    return m;
}

/* The check of the arguments has found a kernel and a device, so a plan can only fail where the driver does.
 * The call then fails for the same reason. */
size_t fkda_cuda_map_workspace(const fkda_map_problem *p)
{
    const fkda_plan *plan;
    const flash_kda_status status = fkda_find_plan(&p->fwd.shape, &plan);
    return lay_out(p, status == FLASH_KDA_OK ? plan->workspace_bytes : 0).bytes;
}

/* ---- Launches ------------------------------------------------------------------------------------------ */

static flash_kda_status launch(const fkda_driver *driver, int ordinal, void *stream, int kernel, int64_t ctas,
                               unsigned threads, unsigned shared_bytes, void *args)
{
    void *pointers[] = {args};
    const flash_kda_status status = fkda_load_module(driver, &module, ordinal);
    if (status != FLASH_KDA_OK || ctas == 0) return status;
    const CUresult result =
        driver->cuLaunchKernel(module.functions[ordinal][kernel], (unsigned)ctas, 1, 1, threads, 1, 1,
                               shared_bytes, (CUstream)stream, pointers, NULL);
    return result ? fkda_driver_fail("cuLaunchKernel", result) : FLASH_KDA_OK;
}

/* Writes the states of `sequences` sequences: identities, or `from` in fp32. */
static flash_kda_status write_states(const fkda_driver *driver, const fkda_problem *p, size_t at,
                                     int64_t sequences, const fkda_state_view *from)
{
    fkda_states_args args = {.to = (float *)((char *)p->workspace + at),
                             .from = from->data,
                             .from_stride = from->slot_stride,
                             .heads = (int)p->shape.heads};
    return launch(driver, p->shape.device.index, p->stream, STATES, sequences * p->shape.heads,
                  FKDA_STATES_THREADS, 0, &args);
}

/* What the forward passes read that is not the caller's. */
static flash_kda_status write_inputs(const fkda_driver *driver, const fkda_map_problem *p,
                                     const map_memory *m)
{
    const fkda_problem *f = &p->fwd;
    const fkda_state_view none = {0};
    flash_kda_status status = FLASH_KDA_OK;
    if (p->wants_state && p->initial_is_bf16)
        status = write_states(driver, f, m->initial, f->shape.sequences, &f->initial_state);
    if (status != FLASH_KDA_OK || !p->wants_map) return status;
    const CUresult result = driver->cuMemsetD32Async((CUdeviceptr)((char *)f->workspace + m->zeros), 0,
                                                     ROW_BYTES / sizeof(uint32_t), (CUstream)f->stream);
    if (result) return fkda_driver_fail("cuMemsetD32Async", result);
    return write_states(driver, f, m->identities, 1, &none);
}

/* ---- Maps ---------------------------------------------------------------------------------------------- */

/* A contiguous state in fp32 that lies in the workspace. */
static fkda_state_view state_at(const fkda_problem *p, size_t at, bool of_each_sequence)
{
    return (fkda_state_view){.data = (char *)p->workspace + at,
                             .slots = p->shape.sequences,
                             .slot_stride = of_each_sequence ? p->shape.heads * MATRIX : 0,
                             .head_stride = MATRIX,
                             .heads = p->shape.heads,
                             .dtype = FLASH_KDA_F32};
}

/* The forward pass that leaves `state`. Nobody reads its outputs. */
static fkda_problem from_initial_state(const fkda_map_problem *p, const map_memory *m)
{
    fkda_problem forward = p->fwd;
    char *const memory = p->fwd.workspace;
    if (p->initial_is_bf16) forward.initial_state = state_at(&p->fwd, m->initial, true);
    forward.out = (fkda_token_view){.data = memory + m->outputs,
                                    .head_stride = FKDA_DIM,
                                    .heads = p->fwd.shape.heads,
                                    .dtype = FLASH_KDA_BF16};
    forward.workspace = memory + m->forward;
    return forward;
}

/* The forward pass that leaves `map`. */
static fkda_problem from_identities(const fkda_map_problem *p, const map_memory *m)
{
    fkda_problem forward = from_initial_state(p, m);
    forward.v = (fkda_token_view){
        .data = (char *)p->fwd.workspace + m->zeros, .heads = p->fwd.shape.heads, .dtype = FLASH_KDA_BF16};
    forward.initial_state = state_at(&p->fwd, m->identities, false);
    forward.final_state = p->map;
    return forward;
}

static flash_kda_status prepare(const fkda_map_problem *p, const map_memory *m)
{
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(p->fwd.shape.device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = write_inputs(driver, p, m);
    return fkda_leave_device(driver, status);
}

flash_kda_status fkda_cuda_map(const fkda_map_problem *p)
{
    const fkda_plan *plan;
    flash_kda_status status = fkda_find_plan(&p->fwd.shape, &plan);
    if (status != FLASH_KDA_OK) return status;
    const map_memory m = lay_out(p, plan->workspace_bytes);
    const fkda_problem passes[] = {from_initial_state(p, &m), from_identities(p, &m)};
    status = prepare(p, &m);
    if (status == FLASH_KDA_OK && p->wants_state) status = plan->shape.kernel->run(&passes[0], plan);
    if (status == FLASH_KDA_OK && p->wants_map) status = plan->shape.kernel->run(&passes[1], plan);
    return status;
}

/* ---- Joining ------------------------------------------------------------------------------------------- */

static fkda_piece_matrices matrices_of(const fkda_state_view *s)
{
    return (fkda_piece_matrices){s->data, s->slot_stride};
}

flash_kda_status fkda_cuda_join(const fkda_join_problem *p)
{
    fkda_join_args args = {
        .maps = matrices_of(&p->maps),
        .states = matrices_of(&p->states),
        .entering = matrices_of(&p->entering),
        .initial_state = p->initial_state.data,
        .final_state = p->final_state.data,
        .pieces = (int)p->pieces,
        .heads = (int)p->heads,
        .backwards = p->backwards,
        .state_k_first = p->state_k_first,
        .initial_is_bf16 = p->initial_state.dtype == FLASH_KDA_BF16,
    };
    const fkda_driver *driver;
    flash_kda_status status = fkda_enter_device(p->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = launch(driver, p->device.index, p->stream, JOIN, p->heads * (FKDA_DIM / FKDA_JOIN_MAP_ROWS),
                    FKDA_JOIN_MAP_THREADS, FKDA_JOIN_MAP_SHARED_BYTES, &args);
    return fkda_leave_device(driver, status);
}
