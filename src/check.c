/* Checks every argument before anything is launched or written. A refusal is a sentence that names the
 * argument, what it was and what it must be. Each tensor leaves this file as a view (problem.h): pointer,
 * strides, sizes and dtype. */
#include "check.h"

#include <string.h>

#include "check_shared.h"
#include "cpu/cpu.h"
#include "errors.h"
#include "kernel.h"

/* Whether an optional tensor is there. A call about shapes alone has no pointers. */
static bool has(const flash_kda_tensor *t, fkda_purpose purpose)
{
    return t->data || (purpose == FKDA_FOR_SHAPES && t->ndim);
}

/* The reference does not write to checkpoint_states, and needs its shape alone. */
static bool has_checkpoints(const flash_kda_fwd_params *p, fkda_purpose purpose)
{
    if (purpose == FKDA_FOR_REFERENCE) purpose = FKDA_FOR_SHAPES;
    return has(&p->checkpoint_states, purpose);
}

/* C: offsets of a sequence. The fields of an absent tensor mean nothing. */
static int64_t columns_of(const flash_kda_fwd_params *p, fkda_purpose purpose)
{
    const flash_kda_tensor *offsets = &p->checkpoint_offsets;
    return has(offsets, purpose) && offsets->ndim == 2 ? offsets->shape[1] : 1;
}

static flash_kda_status check_tensors(const flash_kda_fwd_params *p, const fkda_shape *s,
                                      fkda_purpose purpose)
{
    enum { BF16 = FLASH_KDA_BF16, F32 = FLASH_KDA_F32, I64 = FLASH_KDA_I64 };
    const int64_t B = s->batch, T = s->tokens, H = s->qk_heads, HV = s->heads, N = s->sequences, D = FKDA_DIM,
                  ANY = FKDA_ANY_SIZE, slots = has(&p->state_indices, purpose) ? ANY : N;
    const char *const state_dims = p->state_k_first ? (slots == ANY ? "[slots, HV, K, V]" : "[N, HV, K, V]")
                                                    : (slots == ANY ? "[slots, HV, V, K]" : "[N, HV, V, K]");
    const int64_t seqlens = s->has_cu_seqlens ? N + 1 : 0;
    const int64_t columns = columns_of(p, purpose);
    const int by_column = has(&p->checkpoint_offsets, purpose) && p->checkpoint_offsets.ndim == 2 ? 2 : 1;
    const char *const offset_dims = by_column == 2 ? "[N, C]" : "[N]";
    const bool of_reference = purpose == FKDA_FOR_REFERENCE;
    const struct {
        const flash_kda_tensor *tensor;
        bool optional;
        fkda_requirement must;
    } tensors[] = {
        {&p->q, false, {"q", "[B, T, H, K]", 4, {B, T, H, D}, {BF16}, 16, FKDA_ROWS, false}},
        {&p->k, false, {"k", "[B, T, H, K]", 4, {B, T, H, D}, {BF16}, 16, FKDA_ROWS, false}},
        {&p->v, false, {"v", "[B, T, HV, V]", 4, {B, T, HV, D}, {BF16}, 16, FKDA_ROWS, false}},
        {&p->g, false, {"g", "[B, T, HV, K]", 4, {B, T, HV, D}, {BF16, F32}, 16, FKDA_ROWS, false}},
        {&p->beta, false, {"beta", "[B, T, HV]", 3, {B, T, HV}, {BF16, F32}, 0, FKDA_FREE, false}},
        {&p->out, of_reference, {"out", "[B, T, HV, V]", 4, {B, T, HV, D}, {BF16}, 16, FKDA_ROWS, true}},
        {&p->A_log, true, {"A_log", "HV", 0, {HV}, {F32}, 0, FKDA_CONTIGUOUS, false}},
        {&p->dt_bias, true, {"dt_bias", "HV * K", 0, {HV * D}, {F32}, 16, FKDA_CONTIGUOUS, false}},
        {&p->initial_state,
         true,
         {"initial_state", state_dims, 4, {slots, HV, D, D}, {F32, BF16}, 16, FKDA_SLOTS, false}},
        {&p->final_state,
         true,
         {"final_state", state_dims, 4, {slots, HV, D, D}, {F32, BF16}, 16, FKDA_SLOTS, true}},
        {&p->cu_seqlens, true, fkda_integers("cu_seqlens", "[N + 1]", 1, N + 1, 0)},
        {&p->nonfinite,
         true,
         {"nonfinite", "[tensors, 2]", 2, {FLASH_KDA_CHECKED_TENSORS, 2}, {I64}, 0, FKDA_CONTIGUOUS, true}},
        {&p->state_indices, true, fkda_integers("state_indices", "[N]", 1, N, 0)},
        {&p->has_initial_state,
         true,
         {"has_initial_state", "[N]", 1, {N}, {FLASH_KDA_BOOL}, 0, FKDA_CONTIGUOUS, false}},
        {&p->checkpoint_states,
         true,
         {"checkpoint_states",
          p->state_k_first ? "[rows, HV, K, V]" : "[rows, HV, V, K]",
          4,
          {ANY, HV, D, D},
          {F32, BF16},
          16,
          FKDA_SLOTS,
          !of_reference}},
        {&p->checkpoint_offsets, true,
         fkda_integers("checkpoint_offsets", offset_dims, by_column, N, columns)},
        {&p->checkpoint_indices, true,
         fkda_integers("checkpoint_indices", offset_dims, by_column, N, columns)},
        {&p->checkpoint_starts, true, fkda_integers("checkpoint_starts", "[N]", 1, N, 0)},
    };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        const bool is_checkpoints = tensors[i].tensor == &p->checkpoint_states,
                   is_there = is_checkpoints ? has_checkpoints(p, purpose) : has(tensors[i].tensor, purpose),
                   with_memory = purpose == FKDA_FOR_FWD || (of_reference && !is_checkpoints);
        if (tensors[i].optional && !is_there) continue;
        TRY(fkda_check_tensor(tensors[i].tensor, &tensors[i].must, seqlens, with_memory,
                              p->device.type == FLASH_KDA_CUDA));
    }
    if (columns > FKDA_MAX_COLUMNS)
        return INVALID("checkpoint_offsets has C = %lld offsets for each sequence; there must be at most %d",
                       (long long)columns, FKDA_MAX_COLUMNS);
    if (has(&p->initial_state, purpose) && has(&p->final_state, purpose) &&
        p->initial_state.dtype != p->final_state.dtype)
        return fkda_fail(FLASH_KDA_INVALID_DTYPE,
                         "final_state has dtype %s and initial_state %s; they must have the same",
                         fkda_dtype_name(p->final_state.dtype), fkda_dtype_name(p->initial_state.dtype));
    return FLASH_KDA_OK;
}

