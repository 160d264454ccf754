/* Checks every argument before anything is launched or written. A refusal is a sentence that names the
 * argument, what it was and what it must be. Today's kernels take contiguous tensors alone, and this file
 * refuses all others: what leaves the file are views with strides. */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cpu/cpu.h"
#include "errors.h"
#include "kernel.h"

#define INVALID(...) fkda_fail(FLASH_KDA_INVALID_VALUE, __VA_ARGS__)
#define TRY(call)                                                                                            \
    do {                                                                                                     \
        flash_kda_status try_status = (call);                                                                \
        if (try_status != FLASH_KDA_OK) return try_status;                                                   \
    } while (0)

/* Kernels count tokens in 32 bits. The room above lets a position run past the end of the tensor by a
 * chunk. */
static const int64_t MAX_TOKENS = INT32_MAX - 1024;
/* Kernels number states, N * H, in 32 bits. The room above lets them count past the last state by two for
 * each CTA. */
static const int64_t MAX_STATES = INT32_MAX - 1024;
/* No machine has memory for a tensor of more bytes. Estimates of clocks, which are at most some thousands for
 * each of these bytes, then fit 64 bits. */
static const int64_t MAX_TENSOR_BYTES = (int64_t)1 << 50;
/* With this many heads the step from one token to the next, in elements, still fits 32 bits. */
static const int64_t MAX_HEADS = INT32_MAX / FKDA_DIM;

static const char *dtype_name(int32_t dtype)
{
    static const char *const names[] = {"none",  "bfloat16", "float32", "int32",
                                        "int64", "float16",  "float64", "another type"};
    return dtype >= 0 && dtype <= FLASH_KDA_OTHER ? names[dtype] : "an unknown type";
}

static size_t dtype_size(int32_t dtype)
{
    switch (dtype) {
    case FLASH_KDA_BF16: return 2;
    case FLASH_KDA_I64: return 8;
    default: return 4;
    }
}

