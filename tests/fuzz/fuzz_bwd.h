/* A call for fuzz_bwd.c, made of bytes. */
#ifndef TESTS_FUZZ_BWD_H
#define TESTS_FUZZ_BWD_H

#include "tensor_set.h"

/* In the order of flash_kda_bwd_params. */
enum {
    A_LOG = TOKEN_INPUTS,
    DT_BIAS,
    INITIAL,
    SEQLENS,
    DOUT,
    DFINAL,
    INPUTS,
    DQ = INPUTS,
    DK,
    DV,
    DG,
    DBETA,
    DA_LOG,
    DDT_BIAS,
    DINITIAL,
    TENSORS
};

/* What a good call gets as `saved`. */
typedef enum saving { SAVED_NOTHING, SAVED_RUBBISH, SAVED_STATES } saving;

typedef struct state {
    flash_kda_bwd_params p;
    tensor_set set;
    memory workspace, saved;
    int64_t borders[MOST_INTEGERS]; /* what cu_seqlens holds in a good call */
    saving saves;
    int32_t interrupt[2];
    bool mutated;
    bool huge;        /* consistent sizes that no memory has; pointers are null */
    bool compares;    /* the gradients with the reference, which takes most of the time */
    bool unspecified; /* `saved` is of no forward pass, or an input has values of no allowed kind. */
    rng numbers;
} state;

flash_kda_tensor *tensor(flash_kda_bwd_params *p, int which);

void make_good(state *s, input *from);
void mutate_fields(state *s, input *from); /* before make_memory() */
void make_memory(state *s);
void mutate_memory(state *s, input *from); /* after make_memory(), and after the workspace is there */

#endif