/* Options that make no sense together. */
static flash_kda_status check_combinations(const flash_kda_fwd_params *p, fkda_purpose purpose)
{
    const bool states = has_checkpoints(p, purpose), offsets = has(&p->checkpoint_offsets, purpose),
               every = p->checkpoint_every != 0;
    TRY(fkda_check_gate_tensors(p->gate, has(&p->A_log, purpose), has(&p->dt_bias, purpose)));
    TRY(fkda_check_first_slot(p->first_slot, has(&p->state_indices, purpose)));
    if (offsets && every)
        return INVALID("checkpoint_offsets is given with checkpoint_every = %lld; only one of them must say "
                       "where the checkpoints are",
                       (long long)p->checkpoint_every);
    if (offsets && p->checkpoint_offsets.ndim != 1 && p->checkpoint_offsets.ndim != 2)
        return INVALID("checkpoint_offsets has %d dimensions; it must have 1 or 2: [N] or [N, C]",
                       p->checkpoint_offsets.ndim);
    if (states && !offsets && !every)
        return INVALID("checkpoint_states is given without checkpoint_offsets and with checkpoint_every = 0; "
                       "one of them must say where the checkpoints are");
    if (!states && every)
        return INVALID("checkpoint_every is %lld without checkpoint_states; checkpoint_states must be given "
                       "too",
                       (long long)p->checkpoint_every);
    if (!states && offsets)
        return INVALID("checkpoint_offsets is given without checkpoint_states; checkpoint_states must be "
                       "given too");
    if (has(&p->checkpoint_indices, purpose) && !offsets)
        return INVALID("checkpoint_indices is given without checkpoint_offsets; it must be absent");
    if (has(&p->checkpoint_starts, purpose) && !every)
        return INVALID("checkpoint_starts is given with checkpoint_every = 0; it must be absent");
    return FLASH_KDA_OK;
}

