/* Calls of decode_layer that are drawn at random, run, and held to the definition. */
#ifndef TESTS_LAYER_CALL_H
#define TESTS_LAYER_CALL_H

#include "harness.h"

typedef enum layer_tensor {
    LAYER_X,
    LAYER_WEIGHT,
    LAYER_BIAS,
    LAYER_CONV_STATE,
    LAYER_G,
    LAYER_BETA,
    LAYER_OUT,
    LAYER_A_LOG,
    LAYER_DT_BIAS,
    LAYER_OUTPUT_GATE,
    LAYER_NORM_WEIGHT,
    LAYER_STATE,
    LAYER_STATE_INDICES,
    LAYER_ACCEPTED,
    LAYER_SEQLENS,
    LAYER_RECORDS,
    LAYER_WINDOWS,
    LAYER_ROUNDING,
    LAYER_WRITTEN,
    LAYER_WRITTEN_INDICES,
    LAYER_TENSORS,
} layer_tensor;

/* Memory of the device, and what it holds before and after a call. */
typedef struct layer_memory {
    unsigned char *before, *after;
    bool *may_change; /* for each byte */
    void *device;
    size_t bytes;
} layer_memory;

typedef struct layer_argument {
    flash_kda_tensor tensor; /* without its data; data is NULL if the argument is absent */
    int memory;              /* which of the call's memories it lies in */
    size_t at;               /* where its first element is */
    bool present;
} layer_argument;

typedef struct layer_sizes {
    int64_t sequences, heads, tokens; /* tokens of each sequence, at most; with cu_seqlens of the longest */
    int32_t write;                    /* flash_kda_write_states */
    bool packed;
    bool apart; /* states are written to written_states */
} layer_sizes;

enum { LAYER_MOST_SEQUENCES = 8 };

typedef struct layer_call {
    char text[220];
    layer_sizes sizes;
    int64_t total; /* tokens of all sequences with cu_seqlens, else of one */
    int64_t begin[LAYER_MOST_SEQUENCES], length[LAYER_MOST_SEQUENCES]; /* of a sequence in its batch row */
    int64_t slots, slot_columns, window_columns;
    int64_t written_slots, written_columns;
    int dropped_tokens;                 /* which tensors have no dimension of tokens, where that is allowed */
    int64_t from[LAYER_MOST_SEQUENCES]; /* the slot of the state, -1: none */
    layer_argument arguments[LAYER_TENSORS];
    layer_memory memories[LAYER_TENSORS];
    flash_kda_decode_layer_params params; /* its tensors are filled in by layer_params() */
} layer_call;

layer_sizes layer_any_sizes(rng *r);
layer_call *layer_draw(rng *r, layer_sizes sizes);
void layer_free(layer_call *c);

/* The arguments with tensors in host memory, as they are before the call, or in the device's. */
flash_kda_decode_layer_params layer_params(const layer_call *c, bool on_host);

void layer_run_and_check(layer_call *c);
void layer_check_one_by_one(layer_call *c);
void layer_check_threads(layer_call *c, int count);

/* Fills the tensors of indices with anything, and checks that a call on a GPU writes to no other memory. */
void layer_check_wild(rng *r, layer_call *c);

#endif
