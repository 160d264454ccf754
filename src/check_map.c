/* Checks every argument of flash_kda_map() and flash_kda_join() before anything is computed or written. A
 * refusal is a sentence that names the argument, what it was and what it must be. */
#include "check_map.h"

#include <string.h>

#include "check_shared.h"
#include "cpu/cpu.h"
#include "kernel.h"

_Static_assert(
    offsetof(flash_kda_map_params, interrupt) + sizeof(const volatile int32_t *) ==
            sizeof(flash_kda_map_params) &&
        offsetof(flash_kda_join_params, reserved) + sizeof(int32_t) == sizeof(flash_kda_join_params),
    "the structs must not end in padding: a later field there would read what an older caller left "
    "in it");

/* Whether an optional tensor is there. A call about shapes alone has no pointers. */
static bool has(const flash_kda_tensor *t, fkda_purpose purpose)
{
    return t->data || (purpose == FKDA_FOR_SHAPES && t->ndim);
}

/* A tensor and what it must be. */
typedef struct named_tensor {
    const flash_kda_tensor *tensor;
    bool optional;
    fkda_requirement must;
} named_tensor;

enum { BF16 = FLASH_KDA_BF16, F32 = FLASH_KDA_F32, I32 = FLASH_KDA_I32, I64 = FLASH_KDA_I64 };

/* ---- flash_kda_map() ----------------------------------------------------------------------------------- */

static flash_kda_status check_tensors(const flash_kda_map_params *p, const fkda_shape *s,
                                      fkda_purpose purpose)
{
    const int64_t B = s->batch, T = s->tokens, H = s->qk_heads, HV = s->heads, N = s->sequences, D = FKDA_DIM;
    const int64_t seqlens = s->has_cu_seqlens ? N + 1 : 0;
    const char *const state_dims = p->state_k_first ? "[N, HV, K, V]" : "[N, HV, V, K]";
    const named_tensor tensors[] = {
        {&p->k, false, {"k", "[B, T, H, K]", 4, {B, T, H, D}, {BF16}, 16, FKDA_ROWS, false}},
        {&p->v, false, {"v", "[B, T, HV, V]", 4, {B, T, HV, D}, {BF16}, 16, FKDA_ROWS, false}},
        {&p->g, false, {"g", "[B, T, HV, K]", 4, {B, T, HV, D}, {BF16, F32}, 16, FKDA_ROWS, false}},
        {&p->beta, false, {"beta", "[B, T, HV]", 3, {B, T, HV}, {BF16, F32}, 0, FKDA_FREE, false}},
        {&p->A_log, true, {"A_log", "HV", 0, {HV}, {F32}, 0, FKDA_CONTIGUOUS, false}},
        {&p->dt_bias, true, {"dt_bias", "HV * K", 0, {HV * D}, {F32}, 16, FKDA_CONTIGUOUS, false}},
        {&p->initial_state,
         true,
         {"initial_state", state_dims, 4, {N, HV, D, D}, {F32, BF16}, 16, FKDA_SLOTS, false}},
        {&p->cu_seqlens, true, {"cu_seqlens", "[N + 1]", 1, {N + 1}, {I64, I32}, 0, FKDA_CONTIGUOUS, false}},
        {&p->map, true, {"map", "[N, HV, K, K]", 4, {N, HV, D, D}, {F32}, 16, FKDA_SLOTS, true}},
        {&p->state, true, {"state", state_dims, 4, {N, HV, D, D}, {F32}, 16, FKDA_SLOTS, true}},
    };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        if (tensors[i].optional && !has(tensors[i].tensor, purpose)) continue;
        if (tensors[i].must.is_written && purpose == FKDA_FOR_REFERENCE) continue;
        TRY(fkda_check_tensor(tensors[i].tensor, &tensors[i].must, seqlens, purpose != FKDA_FOR_SHAPES,
                              p->device.type == FLASH_KDA_CUDA));
    }
    if (purpose != FKDA_FOR_REFERENCE && !has(&p->map, purpose) && !has(&p->state, purpose))
        return INVALID("map and state are all absent; at least one of them must be given");
    return FLASH_KDA_OK;
}

static flash_kda_status check_options(const flash_kda_map_params *p, fkda_purpose purpose)
{
    TRY(fkda_check_gate_kinds(p->gate, p->beta_kind));
    TRY(fkda_check_flag(p->qk_is_normalised, "qk_is_normalised"));
    TRY(fkda_check_flag(p->state_k_first, "state_k_first"));
    TRY(fkda_check_scale(1.0f, p->gate, p->lower_bound));
    TRY(fkda_check_host(p->cpu_threads, p->interrupt));
    return fkda_check_gate_tensors(p->gate, has(&p->A_log, purpose), has(&p->dt_bias, purpose));
}

