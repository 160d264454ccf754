/* The checks of one tensor. A refusal is a sentence that names the tensor, what it was and what it must
 * be. */
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

bool fkda_is_empty(const flash_kda_tensor *t)
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
    return fkda_is_empty(t) || is_contiguous_from(t, 0);
}

/* The strides of an empty tensor mean nothing either. An absent tensor may have no dimensions. */
int64_t fkda_stride_of(const flash_kda_tensor *t, int dimension)
{
    if (t->shape[dimension] > 1 && !fkda_is_empty(t)) return t->stride[dimension];
    if (dimension >= t->ndim - 1) return 1;
    const int64_t size = t->shape[dimension + 1];
    /* Unsigned, because a call about shapes alone may have any strides, which nothing has checked. */
    return (int64_t)((uint64_t)fkda_stride_of(t, dimension + 1) * (uint64_t)(size > 1 ? size : 1));
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
    if (fkda_is_empty(t)) return FLASH_KDA_OK;
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
