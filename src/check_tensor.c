/* The checks of one tensor, and of tensors that share memory. A refusal is a sentence that names the tensor,
 * what it was and what it must be. */
#include "check_tensor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *fkda_dtype_name(int32_t dtype)
{
    static const char *const names[] = {"none",    "bfloat16", "float32",      "int32", "int64",
                                        "float16", "float64",  "another type", "bool"};
    return dtype >= 0 && dtype <= FLASH_KDA_BOOL ? names[dtype] : "an unknown type";
}

size_t fkda_dtype_size(int32_t dtype)
{
    switch (dtype) {
    case FLASH_KDA_BOOL: return 1;
    case FLASH_KDA_BF16: return 2;
    case FLASH_KDA_I64: return 8;
    default: return 4;
    }
}

/* "[1, 8192, 96, 128]" */
static const char *numbers_text(const int64_t *numbers, int ndim, char text[96])
{
    int used = snprintf(text, 96, "[");
    for (int i = 0; i < ndim && used < 90; i++)
        used += snprintf(text + used, (size_t)(96 - used), i ? ", %lld" : "%lld", (long long)numbers[i]);
    if (used > 94) used = 94;
    snprintf(text + used, (size_t)(96 - used), "]");
    return text;
}

flash_kda_status fkda_check_rank(const flash_kda_tensor *t, const char *name, const char *dims, int ndim)
{
    if (t->ndim != ndim)
        return INVALID("%s has %d dimensions; it must have %d: %s", name, t->ndim, ndim, dims);
    for (int i = 0; i < ndim; i++)
        if (t->shape[i] < 0)
            return INVALID("%s has size %lld in dimension %d; sizes must not be negative", name,
                           (long long)t->shape[i], i);
    return FLASH_KDA_OK;
}

static flash_kda_status check_dtype(const flash_kda_tensor *t, const fkda_requirement *r)
{
    if (t->dtype == r->dtypes[0] || (r->dtypes[1] && t->dtype == r->dtypes[1])) return FLASH_KDA_OK;
    return fkda_fail(FLASH_KDA_INVALID_DTYPE, "%s has dtype %s; it must be %s%s%s", r->name,
                     fkda_dtype_name(t->dtype), fkda_dtype_name(r->dtypes[0]), r->dtypes[1] ? " or " : "",
                     r->dtypes[1] ? fkda_dtype_name(r->dtypes[1]) : "");
}

static bool is_empty(const flash_kda_tensor *t)
{
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] == 0) return true;
    return false;
}

/* Whether the dimensions from `first` on are contiguous. */
static bool is_contiguous_from(const flash_kda_tensor *t, int first)
{
    int64_t step = 1;
    for (int i = t->ndim - 1; i >= first; i--) {
        if (t->shape[i] > 1 && t->stride[i] != step) return false;
        step *= t->shape[i];
    }
    return true;
}

bool fkda_is_contiguous(const flash_kda_tensor *t)
{
    return is_empty(t) || is_contiguous_from(t, 0);
}

/* The strides of an empty tensor mean nothing either. An absent tensor may have no dimensions. */
int64_t fkda_stride_of(const flash_kda_tensor *t, int dimension)
{
    if (t->shape[dimension] > 1 && !is_empty(t)) return t->stride[dimension];
    if (dimension >= t->ndim - 1) return 1;
    const int64_t size = t->shape[dimension + 1];
    return fkda_stride_of(t, dimension + 1) * (size > 1 ? size : 1);
}

static flash_kda_status refuse_layout(const flash_kda_tensor *t, const fkda_requirement *r)
{
    char was[96], must[96];
    int64_t want[4], step = 1;
    numbers_text(t->stride, t->ndim, was);
    if (r->layout == FKDA_ROWS)
        return INVALID("%s has strides %s; its last dimension must be contiguous, with stride 1", r->name,
                       was);
    for (int i = t->ndim - 1; i >= 0; i--) want[i] = step, step *= t->shape[i];
    if (r->layout == FKDA_SLOTS)
        return INVALID("%s has strides %s; all but its first dimension must be contiguous, with strides %s",
                       r->name, was, numbers_text(want + 1, t->ndim - 1, must));
    return INVALID("%s has strides %s; it must be contiguous, with strides %s", r->name, was,
                   numbers_text(want, t->ndim, must));
}