/* What the forward passes ask for that a GPU runs. */
static int32_t features_of(const flash_kda_map_params *p, const fkda_shape *s, fkda_purpose purpose)
{
    const fkda_arithmetic_options options = {.gate = p->gate,
                                             .beta_kind = p->beta_kind,
                                             .qk_is_normalised = p->qk_is_normalised,
                                             .state_k_first = p->state_k_first,
                                             .g_dtype = p->g.dtype,
                                             .beta_dtype = p->beta.dtype,
                                             .has_A_log = has(&p->A_log, purpose),
                                             .has_dt_bias = has(&p->dt_bias, purpose)};
    return fkda_arithmetic_features(&options, s);
}

static flash_kda_status check_overlap(const flash_kda_map_params *p)
{
    enum { FIRST_WRITTEN = 8, COUNT = 11 };
    const fkda_extent all[COUNT] = {
        fkda_extent_of("k", &p->k),
        fkda_extent_of("v", &p->v),
        fkda_extent_of("g", &p->g),
        fkda_extent_of("beta", &p->beta),
        fkda_extent_of("A_log", &p->A_log),
        fkda_extent_of("dt_bias", &p->dt_bias),
        fkda_extent_of("initial_state", &p->initial_state),
        fkda_extent_of("cu_seqlens", &p->cu_seqlens),
        [FIRST_WRITTEN] = fkda_extent_of("map", &p->map),
        fkda_extent_of("state", &p->state),
        fkda_memory_extent("workspace", p->workspace, p->workspace_size),
    };
    for (int w = FIRST_WRITTEN; w < COUNT; w++) TRY(fkda_check_own_memory(&all[w], all, w));
    return FLASH_KDA_OK;
}

static void fill_problem(const flash_kda_map_params *p, fkda_purpose purpose, fkda_map_problem *out)
{
    fkda_problem *f = &out->fwd;
    f->stream = p->stream;
    f->q = f->k = fkda_token_view_of(&p->k);
    f->v = fkda_token_view_of(&p->v);
    f->g = fkda_token_view_of(&p->g);
    f->beta = fkda_token_view_of(&p->beta);
    f->gate = p->gate;
    f->beta_kind = p->beta_kind;
    f->qk_is_normalised = p->qk_is_normalised;
    f->state_k_first = p->state_k_first;
    f->A_log = p->A_log.data;
    f->dt_bias = p->dt_bias.data;
    f->initial_state = fkda_state_view_of(&p->initial_state, p->initial_state.data != NULL);
    f->cu_seqlens = p->cu_seqlens.data;
    f->cu_seqlens_is_i32 = p->cu_seqlens.dtype == FLASH_KDA_I32;
    f->lower_bound = p->gate == FLASH_KDA_GATE_BOUNDED ? p->lower_bound : 0.0f;
    f->workspace = p->workspace;
    f->workspace_size = p->workspace_size;
    f->interrupt = p->interrupt;
    if (purpose == FKDA_FOR_REFERENCE) return;
    f->final_state = fkda_state_view_of(&p->state, p->state.data != NULL);
    out->map = fkda_state_view_of(&p->map, p->map.data != NULL);
}

flash_kda_status fkda_complete_map_params(const flash_kda_map_params **params, flash_kda_map_params *complete)
{
    const void *from = *params;
    const flash_kda_status status =
        fkda_complete_struct(&from, complete, sizeof *complete, sizeof *complete, "flash_kda_map_params");
    *params = from;
    return status;
}

flash_kda_status fkda_check_map(const flash_kda_map_params *p, fkda_purpose purpose, fkda_map_problem *out)
{
    flash_kda_map_params complete;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_map_params(&p, &complete));
    if (purpose == FKDA_FOR_REFERENCE && p->device.type != FLASH_KDA_CPU)
        return INVALID("device is not the CPU; the reference takes tensors in CPU memory");
    fkda_shape *shape = &out->fwd.shape;
    TRY(fkda_check_sizes(&p->k, "k", &p->v, &p->cu_seqlens, has(&p->cu_seqlens, purpose), shape));
    TRY(check_options(p, purpose));
    TRY(check_tensors(p, shape, purpose));
    if (purpose == FKDA_FOR_FWD) TRY(check_overlap(p));
    shape->device = p->device;
    shape->kernel_is_asked_for = p->kernel != NULL;
    shape->features = features_of(p, shape, purpose);
    if (p->device.type == FLASH_KDA_CPU) shape->threads = p->cpu_threads ? p->cpu_threads : fkda_cpu_count();
    TRY(fkda_find_kernel(p->device, p->kernel, purpose == FKDA_FOR_REFERENCE ? 0 : FKDA_MAPS,
                         &shape->kernel));
    out->wants_map = has(&p->map, purpose);
    out->wants_state = has(&p->state, purpose);
    out->initial_is_bf16 = has(&p->initial_state, purpose) && p->initial_state.dtype == BF16;
    if (purpose == FKDA_FOR_SHAPES) return FLASH_KDA_OK; /* Strides have not been looked at. */
    fill_problem(p, purpose, out);
    if (p->device.type != FLASH_KDA_CPU) return FLASH_KDA_OK;
    TRY(fkda_check_interrupt(p->interrupt));
    return fkda_check_indices(&out->fwd);
}

