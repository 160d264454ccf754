/* The checks that the forward pass and decode share. A refusal is a sentence that names the argument, what it
 * was and what it must be. */
#include "check_shared.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Kernels count tokens in 32 bits. The room above lets a position run past the end of the tensor by a
 * chunk. */
static const int64_t MAX_TOKENS = INT32_MAX - 1024;
/* Kernels number states, N * HV, in 32 bits. The room above lets them count past the last state by two for
 * each CTA. */
static const int64_t MAX_STATES = INT32_MAX - 1024;
/* With this many heads the step from one token to the next, in elements, still fits 32 bits. */
static const int64_t MAX_HEADS = INT32_MAX / FKDA_DIM;

flash_kda_status fkda_complete_struct(const void **params, void *complete, size_t least, size_t most,
                                      const char *name)
{
    if (!*params) return INVALID("params is null; it must point to a %s", name);
    size_t size;
    memcpy(&size, *params, sizeof size);
    if (size == most) return FLASH_KDA_OK;
    if (size < least || size > most || size % sizeof(void *))
        return INVALID(
            "params->struct_size is %zu; it must be sizeof(%s) = %zu (in older headers %zu or more)", size,
            name, most, least);
    memset(complete, 0, most);
    memcpy(complete, *params, size);
    *params = complete;
    return FLASH_KDA_OK;
}

/* ---- Sizes ---- */

