#include "decode_call.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "strided.h"

enum { SLOTS, ACCEPTED, PARENTS, RECORDS, ROUNDING, STARTS, APPLIED, APPLIED_TOKENS, WRITTEN, WRITTEN_SLOTS };
enum { RECORD = FLASH_KDA_RECORD_ROWS * DIM };

static const char *const names[DECODE_BUFFERS] = {
    [SLOTS] = "state_indices",
    [ACCEPTED] = "num_accepted_tokens",
    [PARENTS] = "parents",
    [RECORDS] = "records",
    [ROUNDING] = "rounding",
    [STARTS] = "state_indices of apply",
    [APPLIED] = "num_accepted_tokens of apply",
    [APPLIED_TOKENS] = "accepted",
    [WRITTEN] = "written_states",
    [WRITTEN_SLOTS] = "written_indices",
};

/* ---- Problems ------------------------------------------------------------------------------------------ */

void decode_problem_free(decode_problem *d)
{
    if (d->tokens) problem_free(d->tokens);
    free(d->state_indices);
    free(d->num_accepted_tokens);
    free(d->parents);
    free(d->rounding);
    free(d->written_indices);
    free(d->applied);
    free(d->accepted);
    *d = (decode_problem){0};
}

static int64_t clamp(int64_t x, int64_t least, int64_t most)
{
    return x < least ? least : x > most ? most : x;
}

static int64_t slot_at(const decode_problem *d, int64_t n, int64_t column)
{
    const int64_t slot = d->state_indices ? d->state_indices[n * d->slot_columns + column] : n;
    return slot < d->first_slot || slot < 0 || slot >= d->tokens->slots ? -1 : slot;
}

int64_t decode_first_slot(const decode_problem *d, int64_t n)
{
    const int64_t start = d->num_accepted_tokens ? d->num_accepted_tokens[n] : 1;
    return slot_at(d, n, clamp(start, 1, d->slot_columns) - 1);
}

int64_t decode_slot_after(const decode_problem *d, int64_t n, int64_t i, int64_t length)
{
    const int64_t first = decode_first_slot(d, n);
    if (first < 0 || d->has_written || d->write_states == FLASH_KDA_WRITE_NONE) return -1;
    if (d->write_states == FLASH_KDA_WRITE_LAST) return i == length - 1 ? first : -1;
    return slot_at(d, n, i);
}

int64_t decode_written_slot(const decode_problem *d, int64_t n, int64_t i, int64_t length)
{
    const bool each = d->write_states == FLASH_KDA_WRITE_EACH;
    int64_t begin, end, slot = n;
    if (!d->has_written || decode_first_slot(d, n) < 0 || (!each && i != length - 1)) return -1;
    problem_sequence(d->tokens, n, &begin, &end);
    if (d->written_indices)
        slot = d->written_indices[n * d->written_columns + (each ? i : 0)];
    else if (each)
        slot = begin + i;
    return slot < 0 || slot >= d->written_slots ? -1 : slot;
}

int64_t decode_parent(const decode_problem *d, int64_t n, int64_t i)
{
    return d->parents ? clamp(d->parents[n * d->parent_columns + i], -1, i - 1) : i - 1;
}

int64_t decode_length(const decode_problem *d, int64_t n)
{
    int64_t begin, end;
    problem_sequence(d->tokens, n, &begin, &end);
    return clamp(end - begin, 0, FLASH_KDA_MAX_DECODE_TOKENS);
}

int64_t decode_applied_token(const decode_problem *d, int64_t n, int64_t i)
{
    int64_t most = clamp(d->record_columns, 0, FLASH_KDA_MAX_DECODE_TOKENS);
    if (d->accepted) most = clamp(most, 0, d->accepted_columns);
    if (i >= clamp(d->applied[n], 0, most)) return -1;
    if (!d->accepted) return i;
    const int64_t token = d->accepted[n * d->accepted_columns + i];
    return token < 0 || token >= d->record_columns ? -1 : token;
}

static flash_kda_tensor integers(int64_t *data, int64_t rows, int64_t columns, int ndim)
{
    const int64_t shape[] = {rows, columns};
    return data ? tensor_of(data, FLASH_KDA_I64, ndim, shape) : (flash_kda_tensor){0};
}

static bool has_slots_of_tokens(const decode_problem *d)
{
    return d->write_states == FLASH_KDA_WRITE_EACH && !d->has_written;
}

