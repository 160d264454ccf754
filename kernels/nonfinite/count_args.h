/* What the host passes to the kernel that counts values that are not finite, the same in C and in CUDA C. */
#ifndef FKDA_COUNT_ARGS_H
#define FKDA_COUNT_ARGS_H

#define FKDA_COUNT_THREADS 256
#define FKDA_COUNT_TENSORS 8        /* of one launch, at most */
#define FKDA_COUNT_CTAS_PER_SM 4    /* that __launch_bounds__ leaves registers for */
#define FKDA_COUNT_VECTORS 4        /* of 16 bytes that a thread loads at a time */
#define FKDA_COUNT_SHARED_BYTES 128 /* dynamic shared memory: two numbers of 8 bytes for each warp */

/* The slots of sequences, for a tensor of states. */
typedef struct fkda_count_pool {
    const void *state_indices;              /* or null: sequence n has slot n */
    const unsigned char *has_initial_state; /* or null: all have one */
    long long first_slot;
    long long slots; /* 0: run n of the tensor is not a sequence's slot */
    int indices_are_i32;
    int zero; /* no padding */
} fkda_count_pool;

/* A tensor, and the CTAs that look at it: first_cta to first_cta + ctas - 1 of the grid, at least one. Its
 * elements lie in runs of neighbours (src/nonfinite.h). */
typedef struct fkda_count_tensor {
    const void *data;   /* aligned to an element; null if there are no elements */
    long long elements; /* of bf16 or fp32, a multiple of run */
    long long run;      /* the same as elements: the tensor is contiguous */
    long long sizes[2], strides[3];
    fkda_count_pool pool; /* its slots have strides[2] elements from one to the next */
    long long *record;    /* the count and the first place. Both are -1 when the kernel starts. */
    int is_bf16;
    int by_vectors; /* runs begin at a multiple of 16 bytes, and are as long */
    int first_cta, ctas;
} fkda_count_tensor;

typedef struct fkda_count_args {
    fkda_count_tensor tensors[FKDA_COUNT_TENSORS];
    int count; /* of tensors */
    int zero;  /* no padding */
} fkda_count_args;

#endif
