/* The tensors that the option "nonfinite" looks at, as runs of memory. */
#include "nonfinite.h"

/* Makes longer runs while the runs of the last dimension follow each other. */
static fkda_counted_tensor join_runs(fkda_counted_tensor t, int64_t rows)
{
    int64_t sizes[3] = {rows, t.sizes[0], t.sizes[1]};
    int64_t strides[3] = {t.strides[0], t.strides[1], t.strides[2]};
    for (int joined = 0; joined < 3 && (sizes[2] == 1 || strides[2] == t.run); joined++) {
        t.run *= sizes[2];
        for (int i = 2; i > 0; i--) sizes[i] = sizes[i - 1], strides[i] = strides[i - 1];
        sizes[0] = 1;
        strides[0] = 0;
    }
    for (int i = 0; i < 2; i++) t.sizes[i] = sizes[i + 1];
    for (int i = 0; i < 3; i++) t.strides[i] = strides[i];
    return t;
}

/* A tensor [B, T, heads, width]. */
static fkda_counted_tensor of_tokens(const fkda_shape *s, const fkda_token_view *view, int64_t width)
{
    const fkda_counted_tensor t = {.data = view->data,
                                   .elements = s->batch * s->tokens * view->heads * width,
                                   .run = width,
                                   .sizes = {s->tokens, view->heads},
                                   .strides = {view->batch_stride, view->token_stride, view->head_stride},
                                   .is_bf16 = view->dtype == FLASH_KDA_BF16};
    return t.elements ? join_runs(t, s->batch) : t;
}

static fkda_counted_tensor of_parameter(const float *data, int64_t elements)
{
    return (fkda_counted_tensor){.data = data, .elements = elements, .run = elements, .sizes = {1, 1}};
}

/* The states that sequences start from or end in. */
static fkda_counted_tensor of_states(const fkda_problem *p, const fkda_state_view *view)
{
    const fkda_shape *s = &p->shape;
    const bool is_pool =
        p->state_indices.data || (view == &p->initial_state && p->has_initial_state && view->data);
    const int64_t run = s->heads * FKDA_DIM * FKDA_DIM;
    const fkda_counted_tensor t = {.data = view->data,
                                   .elements = is_pool && !view->slots ? 0 : s->sequences * run,
                                   .run = run,
                                   .sizes = {1, s->sequences},
                                   .strides = {0, 0, view->slot_stride},
                                   .pool = is_pool ? view : NULL,
                                   .is_bf16 = view->dtype == FLASH_KDA_BF16};
    return is_pool ? t : join_runs(t, 1);
}

int fkda_counted_tensors(const fkda_problem *p, fkda_counted counted,
                         fkda_counted_tensor tensors[FLASH_KDA_CHECKED_TENSORS])
{
    enum { INPUTS = FLASH_KDA_CHECKED_OUT, OUTPUTS = FLASH_KDA_CHECKED_TENSORS - INPUTS };
    const fkda_shape *s = &p->shape;
    const fkda_counted_tensor all[FLASH_KDA_CHECKED_TENSORS] = {
        [FLASH_KDA_CHECKED_Q] = of_tokens(s, &p->q, FKDA_DIM),
        [FLASH_KDA_CHECKED_K] = of_tokens(s, &p->k, FKDA_DIM),
        [FLASH_KDA_CHECKED_V] = of_tokens(s, &p->v, FKDA_DIM),
        [FLASH_KDA_CHECKED_G] = of_tokens(s, &p->g, FKDA_DIM),
        [FLASH_KDA_CHECKED_BETA] = of_tokens(s, &p->beta, 1),
        [FLASH_KDA_CHECKED_A_LOG] = of_parameter(p->A_log, s->heads),
        [FLASH_KDA_CHECKED_DT_BIAS] = of_parameter(p->dt_bias, s->heads * FKDA_DIM),
        [FLASH_KDA_CHECKED_INITIAL_STATE] = of_states(p, &p->initial_state),
        [FLASH_KDA_CHECKED_OUT] = of_tokens(s, &p->out, FKDA_DIM),
        [FLASH_KDA_CHECKED_FINAL_STATE] = of_states(p, &p->final_state),
    };
    const int first = counted == FKDA_INPUTS ? 0 : INPUTS, count = counted == FKDA_INPUTS ? INPUTS : OUTPUTS;
    for (int i = 0; i < count; i++) {
        tensors[i] = all[first + i];
        tensors[i].record = &p->nonfinite[first + i];
        if (!tensors[i].data) tensors[i].elements = 0;
    }
    return count;
}