static flash_kda_tensor slots_of(const decode_problem *d)
{
    return integers(d->state_indices, d->tokens->sequences, d->slot_columns, has_slots_of_tokens(d) ? 2 : 1);
}

/* The parameters that a forward pass over the same tokens has too. */
static flash_kda_decode_params shared_params(const flash_kda_fwd_params *p, const decode_problem *d)
{
    return (flash_kda_decode_params){
        .struct_size = sizeof(flash_kda_decode_params),
        .device = p->device,
        .q = p->q,
        .k = p->k,
        .v = p->v,
        .g = p->g,
        .beta = p->beta,
        .out = p->out,
        .A_log = p->A_log,
        .dt_bias = p->dt_bias,
        .state = p->initial_state,
        .cu_seqlens = p->cu_seqlens,
        .scale = p->scale,
        .lower_bound = p->lower_bound,
        .write_states = d->write_states,
        .gate = p->gate,
        .beta_kind = p->beta_kind,
        .qk_is_normalised = p->qk_is_normalised,
        .state_k_first = p->state_k_first,
        .cpu_threads = p->cpu_threads,
        .first_slot = d->first_slot,
        .kernel = p->kernel,
    };
}

decode_answer decode_solve(const decode_problem *d)
{
    const problem *p = d->tokens;
    const flash_kda_fwd_params tokens = problem_params(p, true);
    flash_kda_decode_params params = shared_params(&tokens, d);
    const size_t values = (size_t)problem_rows(p) * DIM;
    decode_answer a = {allocate(values, sizeof *a.out), allocate(values * DIM, sizeof *a.states)};
    for (size_t i = 0; i < values * DIM; i++) a.states[i] = NAN;
    if (d->has_written) params.write_states = FLASH_KDA_WRITE_NONE; /* the truth is the same */
    params.state_indices = slots_of(d);
    params.num_accepted_tokens = integers(d->num_accepted_tokens, p->sequences, 1, 1);
    params.parents = integers(d->parents, p->sequences, d->parent_columns, 2);
    must(flash_kda_decode_reference(&params, a.out, a.states));
    return a;
}

void decode_answer_free(decode_answer *a)
{
    free(a->out);
    free(a->states);
    *a = (decode_answer){0};
}

/* ---- Calls --------------------------------------------------------------------------------------------- */

/* A buffer with the numbers of a tensor, which becomes what the call gets. */
static void place(decode_call *c, int which, flash_kda_tensor *t, bool is_i32)
{
    int64_t count = 1;
    int32_t *narrow = NULL;
    if (!t->data) return;
    for (int i = 0; i < t->ndim; i++) count *= t->shape[i];
    if (is_i32) {
        narrow = allocate((size_t)count, sizeof *narrow);
        for (int64_t i = 0; i < count; i++) narrow[i] = (int32_t)((int64_t *)t->data)[i];
        t->dtype = FLASH_KDA_I32;
    }
    buffer *b = &c->buffers[which];
    *b = (buffer){.device = c->tokens.params.device,
                  .bytes = (size_t)count * dtype_size(t->dtype),
                  .band = which == RECORDS ? OUTPUT_BAND_BYTE : NAN_BYTE};
    buffer_create(b);
    c->images[which] = allocate(b->bytes, 1);
    memcpy(c->images[which], narrow ? (void *)narrow : t->data, b->bytes);
    buffer_write(b, c->images[which]);
    t->data = buffer_start(b);
    free(narrow);
}

static void place_records(decode_call *c)
{
    const decode_problem *d = c->problem;
    const int64_t shape[] = {d->tokens->sequences, d->record_columns, d->tokens->heads, RECORD};
    const size_t bytes = (size_t)(shape[0] * shape[1] * shape[2] * RECORD) * sizeof(float);
    void *poison = allocate(bytes, 1);
    memset(poison, NAN_BYTE, bytes);
    c->decode.records = tensor_of(poison, FLASH_KDA_F32, 4, shape);
    place(c, RECORDS, &c->decode.records, false);
    free(poison);
}