flash_kda_status fkda_check_head_sizes(const flash_kda_tensor *q, const char *q_name,
                                       const flash_kda_tensor *v)
{
    const int64_t H = q->shape[2], HV = v->shape[2];
    if (q->shape[3] != FKDA_DIM)
        return INVALID("%s has K = %lld; the head size K must be 128", q_name, (long long)q->shape[3]);
    if (v->shape[3] != FKDA_DIM)
        return INVALID("v has V = %lld; the head size V must be 128", (long long)v->shape[3]);
    if (H < 1) return INVALID("%s has H = %lld; there must be at least 1 head", q_name, (long long)H);
    if (HV < 1 || HV % H)
        return INVALID("v has HV = %lld heads and %s has H = %lld; HV must be a multiple of H", (long long)HV,
                       q_name, (long long)H);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_counts(const char *q_name, const char *rows, int64_t batch, int64_t T, int64_t N,
                                   int64_t HV)
{
    int64_t tokens, elements;
    if (__builtin_mul_overflow(batch, T, &tokens) || __builtin_mul_overflow(tokens, HV, &elements) ||
        __builtin_mul_overflow(elements, 4 * FKDA_DIM, &elements) || elements > FKDA_MAX_TENSOR_BYTES ||
        tokens > MAX_TOKENS)
        return INVALID("%s has %s * T = %lld * %lld tokens and v has HV = %lld heads; there must be at most "
                       "%lld tokens, and a tensor must fit in memory",
                       q_name, rows, (long long)batch, (long long)T, (long long)HV, (long long)MAX_TOKENS);
    TRY(fkda_check_states(N, HV));
    if (HV > MAX_HEADS)
        return INVALID("v has HV = %lld; there must be at most %lld heads", (long long)HV,
                       (long long)MAX_HEADS);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_states(int64_t N, int64_t HV)
{
    int64_t tasks, states;
    if (__builtin_mul_overflow(N, HV, &tasks) || tasks > MAX_STATES ||
        __builtin_mul_overflow(tasks, 4 * FKDA_DIM * FKDA_DIM, &states))
        return INVALID("there are N * HV = %lld * %lld states; there must be at most %lld", (long long)N,
                       (long long)HV, (long long)MAX_STATES);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_sizes(const flash_kda_tensor *q, const char *q_name, const flash_kda_tensor *v,
                                  const flash_kda_tensor *cu_seqlens, bool has_cu_seqlens, fkda_shape *out)
{
    TRY(fkda_check_rank(q, q_name, "[B, T, H, K]", 4));
    TRY(fkda_check_rank(v, "v", "[B, T, HV, V]", 4));
    int64_t B = q->shape[0], T = q->shape[1], N = B;
    const int64_t H = q->shape[2], HV = v->shape[2];
    TRY(fkda_check_head_sizes(q, q_name, v));
    if (B < 1) return INVALID("%s has B = %lld; there must be at least 1 batch row", q_name, (long long)B);
    if (has_cu_seqlens) {
        TRY(fkda_check_rank(cu_seqlens, "cu_seqlens", "[N + 1]", 1));
        if (B != 1)
            return INVALID("cu_seqlens is given with B = %lld; B must be 1, all sequences in one row",
                           (long long)B);
        N = cu_seqlens->shape[0] - 1;
        if (N < 1)
            return INVALID("cu_seqlens has %lld entries; it must have N + 1 for N >= 1 sequences",
                           (long long)cu_seqlens->shape[0]);
    }
    TRY(fkda_check_counts(q_name, "B", B, T, N, HV));
    out->batch = B;
    out->tokens = T;
    out->heads = HV;
    out->qk_heads = H;
    out->sequences = N;
    out->has_cu_seqlens = has_cu_seqlens;
    return FLASH_KDA_OK;
}

/* ---- Numbers and flags ---- */

flash_kda_status fkda_check_flag(int32_t flag, const char *name)
{
    return flag == 0 || flag == 1 ? FLASH_KDA_OK : INVALID("%s is %d; it must be 0 or 1", name, flag);
}

flash_kda_status fkda_check_gate_kinds(int32_t gate, int32_t beta_kind)
{
    if (gate < FLASH_KDA_GATE_BOUNDED || gate > FLASH_KDA_GATE_ACTIVATED)
        return INVALID("gate is %d; it must be a flash_kda_gate, in [%d, %d]", gate, FLASH_KDA_GATE_BOUNDED,
                       FLASH_KDA_GATE_ACTIVATED);
    if (beta_kind < FLASH_KDA_BETA_SIGMOID || beta_kind > FLASH_KDA_BETA_ACTIVATED)
        return INVALID("beta_kind is %d; it must be a flash_kda_beta, in [%d, %d]", beta_kind,
                       FLASH_KDA_BETA_SIGMOID, FLASH_KDA_BETA_ACTIVATED);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_gate_tensors(int32_t gate, bool has_A_log, bool has_dt_bias)
{
    if (gate == FLASH_KDA_GATE_ACTIVATED && has_A_log)
        return INVALID("A_log is given with the gate FLASH_KDA_GATE_ACTIVATED, for which g is the log decay "
                       "itself; it must be absent");
    if (gate == FLASH_KDA_GATE_ACTIVATED && has_dt_bias)
        return INVALID("dt_bias is given with the gate FLASH_KDA_GATE_ACTIVATED, for which g is the log "
                       "decay itself; it must be absent");
    if (gate == FLASH_KDA_GATE_SOFTPLUS && !has_A_log)
        return INVALID("A_log is absent; it must be given with the gate FLASH_KDA_GATE_SOFTPLUS");
    return FLASH_KDA_OK;
}

/* A number as C writes it, "0.5", whatever decimal point the process's locale has: "0,5" in [-5, 0] would
 * read as two numbers. A decimal point of several bytes becomes one too. */
static const char *number_text(float number, char text[32])
{
    char *to = text;
    snprintf(text, 32, "%g", (double)number);
    for (const char *from = text; *from; from++) {
        if (strchr("+-0123456789abcdefinty", *from))
            *to++ = *from;
        else if (to == text || to[-1] != '.')
            *to++ = '.';
    }
    *to = 0;
    return text;
}

flash_kda_status fkda_check_scale(float scale, int32_t gate, float lower_bound)
{
    char number[32];
    if (!isfinite(scale)) return INVALID("scale is %s; it must be finite", number_text(scale, number));
    if (gate == FLASH_KDA_GATE_BOUNDED && !(lower_bound >= -5.0f && lower_bound <= 0.0f))
        return INVALID("lower_bound is %s; it must be in [-5, 0]", number_text(lower_bound, number));
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_first_slot(int64_t first_slot, bool has_state_indices)
{
    if (first_slot < 0) return INVALID("first_slot is %lld; it must be 0 or more", (long long)first_slot);
    if (first_slot && !has_state_indices)
        return INVALID("first_slot is %lld without state_indices; it must be 0", (long long)first_slot);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_max_seqlen(int64_t max_seqlen, int64_t tokens)
{
    if (max_seqlen >= 0 && max_seqlen <= tokens) return FLASH_KDA_OK;
    return INVALID("max_seqlen is %lld; it must be in [0, T] = [0, %lld]", (long long)max_seqlen,
                   (long long)tokens);
}

flash_kda_status fkda_check_host(int32_t cpu_threads, const volatile int32_t *interrupt)
{
    if (cpu_threads < 0) return INVALID("cpu_threads is %d; it must be 0 (all) or more", cpu_threads);
    if ((uintptr_t)interrupt % sizeof *interrupt)
        return INVALID("interrupt is at address %p; it must be aligned to 4 bytes", (void *)interrupt);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_saved_pointer(const void *saved, size_t size, fkda_purpose purpose)
{
    if (purpose != FKDA_FOR_FWD) return FLASH_KDA_OK;
    if (!saved && size)
        return INVALID("saved is null and saved_size is %zu; without saved it must be 0", size);
    if ((uintptr_t)saved % 64)
        return INVALID("saved is at address %p; it must be aligned to 64 bytes", saved);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_saved_size(const fkda_problem *p, size_t bytes_needed)
{
    if (!p->saved || p->saved_size >= bytes_needed) return FLASH_KDA_OK;
    return INVALID("saved_size is %zu bytes; this call needs %zu", p->saved_size, bytes_needed);
}

int32_t fkda_arithmetic_features(const fkda_arithmetic_options *o, const fkda_shape *s)
{
    int32_t features = 0;
    if (s->heads != s->qk_heads) features |= FKDA_GROUPED;
    if (o->gate == FLASH_KDA_GATE_SOFTPLUS) features |= FKDA_SOFTPLUS;
    if (o->gate == FLASH_KDA_GATE_ACTIVATED) features |= FKDA_ACTIVATED;
    if (o->gate == FLASH_KDA_GATE_BOUNDED && !o->has_A_log) features |= FKDA_NO_PARAMETER;
    if (o->gate != FLASH_KDA_GATE_ACTIVATED && !o->has_dt_bias) features |= FKDA_NO_PARAMETER;
    if (o->g_dtype == FLASH_KDA_F32) features |= FKDA_FP32_GATES;
    if (o->beta_dtype == FLASH_KDA_F32) features |= FKDA_FP32_BETA;
    if (o->beta_kind != FLASH_KDA_BETA_SIGMOID) features |= FKDA_BETA_KIND;
    if (o->qk_is_normalised) features |= FKDA_NORMALISED;
    if (o->state_k_first) features |= FKDA_K_FIRST;
    return features;
}

flash_kda_status fkda_check_interrupt(const volatile int32_t *interrupt)
{
    if (!fkda_is_interrupt(interrupt)) return FLASH_KDA_OK;
    return fkda_fail(FLASH_KDA_INTERRUPTED, "*interrupt is not 0, so the call was given up before it began");
}

/* ---- Views ---- */

fkda_token_view fkda_token_view_of(const flash_kda_tensor *t)
{
    return (fkda_token_view){.data = t->data,
                             .batch_stride = fkda_stride_of(t, 0),
                             .token_stride = fkda_stride_of(t, 1),
                             .head_stride = fkda_stride_of(t, 2),
                             .heads = t->shape[2],
                             .dtype = t->dtype};
}

fkda_state_view fkda_state_view_of(const flash_kda_tensor *t, bool present)
{
    if (!present) return (fkda_state_view){0};
    return (fkda_state_view){.data = t->data,
                             .slots = t->shape[0],
                             .slot_stride = fkda_stride_of(t, 0),
                             .head_stride = FKDA_DIM * FKDA_DIM,
                             .heads = t->shape[1],
                             .dtype = t->dtype};
}

fkda_index_view fkda_index_view_of(const flash_kda_tensor *t)
{
    return (fkda_index_view){t->data, t->dtype == FLASH_KDA_I32};
}
