#include "problem.h"

#include <stdlib.h>

static problem *create(int64_t batch, int64_t tokens, int64_t heads, int64_t sequences)
{
    problem *p = allocate(1, sizeof *p);
    p->batch = batch;
    p->tokens = tokens;
    p->heads = heads;
    p->sequences = sequences;
    size_t rows = (size_t)problem_rows(p), channels = rows * DIM;
    p->q = allocate(channels, sizeof *p->q);
    p->k = allocate(channels, sizeof *p->k);
    p->v = allocate(channels, sizeof *p->v);
    p->g = allocate(channels, sizeof *p->g);
    p->beta = allocate(rows, sizeof *p->beta);
    p->A_log = allocate((size_t)heads, sizeof *p->A_log);
    p->dt_bias = allocate((size_t)heads * DIM, sizeof *p->dt_bias);
    p->initial_state = allocate((size_t)problem_states(p) * DIM * DIM, sizeof *p->initial_state);
    p->scale = 0.08838834764831845f;
    p->lower_bound = -5.0f;
    return p;
}

problem *problem_create(int64_t batch, int64_t tokens, int64_t heads)
{
    return create(batch, tokens, heads, batch);
}

problem *problem_create_ragged(const int64_t *lengths, int64_t count, int64_t heads)
{
    int64_t total = 0;
    for (int64_t n = 0; n < count; n++) total += lengths[n];
    problem *p = create(1, total, heads, count);
    p->cu_seqlens = allocate((size_t)count + 1, sizeof *p->cu_seqlens);
    for (int64_t n = 0; n < count; n++) p->cu_seqlens[n + 1] = p->cu_seqlens[n] + lengths[n];
    return p;
}

void problem_free(problem *p)
{
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->g);
    free(p->beta);
    free(p->A_log);
    free(p->dt_bias);
    free(p->initial_state);
    free(p->cu_seqlens);
    free(p);
}

int64_t problem_rows(const problem *p)
{
    return p->batch * p->tokens * p->heads;
}

int64_t problem_states(const problem *p)
{
    return p->sequences * p->heads;
}

flash_kda_tensor tensor_of(void *data, flash_kda_dtype dtype, int ndim, const int64_t *shape)
{
    flash_kda_tensor t = {.data = data, .dtype = dtype, .ndim = ndim};
    int64_t step = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        t.shape[i] = shape[i];
        t.stride[i] = step;
        step *= shape[i];
    }
    return t;
}

flash_kda_fwd_params problem_params(const problem *p, bool with_initial_state)
{
    const int64_t channels[] = {p->batch, p->tokens, p->heads, DIM};
    const int64_t states[] = {p->sequences, p->heads, DIM, DIM};
    const int64_t heads[] = {p->heads, DIM}, ends[] = {p->sequences + 1};
    flash_kda_fwd_params params = {
        .struct_size = sizeof params,
        .q = tensor_of(p->q, FLASH_KDA_BF16, 4, channels),
        .k = tensor_of(p->k, FLASH_KDA_BF16, 4, channels),
        .v = tensor_of(p->v, FLASH_KDA_BF16, 4, channels),
        .g = tensor_of(p->g, FLASH_KDA_BF16, 4, channels),
        .beta = tensor_of(p->beta, FLASH_KDA_BF16, 3, channels),
        .A_log = tensor_of(p->A_log, FLASH_KDA_F32, 1, heads),
        .dt_bias = tensor_of(p->dt_bias, FLASH_KDA_F32, 2, heads),
        .scale = p->scale,
        .lower_bound = p->lower_bound,
    };
    if (with_initial_state) params.initial_state = tensor_of(p->initial_state, FLASH_KDA_F32, 4, states);
    if (p->cu_seqlens) params.cu_seqlens = tensor_of(p->cu_seqlens, FLASH_KDA_I64, 1, ends);
    return params;
}

answer problem_solve(const problem *p, bool with_initial_state)
{
    answer a = {
        .out = allocate((size_t)problem_rows(p) * DIM, sizeof *a.out),
        .state = allocate((size_t)problem_states(p) * DIM * DIM, sizeof *a.state),
    };
    flash_kda_fwd_params params = problem_params(p, with_initial_state);
    must(flash_kda_reference(&params, a.out, a.state, NULL));
    return a;
}

void answer_free(answer *a)
{
    free(a->out);
    free(a->state);
    *a = (answer){0};
}
