/*
 * A call of decode_layer after its arguments were checked, as decode_problem.h has it for decode. Everything
 * below check_decode_layer.c takes this struct.
 */
#ifndef FKDA_DECODE_LAYER_PROBLEM_H
#define FKDA_DECODE_LAYER_PROBLEM_H

#include "decode_problem.h"

enum {
    FKDA_CONV_TAPS = 4,               /* inputs that each output of the convolution depends on */
    FKDA_WINDOW = FKDA_CONV_TAPS - 1, /* inputs that the convolution keeps */
    FKDA_CONV_PARTS = 3,              /* q, k, v */
};

/* A tensor of numbers, one for each channel of q, k and v and each of some columns. Strides count elements.
 */
typedef struct fkda_channel_view {
    void *data;                                         /* or NULL */
    int64_t part_stride, channel_stride, column_stride; /* from q to k and from k to v; and so on */
    int32_t dtype;                                      /* flash_kda_dtype */
} fkda_channel_view;

typedef struct fkda_decode_layer_problem {
    fkda_decode_problem decode; /* q, k, v and parents are absent; H = HV */
    fkda_token_view x;          /* head_stride is that of a part's heads */
    int64_t x_part_stride;      /* from q to k, and from k to v */
    fkda_channel_view weight;
    fkda_channel_view bias;       /* of one column */
    fkda_channel_view conv_state; /* of `window_columns` columns, with as many slots as decode.state */
    int64_t conv_slot_stride;
    int64_t window_columns;    /* L */
    fkda_channel_view windows; /* conv_windows */
    int64_t windows_sequence_stride, windows_token_stride;
    int64_t windows_columns;     /* C */
    fkda_token_view output_gate; /* data is NULL if it is absent */
    const void *norm_weight;     /* [128], or NULL */
    int32_t norm_weight_dtype;
    float norm_eps;
} fkda_decode_layer_problem;

/* Whether one slot keeps the inputs of all draft tokens (flash_kda.h, L > 3). */
static inline bool fkda_keeps_drafts(const fkda_decode_layer_problem *p)
{
    return p->decode.write_states == FLASH_KDA_WRITE_EACH && p->window_columns > FKDA_WINDOW &&
           !p->decode.has_written_states;
}

/* The slot that the window of sequence n is read from, or FKDA_NO_SLOT, and its first column. For tensors
 * that the host may read. `from` is the slot of the state. */
static inline int64_t fkda_window_slot(const fkda_decode_layer_problem *p, int64_t n, int64_t from)
{
    if (!fkda_keeps_drafts(p) || from == FKDA_NO_SLOT) return from;
    return fkda_decode_slot_after(&p->decode, n, 0);
}

static inline int64_t fkda_window_column(const fkda_decode_layer_problem *p, int64_t n)
{
    const fkda_index_view *accepted = &p->decode.num_accepted_tokens;
    if (!fkda_keeps_drafts(p) || !accepted->data) return 0;
    return fkda_clamp(fkda_index_at(accepted, n), 1, p->decode.slot_columns) - 1;
}

static inline int64_t fkda_channel_offset(const fkda_channel_view *c, int part, int64_t channel,
                                          int64_t column)
{
    return part * c->part_stride + channel * c->channel_stride + column * c->column_stride;
}

#endif