static flash_kda_status check_kinds(const flash_kda_fwd_params *p)
{
    TRY(fkda_check_gate_kinds(p->gate, p->beta_kind));
    TRY(fkda_check_flag(p->qk_is_normalised, "qk_is_normalised"));
    TRY(fkda_check_flag(p->state_k_first, "state_k_first"));
    TRY(fkda_check_flag(p->batch_invariant, "batch_invariant"));
    if (p->checkpoint_every < 0 || p->checkpoint_every % 16)
        return INVALID("checkpoint_every is %lld; it must be a multiple of 16 tokens, or 0",
                       (long long)p->checkpoint_every);
    return FLASH_KDA_OK;
}

static flash_kda_status check_scalars(const flash_kda_fwd_params *p, int64_t tokens, fkda_purpose purpose)
{
    TRY(fkda_check_scale(p->scale, p->gate, p->lower_bound));
    TRY(fkda_check_host(p->cpu_threads, p->interrupt));
    TRY(fkda_check_max_seqlen(p->max_seqlen, tokens));
    if (p->cut < FLASH_KDA_CUT_AUTO || p->cut > FLASH_KDA_CUT_MIXED)
        return INVALID("cut is %d; it must be a flash_kda_cut, in [%d, %d]", p->cut, FLASH_KDA_CUT_AUTO,
                       FLASH_KDA_CUT_MIXED);
    TRY(fkda_check_saved_pointer(p->saved, p->saved_size, purpose));
    if (p->reserved != 0) return INVALID("reserved is %d; it must be 0", p->reserved);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_workspace(const fkda_problem *p, size_t bytes_needed)
{
    if (p->workspace_size < bytes_needed)
        return INVALID("workspace_size is %zu bytes; this call needs %zu", p->workspace_size, bytes_needed);
    if (bytes_needed && !p->workspace)
        return INVALID("workspace is null; it must point to %zu bytes", bytes_needed);
    if ((uintptr_t)p->workspace % 64)
        return INVALID("workspace is at address %p; it must be aligned to 64 bytes", p->workspace);
    return FLASH_KDA_OK;
}

_Static_assert(
    offsetof(flash_kda_fwd_params, saved_size) + sizeof(size_t) == sizeof(flash_kda_fwd_params),
    "the struct must not end in padding: a later field there would read what an older caller left in it");

/* The fields before `workspace` exist since the first version. */
flash_kda_status fkda_complete_params(const flash_kda_fwd_params **params, flash_kda_fwd_params *complete)
{
    const void *from = *params;
    const flash_kda_status status = fkda_complete_struct(
        &from, complete, offsetof(flash_kda_fwd_params, workspace), sizeof *complete, "flash_kda_fwd_params");
    *params = from;
    return status;
}

static fkda_checkpoints checkpoints_of(const flash_kda_fwd_params *p, fkda_purpose purpose)
{
    const bool wanted = has_checkpoints(p, purpose);
    return (fkda_checkpoints){.wanted = wanted,
                              .states = fkda_state_view_of(&p->checkpoint_states, wanted),
                              .offsets = fkda_index_view_of(&p->checkpoint_offsets),
                              .indices = fkda_index_view_of(&p->checkpoint_indices),
                              .columns = columns_of(p, purpose),
                              .starts = fkda_index_view_of(&p->checkpoint_starts),
                              .every = p->checkpoint_every};
}

static void fill_problem(const flash_kda_fwd_params *p, fkda_purpose purpose, fkda_problem *out)
{
    out->stream = p->stream;
    out->q = fkda_token_view_of(&p->q);
    out->k = fkda_token_view_of(&p->k);
    out->v = fkda_token_view_of(&p->v);
    out->g = fkda_token_view_of(&p->g);
    out->beta = fkda_token_view_of(&p->beta);
    out->out = fkda_token_view_of(&p->out);
    out->gate = p->gate;
    out->beta_kind = p->beta_kind;
    out->qk_is_normalised = p->qk_is_normalised;
    out->state_k_first = p->state_k_first;
    out->A_log = p->A_log.data;
    out->dt_bias = p->dt_bias.data;
    out->initial_state = fkda_state_view_of(&p->initial_state, p->initial_state.data != NULL);
    out->final_state = fkda_state_view_of(&p->final_state, p->final_state.data != NULL);
    out->state_indices = fkda_index_view_of(&p->state_indices);
    out->has_initial_state = p->has_initial_state.data;
    out->first_slot = p->first_slot;
    out->checkpoints = checkpoints_of(p, purpose);
    out->cu_seqlens = p->cu_seqlens.data;
    out->cu_seqlens_is_i32 = p->cu_seqlens.dtype == FLASH_KDA_I32;
    out->scale = p->scale;
    /* With another gate it may be any number, and kernels need not look out for one. */
    out->lower_bound = p->gate == FLASH_KDA_GATE_BOUNDED ? p->lower_bound : 0.0f;
    out->workspace = p->workspace;
    out->workspace_size = p->workspace_size;
    if (purpose != FKDA_FOR_REFERENCE) {
        out->saved = p->saved;
        out->saved_size = p->saved_size;
    }
    out->interrupt = p->interrupt;
    out->nonfinite = p->nonfinite.data;
}

static int32_t features_of(const flash_kda_fwd_params *p, const fkda_shape *s, fkda_purpose purpose)
{
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
    int32_t features = fkda_arithmetic_features(&arithmetic, s);
    if (has(&p->state_indices, purpose) || has(&p->has_initial_state, purpose)) features |= FKDA_POOL;
    if (has_checkpoints(p, purpose)) features |= FKDA_CHECKPOINTS;
    if (purpose != FKDA_FOR_REFERENCE && (p->saved || p->saved_size)) features |= FKDA_SAVED;
    return features;
}

/* Whether a tensor is not contiguous, which takes a kernel with FKDA_STRIDES. The states of checkpoints are
 * not looked at. */
static bool has_strides(const flash_kda_fwd_params *p)
{
    const flash_kda_tensor *const all[] = {
        &p->q, &p->k, &p->v, &p->g, &p->beta, &p->out, &p->initial_state, &p->final_state};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]->data && !fkda_is_contiguous(all[i])) return true;
    return false;
}

