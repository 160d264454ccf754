/* What the calls about decode would do, in words: which kernel runs and why, how it lays the work out, and
 * how many bytes it moves. Nothing is launched, and no pointer is followed. */
#include <stddef.h>
#include <stdio.h>

#include "check_decode.h"
#include "check_decode_layer.h"
#include "check_tensor.h"
#include "errors.h"
#include "guard.h"
#include "kernel.h"

enum {
    PART = 512, /* bytes of each part of the explanation, at most */
    RECORD_BYTES = FLASH_KDA_RECORD_ROWS * FKDA_DIM * 4,
};

/* Bytes that a call moves, if every sequence has a state and all tokens that the shapes have room for. */
typedef struct moved {
    int64_t states_read, states_written; /* of the pools of states */
    int64_t tokens;                      /* inputs and outputs */
    int64_t records;
    int64_t windows; /* of the convolution, with its weights */
} moved;

static int64_t bytes_of(int32_t dtype)
{
    return dtype == FLASH_KDA_F32 ? 4 : 2;
}

static int64_t state_bytes(const fkda_state_view *state)
{
    return (int64_t)FKDA_DIM * FKDA_DIM * bytes_of(state->dtype);
}

static int64_t tokens_of(const fkda_decode_problem *p)
{
    return p->cu_seqlens.data ? p->tokens : p->sequences * p->tokens;
}

/* What decode and decode_layer have in common: all but q, k and v. */
static moved moved_by_heads(const fkda_decode_problem *p)
{
    const int64_t tokens = tokens_of(p), states = p->sequences * p->heads,
                  written = p->write_states == FLASH_KDA_WRITE_NONE   ? 0
                            : p->write_states == FLASH_KDA_WRITE_LAST ? states
                                                                      : tokens * p->heads,
                  of_head = FKDA_DIM * (2 + bytes_of(p->g.dtype)) + bytes_of(p->beta.dtype);
    return (moved){
        .states_read = states * state_bytes(&p->state),
        .states_written = written * state_bytes(&p->written),
        .tokens = tokens * p->heads * of_head,
        .records = p->records ? tokens * p->heads * RECORD_BYTES : 0,
    };
}

static moved moved_by_layer(const fkda_decode_layer_problem *p)
{
    const fkda_decode_problem *d = &p->decode;
    const int64_t channels = FKDA_CONV_PARTS * d->heads * FKDA_DIM, tokens = tokens_of(d),
                  window = channels * FKDA_WINDOW * 2,
                  windows_written = d->has_written_states || d->write_states == FLASH_KDA_WRITE_NONE ? 0
                                    : d->write_states == FLASH_KDA_WRITE_LAST ? d->sequences
                                                                              : tokens;
    moved m = moved_by_heads(d);
    m.tokens += tokens * channels * 2;
    if (p->output_gate.data) m.tokens += tokens * d->heads * FKDA_DIM * bytes_of(p->output_gate.dtype);
    m.windows = (d->sequences + windows_written + (p->windows.data ? tokens : 0)) * window +
                channels * FKDA_CONV_TAPS * bytes_of(p->weight.dtype);
    return m;
}

static moved moved_by_apply(const fkda_apply_problem *p)
{
    const int64_t states = p->sequences * p->heads, columns = p->record_columns,
                  tokens = columns < FLASH_KDA_MAX_DECODE_TOKENS ? columns : FLASH_KDA_MAX_DECODE_TOKENS;
    return (moved){
        .states_read = states * state_bytes(&p->state),
        .states_written = states * state_bytes(&p->state),
        .records = states * tokens * RECORD_BYTES,
    };
}

static moved moved_by_decode(const fkda_decode_problem *p)
{
    moved m = moved_by_heads(p);
    m.tokens += tokens_of(p) * (2 * p->qk_heads + p->heads) * FKDA_DIM * 2;
    if (!p->past_records) return m;
    const fkda_apply_problem past = fkda_past_of(p);
    const moved by_past = moved_by_apply(&past);
    m.states_written = by_past.states_written;
    m.records += by_past.records;
    return m;
}

/* Whether the caller names a kernel. The struct of an older version may end before the field. */
#define ASKS_FOR_KERNEL(type, params)                                                                        \
    ((params)->struct_size > offsetof(type, kernel) && (params)->kernel != NULL)

static flash_kda_status check_text(const char *text, size_t capacity)
{
    if (text && capacity) return FLASH_KDA_OK;
    return fkda_fail(FLASH_KDA_INVALID_VALUE, "text must point to capacity = %zu bytes, at least 1",
                     capacity);
}

static void write(char *text, size_t capacity, const char *choice, const char *layout, moved m)
{
    const int64_t all = m.states_read + m.states_written + m.tokens + m.records + m.windows;
    char windows[64] = "";
    if (m.windows) snprintf(windows, sizeof windows, ", %lld of the convolution", (long long)m.windows);
    snprintf(text, capacity,
             "%s\n%s\nBytes moved: %lld of states read, %lld of states written, %lld of tokens, %lld of "
             "records%s; %lld in all, if every sequence has a state.\n",
             choice, layout, (long long)m.states_read, (long long)m.states_written, (long long)m.tokens,
             (long long)m.records, windows, (long long)all);
}

flash_kda_status flash_kda_explain_decode(const flash_kda_decode_params *params, char *text, size_t capacity)
{
    FKDA_GUARD;
    fkda_decode_problem p;
    char choice[PART], layout[PART];
    TRY(check_text(text, capacity));
    TRY(fkda_check_decode_shapes(params, &p));
    fkda_explain_kernel(p.device, p.kernel, ASKS_FOR_KERNEL(flash_kda_decode_params, params), choice,
                        sizeof choice);
    p.kernel->explain_decode(&p, layout, sizeof layout);
    write(text, capacity, choice, layout, moved_by_decode(&p));
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_explain_decode_layer(const flash_kda_decode_layer_params *params, char *text,
                                                size_t capacity)
{
    FKDA_GUARD;
    fkda_decode_layer_problem p;
    char choice[PART], layout[PART];
    TRY(check_text(text, capacity));
    TRY(fkda_check_decode_layer_shapes(params, &p));
    fkda_explain_kernel(p.decode.device, p.decode.kernel,
                        ASKS_FOR_KERNEL(flash_kda_decode_layer_params, params), choice, sizeof choice);
    p.decode.kernel->explain_decode_layer(&p, layout, sizeof layout);
    write(text, capacity, choice, layout, moved_by_layer(&p));
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_explain_apply(const flash_kda_apply_params *params, char *text, size_t capacity)
{
    FKDA_GUARD;
    fkda_apply_problem p;
    char choice[PART], layout[PART];
    TRY(check_text(text, capacity));
    TRY(fkda_check_apply_shapes(params, &p));
    fkda_explain_kernel(p.device, p.kernel, ASKS_FOR_KERNEL(flash_kda_apply_params, params), choice,
                        sizeof choice);
    p.kernel->explain_apply(&p, layout, sizeof layout);
    write(text, capacity, choice, layout, moved_by_apply(&p));
    return FLASH_KDA_OK;
}
