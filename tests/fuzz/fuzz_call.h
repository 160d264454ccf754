/* A call for fuzz_call.c, made of bytes. */
#ifndef TESTS_FUZZ_CALL_H
#define TESTS_FUZZ_CALL_H

#include "tensors.h"

enum {
    OUT = TOKEN_INPUTS,
    A_LOG,
    DT_BIAS,
    INITIAL,
    FINAL,
    SEQLENS,
    NONFINITE,
    SLOT_INDICES,
    HAS_INITIAL,
    CHECKPOINTS,
    OFFSETS,
    ROW_INDICES,
    STARTS,
    TENSORS
};

typedef struct state {
    flash_kda_fwd_params p;
    memory tensors[TENSORS], workspace;
    int64_t integers[TENSORS][MOST_INTEGERS]; /* what tensors of integers hold in a good call */
    bool mutated;
    bool huge;     /* consistent sizes that no memory has; pointers are null */
    bool compares; /* the result with the reference, which takes most of the time */
    bool unreal;   /* A pointer does not lead to memory of that size, so that the call must not be tried. */
    bool unspecified; /* Several sequences may have one slot, or several checkpoints one row. */
    rng numbers;
} state;

flash_kda_tensor *tensor(state *s, int which);

void make_good(state *s, input *from);
void mutate_fields(state *s, input *from); /* before make_memory() */
void make_memory(state *s);
void mutate_memory(state *s, input *from);

#endif