/* "[1, 8192, 96, 128]" */
static const char *shape_text(const int64_t *sizes, int ndim, char text[96])
{
    int used = snprintf(text, 96, "[");
    for (int i = 0; i < ndim && used < 90; i++)
        used += snprintf(text + used, (size_t)(96 - used), i ? ", %lld" : "%lld", (long long)sizes[i]);
    snprintf(text + used, (size_t)(96 - used), "]");
    return text;
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

/* What a tensor must look like. */
typedef struct requirement {
    const char *name;
    const char *dims; /* the shape in words: "[B, T, H, K]" */
    int ndim;
    int64_t shape[4];
    int32_t dtypes[2]; /* the accepted ones; the second may be 0 */
    size_t alignment;  /* in bytes */
} requirement;

static flash_kda_status check_rank(const flash_kda_tensor *t, const char *name, const char *dims, int ndim)
{
    if (t->ndim != ndim)
        return INVALID("%s has %d dimensions; it must have %d: %s", name, t->ndim, ndim, dims);
    for (int i = 0; i < ndim; i++)
        if (t->shape[i] < 0)
            return INVALID("%s has size %lld in dimension %d; sizes must not be negative", name,
                           (long long)t->shape[i], i);
    return FLASH_KDA_OK;
}

static flash_kda_status check_dtype(const flash_kda_tensor *t, const requirement *r)
{
    if (t->dtype == r->dtypes[0] || (r->dtypes[1] && t->dtype == r->dtypes[1])) return FLASH_KDA_OK;
    return fkda_fail(FLASH_KDA_INVALID_DTYPE, "%s has dtype %s; it must be %s%s%s", r->name,
                     dtype_name(t->dtype), dtype_name(r->dtypes[0]), r->dtypes[1] ? " or " : "",
                     r->dtypes[1] ? dtype_name(r->dtypes[1]) : "");
}

/* The tensor must be contiguous. The stride of a dimension of size 1 means nothing and may be anything. */
static flash_kda_status check_strides(const flash_kda_tensor *t, const requirement *r)
{
    int64_t want[4], step = 1;
    bool contiguous = true;
    for (int i = r->ndim - 1; i >= 0; i--) {
        want[i] = step;
        if (t->shape[i] == 0) return FLASH_KDA_OK;
        if (t->shape[i] > 1 && t->stride[i] != step) contiguous = false;
        step *= t->shape[i];
    }
    if (contiguous) return FLASH_KDA_OK;
    char was[96], must[96];
    return INVALID("%s has strides %s; it must be contiguous, with strides %s", r->name,
                   shape_text(t->stride, r->ndim, was), shape_text(want, r->ndim, must));
}

static flash_kda_status check_memory(const flash_kda_tensor *t, const requirement *r)
{
    int64_t bytes = (int64_t)dtype_size(t->dtype);
    for (int i = 0; i < r->ndim; i++) bytes *= r->shape[i];
    if (bytes && !t->data)
        return INVALID("%s is null; it must point to its %lld bytes", r->name, (long long)bytes);
    size_t alignment = r->alignment ? r->alignment : dtype_size(t->dtype);
    if ((uintptr_t)t->data % alignment)
        return INVALID("%s is at address %p; it must be aligned to %zu bytes", r->name, t->data, alignment);
    return FLASH_KDA_OK;
}

static flash_kda_status refuse_shape(const flash_kda_tensor *t, const requirement *r, int64_t seqlens)
{
    char was[96], must[96], source[64] = "";
    if (seqlens && strncmp(r->dims, "[N,", 3) == 0)
        snprintf(source, sizeof source, ", with N from the %lld entries of cu_seqlens", (long long)seqlens);
    return INVALID("%s has shape %s; it must be %s = %s%s", r->name, shape_text(t->shape, r->ndim, was),
                   r->dims, shape_text(r->shape, r->ndim, must), source);
}

/* `seqlens` is the number of entries of cu_seqlens, 0 if it is absent. */
static flash_kda_status check_tensor(const flash_kda_tensor *t, const requirement *r, int64_t seqlens,
                                     fkda_purpose purpose)
{
    TRY(check_dtype(t, r));
    TRY(check_rank(t, r->name, r->dims, r->ndim));
    if (memcmp(t->shape, r->shape, sizeof(int64_t) * (size_t)r->ndim) != 0)
        return refuse_shape(t, r, seqlens);
    if (purpose == FKDA_FOR_SHAPES) return FLASH_KDA_OK;
    TRY(check_strides(t, r));
    return check_memory(t, r);
}

/* A stretch of memory that belongs to one argument; bytes is 0 if it is absent or empty. */
typedef struct extent {
    const char *name;
    const void *data;
    size_t bytes;
} extent;

static extent extent_of(const char *name, const flash_kda_tensor *t)
{
    extent e = {name, t->data, 0};
    if (!t->data) return e; /* its other fields mean nothing */
    e.bytes = dtype_size(t->dtype);
    for (int i = 0; i < t->ndim; i++) e.bytes *= (size_t)t->shape[i];
    return e;
}

static bool overlap(extent a, extent b)
{
    /* Differences cannot wrap, and ends of stretches could: workspace_size may be any number. */
    uintptr_t x = (uintptr_t)a.data, y = (uintptr_t)b.data;
    return a.bytes && b.bytes && (x < y ? y - x < a.bytes : x - y < b.bytes);
}

/* Memory that is written must belong to one argument alone. The one exception is a state that is updated in
 * place. */
static flash_kda_status check_overlap(const flash_kda_fwd_params *p)
{
    enum { INITIAL = 8, FINAL = 9, FIRST_WRITTEN = FINAL, COUNT = 13 };
    const extent all[COUNT] = {
        extent_of("q", &p->q),
        extent_of("k", &p->k),
        extent_of("v", &p->v),
        extent_of("g", &p->g),
        extent_of("beta", &p->beta),
        extent_of("A_log", &p->A_log),
        extent_of("dt_bias", &p->dt_bias),
        extent_of("cu_seqlens", &p->cu_seqlens),
        [INITIAL] = extent_of("initial_state", &p->initial_state),
        [FINAL] = extent_of("final_state", &p->final_state),
        extent_of("out", &p->out),
        extent_of("nonfinite", &p->nonfinite),
        {"workspace", p->workspace, p->workspace ? p->workspace_size : 0},
    };
    for (int w = FIRST_WRITTEN; w < COUNT; w++)
        for (int i = 0; i < w; i++) {
            if (!overlap(all[w], all[i])) continue;
            if (w == FINAL && i == INITIAL) {
                if (all[w].data == all[i].data) continue;
                return INVALID(
                    "final_state overlaps initial_state in part; they must be the same memory or apart");
            }
            return INVALID("%s overlaps %s; it must have memory of its own", all[w].name, all[i].name);
        }
    return FLASH_KDA_OK;
}

static bool has_seqlens(const flash_kda_fwd_params *p, fkda_purpose purpose)
{
    return p->cu_seqlens.data || (purpose == FKDA_FOR_SHAPES && p->cu_seqlens.ndim);
}

static flash_kda_status check_sizes(const flash_kda_fwd_params *p, fkda_purpose purpose, fkda_shape *out)
{
    TRY(check_rank(&p->q, "q", "[B, T, H, K]", 4));
    TRY(check_rank(&p->v, "v", "[B, T, H, V]", 4));
    int64_t B = p->q.shape[0], T = p->q.shape[1], H = p->q.shape[2], N = B;
    if (p->q.shape[3] != FKDA_DIM)
        return INVALID("q has K = %lld; the head size K must be 128", (long long)p->q.shape[3]);
    if (p->v.shape[3] != FKDA_DIM)
        return INVALID("v has V = %lld; the head size V must be 128", (long long)p->v.shape[3]);
    if (B < 1) return INVALID("q has B = %lld; there must be at least 1 batch row", (long long)B);
    if (H < 1) return INVALID("q has H = %lld; there must be at least 1 head", (long long)H);
    if (has_seqlens(p, purpose)) {
        TRY(check_rank(&p->cu_seqlens, "cu_seqlens", "[N + 1]", 1));
        if (B != 1)
            return INVALID("cu_seqlens is given with B = %lld; B must be 1, all sequences in one row",
                           (long long)B);
        N = p->cu_seqlens.shape[0] - 1;
        if (N < 1)
            return INVALID("cu_seqlens has %lld entries; it must have N + 1 for N >= 1 sequences",
                           (long long)p->cu_seqlens.shape[0]);
    }
    int64_t tokens, elements, tasks, states;
    if (__builtin_mul_overflow(B, T, &tokens) || __builtin_mul_overflow(tokens, H, &elements) ||
        __builtin_mul_overflow(elements, 4 * FKDA_DIM, &elements) || elements > MAX_TENSOR_BYTES ||
        tokens > MAX_TOKENS)
        return INVALID("q has B * T = %lld * %lld tokens of %lld heads; there must be at most %lld tokens, "
                       "and a tensor must fit in memory",
                       (long long)B, (long long)T, (long long)H, (long long)MAX_TOKENS);
    if (__builtin_mul_overflow(N, H, &tasks) || tasks > MAX_STATES ||
        __builtin_mul_overflow(tasks, 4 * FKDA_DIM * FKDA_DIM, &states))
        return INVALID("there are N * H = %lld * %lld states; there must be at most %lld", (long long)N,
                       (long long)H, (long long)MAX_STATES);
    if (H > MAX_HEADS)
        return INVALID("q has H = %lld; there must be at most %lld heads", (long long)H,
                       (long long)MAX_HEADS);
    out->batch = B;
    out->tokens = T;
    out->heads = H;
    out->sequences = N;
    out->has_cu_seqlens = has_seqlens(p, purpose);
    return FLASH_KDA_OK;
}

static flash_kda_status check_tensors(const flash_kda_fwd_params *p, const fkda_shape *s,
                                      fkda_purpose purpose)
{
    const int64_t B = s->batch, T = s->tokens, H = s->heads, N = s->sequences, D = FKDA_DIM;
    const int64_t seqlens = has_seqlens(p, purpose) ? N + 1 : 0;
    const struct {
        const flash_kda_tensor *tensor;
        bool optional;
        requirement must;
    } tensors[] = {
        {&p->q, false, {"q", "[B, T, H, K]", 4, {B, T, H, D}, {FLASH_KDA_BF16}, 16}},
        {&p->k, false, {"k", "[B, T, H, K]", 4, {B, T, H, D}, {FLASH_KDA_BF16}, 16}},
        {&p->v, false, {"v", "[B, T, H, V]", 4, {B, T, H, D}, {FLASH_KDA_BF16}, 16}},
        {&p->g, false, {"g", "[B, T, H, K]", 4, {B, T, H, D}, {FLASH_KDA_BF16}, 16}},
        {&p->beta, false, {"beta", "[B, T, H]", 3, {B, T, H}, {FLASH_KDA_BF16}, 0}},
        {&p->out,
         purpose == FKDA_FOR_REFERENCE,
         {"out", "[B, T, H, V]", 4, {B, T, H, D}, {FLASH_KDA_BF16}, 16}},
        {&p->A_log, false, {"A_log", "[H]", 1, {H}, {FLASH_KDA_F32}, 0}},
        {&p->dt_bias, false, {"dt_bias", "[H, K]", 2, {H, D}, {FLASH_KDA_F32}, 16}},
        {&p->initial_state,
         true,
         {"initial_state", "[N, H, V, K]", 4, {N, H, D, D}, {FLASH_KDA_F32, FLASH_KDA_BF16}, 16}},
        {&p->final_state,
         true,
         {"final_state", "[N, H, V, K]", 4, {N, H, D, D}, {FLASH_KDA_F32, FLASH_KDA_BF16}, 16}},
        {&p->cu_seqlens, true, {"cu_seqlens", "[N + 1]", 1, {N + 1}, {FLASH_KDA_I64, FLASH_KDA_I32}, 0}},
        {&p->nonfinite,
         true,
         {"nonfinite", "[tensors, 2]", 2, {FLASH_KDA_CHECKED_TENSORS, 2}, {FLASH_KDA_I64}, 0}},
    };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        if (tensors[i].optional && !tensors[i].tensor->data) continue;
        TRY(check_tensor(tensors[i].tensor, &tensors[i].must, seqlens, purpose));
    }
    if (p->initial_state.data && p->final_state.data && p->initial_state.dtype != p->final_state.dtype)
        return fkda_fail(FLASH_KDA_INVALID_DTYPE,
                         "final_state has dtype %s and initial_state %s; they must have the same",
                         dtype_name(p->final_state.dtype), dtype_name(p->initial_state.dtype));
    return FLASH_KDA_OK;
}