/* ---- flash_kda_join() ---------------------------------------------------------------------------------- */

static flash_kda_status check_join_sizes(const flash_kda_join_params *p, fkda_join_problem *out)
{
    TRY(fkda_check_rank(&p->maps, "maps", "[P, HV, K, K]", 4));
    const int64_t P = p->maps.shape[0], HV = p->maps.shape[1];
    if (P < 1) return INVALID("maps has P = %lld; there must be at least 1 piece", (long long)P);
    if (HV < 1) return INVALID("maps has HV = %lld; there must be at least 1 head", (long long)HV);
    TRY(fkda_check_states(P, HV));
    out->pieces = P;
    out->heads = HV;
    return FLASH_KDA_OK;
}

static flash_kda_status check_join_tensors(const flash_kda_join_params *p, int64_t P, int64_t HV,
                                           bool with_memory)
{
    const bool k_first = p->state_k_first;
    const int64_t D = FKDA_DIM;
    const char *const dims = k_first ? "[P, HV, K, V]" : "[P, HV, V, K]", *const one = k_first
                                                                                           ? "[1, HV, K, V]"
                                                                                           : "[1, HV, V, K]";
    const named_tensor tensors[] = {
        {&p->maps, false, {"maps", "[P, HV, K, K]", 4, {P, HV, D, D}, {F32}, 16, FKDA_SLOTS, false}},
        {&p->states, false, {"states", dims, 4, {P, HV, D, D}, {F32}, 16, FKDA_SLOTS, false}},
        {&p->initial_state,
         true,
         {"initial_state", one, 4, {1, HV, D, D}, {F32, BF16}, 16, FKDA_SLOTS, false}},
        {&p->entering, true, {"entering", dims, 4, {P, HV, D, D}, {F32}, 16, FKDA_SLOTS, true}},
        {&p->final_state, true, {"final_state", one, 4, {1, HV, D, D}, {F32}, 16, FKDA_SLOTS, true}},
    };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        if (tensors[i].optional && !tensors[i].tensor->data) continue;
        TRY(fkda_check_tensor(tensors[i].tensor, &tensors[i].must, 0, with_memory,
                              p->device.type == FLASH_KDA_CUDA));
    }
    if (!p->entering.data && !p->final_state.data)
        return INVALID("entering and final_state are all absent; at least one of them must be given");
    return FLASH_KDA_OK;
}

static flash_kda_status check_join_overlap(const flash_kda_join_params *p)
{
    enum { FIRST_WRITTEN = 3, COUNT = 5 };
    const fkda_extent all[COUNT] = {
        fkda_extent_of("maps", &p->maps),
        fkda_extent_of("states", &p->states),
        fkda_extent_of("initial_state", &p->initial_state),
        [FIRST_WRITTEN] = fkda_extent_of("entering", &p->entering),
        fkda_extent_of("final_state", &p->final_state),
    };
    for (int w = FIRST_WRITTEN; w < COUNT; w++) TRY(fkda_check_own_memory(&all[w], all, w));
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_join(const flash_kda_join_params *p, bool with_memory, fkda_join_problem *out)
{
    flash_kda_join_params complete;
    const void *from = p;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_struct(&from, &complete, sizeof complete, sizeof complete, "flash_kda_join_params"));
    p = from;
    TRY(check_join_sizes(p, out));
    TRY(fkda_check_flag(p->backwards, "backwards"));
    TRY(fkda_check_flag(p->state_k_first, "state_k_first"));
    TRY(fkda_check_host(p->cpu_threads, NULL));
    if (p->reserved != 0) return INVALID("reserved is %d; it must be 0", p->reserved);
    TRY(check_join_tensors(p, out->pieces, out->heads, with_memory));
    if (with_memory) TRY(check_join_overlap(p));
    if (p->device.type == FLASH_KDA_CPU) out->threads = p->cpu_threads ? p->cpu_threads : fkda_cpu_count();
    out->device = p->device;
    out->stream = p->stream;
    out->backwards = p->backwards;
    out->state_k_first = p->state_k_first;
    out->maps = fkda_state_view_of(&p->maps, true);
    out->states = fkda_state_view_of(&p->states, true);
    out->initial_state = fkda_state_view_of(&p->initial_state, p->initial_state.data != NULL);
    out->entering = fkda_state_view_of(&p->entering, p->entering.data != NULL);
    out->final_state = fkda_state_view_of(&p->final_state, p->final_state.data != NULL);
    return fkda_find_kernel(p->device, p->kernel, FKDA_MAPS, &out->kernel);
}
