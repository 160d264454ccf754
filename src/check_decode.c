/* Checks every argument of decode and apply before anything is launched or written. A refusal is a sentence
 * that names the argument, what it was and what it must be. */
#include "check_decode.h"

#include <string.h>

#include "check_shared.h"
#include "cpu/cpu.h"
#include "kernel.h"

enum { BF16 = FLASH_KDA_BF16, F32 = FLASH_KDA_F32, I64 = FLASH_KDA_I64 };
enum { MAX_LENGTH = FLASH_KDA_MAX_DECODE_TOKENS, RECORD = FLASH_KDA_RECORD_ROWS * FKDA_DIM };

#define ENDS_WITH(type, field, field_type)                                                                   \
    _Static_assert(                                                                                          \
        offsetof(type, field) + sizeof(field_type) == sizeof(type),                                          \
        "the struct must not end in padding: a later field there would read what an older caller "           \
        "left in it")
ENDS_WITH(flash_kda_decode_params, accepted, flash_kda_tensor);
ENDS_WITH(flash_kda_apply_params, interrupt, const volatile int32_t *);

static bool has(const flash_kda_tensor *t)
{
    return t->data != NULL;
}

/* A tensor and what it must be. */
typedef struct named_tensor {
    const flash_kda_tensor *tensor;
    bool optional;
    fkda_requirement must;
} named_tensor;

static flash_kda_status check_tensors(const named_tensor *tensors, int count, int64_t seqlens,
                                      bool with_memory, bool on_gpu)
{
    for (int i = 0; i < count; i++) {
        if (tensors[i].optional && !has(tensors[i].tensor)) continue;
        TRY(fkda_check_tensor(tensors[i].tensor, &tensors[i].must, seqlens, with_memory, on_gpu));
    }
    return FLASH_KDA_OK;
}

/* ---- What decode_layer has too ------------------------------------------------------------------------- */

