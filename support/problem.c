#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static problem *create(int64_t batch, int64_t tokens, int64_t heads, int64_t sequences)
{
    problem *p = allocate(1, sizeof *p);
    p->batch = batch;
    p->tokens = tokens;
    p->heads = p->qk_heads = heads;
    p->sequences = p->slots = sequences;
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

void problem_group_heads(problem *p, int64_t group)
{
    p->qk_heads = p->heads / group;
}

void problem_make_pool(problem *p, int64_t slots)
{
    free(p->initial_state);
    p->slots = slots;
    p->initial_state = allocate((size_t)(slots * p->heads) * DIM * DIM, sizeof *p->initial_state);
    p->state_indices = allocate((size_t)p->sequences, sizeof *p->state_indices);
}

static void *copied(const void *from, int64_t count, size_t size)
{
    if (!from) return NULL;
    void *to = allocate((size_t)count, size);
    memcpy(to, from, (size_t)count * size);
    return to;
}

problem *problem_copy(const problem *p)
{
    problem *to = allocate(1, sizeof *to);
    const int64_t rows = problem_rows(p), channels = rows * DIM, N = p->sequences,
                  offsets = N * (p->checkpoint_columns ? p->checkpoint_columns : 1);
    *to = *p;
    to->q = copied(p->q, channels, sizeof *p->q); /* room for HV heads, whatever H is */
    to->k = copied(p->k, channels, sizeof *p->k);
    to->v = copied(p->v, channels, sizeof *p->v);
    to->g = copied(p->g, channels, sizeof *p->g);
    to->beta = copied(p->beta, rows, sizeof *p->beta);
    to->g_f32 = copied(p->g_f32, channels, sizeof *p->g_f32);
    to->beta_f32 = copied(p->beta_f32, rows, sizeof *p->beta_f32);
    to->A_log = copied(p->A_log, p->heads, sizeof *p->A_log);
    to->dt_bias = copied(p->dt_bias, p->heads * DIM, sizeof *p->dt_bias);
    to->cu_seqlens = copied(p->cu_seqlens, N + 1, sizeof *p->cu_seqlens);
    to->initial_state = copied(p->initial_state, p->slots * p->heads * DIM * DIM, sizeof *p->initial_state);
    to->state_indices = copied(p->state_indices, N, sizeof *p->state_indices);
    to->has_initial_state = copied(p->has_initial_state, N, sizeof *p->has_initial_state);
    to->checkpoint_offsets = copied(p->checkpoint_offsets, offsets, sizeof *p->checkpoint_offsets);
    to->checkpoint_indices = copied(p->checkpoint_indices, offsets, sizeof *p->checkpoint_indices);
    to->checkpoint_starts = copied(p->checkpoint_starts, N, sizeof *p->checkpoint_starts);
    return to;
}

void problem_free(problem *p)
{
    free(p->g_f32);
    free(p->beta_f32);
    free(p->state_indices);
    free(p->has_initial_state);
    free(p->checkpoint_offsets);
    free(p->checkpoint_indices);
    free(p->checkpoint_starts);
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

int64_t problem_qk_rows(const problem *p)
{
    return p->batch * p->tokens * p->qk_heads;
}

int64_t problem_states(const problem *p)
{
    return p->sequences * p->heads;
}

void problem_sequence(const problem *p, int64_t n, int64_t *begin, int64_t *end)
{
    *begin = p->cu_seqlens ? p->cu_seqlens[n] : n * p->tokens;
    *end = p->cu_seqlens ? p->cu_seqlens[n + 1] : (n + 1) * p->tokens;
}

int64_t problem_final_slot(const problem *p, int64_t slots, int64_t n)
{
    const int64_t slot = p->state_indices ? p->state_indices[n] : n;
    if (p->state_indices && slot < p->first_slot) return -1;
    return slot >= 0 && slot < slots ? slot : -1;
}

int64_t problem_initial_slot(const problem *p, int64_t slots, int64_t n)
{
    return p->has_initial_state && !p->has_initial_state[n] ? -1 : problem_final_slot(p, slots, n);
}

void problem_checkpoints(const problem *p,
                         void (*found)(void *context, int64_t n, int64_t offset, int64_t row), void *context)
{
    const int64_t columns = p->checkpoint_columns ? p->checkpoint_columns : 1;
    uint64_t next = 0; /* row with checkpoint_every; starts may be any number */
    for (int64_t n = 0; p->checkpoint_rows && n < p->sequences; n++) {
        int64_t begin, end;
        problem_sequence(p, n, &begin, &end);
        if (p->checkpoint_every) {
            if (p->checkpoint_starts) next = (uint64_t)p->checkpoint_starts[n];
            for (int64_t at = p->checkpoint_every; at <= end - begin; at += p->checkpoint_every, next++)
                if (next < (uint64_t)p->checkpoint_rows) found(context, n, at, (int64_t)next);
            continue;
        }
        for (int64_t i = n * columns; i < (n + 1) * columns; i++) {
            const int64_t offset = p->checkpoint_offsets[i],
                          row = p->checkpoint_indices ? p->checkpoint_indices[i] : i;
            if (offset <= 0 || offset > end - begin || offset % 16) continue;
            if (row >= 0 && row < p->checkpoint_rows) found(context, n, offset, row);
        }
    }
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

/* An optional tensor of int64. */
static flash_kda_tensor indices_of(int64_t *data, int ndim, const int64_t *shape)
{
    return data ? tensor_of(data, FLASH_KDA_I64, ndim, shape) : (flash_kda_tensor){0};
}

static void add_checkpoints(const problem *p, flash_kda_fwd_params *params)
{
    const int64_t offsets[] = {p->sequences, p->checkpoint_columns};
    const int ndim = p->checkpoint_columns ? 2 : 1;
    if (!p->checkpoint_rows) return;
    params->checkpoint_offsets = indices_of(p->checkpoint_offsets, ndim, offsets);
    params->checkpoint_indices = indices_of(p->checkpoint_indices, ndim, offsets);
    params->checkpoint_starts = indices_of(p->checkpoint_starts, 1, offsets);
    params->checkpoint_every = p->checkpoint_every;
}

flash_kda_fwd_params problem_params(const problem *p, bool with_initial_state)
{
    const int64_t channels[] = {p->batch, p->tokens, p->heads, DIM};
    const int64_t qk_channels[] = {p->batch, p->tokens, p->qk_heads, DIM};
    const int64_t states[] = {p->slots, p->heads, DIM, DIM};
    const int64_t heads[] = {p->heads, DIM}, sequences[] = {p->sequences}, ends[] = {p->sequences + 1};
    const bool activated = p->gate == FLASH_KDA_GATE_ACTIVATED;
    flash_kda_fwd_params params = {
        .struct_size = sizeof params,
        .q = tensor_of(p->q, FLASH_KDA_BF16, 4, qk_channels),
        .k = tensor_of(p->k, FLASH_KDA_BF16, 4, qk_channels),
        .v = tensor_of(p->v, FLASH_KDA_BF16, 4, channels),
        .g = tensor_of(p->g, FLASH_KDA_BF16, 4, channels),
        .beta = tensor_of(p->beta, FLASH_KDA_BF16, 3, channels),
        .scale = p->scale,
        .lower_bound = p->lower_bound,
        .state_indices = indices_of(p->state_indices, 1, sequences),
        .first_slot = p->first_slot,
        .gate = p->gate,
        .beta_kind = p->beta_kind,
        .qk_is_normalised = p->qk_is_normalised,
    };
    if (p->g_f32) params.g = tensor_of(p->g_f32, FLASH_KDA_F32, 4, channels);
    if (p->beta_f32) params.beta = tensor_of(p->beta_f32, FLASH_KDA_F32, 3, channels);
    if (!p->without_A_log && !activated) params.A_log = tensor_of(p->A_log, FLASH_KDA_F32, 1, heads);
    if (!p->without_dt_bias && !activated) params.dt_bias = tensor_of(p->dt_bias, FLASH_KDA_F32, 2, heads);
    if (with_initial_state) params.initial_state = tensor_of(p->initial_state, FLASH_KDA_F32, 4, states);
    if (p->cu_seqlens) params.cu_seqlens = tensor_of(p->cu_seqlens, FLASH_KDA_I64, 1, ends);
    if (p->has_initial_state)
        params.has_initial_state = tensor_of(p->has_initial_state, FLASH_KDA_BOOL, 1, sequences);
    add_checkpoints(p, &params);
    return params;
}

answer problem_solve(const problem *p, bool with_initial_state)
{
    answer a = {
        .out = allocate((size_t)problem_rows(p) * DIM, sizeof *a.out),
        .state = allocate((size_t)problem_states(p) * DIM * DIM, sizeof *a.state),
    };
    flash_kda_fwd_params params = problem_params(p, with_initial_state);
    if (p->checkpoint_rows) {
        const int64_t rows[] = {p->checkpoint_rows, p->heads, DIM, DIM};
        const size_t values = (size_t)(p->checkpoint_rows * p->heads) * DIM * DIM;
        params.checkpoint_states = tensor_of(NULL, FLASH_KDA_F32, 4, rows);
        a.checkpoints = allocate(values, sizeof *a.checkpoints);
        for (size_t i = 0; i < values; i++) a.checkpoints[i] = NAN;
    }
    must(flash_kda_reference(&params, a.out, a.state, a.checkpoints));
    return a;
}

void answer_free(answer *a)
{
    free(a->out);
    free(a->state);
    free(a->checkpoints);
    *a = (answer){0};
}