static flash_kda_status check_scalars(const flash_kda_fwd_params *p, int64_t tokens)
{
    char number[32];
    if (!isfinite(p->scale)) return INVALID("scale is %s; it must be finite", number_text(p->scale, number));
    if (!(p->lower_bound >= -5.0f && p->lower_bound <= 0.0f))
        return INVALID("lower_bound is %s; it must be in [-5, 0]", number_text(p->lower_bound, number));
    if (p->cpu_threads < 0) return INVALID("cpu_threads is %d; it must be 0 (all) or more", p->cpu_threads);
    if (p->batch_invariant != 0 && p->batch_invariant != 1)
        return INVALID("batch_invariant is %d; it must be 0 or 1", p->batch_invariant);
    if (p->max_seqlen < 0 || p->max_seqlen > tokens)
        return INVALID("max_seqlen is %lld; it must be in [0, T] = [0, %lld]", (long long)p->max_seqlen,
                       (long long)tokens);
    if (p->cut < FLASH_KDA_CUT_AUTO || p->cut > FLASH_KDA_CUT_MIXED)
        return INVALID("cut is %d; it must be a flash_kda_cut, in [%d, %d]", p->cut, FLASH_KDA_CUT_AUTO,
                       FLASH_KDA_CUT_MIXED);
    if (p->reserved != 0) return INVALID("reserved is %d; it must be 0", p->reserved);
    if ((uintptr_t)p->interrupt % sizeof *p->interrupt)
        return INVALID("interrupt is at address %p; it must be aligned to 4 bytes", (void *)p->interrupt);
    return FLASH_KDA_OK;
}

