/* What the host passes to the kernel that counts values that are not finite, the same in C and in CUDA C. */
#ifndef FKDA_COUNT_ARGS_H
#define FKDA_COUNT_ARGS_H

#define FKDA_COUNT_THREADS 256
#define FKDA_COUNT_TENSORS 8        /* of one launch, at most */
#define FKDA_COUNT_CTAS_PER_SM 4    /* that __launch_bounds__ leaves registers for */
#define FKDA_COUNT_VECTORS 4        /* of 16 bytes that a thread loads at a time */
#define FKDA_COUNT_SHARED_BYTES 128 /* dynamic shared memory: two numbers of 8 bytes for each warp */

/* A tensor, and the CTAs that look at it: first_cta to first_cta + ctas - 1 of the grid, at least one. */
typedef struct fkda_count_tensor {
    const void *data;   /* aligned to an element; null if there are no elements */
    long long elements; /* of bf16 or fp32 */
    long long *record;  /* the count and the first place. Both are -1 when the kernel starts. */
    int is_bf16;
    int first_cta, ctas;
    int zero; /* no padding */
} fkda_count_tensor;

typedef struct fkda_count_args {
    fkda_count_tensor tensors[FKDA_COUNT_TENSORS];
    int count; /* of tensors */
    int zero;  /* no padding */
} fkda_count_args;

#endif