/* A buffer of NaN for written_states. */
static void place_written(decode_call *c, const decode_options *options)
{
    const decode_problem *d = c->problem;
    const int64_t shape[] = {d->written_slots, d->tokens->heads, DIM, DIM},
                  stride = shape[1] * DIM * DIM + options->written_gap;
    flash_kda_tensor *t = &c->decode.written_states, *view = &c->written_view;
    buffer *b = &c->buffers[WRITTEN];
    *t = tensor_of(NULL, c->decode.state.dtype, 4, shape);
    t->stride[0] = stride;
    *b = (buffer){.device = c->decode.device,
                  .bytes = (size_t)(shape[0] * stride) * dtype_size(t->dtype),
                  .band = OUTPUT_BAND_BYTE};
    buffer_create(b);
    c->images[WRITTEN] = allocate(b->bytes, 1);
    memset(c->images[WRITTEN], NAN_BYTE, b->bytes);
    buffer_write(b, c->images[WRITTEN]);
    t->data = buffer_start(b);
    *view = *t;
    if (!options->tokens.k_first) return;
    view->stride[2] = 1;
    view->stride[3] = DIM;
}

/* With a slot for each token apply gets the slots that sequences start from. */
static void place_starts(decode_call *c, bool is_i32)
{
    const decode_problem *d = c->problem;
    const int64_t N = d->tokens->sequences;
    int64_t *starts = allocate((size_t)N, sizeof *starts);
    for (int64_t n = 0; n < N; n++) starts[n] = decode_first_slot(d, n);
    c->apply.state_indices = integers(starts, N, 1, 1);
    place(c, STARTS, &c->apply.state_indices, is_i32);
    free(starts);
}

static void open_apply(decode_call *c, const decode_options *options)
{
    const decode_problem *d = c->problem;
    const int64_t N = d->tokens->sequences;
    c->apply = (flash_kda_apply_params){
        .struct_size = sizeof c->apply,
        .device = c->decode.device,
        .records = c->decode.records,
        .num_accepted_tokens = integers(d->applied, N, 1, 1),
        .accepted = integers(d->accepted, N, d->accepted_columns, 2),
        .state = c->decode.state,
        .state_indices = c->decode.state_indices,
        .rounding = c->decode.rounding,
        .state_k_first = c->decode.state_k_first,
        .cpu_threads = c->decode.cpu_threads,
        .first_slot = d->first_slot,
        .kernel = c->decode.kernel,
    };
    if (has_slots_of_tokens(d)) place_starts(c, options->i32_slots);
    place(c, APPLIED, &c->apply.num_accepted_tokens, options->i32_accepted);
    place(c, APPLIED_TOKENS, &c->apply.accepted, options->i32_parents);
}

void decode_call_open(decode_call *c, const decode_problem *d, decode_options options)
{
    const int64_t N = d->tokens->sequences;
    *c = (decode_call){.problem = d};
    options.tokens.mode = STATE_IN_PLACE;
    options.tokens.for_reference = true; /* no workspace */
    must(call_open(&c->tokens, d->tokens, options.tokens));
    c->decode = shared_params(&c->tokens.params, d);
    c->decode.state_indices = slots_of(d);
    c->decode.num_accepted_tokens = integers(d->num_accepted_tokens, N, 1, 1);
    c->decode.parents = integers(d->parents, N, d->parent_columns, 2);
    c->decode.rounding = integers(d->rounding, 2, 1, 1);
    place(c, SLOTS, &c->decode.state_indices, options.i32_slots);
    place(c, ACCEPTED, &c->decode.num_accepted_tokens, options.i32_accepted);
    place(c, PARENTS, &c->decode.parents, options.i32_parents);
    place(c, ROUNDING, &c->decode.rounding, false);
    if (d->has_written) {
        place_written(c, &options);
        c->decode.written_indices = integers(d->written_indices, N, d->written_columns,
                                             d->write_states == FLASH_KDA_WRITE_EACH ? 2 : 1);
        place(c, WRITTEN_SLOTS, &c->decode.written_indices, options.i32_written);
    }
    if (!d->record_columns) return;
    place_records(c);
    open_apply(c, &options);
}

void decode_call_close(decode_call *c)
{
    for (int i = 0; i < DECODE_BUFFERS; i++) {
        buffer_free(&c->buffers[i]);
        free(c->images[i]);
    }
    call_close(&c->tokens);
    *c = (decode_call){0};
}

void decode_call_restore_pool(decode_call *c)
{
    call_poison(&c->tokens);
    if (c->problem->has_written) buffer_write(&c->buffers[WRITTEN], c->images[WRITTEN]);
}

