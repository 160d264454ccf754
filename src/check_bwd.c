/* Checks every argument of the backward pass before anything is computed or written. A refusal is a sentence
 * that names the argument, what it was and what it must be. */
#include "check_bwd.h"

#include <string.h>

#include "check_shared.h"
#include "cpu/cpu.h"
#include "kernel.h"

_Static_assert(offsetof(flash_kda_bwd_params, workspace_limit) + sizeof(size_t) ==
                   sizeof(flash_kda_bwd_params),
               "the struct must not end in padding: a later field there would read what an older caller left "
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

static flash_kda_status check_all(const flash_kda_bwd_params *p, const fkda_shape *s, fkda_purpose purpose,
                                  const named_tensor *tensors, int count)
{
    const int64_t seqlens = s->has_cu_seqlens ? s->sequences + 1 : 0;
    for (int i = 0; i < count; i++) {
        if (tensors[i].optional && !has(tensors[i].tensor, purpose)) continue;
        TRY(fkda_check_tensor(tensors[i].tensor, &tensors[i].must, seqlens, purpose != FKDA_FOR_SHAPES,
                              p->device.type == FLASH_KDA_CUDA));
    }
    return FLASH_KDA_OK;
}

enum { BF16 = FLASH_KDA_BF16, F32 = FLASH_KDA_F32, I32 = FLASH_KDA_I32, I64 = FLASH_KDA_I64 };

static flash_kda_status check_inputs(const flash_kda_bwd_params *p, const fkda_shape *s, fkda_purpose purpose)
{
    const int64_t B = s->batch, T = s->tokens, H = s->qk_heads, HV = s->heads, N = s->sequences, D = FKDA_DIM;
    const char *const state_dims = p->state_k_first ? "[N, HV, K, V]" : "[N, HV, V, K]";
    const named_tensor inputs[] = {
        {&p->q, false, {"q", "[B, T, H, K]", 4, {B, T, H, D}, {BF16}, 16, FKDA_ROWS, false}},
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
        {&p->dout, true, {"dout", "[B, T, HV, V]", 4, {B, T, HV, D}, {BF16}, 16, FKDA_ROWS, false}},
        {&p->dfinal_state,
         true,
         {"dfinal_state", state_dims, 4, {N, HV, D, D}, {F32, BF16}, 16, FKDA_SLOTS, false}},
    };
    return check_all(p, s, purpose, inputs, sizeof inputs / sizeof *inputs);
}

static flash_kda_status check_outputs(const flash_kda_bwd_params *p, const fkda_shape *s,
                                      fkda_purpose purpose)
{
    const int64_t B = s->batch, T = s->tokens, H = s->qk_heads, HV = s->heads, N = s->sequences, D = FKDA_DIM;
    const char *const state_dims = p->state_k_first ? "[N, HV, K, V]" : "[N, HV, V, K]";
    const named_tensor outputs[] = {
        {&p->dq, true, {"dq", "[B, T, H, K]", 4, {B, T, H, D}, {BF16}, 16, FKDA_ROWS, true}},
        {&p->dk, true, {"dk", "[B, T, H, K]", 4, {B, T, H, D}, {BF16}, 16, FKDA_ROWS, true}},
        {&p->dv, true, {"dv", "[B, T, HV, V]", 4, {B, T, HV, D}, {BF16}, 16, FKDA_ROWS, true}},
        {&p->dg, true, {"dg", "[B, T, HV, K]", 4, {B, T, HV, D}, {p->g.dtype}, 16, FKDA_ROWS, true}},
        {&p->dbeta, true, {"dbeta", "[B, T, HV]", 3, {B, T, HV}, {p->beta.dtype}, 0, FKDA_FREE, true}},
        {&p->dA_log, true, {"dA_log", "HV", 0, {HV}, {F32}, 0, FKDA_CONTIGUOUS, true}},
        {&p->ddt_bias, true, {"ddt_bias", "HV * K", 0, {HV * D}, {F32}, 16, FKDA_CONTIGUOUS, true}},
        {&p->dinitial_state,
         true,
         {"dinitial_state", state_dims, 4, {N, HV, D, D}, {F32}, 16, FKDA_SLOTS, true}},
    };
    bool any = false;
    TRY(check_all(p, s, purpose, outputs, sizeof outputs / sizeof *outputs));
    for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) any |= has(outputs[i].tensor, purpose);
    if (!any)
        return INVALID("dq, dk, dv, dg, dbeta, dA_log, ddt_bias and dinitial_state are all absent; at least "
                       "one gradient must be given");
    return FLASH_KDA_OK;
}

