/* The checks of one tensor, and of tensors that share memory (check_overlap.c). */
#ifndef FKDA_CHECK_TENSOR_H
#define FKDA_CHECK_TENSOR_H

#include "check.h"
#include "errors.h"

#define INVALID(...) fkda_fail(FLASH_KDA_INVALID_VALUE, __VA_ARGS__)
#define TRY(call)                                                                                            \
    do {                                                                                                     \
        flash_kda_status try_status = (call);                                                                \
        if (try_status != FLASH_KDA_OK) return try_status;                                                   \
    } while (0)

/* No machine has memory for a tensor of more bytes. The planner's estimates count at most some thousands of
 * clocks for each byte of a tensor, so with this limit every estimate fits 64 bits. */
#define FKDA_MAX_TENSOR_BYTES ((int64_t)1 << 50)

/* How a tensor may lie in memory. */
typedef enum fkda_layout {
    FKDA_CONTIGUOUS,
    FKDA_ROWS,  /* the last dimension is contiguous, the strides of the others are free */
    FKDA_FREE,  /* all strides are free */
    FKDA_SLOTS, /* the stride of the first dimension is free, and the rest is contiguous */
} fkda_layout;

/* What a tensor must look like. */
typedef struct fkda_requirement {
    const char *name;
    const char *dims;  /* the shape in words: "[B, T, H, K]" */
    int ndim;          /* 0: any number of dimensions, contiguous, whose product is shape[0] */
    int64_t shape[4];  /* a size of FKDA_ANY_SIZE may be any */
    int32_t dtypes[2]; /* the accepted ones; the second may be 0 */
    size_t alignment;  /* in bytes; 0: of an element */
    fkda_layout layout;
    bool is_written;
} fkda_requirement;

enum { FKDA_ANY_SIZE = -1 };

/* What a tensor of integers must be that a call reads: [rows] or, with two dimensions, [rows, columns]. */
static inline fkda_requirement fkda_integers(const char *name, const char *dims, int ndim, int64_t rows,
                                             int64_t columns)
{
    return (fkda_requirement){.name = name,
                              .dims = dims,
                              .ndim = ndim,
                              .shape = {rows, columns},
                              .dtypes = {FLASH_KDA_I64, FLASH_KDA_I32},
                              .layout = FKDA_CONTIGUOUS};
}

const char *fkda_dtype_name(int32_t dtype);
size_t fkda_dtype_size(int32_t dtype);

flash_kda_status fkda_check_rank(const flash_kda_tensor *t, const char *name, const char *dims, int ndim);

/* `seqlens` is the number of entries of cu_seqlens, 0 if it is absent. Without `with_memory` only dtype and
 * shape are looked at. */
flash_kda_status fkda_check_tensor(const flash_kda_tensor *t, const fkda_requirement *r, int64_t seqlens,
                                   bool with_memory, bool on_gpu);

/* Whether the tensor is contiguous. */
bool fkda_is_contiguous(const flash_kda_tensor *t);

bool fkda_is_empty(const flash_kda_tensor *t);

/* The stride of a dimension. Where the size is 1 and the stride means nothing, it is the stride that the
 * dimension would need to hold the dimensions after it. */
int64_t fkda_stride_of(const flash_kda_tensor *t, int dimension);

/* The memory of one argument: stretches of `width` bytes, repeated by `levels` nested steps, the largest step
 * first. `bytes` is what lies between its first and its last byte, 0 if the argument is absent or empty. */
typedef struct fkda_extent {
    const char *name;
    uintptr_t begin;
    size_t bytes;
    int levels;
    int64_t step[4], count[4]; /* in bytes; how often */
    int64_t width;
} fkda_extent;

fkda_extent fkda_extent_of(const char *name, const flash_kda_tensor *t);

/* Of memory that is no tensor, or NULL. */
fkda_extent fkda_memory_extent(const char *name, const void *memory, size_t bytes);

/* Memory that is written must share nothing with the others. */
flash_kda_status fkda_check_own_memory(const fkda_extent *written, const fkda_extent *others, int count);

/* check_overlap.c: the memory of all tensors of a forward pass. A final state may be the initial one, which
 * is then updated in place. */
flash_kda_status fkda_check_overlap(const flash_kda_fwd_params *p);

/* check_indices.c: the numbers in tensors of integers, for a call on the CPU. */
flash_kda_status fkda_check_indices(const fkda_problem *p);

#endif
