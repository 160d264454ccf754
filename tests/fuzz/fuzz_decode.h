/* A call for fuzz_decode.c, made of bytes. */
#ifndef TESTS_FUZZ_DECODE_H
#define TESTS_FUZZ_DECODE_H

#include "tensor_set.h"

/* In the order of flash_kda_decode_params, at the end of which the last four are. */
enum {
    OUT = TOKEN_INPUTS,
    A_LOG,
    DT_BIAS,
    STATE,
    SLOT_INDICES,
    ACCEPTED,
    SEQLENS,
    PARENTS,
    RECORDS,
    ROUNDING,
    WRITTEN,
    WRITTEN_INDICES,
    PAST,
    PAST_TOKENS,
    TENSORS
};

typedef struct state {
    flash_kda_decode_params p;
    tensor_set set;
    int64_t integers[TENSORS][MOST_INTEGERS]; /* what tensors of integers hold in a good call */
    int32_t interrupt[2];
    bool mutated;
    bool huge;        /* consistent sizes that no memory has; pointers are null */
    bool compares;    /* the results with the reference, which takes most of the time */
    bool unspecified; /* An input has values of no allowed kind. */
    rng numbers;
} state;

void make_good(state *s, input *from);
void mutate_fields(state *s, input *from); /* before make_memory() */
void make_memory(state *s);
void mutate_memory(state *s, input *from);

#endif