flash_kda_status decode_call_run(decode_call *c)
{
    const flash_kda_status status = flash_kda_decode(&c->decode);
    return status == FLASH_KDA_OK ? flash_kda_synchronize(c->decode.device, c->decode.stream) : status;
}

flash_kda_status decode_call_apply(decode_call *c)
{
    const flash_kda_status status = flash_kda_apply(&c->apply);
    return status == FLASH_KDA_OK ? flash_kda_synchronize(c->apply.device, c->apply.stream) : status;
}

uint16_t *decode_call_read_out(const decode_call *c)
{
    return call_read_out(&c->tokens);
}

void *decode_call_read_pool(const decode_call *c)
{
    return call_read_state(&c->tokens);
}

void *decode_call_read_written(const decode_call *c)
{
    const flash_kda_tensor *view = &c->written_view;
    unsigned char *all = buffer_read(&c->buffers[WRITTEN]),
                  *elements = allocate((size_t)elements_of(view) * dtype_size(view->dtype), 1);
    gather(view, all, elements);
    free(all);
    return elements;
}

float *decode_call_read_records(const decode_call *c)
{
    return (float *)buffer_read(&c->buffers[RECORDS]);
}

/* ---- Damage -------------------------------------------------------------------------------------------- */

/* Lists the slots that the call may write, and returns how many there are. */
static int64_t list_written(const decode_problem *d, bool applied, int64_t *slots)
{
    int64_t count = 0;
    for (int64_t n = 0; n < d->tokens->sequences; n++) {
        const int64_t length = decode_length(d, n);
        if (applied && decode_applied_token(d, n, 0) >= 0) slots[count++] = decode_first_slot(d, n);
        for (int64_t i = 0; i < length && !applied; i++) slots[count++] = decode_slot_after(d, n, i, length);
    }
    return count;
}

/* Puts back what the call may write of the records. */
static void put_back_records(const decode_call *c, unsigned char *now)
{
    const decode_problem *d = c->problem;
    const size_t row = (size_t)d->tokens->heads * RECORD * sizeof(float);
    for (int64_t n = 0; n < d->tokens->sequences; n++) {
        const size_t at = (size_t)(n * d->record_columns) * row;
        memcpy(now + at, c->images[RECORDS] + at, (size_t)decode_length(d, n) * row);
    }
}

/* Puts back what the call may write of written_states. */
static void put_back_written(const decode_call *c, unsigned char *now)
{
    const decode_problem *d = c->problem;
    const size_t size = dtype_size(c->written_view.dtype),
                 slot_bytes = (size_t)(d->tokens->heads * DIM * DIM) * size;
    for (int64_t n = 0; n < d->tokens->sequences; n++) {
        const int64_t length = decode_length(d, n);
        for (int64_t i = 0; i < length; i++) {
            const int64_t slot = decode_written_slot(d, n, i, length);
            if (slot < 0) continue;
            const size_t at = (size_t)(slot * c->written_view.stride[0]) * size;
            memcpy(now + at, c->images[WRITTEN] + at, slot_bytes);
        }
    }
}

static bool is_damaged(const decode_call *c, int which, bool may_write)
{
    const buffer *b = &c->buffers[which];
    if (!b->base) return false;
    unsigned char *now = buffer_read(b);
    if (which == RECORDS && may_write) put_back_records(c, now);
    if (which == WRITTEN && may_write) put_back_written(c, now);
    const bool same = memcmp(now, c->images[which], b->bytes) == 0;
    free(now);
    return !same || !buffer_is_intact(b);
}

const char *decode_call_damage(const decode_call *c, bool applied)
{
    const problem *p = c->problem->tokens;
    int64_t *slots = allocate((size_t)p->sequences * FLASH_KDA_MAX_DECODE_TOKENS, sizeof *slots);
    problem written = *p;
    written.sequences = list_written(c->problem, applied, slots);
    written.state_indices = slots;
    const char *damaged = call_damage(&c->tokens, &written);
    free(slots);
    for (int i = 0; i < DECODE_BUFFERS && !damaged; i++)
        if (is_damaged(c, i, true)) damaged = names[i];
    return damaged;
}

bool decode_call_untouched(const decode_call *c)
{
    for (int i = 0; i < DECODE_BUFFERS; i++)
        if (is_damaged(c, i, false)) return false;
    return call_untouched(&c->tokens);
}