static flash_kda_status check_cu_seqlens(const fkda_problem *p)
{
    int64_t last = fkda_border(p, 0);
    if (last != 0) return INVALID("cu_seqlens[0] is %lld; it must be 0", (long long)last);
    for (int64_t n = 1; n <= p->shape.sequences; n++) {
        const int64_t border = fkda_border(p, n);
        if (border < last)
            return INVALID("cu_seqlens[%lld] is %lld after %lld; it must not decrease", (long long)n,
                           (long long)border, (long long)last);
        last = border;
    }
    if (last != p->shape.tokens)
        return INVALID("cu_seqlens ends with %lld; its last entry must be T = %lld", (long long)last,
                       (long long)p->shape.tokens);
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
    offsetof(flash_kda_fwd_params, nonfinite) + sizeof(flash_kda_tensor) == sizeof(flash_kda_fwd_params),
    "the struct must not end in padding: a later field there would read what an older caller left in it");

/* The fields before `workspace` exist since the first version. */
flash_kda_status fkda_complete_params(const flash_kda_fwd_params **params, flash_kda_fwd_params *whole)
{
    const size_t least = offsetof(flash_kda_fwd_params, workspace), most = sizeof *whole;
    if (!*params) return INVALID("params is null; it must point to a flash_kda_fwd_params");
    const size_t size = (*params)->struct_size;
    if (size == most) return FLASH_KDA_OK;
    if (size < least || size > most || size % sizeof(void *))
        return INVALID("params->struct_size is %zu; it must be sizeof(flash_kda_fwd_params) = %zu (in older "
                       "headers %zu or more)",
                       size, most, least);
    memset(whole, 0, sizeof *whole);
    memcpy(whole, *params, size);
    *params = whole;
    return FLASH_KDA_OK;
}