static flash_kda_status check_options(const flash_kda_bwd_params *p, const fkda_shape *s,
                                      fkda_purpose purpose)
{
    TRY(fkda_check_gate_kinds(p->gate, p->beta_kind));
    TRY(fkda_check_flag(p->qk_is_normalised, "qk_is_normalised"));
    TRY(fkda_check_flag(p->state_k_first, "state_k_first"));
    TRY(fkda_check_scale(p->scale, p->gate, p->lower_bound));
    TRY(fkda_check_host(p->cpu_threads, p->interrupt));
    TRY(fkda_check_max_seqlen(p->max_seqlen, s->tokens));
    TRY(fkda_check_saved_pointer(p->saved, p->saved_size, purpose));
    TRY(fkda_check_flag(p->batch_invariant, "batch_invariant"));
    TRY(fkda_check_gate_tensors(p->gate, has(&p->A_log, purpose), has(&p->dt_bias, purpose)));
    if (purpose == FKDA_FOR_REFERENCE) return FLASH_KDA_OK;
    if (has(&p->dA_log, purpose) && !has(&p->A_log, purpose))
        return INVALID("dA_log is given without A_log; it must be absent");
    if (has(&p->ddt_bias, purpose) && !has(&p->dt_bias, purpose))
        return INVALID("ddt_bias is given without dt_bias; it must be absent");
    return FLASH_KDA_OK;
}

static flash_kda_status check_overlap(const flash_kda_bwd_params *p)
{
    enum { FIRST_WRITTEN = 12, WORKSPACE = 20, COUNT };
    const fkda_extent all[COUNT] = {
        fkda_extent_of("q", &p->q),
        fkda_extent_of("k", &p->k),
        fkda_extent_of("v", &p->v),
        fkda_extent_of("g", &p->g),
        fkda_extent_of("beta", &p->beta),
        fkda_extent_of("A_log", &p->A_log),
        fkda_extent_of("dt_bias", &p->dt_bias),
        fkda_extent_of("initial_state", &p->initial_state),
        fkda_extent_of("cu_seqlens", &p->cu_seqlens),
        fkda_extent_of("dout", &p->dout),
        fkda_extent_of("dfinal_state", &p->dfinal_state),
        fkda_memory_extent("saved", p->saved, p->saved_size),
        [FIRST_WRITTEN] = fkda_extent_of("dq", &p->dq),
        fkda_extent_of("dk", &p->dk),
        fkda_extent_of("dv", &p->dv),
        fkda_extent_of("dg", &p->dg),
        fkda_extent_of("dbeta", &p->dbeta),
        fkda_extent_of("dA_log", &p->dA_log),
        fkda_extent_of("ddt_bias", &p->ddt_bias),
        fkda_extent_of("dinitial_state", &p->dinitial_state),
        [WORKSPACE] = fkda_memory_extent("workspace", p->workspace, p->workspace_size),
    };
    for (int w = FIRST_WRITTEN; w < COUNT; w++) TRY(fkda_check_own_memory(&all[w], all, w));
    return FLASH_KDA_OK;
}

static fkda_token_view token_view(const flash_kda_tensor *t)
{
    return t->data ? fkda_token_view_of(t) : (fkda_token_view){0};
}

static fkda_state_view state_view(const flash_kda_tensor *t)
{
    return fkda_state_view_of(t, t->data != NULL);
}

static void fill_inputs(const flash_kda_bwd_params *p, fkda_problem *out)
{
    out->stream = p->stream;
    out->q = fkda_token_view_of(&p->q);
    out->k = fkda_token_view_of(&p->k);
    out->v = fkda_token_view_of(&p->v);
    out->g = fkda_token_view_of(&p->g);
    out->beta = fkda_token_view_of(&p->beta);
    out->gate = p->gate;
    out->beta_kind = p->beta_kind;
    out->qk_is_normalised = p->qk_is_normalised;
    out->state_k_first = p->state_k_first;
    out->A_log = p->A_log.data;
    out->dt_bias = p->dt_bias.data;
    out->initial_state = state_view(&p->initial_state);
    out->cu_seqlens = p->cu_seqlens.data;
    out->cu_seqlens_is_i32 = p->cu_seqlens.dtype == FLASH_KDA_I32;
    out->scale = p->scale;
    /* With another gate it may be any number, and kernels need not look out for one. */
    out->lower_bound = p->gate == FLASH_KDA_GATE_BOUNDED ? p->lower_bound : 0.0f;
    out->workspace = p->workspace;
    out->workspace_size = p->workspace_size;
    out->saved = (void *)p->saved; /* read, and not written */
    out->saved_size = p->saved_size;
    out->interrupt = p->interrupt;
}