/* On a GPU rows are copied in units of 16 bytes, and the kernels count strides in 32 bits. */
static flash_kda_status check_gpu_strides(const flash_kda_tensor *t, const fkda_requirement *r)
{
    const int64_t unit = 16 / (int64_t)fkda_dtype_size(t->dtype);
    const int free_dims = r->layout == FKDA_SLOTS ? 1 : r->layout == FKDA_ROWS ? t->ndim - 1 : 0;
    for (int i = 0; i < free_dims; i++) {
        if (t->shape[i] < 2) continue;
        if (t->stride[i] % unit || t->stride[i] < 0)
            return INVALID("%s has stride %lld in dimension %d; on a GPU it must be a multiple of 16 bytes, "
                           "which are %lld elements, and not negative",
                           r->name, (long long)t->stride[i], i, (long long)unit);
        if (r->layout == FKDA_ROWS && i > 0 && t->stride[i] > INT32_MAX)
            return INVALID("%s has stride %lld in dimension %d; on a GPU it must be at most %d", r->name,
                           (long long)t->stride[i], i, INT32_MAX);
    }
    return FLASH_KDA_OK;
}

/* A dimension may not step into the memory of the dimensions that have smaller steps. */
static flash_kda_status check_own_overlap(const flash_kda_tensor *t, const fkda_requirement *r)
{
    int64_t reach = 1; /* elements that the dimensions with smaller steps reach over */
    bool seen[4] = {false};
    for (int round = 0; round < t->ndim; round++) {
        int next = -1;
        for (int i = 0; i < t->ndim; i++)
            if (!seen[i] && t->shape[i] > 1 && (next < 0 || llabs(t->stride[i]) < llabs(t->stride[next])))
                next = i;
        if (next < 0) break;
        seen[next] = true;
        if (llabs(t->stride[next]) < reach)
            return INVALID(
                "%s has stride %lld in dimension %d; its elements must not share memory, so it must "
                "be at least %lld",
                r->name, (long long)t->stride[next], next, (long long)reach);
        reach += llabs(t->stride[next]) * (t->shape[next] - 1);
    }
    return FLASH_KDA_OK;
}