flash_kda_status fkda_check_columns(const flash_kda_tensor *t, const char *name, const char *letter,
                                    int64_t tokens)
{
    if (t->shape[1] < tokens)
        return INVALID("%s has %s = %lld; it must be at least T = %lld", name, letter, (long long)t->shape[1],
                       (long long)tokens);
    if (t->shape[1] > FKDA_MAX_COLUMNS)
        return INVALID("%s has %s = %lld; it must be at most %d", name, letter, (long long)t->shape[1],
                       FKDA_MAX_COLUMNS);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_slots(const flash_kda_tensor *state, bool has_state_indices, int64_t sequences)
{
    if (has_state_indices || state->shape[0] >= sequences) return FLASH_KDA_OK;
    return INVALID("state has %lld slots; without state_indices it must have one for each of N = %lld "
                   "sequences",
                   (long long)state->shape[0], (long long)sequences);
}

flash_kda_status fkda_check_sequences(const flash_kda_tensor *t, const char *name,
                                      const flash_kda_tensor *cu_seqlens, int64_t *sequences)
{
    const bool packed = has(cu_seqlens);
    int64_t N = t->shape[0];
    if (packed) {
        TRY(fkda_check_rank(cu_seqlens, "cu_seqlens", "[N + 1]", 1));
        N = cu_seqlens->shape[0] - 1;
        if (t->shape[0] != 1)
            return INVALID(
                "cu_seqlens is given and the first size of %s is %lld; it must be 1, all sequences "
                "in one row",
                name, (long long)t->shape[0]);
        if (N < 1)
            return INVALID("cu_seqlens has %lld entries; it must have N + 1 for N >= 1 sequences",
                           (long long)cu_seqlens->shape[0]);
    }
    if (N < 1) return INVALID("%s has N = %lld; there must be at least 1 sequence", name, (long long)N);
    if (!packed && t->shape[1] > MAX_LENGTH)
        return INVALID("%s has T = %lld; there must be at most %d tokens", name, (long long)t->shape[1],
                       MAX_LENGTH);
    *sequences = N;
    return FLASH_KDA_OK;
}

static flash_kda_status check_past_options(const flash_kda_decode_params *p)
{
    if (!has(&p->past_records)) {
        if (has(&p->accepted)) return INVALID("accepted is given without past_records; it must be absent");
        return FLASH_KDA_OK;
    }
    if (p->write_states != FLASH_KDA_WRITE_NONE)
        return INVALID("past_records is given without FLASH_KDA_WRITE_NONE; it must be absent");
    if (!has(&p->num_accepted_tokens))
        return INVALID("num_accepted_tokens is absent; it must be given with past_records");
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_decode_options(const flash_kda_decode_params *p)
{
    if (p->write_states < FLASH_KDA_WRITE_LAST || p->write_states > FLASH_KDA_WRITE_EACH)
        return INVALID("write_states is %d; it must be a flash_kda_write_states, in [%d, %d]",
                       p->write_states, FLASH_KDA_WRITE_LAST, FLASH_KDA_WRITE_EACH);
    TRY(fkda_check_gate_kinds(p->gate, p->beta_kind));
    TRY(fkda_check_flag(p->qk_is_normalised, "qk_is_normalised"));
    TRY(fkda_check_flag(p->state_k_first, "state_k_first"));
    TRY(fkda_check_scale(p->scale, p->gate, p->lower_bound));
    TRY(fkda_check_host(p->cpu_threads, p->interrupt));
    TRY(fkda_check_gate_tensors(p->gate, has(&p->A_log), has(&p->dt_bias)));
    TRY(fkda_check_first_slot(p->first_slot, has(&p->state_indices)));
    const bool each = p->write_states == FLASH_KDA_WRITE_EACH, apart = has(&p->written_states);
    if (apart && p->write_states == FLASH_KDA_WRITE_NONE)
        return INVALID("written_states is given with FLASH_KDA_WRITE_NONE; it must be absent");
    if (!apart && has(&p->written_indices))
        return INVALID("written_indices is given without written_states; it must be absent");
    if (each && !apart && !has(&p->state_indices))
        return INVALID("state_indices is absent; it must be given with FLASH_KDA_WRITE_EACH");
    if (!each && !has(&p->past_records) && has(&p->num_accepted_tokens))
        return INVALID("num_accepted_tokens is given without FLASH_KDA_WRITE_EACH; it must be absent");
    TRY(check_past_options(p));
    if (apart && has(&p->num_accepted_tokens))
        return INVALID("num_accepted_tokens is given with written_states; it must be absent");
    if (p->write_states == FLASH_KDA_WRITE_LAST && has(&p->parents))
        return INVALID("parents is given with FLASH_KDA_WRITE_LAST; a tree has no last state, so it must be "
                       "absent");
    return FLASH_KDA_OK;
}

static int32_t threads_of(flash_kda_device device, int32_t cpu_threads)
{
    if (device.type != FLASH_KDA_CPU) return 0;
    return cpu_threads ? cpu_threads : fkda_cpu_count();
}

bool fkda_has_slots_of_tokens(const flash_kda_decode_params *p)
{
    return p->write_states == FLASH_KDA_WRITE_EACH && !has(&p->written_states);
}

static void fill_written(const flash_kda_decode_params *p, fkda_decode_problem *out)
{
    out->has_written_states = has(&p->written_states);
    out->written = fkda_state_view_of(out->has_written_states ? &p->written_states : &p->state, true);
    out->written_indices = fkda_index_view_of(&p->written_indices);
    out->written_columns = p->write_states == FLASH_KDA_WRITE_EACH ? p->written_indices.shape[1] : 1;
}

void fkda_fill_decode(const flash_kda_decode_params *p, fkda_decode_problem *out)
{
    out->device = p->device;
    out->stream = p->stream;
    out->q = fkda_token_view_of(&p->q);
    out->k = fkda_token_view_of(&p->k);
    out->v = fkda_token_view_of(&p->v);
    out->g = fkda_token_view_of(&p->g);
    out->beta = fkda_token_view_of(&p->beta);
    out->out = fkda_token_view_of(&p->out);
    out->gate = p->gate;
    out->beta_kind = p->beta_kind;
    out->A_log = p->A_log.data;
    out->dt_bias = p->dt_bias.data;
    out->qk_is_normalised = p->qk_is_normalised;
    out->state_k_first = p->state_k_first;
    out->write_states = p->write_states;
    out->state = fkda_state_view_of(&p->state, true);
    out->state_indices = fkda_index_view_of(&p->state_indices);
    out->slot_columns = fkda_has_slots_of_tokens(p) ? p->state_indices.shape[1] : 1;
    out->num_accepted_tokens = fkda_index_view_of(&p->num_accepted_tokens);
    out->cu_seqlens = fkda_index_view_of(&p->cu_seqlens);
    out->parents = fkda_index_view_of(&p->parents);
    out->parent_columns = has(&p->parents) ? p->parents.shape[1] : 0;
    out->records = p->records.data;
    out->record_columns = has(&p->records) ? p->records.shape[1] : 0;
    out->past_records = p->past_records.data;
    out->past_columns = has(&p->past_records) ? p->past_records.shape[1] : 0;
    out->accepted = fkda_index_view_of(&p->accepted);
    out->accepted_columns = has(&p->accepted) ? p->accepted.shape[1] : 0;
    out->rounding = p->state.dtype == FLASH_KDA_BF16 ? p->rounding.data : NULL;
    out->first_slot = p->first_slot;
    fill_written(p, out);
    out->scale = p->scale;
    /* With another gate it may be any number, and kernels need not look out for one. */
    out->lower_bound = p->gate == FLASH_KDA_GATE_BOUNDED ? p->lower_bound : 0.0f;
    out->interrupt = p->interrupt;
    out->threads = threads_of(p->device, p->cpu_threads);
}

flash_kda_status fkda_check_written(const flash_kda_decode_params *p, const fkda_decode_problem *s)
{
    if (!has(&p->written_states)) return FLASH_KDA_OK;
    const bool packed = has(&p->cu_seqlens), each = p->write_states == FLASH_KDA_WRITE_EACH;
    const int64_t tokens = packed ? s->tokens : s->sequences * s->tokens,
                  states = each ? tokens : s->sequences;
    const flash_kda_tensor *const t = &p->written_states;
    if (t->dtype != p->state.dtype)
        return fkda_fail(FLASH_KDA_INVALID_DTYPE,
                         "written_states has dtype %s and state has dtype %s; they must have one dtype",
                         fkda_dtype_name(t->dtype), fkda_dtype_name(p->state.dtype));
    if (!has(&p->written_indices)) {
        if (t->shape[0] >= states) return FLASH_KDA_OK;
        return INVALID("written_states has %lld slots; without written_indices it must have one for each of "
                       "the %lld states that are written",
                       (long long)t->shape[0], (long long)states);
    }
    /* On the CPU the lengths in cu_seqlens are looked at later. */
    return each ? fkda_check_columns(&p->written_indices, "written_indices", "W", packed ? 0 : s->tokens)
                : FLASH_KDA_OK;
}

/* ---- Decode -------------------------------------------------------------------------------------------- */

/* Whether the call writes states where it reads them. */
static bool writes_to_pool(const flash_kda_decode_params *p)
{
    if (p->write_states == FLASH_KDA_WRITE_NONE) return has(&p->past_records);
    return !has(&p->written_states);
}

static flash_kda_status check_sizes(const flash_kda_decode_params *p, fkda_decode_problem *out)
{
    const bool packed = has(&p->cu_seqlens);
    TRY(fkda_check_rank(&p->q, "q", packed ? "[1, total, H, K]" : "[N, T, H, K]", 4));
    TRY(fkda_check_rank(&p->v, "v", packed ? "[1, total, HV, V]" : "[N, T, HV, V]", 4));
    TRY(fkda_check_head_sizes(&p->q, "q", &p->v));
    const int64_t rows = p->q.shape[0], T = p->q.shape[1];
    TRY(fkda_check_sequences(&p->q, "q", &p->cu_seqlens, &out->sequences));
    TRY(fkda_check_counts("q", packed ? "1" : "N", rows, T, out->sequences, p->v.shape[2]));
    out->tokens = T;
    out->heads = p->v.shape[2];
    out->qk_heads = p->q.shape[2];
    return FLASH_KDA_OK;
}

static flash_kda_status check_decode_tensors(const flash_kda_decode_params *p, const fkda_decode_problem *s,
                                             bool for_reference, bool with_memory)
{
    const bool packed = has(&p->cu_seqlens), each = p->write_states == FLASH_KDA_WRITE_EACH,
               has_columns = fkda_has_slots_of_tokens(p);
    const int64_t N = s->sequences, T = s->tokens, H = s->qk_heads, HV = s->heads, D = FKDA_DIM,
                  ANY = FKDA_ANY_SIZE, rows = packed ? 1 : N;
    const char *const q_dims = packed ? "[1, total, H, K]" : "[N, T, H, K]",
                      *const v_dims = packed ? "[1, total, HV, V]" : "[N, T, HV, V]",
                      *const g_dims = packed ? "[1, total, HV, K]" : "[N, T, HV, K]",
                      *const beta_dims = packed ? "[1, total, HV]" : "[N, T, HV]",
                      *const state_dims = p->state_k_first ? "[slots, HV, K, V]" : "[slots, HV, V, K]";
    const bool writes_state = writes_to_pool(p) && !for_reference;
    const char *const written_dims = p->state_k_first ? "[slots2, HV, K, V]" : "[slots2, HV, V, K]";
    const named_tensor tensors[] = {
        {&p->q, false, {"q", q_dims, 4, {rows, T, H, D}, {BF16}, 16, FKDA_ROWS, false}},
        {&p->k, false, {"k", q_dims, 4, {rows, T, H, D}, {BF16}, 16, FKDA_ROWS, false}},
        {&p->v, false, {"v", v_dims, 4, {rows, T, HV, D}, {BF16}, 16, FKDA_ROWS, false}},
        {&p->g, false, {"g", g_dims, 4, {rows, T, HV, D}, {BF16, F32}, 16, FKDA_ROWS, false}},
        {&p->beta, false, {"beta", beta_dims, 3, {rows, T, HV}, {BF16, F32}, 0, FKDA_FREE, false}},
        {&p->out, for_reference, {"out", v_dims, 4, {rows, T, HV, D}, {BF16}, 16, FKDA_ROWS, true}},
        {&p->A_log, true, {"A_log", "HV", 0, {HV}, {F32}, 0, FKDA_CONTIGUOUS, false}},
        {&p->dt_bias, true, {"dt_bias", "HV * K", 0, {HV * D}, {F32}, 16, FKDA_CONTIGUOUS, false}},
        {&p->state,
         false,
         {"state", state_dims, 4, {ANY, HV, D, D}, {F32, BF16}, 16, FKDA_SLOTS, writes_state}},
        {&p->state_indices, true,
         fkda_integers("state_indices", has_columns ? "[N, S]" : "[N]", has_columns ? 2 : 1, N, ANY)},
        {&p->num_accepted_tokens, true, fkda_integers("num_accepted_tokens", "[N]", 1, N, 0)},
        {&p->cu_seqlens, true, fkda_integers("cu_seqlens", "[N + 1]", 1, N + 1, 0)},
        {&p->parents, true, fkda_integers("parents", "[N, P]", 2, N, ANY)},
        {&p->records,
         true,
         {"records",
          "[N, R, HV, 3 * K]",
          4,
          {N, ANY, HV, RECORD},
          {F32},
          16,
          FKDA_CONTIGUOUS,
          !for_reference}},
        {&p->past_records,
         true,
         {"past_records", "[N, R, HV, 3 * K]", 4, {N, ANY, HV, RECORD}, {F32}, 16, FKDA_CONTIGUOUS, false}},
        {&p->accepted, true, fkda_integers("accepted", "[N, A]", 2, N, ANY)},
        {&p->rounding, true, {"rounding", "[2]", 1, {2}, {I64}, 0, FKDA_CONTIGUOUS, false}},
        {&p->written_states,
         true,
         {"written_states", written_dims, 4, {ANY, HV, D, D}, {F32, BF16}, 16, FKDA_SLOTS, !for_reference}},
        {&p->written_indices, true,
         fkda_integers("written_indices", each ? "[N, W]" : "[N]", each ? 2 : 1, N, ANY)},
    };
    TRY(check_tensors(tensors, sizeof tensors / sizeof *tensors, packed ? N + 1 : 0, with_memory,
                      p->device.type == FLASH_KDA_CUDA));
    TRY(fkda_check_slots(&p->state, has(&p->state_indices), N));
    TRY(fkda_check_written(p, s));
    const int64_t columns = packed ? 0 : T; /* On the CPU the lengths in cu_seqlens are looked at later. */
    if (has_columns && p->state_indices.shape[1] < 1)
        return INVALID("state_indices has S = 0; it must have at least the slot that a sequence starts from");
    if (has_columns) TRY(fkda_check_columns(&p->state_indices, "state_indices", "S", columns));
    if (has(&p->parents)) TRY(fkda_check_columns(&p->parents, "parents", "P", columns));
    if (has(&p->records)) TRY(fkda_check_columns(&p->records, "records", "R", columns));
    if (has(&p->past_records)) TRY(fkda_check_columns(&p->past_records, "past_records", "R", 0));
    if (has(&p->accepted)) TRY(fkda_check_columns(&p->accepted, "accepted", "A", 0));
    return FLASH_KDA_OK;
}

static flash_kda_status check_decode_memory(const flash_kda_decode_params *p)
{
    enum { WRITTEN_INDICES = 11, PAST_RECORDS, ACCEPTED, STATE, OUT, RECORDS, WRITTEN, COUNT };
    const fkda_extent all[COUNT] = {
        fkda_extent_of("q", &p->q),
        fkda_extent_of("k", &p->k),
        fkda_extent_of("v", &p->v),
        fkda_extent_of("g", &p->g),
        fkda_extent_of("beta", &p->beta),
        fkda_extent_of("A_log", &p->A_log),
        fkda_extent_of("dt_bias", &p->dt_bias),
        fkda_extent_of("state_indices", &p->state_indices),
        fkda_extent_of("num_accepted_tokens", &p->num_accepted_tokens),
        fkda_extent_of("cu_seqlens", &p->cu_seqlens),
        fkda_extent_of("parents", &p->parents),
        [WRITTEN_INDICES] = fkda_extent_of("written_indices", &p->written_indices),
        [PAST_RECORDS] = fkda_extent_of("past_records", &p->past_records),
        [ACCEPTED] = fkda_extent_of("accepted", &p->accepted),
        [STATE] = fkda_extent_of("state", &p->state),
        [OUT] = fkda_extent_of("out", &p->out),
        [RECORDS] = fkda_extent_of("records", &p->records),
        [WRITTEN] = fkda_extent_of("written_states", &p->written_states),
    };
    const fkda_extent rounding = fkda_extent_of("rounding", &p->rounding);
    for (int w = writes_to_pool(p) ? STATE : OUT; w < COUNT; w++) {
        TRY(fkda_check_own_memory(&all[w], all, w));
        TRY(fkda_check_own_memory(&all[w], &rounding, 1));
    }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_decode(const flash_kda_decode_params *p, bool for_reference,
                                   fkda_decode_problem *out)
{
    flash_kda_decode_params complete;
    const void *params = p;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_struct(&params, &complete, offsetof(flash_kda_decode_params, kernel), sizeof complete,
                             "flash_kda_decode_params"));
    p = params;
    if (for_reference && p->device.type != FLASH_KDA_CPU)
        return INVALID("device is not the CPU; the reference takes tensors in CPU memory");
    TRY(check_sizes(p, out));
    TRY(fkda_check_decode_options(p));
    TRY(check_decode_tensors(p, out, for_reference, true));
    if (!for_reference) TRY(check_decode_memory(p));
    TRY(fkda_find_kernel(p->device, p->kernel, for_reference ? 0 : FKDA_DECODE, &out->kernel));
    fkda_fill_decode(p, out);
    if (p->device.type != FLASH_KDA_CPU) return FLASH_KDA_OK;
    TRY(fkda_check_interrupt(p->interrupt));
    return fkda_check_decode_indices(out);
}

flash_kda_status fkda_check_decode_shapes(const flash_kda_decode_params *p, fkda_decode_problem *out)
{
    flash_kda_decode_params complete;
    const void *params = p;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_struct(&params, &complete, offsetof(flash_kda_decode_params, kernel), sizeof complete,
                             "flash_kda_decode_params"));
    p = params;
    TRY(check_sizes(p, out));
    TRY(fkda_check_decode_options(p));
    TRY(check_decode_tensors(p, out, false, false));
    TRY(fkda_find_kernel(p->device, p->kernel, FKDA_DECODE, &out->kernel));
    fkda_fill_decode(p, out);
    return FLASH_KDA_OK;
}

/* ---- Apply --------------------------------------------------------------------------------------------- */

static flash_kda_status check_apply_tensors(const flash_kda_apply_params *p, bool with_memory)
{
    const bool on_gpu = p->device.type == FLASH_KDA_CUDA;
    const int64_t ANY = FKDA_ANY_SIZE, D = FKDA_DIM;
    const named_tensor records = {
        &p->records,
        false,
        {"records", "[N, R, HV, 3 * K]", 4, {ANY, ANY, ANY, RECORD}, {F32}, 16, FKDA_CONTIGUOUS, false}};
    TRY(check_tensors(&records, 1, 0, with_memory, on_gpu));
    const int64_t N = p->records.shape[0], HV = p->records.shape[2];
    if (N < 1) return INVALID("records has N = %lld; there must be at least 1 sequence", (long long)N);
    if (HV < 1) return INVALID("records has HV = %lld; there must be at least 1 head", (long long)HV);
    TRY(fkda_check_states(N, HV));
    TRY(fkda_check_columns(&p->records, "records", "R", 0));
    const char *const state_dims = p->state_k_first ? "[slots, HV, K, V]" : "[slots, HV, V, K]";
    const named_tensor tensors[] = {
        {&p->num_accepted_tokens, false, fkda_integers("num_accepted_tokens", "[N]", 1, N, 0)},
        {&p->accepted, true, fkda_integers("accepted", "[N, A]", 2, N, ANY)},
        {&p->state, false, {"state", state_dims, 4, {ANY, HV, D, D}, {F32, BF16}, 16, FKDA_SLOTS, true}},
        {&p->state_indices, true, fkda_integers("state_indices", "[N]", 1, N, 0)},
        {&p->rounding, true, {"rounding", "[2]", 1, {2}, {I64}, 0, FKDA_CONTIGUOUS, false}},
    };
    TRY(check_tensors(tensors, sizeof tensors / sizeof *tensors, 0, with_memory, on_gpu));
    if (has(&p->accepted)) TRY(fkda_check_columns(&p->accepted, "accepted", "A", 0));
    return fkda_check_slots(&p->state, has(&p->state_indices), N);
}

static flash_kda_status check_apply_options(const flash_kda_apply_params *p)
{
    TRY(fkda_check_flag(p->state_k_first, "state_k_first"));
    TRY(fkda_check_host(p->cpu_threads, p->interrupt));
    return fkda_check_first_slot(p->first_slot, has(&p->state_indices));
}

static flash_kda_status check_apply_memory(const flash_kda_apply_params *p)
{
    const fkda_extent state = fkda_extent_of("state", &p->state),
                      inputs[] = {
                          fkda_extent_of("records", &p->records),
                          fkda_extent_of("num_accepted_tokens", &p->num_accepted_tokens),
                          fkda_extent_of("accepted", &p->accepted),
                          fkda_extent_of("state_indices", &p->state_indices),
                          fkda_extent_of("rounding", &p->rounding),
                      };
    return fkda_check_own_memory(&state, inputs, sizeof inputs / sizeof *inputs);
}

static void fill_apply(const flash_kda_apply_params *p, fkda_apply_problem *out)
{
    out->device = p->device;
    out->stream = p->stream;
    out->threads = threads_of(p->device, p->cpu_threads);
    out->sequences = p->records.shape[0];
    out->heads = p->records.shape[2];
    out->records = p->records.data;
    out->record_columns = p->records.shape[1];
    out->num_accepted_tokens = fkda_index_view_of(&p->num_accepted_tokens);
    out->accepted = fkda_index_view_of(&p->accepted);
    out->accepted_columns = has(&p->accepted) ? p->accepted.shape[1] : 0;
    out->state_k_first = p->state_k_first;
    out->state = fkda_state_view_of(&p->state, true);
    out->state_indices = fkda_index_view_of(&p->state_indices);
    out->rounding = p->state.dtype == FLASH_KDA_BF16 ? p->rounding.data : NULL;
    out->first_slot = p->first_slot;
    out->interrupt = p->interrupt;
}

flash_kda_status fkda_check_apply(const flash_kda_apply_params *p, fkda_apply_problem *out)
{
    flash_kda_apply_params complete;
    const void *params = p;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_struct(&params, &complete, offsetof(flash_kda_apply_params, kernel), sizeof complete,
                             "flash_kda_apply_params"));
    p = params;
    TRY(check_apply_options(p));
    TRY(check_apply_tensors(p, true));
    TRY(check_apply_memory(p));
    TRY(fkda_find_kernel(p->device, p->kernel, FKDA_DECODE, &out->kernel));
    fill_apply(p, out);
    if (p->device.type != FLASH_KDA_CPU) return FLASH_KDA_OK;
    TRY(fkda_check_interrupt(p->interrupt));
    return fkda_check_apply_indices(out);
}

flash_kda_status fkda_check_apply_shapes(const flash_kda_apply_params *p, fkda_apply_problem *out)
{
    flash_kda_apply_params complete;
    const void *params = p;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_struct(&params, &complete, offsetof(flash_kda_apply_params, kernel), sizeof complete,
                             "flash_kda_apply_params"));
    p = params;
    TRY(check_apply_options(p));
    TRY(check_apply_tensors(p, false));
    TRY(fkda_find_kernel(p->device, p->kernel, FKDA_DECODE, &out->kernel));
    fill_apply(p, out);
    return FLASH_KDA_OK;
}