static flash_kda_status fill_options(const flash_kda_fwd_params *p, fkda_purpose purpose, fkda_shape *out)
{
    out->features = features_of(p, out, purpose);
    const int32_t strides = purpose != FKDA_FOR_SHAPES && has_strides(p) ? FKDA_STRIDES : 0;
    out->device = p->device;
    out->max_seqlen = p->max_seqlen;
    out->cut = p->cut;
    out->batch_invariant = p->batch_invariant;
    out->kernel_is_asked_for = p->kernel != NULL;
    if (p->device.type == FLASH_KDA_CPU) out->threads = p->cpu_threads ? p->cpu_threads : fkda_cpu_count();
    const int32_t needed = purpose == FKDA_FOR_REFERENCE ? 0 : out->features | strides;
    return fkda_find_kernel(p->device, p->kernel, needed, &out->kernel);
}

flash_kda_status fkda_check(const flash_kda_fwd_params *p, fkda_purpose purpose, fkda_problem *out)
{
    flash_kda_fwd_params complete;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_params(&p, &complete));
    if (purpose == FKDA_FOR_REFERENCE && p->device.type != FLASH_KDA_CPU)
        return INVALID("device is not the CPU; the reference takes tensors in CPU memory");
    TRY(fkda_check_sizes(&p->q, "q", &p->v, &p->cu_seqlens, has(&p->cu_seqlens, purpose), &out->shape));
    TRY(check_kinds(p));
    TRY(check_scalars(p, out->shape.tokens, purpose));
    TRY(check_combinations(p, purpose));
    TRY(check_tensors(p, &out->shape, purpose));
    if (purpose == FKDA_FOR_FWD) TRY(fkda_check_overlap(p));
    TRY(fill_options(p, purpose, &out->shape));
    if (purpose == FKDA_FOR_SHAPES) return FLASH_KDA_OK; /* Strides have not been looked at. */
    fill_problem(p, purpose, out);
    if (p->device.type != FLASH_KDA_CPU) return FLASH_KDA_OK;
    TRY(fkda_check_interrupt(out->interrupt));
    return fkda_check_indices(out);
}