/* The tensor's memory from its first to its last element must fit the address space. */
static flash_kda_status check_reach(const flash_kda_tensor *t, const fkda_requirement *r)
{
    int64_t reach = 1;
    for (int i = 0; i < t->ndim; i++) {
        int64_t step = t->shape[i] > 1 ? t->stride[i] : 0;
        if (step == INT64_MIN || __builtin_mul_overflow(llabs(step), t->shape[i] - 1, &step) ||
            __builtin_add_overflow(reach, step, &reach) || reach > FKDA_MAX_TENSOR_BYTES / 8)
            return INVALID("%s has stride %lld in dimension %d; the tensor must fit in memory", r->name,
                           (long long)t->stride[i], i);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_layout(const flash_kda_tensor *t, const fkda_requirement *r, bool on_gpu)
{
    const int last = t->ndim - 1;
    if (is_empty(t)) return FLASH_KDA_OK;
    const bool right = r->layout == FKDA_CONTIGUOUS ? is_contiguous_from(t, 0)
                       : r->layout == FKDA_ROWS     ? is_contiguous_from(t, last)
                       : r->layout == FKDA_SLOTS    ? is_contiguous_from(t, 1)
                                                    : true;
    if (!right) return refuse_layout(t, r);
    TRY(check_reach(t, r));
    if (on_gpu) TRY(check_gpu_strides(t, r));
    return r->is_written ? check_own_overlap(t, r) : FLASH_KDA_OK;
}

static flash_kda_status check_memory(const flash_kda_tensor *t, const fkda_requirement *r)
{
    const size_t size = fkda_dtype_size(t->dtype), alignment = r->alignment ? r->alignment : size;
    int64_t bytes = (int64_t)size;
    for (int i = 0; i < t->ndim; i++) bytes *= t->shape[i];
    if (bytes && !t->data)
        return INVALID("%s is null; it must point to its %lld bytes", r->name, (long long)bytes);
    if ((uintptr_t)t->data % alignment)
        return INVALID("%s is at address %p; it must be aligned to %zu bytes", r->name, t->data, alignment);
    return FLASH_KDA_OK;
}

static flash_kda_status refuse_shape(const flash_kda_tensor *t, const fkda_requirement *r, int64_t seqlens)
{
    int64_t want[4];
    char was[96], must[96], source[64] = "";
    for (int i = 0; i < r->ndim; i++) want[i] = r->shape[i] == FKDA_ANY_SIZE ? t->shape[i] : r->shape[i];
    if (seqlens && (strncmp(r->dims, "[N,", 3) == 0 || strcmp(r->dims, "[N]") == 0))
        snprintf(source, sizeof source, ", with N from the %lld entries of cu_seqlens", (long long)seqlens);
    return INVALID("%s has shape %s; it must be %s = %s%s", r->name, numbers_text(t->shape, r->ndim, was),
                   r->dims, numbers_text(want, r->ndim, must), source);
}

/* For a tensor that may have any shape with the right number of elements. */
static flash_kda_status check_elements(const flash_kda_tensor *t, const fkda_requirement *r)
{
    int64_t elements = 1;
    char was[96];
    if (t->ndim < 0 || t->ndim > 4)
        return INVALID("%s has %d dimensions; it must have 0 to 4", r->name, t->ndim);
    TRY(fkda_check_rank(t, r->name, r->dims, t->ndim));
    for (int i = 0; i < t->ndim; i++)
        if (__builtin_mul_overflow(elements, t->shape[i], &elements)) elements = FKDA_ANY_SIZE;
    if (elements == r->shape[0]) return FLASH_KDA_OK;
    return INVALID("%s has shape %s; it must have %s = %lld elements", r->name,
                   numbers_text(t->shape, t->ndim, was), r->dims, (long long)r->shape[0]);
}

static flash_kda_status check_shape(const flash_kda_tensor *t, const fkda_requirement *r, int64_t seqlens)
{
    if (r->ndim == 0) return check_elements(t, r);
    char was[96];
    TRY(fkda_check_rank(t, r->name, r->dims, r->ndim));
    int64_t bytes = (int64_t)fkda_dtype_size(t->dtype);
    for (int i = 0; i < r->ndim; i++)
        if (r->shape[i] != FKDA_ANY_SIZE && t->shape[i] != r->shape[i]) return refuse_shape(t, r, seqlens);
    for (int i = 0; i < r->ndim; i++)
        if (__builtin_mul_overflow(bytes, t->shape[i], &bytes) || bytes > FKDA_MAX_TENSOR_BYTES)
            return INVALID("%s has shape %s; a tensor must fit in memory", r->name,
                           numbers_text(t->shape, r->ndim, was));
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_tensor(const flash_kda_tensor *t, const fkda_requirement *r, int64_t seqlens,
                                   bool with_memory, bool on_gpu)
{
    TRY(check_dtype(t, r));
    TRY(check_shape(t, r, seqlens));
    if (!with_memory) return FLASH_KDA_OK;
    TRY(check_layout(t, r, on_gpu));
    return check_memory(t, r);
}

/* ---- Tensors that share memory ---- */

/* The memory of one argument: stretches of `width` bytes, repeated by `levels` nested steps, the largest step
 * first. `bytes` is what lies between its first and its last byte, 0 if the argument is absent or empty. */
typedef struct extent {
    const char *name;
    uintptr_t begin;
    size_t bytes;
    int levels;
    int64_t step[4], count[4]; /* in bytes; how often */
    int64_t width;
} extent;

/* Adds a dimension with a larger step than those before it, at the place of the largest. */
static void add_level(extent *e, int64_t step, int64_t count)
{
    if (step <= e->width && e->levels == 0) { /* The next stretch begins in or right behind the last one. */
        e->width += step * (count - 1);
        return;
    }
    if (e->levels && step == e->step[0] * e->count[0]) { /* The dimension continues the one before it. */
        e->count[0] *= count;
        return;
    }
    for (int i = e->levels++; i > 0; i--) e->step[i] = e->step[i - 1], e->count[i] = e->count[i - 1];
    e->step[0] = step;
    e->count[0] = count;
}

static extent extent_of(const char *name, const flash_kda_tensor *t)
{
    extent e = {.name = name};
    if (!t->data || is_empty(t)) return e; /* the other fields of an absent tensor mean nothing */
    const int64_t size = (int64_t)fkda_dtype_size(t->dtype);
    int64_t before = 0, reach = 0; /* bytes in front of the first element, and to the last one in memory */
    bool done[4] = {false};
    e.width = size;
    for (int round = 0; round < t->ndim; round++) {
        int next = -1; /* the dimension with the smallest step that is left */
        for (int i = 0; i < t->ndim; i++)
            if (!done[i] && t->shape[i] > 1 && t->stride[i] != 0 &&
                (next < 0 || llabs(t->stride[i]) < llabs(t->stride[next])))
                next = i;
        if (next < 0) break;
        done[next] = true;
        const int64_t step = llabs(t->stride[next]) * size, over = step * (t->shape[next] - 1);
        if (t->stride[next] < 0) before += over;
        reach += over;
        add_level(&e, step, t->shape[next]);
    }
    e.begin = (uintptr_t)t->data - (uintptr_t)before;
    e.bytes = (size_t)(reach + size);
    return e;
}

/* The bytes between the first and the last one of what a level repeats. */
static int64_t inner_bytes(const extent *e, int level)
{
    int64_t bytes = e->width;
    for (int i = level + 1; i < e->levels; i++) bytes += e->step[i] * (e->count[i] - 1);
    return bytes;
}

/* Whether b, which begins `apart` bytes after a, shares memory with a. Only the levels from `level` on count.
 * Tensors whose steps differ count as sharing what lies between their ends. */
static bool levels_overlap(const extent *a, const extent *b, int level, int64_t apart)
{
    const int64_t all_of_a = inner_bytes(a, level - 1), all_of_b = inner_bytes(b, level - 1);
    if (apart >= all_of_a || apart <= -all_of_b) return false;
    if (level >= a->levels || level >= b->levels || a->step[level] != b->step[level]) return true;
    const int64_t step = a->step[level], inner_a = inner_bytes(a, level), inner_b = inner_bytes(b, level);
    if (inner_a > step || inner_b > step) return true;
    /* Repetition i of a can only meet the repetitions of b that begin less than a step away from it. */
    for (int64_t between = apart / step - 1; between <= apart / step + 1; between++) {
        if (between > a->count[level] - 1 || between < -(b->count[level] - 1)) continue;
        if (levels_overlap(a, b, level + 1, apart - between * step)) return true;
    }
    return false;
}

static bool overlap(const extent *a, const extent *b)
{
    /* Differences cannot wrap, and ends of stretches could: workspace_size may be any number. */
    const extent *low = a->begin < b->begin ? a : b, *high = low == a ? b : a;
    const uint64_t apart = high->begin - low->begin;
    if (!a->bytes || !b->bytes || apart >= low->bytes) return false;
    if (!a->levels || !b->levels) return true;
    return levels_overlap(low, high, 0, (int64_t)apart);
}

flash_kda_status fkda_check_overlap(const flash_kda_fwd_params *p)
{
    enum { INITIAL = 13, FINAL, FIRST_WRITTEN = FINAL, OUT, NONFINITE, CHECKPOINTS, WORKSPACE, COUNT };
    extent all[COUNT] = {
        extent_of("q", &p->q),
        extent_of("k", &p->k),
        extent_of("v", &p->v),
        extent_of("g", &p->g),
        extent_of("beta", &p->beta),
        extent_of("A_log", &p->A_log),
        extent_of("dt_bias", &p->dt_bias),
        extent_of("cu_seqlens", &p->cu_seqlens),
        extent_of("state_indices", &p->state_indices),
        extent_of("has_initial_state", &p->has_initial_state),
        extent_of("checkpoint_offsets", &p->checkpoint_offsets),
        extent_of("checkpoint_indices", &p->checkpoint_indices),
        extent_of("checkpoint_starts", &p->checkpoint_starts),
        [INITIAL] = extent_of("initial_state", &p->initial_state),
        [FINAL] = extent_of("final_state", &p->final_state),
        [OUT] = extent_of("out", &p->out),
        [NONFINITE] = extent_of("nonfinite", &p->nonfinite),
        [CHECKPOINTS] = extent_of("checkpoint_states", &p->checkpoint_states),
        [WORKSPACE] =
            {"workspace", (uintptr_t)p->workspace, p->workspace ? p->workspace_size : 0, 0, {0}, {0}, 0},
    };
    const bool same_slots = p->initial_state.shape[0] < 2 || p->final_state.shape[0] < 2 ||
                            p->initial_state.stride[0] == p->final_state.stride[0];
    for (int w = FIRST_WRITTEN; w < COUNT; w++)
        for (int i = 0; i < w; i++) {
            if (!overlap(&all[w], &all[i])) continue;
            if (w == FINAL && i == INITIAL) {
                if (all[w].begin == all[i].begin && same_slots) continue;
                return INVALID("final_state overlaps initial_state in part; they must be apart, or the same "
                               "memory with the same strides");
            }
            return INVALID("%s overlaps %s; it must have memory of its own", all[w].name, all[i].name);
        }
    return FLASH_KDA_OK;
}