static void fill_gradients(const flash_kda_bwd_params *p, fkda_purpose purpose, fkda_bwd_problem *out)
{
    out->dout = token_view(&p->dout);
    out->dfinal_state = state_view(&p->dfinal_state);
    if (purpose == FKDA_FOR_REFERENCE) return;
    out->dq = token_view(&p->dq);
    out->dk = token_view(&p->dk);
    out->dv = token_view(&p->dv);
    out->dg = token_view(&p->dg);
    out->dbeta = token_view(&p->dbeta);
    out->dA_log = p->dA_log.data;
    out->ddt_bias = p->ddt_bias.data;
    out->dinitial_state = state_view(&p->dinitial_state);
}

static flash_kda_status fill_shape(const flash_kda_bwd_params *p, fkda_purpose purpose, fkda_shape *out)
{
    out->device = p->device;
    out->max_seqlen = p->max_seqlen;
    out->batch_invariant = p->batch_invariant;
    out->kernel_is_asked_for = p->kernel != NULL;
    if (p->device.type == FLASH_KDA_CPU) out->threads = p->cpu_threads ? p->cpu_threads : fkda_cpu_count();
    const int32_t features = FKDA_BACKWARD | (p->saved || p->saved_size ? FKDA_SAVED : 0);
    const fkda_arithmetic_options arithmetic = {
        .gate = p->gate,
        .beta_kind = p->beta_kind,
        .qk_is_normalised = p->qk_is_normalised,
        .state_k_first = p->state_k_first,
        .g_dtype = p->g.dtype,
        .beta_dtype = p->beta.dtype,
        .has_A_log = has(&p->A_log, purpose),
        .has_dt_bias = has(&p->dt_bias, purpose),
    };
    out->features = fkda_arithmetic_features(&arithmetic, out);
    return fkda_find_kernel(p->device, p->kernel, purpose == FKDA_FOR_REFERENCE ? 0 : features, &out->kernel);
}

flash_kda_status fkda_complete_bwd_params(const flash_kda_bwd_params **params, flash_kda_bwd_params *complete)
{
    const void *from = *params;
    const flash_kda_status status =
        fkda_complete_struct(&from, complete, offsetof(flash_kda_bwd_params, workspace_limit),
                             sizeof *complete, "flash_kda_bwd_params");
    *params = from;
    return status;
}

flash_kda_status fkda_check_bwd(const flash_kda_bwd_params *p, fkda_purpose purpose, fkda_bwd_problem *out)
{
    flash_kda_bwd_params complete;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_bwd_params(&p, &complete));
    if (purpose == FKDA_FOR_REFERENCE && p->device.type != FLASH_KDA_CPU)
        return INVALID("device is not the CPU; the reference takes tensors in CPU memory");
    fkda_shape *shape = &out->fwd.shape;
    TRY(fkda_check_sizes(&p->q, "q", &p->v, &p->cu_seqlens, has(&p->cu_seqlens, purpose), shape));
    TRY(check_options(p, shape, purpose));
    TRY(check_inputs(p, shape, purpose));
    if (purpose != FKDA_FOR_REFERENCE) TRY(check_outputs(p, shape, purpose));
    if (purpose == FKDA_FOR_FWD) TRY(check_overlap(p));
    TRY(fill_shape(p, purpose, shape));
    out->has_saved = p->saved_size != 0; /* and not the pointer, which a call for sizes does not have */
    out->workspace_limit = p->workspace_limit;
    out->wants_parameters = has(&p->dA_log, purpose) || has(&p->ddt_bias, purpose);
    if (purpose == FKDA_FOR_SHAPES) return FLASH_KDA_OK; /* Strides have not been looked at. */
    fill_inputs(p, &out->fwd);
    fill_gradients(p, purpose, out);
    if (p->device.type != FLASH_KDA_CPU) return FLASH_KDA_OK;
    TRY(fkda_check_interrupt(p->interrupt));
    return fkda_check_indices(&out->fwd);
}