/* The view of a contiguous tensor [B, T, H, 128] or [B, T, H]. The strides are made from the sizes, because a
 * contiguous tensor may come with any stride in a dimension of size 1. */
static fkda_token_view contiguous_token_view(const flash_kda_tensor *t)
{
    const int64_t heads = t->shape[2], row = t->ndim == 4 ? FKDA_DIM : 1;
    return (fkda_token_view){.data = t->data,
                             .batch_stride = t->shape[1] * heads * row,
                             .token_stride = heads * row,
                             .head_stride = row,
                             .heads = heads,
                             .dtype = t->dtype};
}

static fkda_state_view contiguous_state_view(const flash_kda_tensor *t)
{
    if (!t->data) return (fkda_state_view){0};
    return (fkda_state_view){.data = t->data,
                             .sequence_stride = t->shape[1] * FKDA_DIM * FKDA_DIM,
                             .head_stride = FKDA_DIM * FKDA_DIM,
                             .heads = t->shape[1],
                             .dtype = t->dtype};
}

static void fill_problem(const flash_kda_fwd_params *p, fkda_problem *out)
{
    out->stream = p->stream;
    out->q = contiguous_token_view(&p->q);
    out->k = contiguous_token_view(&p->k);
    out->v = contiguous_token_view(&p->v);
    out->g = contiguous_token_view(&p->g);
    out->beta = contiguous_token_view(&p->beta);
    out->out = contiguous_token_view(&p->out);
    out->A_log = p->A_log.data;
    out->dt_bias = p->dt_bias.data;
    out->initial_state = contiguous_state_view(&p->initial_state);
    out->final_state = contiguous_state_view(&p->final_state);
    out->cu_seqlens = p->cu_seqlens.data;
    out->cu_seqlens_is_i32 = p->cu_seqlens.dtype == FLASH_KDA_I32;
    out->scale = p->scale;
    out->lower_bound = p->lower_bound;
    out->workspace = p->workspace;
    out->workspace_size = p->workspace_size;
    out->interrupt = p->interrupt;
    out->nonfinite = p->nonfinite.data;
}

static flash_kda_status fill_options(const flash_kda_fwd_params *p, fkda_shape *out)
{
    out->device = p->device;
    out->max_seqlen = p->max_seqlen;
    out->cut = p->cut;
    out->batch_invariant = p->batch_invariant;
    out->kernel_is_asked_for = p->kernel != NULL;
    if (p->device.type == FLASH_KDA_CPU) out->threads = p->cpu_threads ? p->cpu_threads : fkda_cpu_count();
    return fkda_find_kernel(p->device, p->kernel, &out->kernel);
}

flash_kda_status fkda_check(const flash_kda_fwd_params *p, fkda_purpose purpose, fkda_problem *out)
{
    flash_kda_fwd_params whole;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_params(&p, &whole));
    if (purpose == FKDA_FOR_REFERENCE && p->device.type != FLASH_KDA_CPU)
        return INVALID("device is not the CPU; the reference takes tensors in CPU memory");
    TRY(check_sizes(p, purpose, &out->shape));
    TRY(check_scalars(p, out->shape.tokens));
    TRY(check_tensors(p, &out->shape, purpose));
    TRY(fill_options(p, &out->shape));
    fill_problem(p, out);
    if (purpose == FKDA_FOR_SHAPES) return FLASH_KDA_OK;
    if (purpose == FKDA_FOR_FWD) TRY(check_overlap(p));
    if (p->device.type != FLASH_KDA_CPU) return FLASH_KDA_OK;
    if (fkda_interrupted(out))
        return fkda_fail(FLASH_KDA_INTERRUPTED,
                         "*interrupt is not 0, so the call was given up before it began");
    if (out->cu_seqlens) TRY(check_cu_seqlens(out));
    return FLASH_KDA_OK;
}
