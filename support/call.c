#include "call.h"

#include <stdlib.h>
#include <string.h>

#include "strided.h"

/* What the records of nonfinite hold before a call: no record that a call could write. */
enum { RECORD_BYTE = 0x5a, RECORD_BYTES = FLASH_KDA_CHECKED_TENSORS * sizeof(flash_kda_nonfinite) };

/* Buffers beyond those of the arguments. */
enum { NARROW_SLICES = ARGS, WIDE_SLICES, WORKSPACE };

const char *const state_mode_names[STATE_MODES] = {"no state", "state in", "state out", "state in and out",
                                                   "state in place"};

const char *const argument_names[ARGS] = {
    [ARG_Q] = "q",
    [ARG_K] = "k",
    [ARG_V] = "v",
    [ARG_G] = "g",
    [ARG_BETA] = "beta",
    [ARG_OUT] = "out",
    [ARG_A_LOG] = "A_log",
    [ARG_DT_BIAS] = "dt_bias",
    [ARG_INITIAL_STATE] = "initial_state",
    [ARG_FINAL_STATE] = "final_state",
    [ARG_CU_SEQLENS] = "cu_seqlens",
    [ARG_NONFINITE] = "nonfinite",
    [ARG_STATE_INDICES] = "state_indices",
    [ARG_HAS_INITIAL_STATE] = "has_initial_state",
    [ARG_CHECKPOINT_STATES] = "checkpoint_states",
    [ARG_CHECKPOINT_OFFSETS] = "checkpoint_offsets",
    [ARG_CHECKPOINT_INDICES] = "checkpoint_indices",
    [ARG_CHECKPOINT_STARTS] = "checkpoint_starts",
};

static flash_kda_tensor *param_of(flash_kda_fwd_params *p, call_tensor which)
{
    flash_kda_tensor *const all[ARGS] = {
        [ARG_Q] = &p->q,
        [ARG_K] = &p->k,
        [ARG_V] = &p->v,
        [ARG_G] = &p->g,
        [ARG_BETA] = &p->beta,
        [ARG_OUT] = &p->out,
        [ARG_A_LOG] = &p->A_log,
        [ARG_DT_BIAS] = &p->dt_bias,
        [ARG_INITIAL_STATE] = &p->initial_state,
        [ARG_FINAL_STATE] = &p->final_state,
        [ARG_CU_SEQLENS] = &p->cu_seqlens,
        [ARG_NONFINITE] = &p->nonfinite,
        [ARG_STATE_INDICES] = &p->state_indices,
        [ARG_HAS_INITIAL_STATE] = &p->has_initial_state,
        [ARG_CHECKPOINT_STATES] = &p->checkpoint_states,
        [ARG_CHECKPOINT_OFFSETS] = &p->checkpoint_offsets,
        [ARG_CHECKPOINT_INDICES] = &p->checkpoint_indices,
        [ARG_CHECKPOINT_STARTS] = &p->checkpoint_starts,
    };
    return all[which];
}

/* ---- Contents ------------------------------------------------------------------------------------------ */

static const void *narrow_integers(const int64_t *wide, int64_t count, void **made)
{
    int32_t *narrow = *made = allocate((size_t)count, sizeof *narrow);
    for (int64_t i = 0; i < count; i++) narrow[i] = (int32_t)wide[i];
    return narrow;
}

static const void *narrow_floats(const float *wide, int64_t count, void **made)
{
    uint16_t *narrow = *made = allocate((size_t)count, sizeof *narrow);
    for (int64_t i = 0; i < count; i++) narrow[i] = bf16_from_float(wide[i]);
    return narrow;
}

/* What an argument holds before a call, contiguous; NULL if it is an output. The caller frees *made. */
static const void *contents_of(const call *c, const problem *p, call_tensor which, void **made)
{
    const flash_kda_tensor *t = &c->places[which].view;
    const int64_t *integers = NULL;
    *made = NULL;
    switch (which) {
    case ARG_Q: return p->q;
    case ARG_K: return p->k;
    case ARG_V: return p->v;
    case ARG_G: return p->g_f32 ? (const void *)p->g_f32 : p->g;
    case ARG_BETA: return p->beta_f32 ? (const void *)p->beta_f32 : p->beta;
    case ARG_A_LOG: return p->A_log;
    case ARG_DT_BIAS: return p->dt_bias;
    case ARG_HAS_INITIAL_STATE: return p->has_initial_state;
    case ARG_INITIAL_STATE:
        if (t->dtype == FLASH_KDA_F32) return p->initial_state;
        return narrow_floats(p->initial_state, elements_of(t), made);
    case ARG_CU_SEQLENS: integers = p->cu_seqlens; break;
    case ARG_STATE_INDICES: integers = p->state_indices; break;
    case ARG_CHECKPOINT_OFFSETS: integers = p->checkpoint_offsets; break;
    case ARG_CHECKPOINT_INDICES: integers = p->checkpoint_indices; break;
    case ARG_CHECKPOINT_STARTS: integers = p->checkpoint_starts; break;
    default: return NULL;
    }
    return t->dtype == FLASH_KDA_I32 ? narrow_integers(integers, elements_of(t), made) : integers;
}

/* Whether an argument is in a buffer. */
static bool is_in(const call *c, int which, int number)
{
    return c->places[which].view.ndim && c->places[which].buffer == number;
}

/* What a buffer holds before a call. */
static unsigned char *image_of(const call *c, const problem *p, int b)
{
    const size_t bytes = c->buffers[b].bytes;
    unsigned char *image = allocate(bytes, 1);
    memset(image, b == ARG_NONFINITE ? RECORD_BYTE : NAN_BYTE, bytes);
    for (int a = 0; a < ARGS; a++) {
        const tensor_place *at = &c->places[a];
        void *made;
        if (!is_in(c, a, b)) continue;
        const void *contents = contents_of(c, p, (call_tensor)a, &made);
        if (contents) scatter(&at->view, image + at->offset, contents);
        free(made);
    }
    return image;
}

static void fill_buffer(const call *c, int b)
{
    unsigned char *image = image_of(c, c->problem, b);
    buffer_write(&c->buffers[b], image);
    free(image);
}

/* ---- Places -------------------------------------------------------------------------------------------- */

static bool is_output(int a)
{
    return a == ARG_OUT || a == ARG_FINAL_STATE || a == ARG_NONFINITE || a == ARG_CHECKPOINT_STATES;
}

/* Gives a tensor a buffer of its own, `bytes` long. */
static void place_alone(call *c, call_tensor which, size_t offset, size_t bytes)
{
    buffer *b = &c->buffers[which];
    *b = (buffer){
        .device = c->options.device, .bytes = bytes, .band = is_output(which) ? OUTPUT_BAND_BYTE : NAN_BYTE};
    c->places[which].buffer = which;
    c->places[which].offset = offset;
}

static void place_contiguous(call *c, call_tensor which, flash_kda_tensor t)
{
    if (!t.ndim) return;
    c->places[which].view = t;
    place_alone(c, which, 0, (size_t)elements_of(&t) * dtype_size(t.dtype));
}

/* A place in memory of its own for a tensor of rows of tokens. */
static void place_rows(call *c, call_tensor which, flash_kda_tensor t, layout how)
{
    static const int plain[] = {0, 1, 2, 3}, head_major[] = {0, 2, 1, 3}, token_major[] = {1, 0, 2, 3};
    const size_t size = dtype_size(t.dtype);
    const int64_t unit = c->options.odd_gaps ? 1 : 16 / (int64_t)size;
    const int64_t none[4] = {0}, gaps[4] = {3 * unit, 2 * unit, unit, 0}, of_beta[3] = {7, 3, 1};
    const bool is_beta = which == ARG_BETA;
    const int *order = how == LAYOUT_HEAD_MAJOR    ? head_major
                       : how == LAYOUT_TOKEN_MAJOR ? token_major
                                                   : plain;
    int64_t first = 0, elements;
    if (how == LAYOUT_PADDED && is_beta) {
        t.stride[2] = 2;
        t.stride[1] = 2 * t.shape[2] + of_beta[1];
        t.stride[0] = t.stride[1] * t.shape[1] + of_beta[0];
        elements = t.stride[0] * t.shape[0] + of_beta[2];
    } else {
        elements = lay_out(&t, order, how == LAYOUT_PADDED ? gaps : none);
    }
    for (int d = 1; how == LAYOUT_REVERSED && d < 3; d++)
        if (t.shape[d] > 0) {
            first += (t.shape[d] - 1) * t.stride[d];
            t.stride[d] = -t.stride[d];
        }
    c->places[which].view = t;
    place_alone(c, which, (size_t)first * size, (size_t)elements * size);
}

/* Places all slices of elements of that size into one buffer [B, T, width]. */
static void place_slices(call *c, const flash_kda_tensor *tensors, size_t size)
{
    const int number = size == 2 ? NARROW_SLICES : WIDE_SLICES;
    buffer *b = &c->buffers[number];
    const int64_t unit = 16 / (int64_t)size;
    int64_t width = unit, first[STRIDED_ARGS]; /* a gap in front of the first slice */
    bool any = false;
    for (int a = 0; a < STRIDED_ARGS; a++) {
        const flash_kda_tensor *t = &tensors[a];
        if (c->options.layouts[a] != LAYOUT_FUSED || dtype_size(t->dtype) != size) continue;
        any = true;
        first[a] = width;
        width += t->shape[2] * (t->ndim == 4 ? DIM : 1);
        width += (unit - width % unit) % unit + (a % 2 ? unit : 0);
    }
    if (!any) return;
    *b = (buffer){.device = c->options.device,
                  .bytes = (size_t)(width * tensors[ARG_V].shape[0] * tensors[ARG_V].shape[1]) * size,
                  .band = NAN_BYTE};
    for (int a = 0; a < STRIDED_ARGS; a++) {
        const flash_kda_tensor *t = &tensors[a];
        if (c->options.layouts[a] != LAYOUT_FUSED || dtype_size(t->dtype) != size) continue;
        tensor_place *at = &c->places[a];
        *at = (tensor_place){.buffer = number, .offset = (size_t)first[a] * size, .view = *t};
        at->view.stride[1] = width;
        at->view.stride[0] = width * t->shape[1];
        if (b->bytes == 0) at->offset = 0;
    }
}

static void place_tokens(call *c)
{
    const flash_kda_fwd_params *p = &c->params;
    const flash_kda_tensor tensors[STRIDED_ARGS] = {p->q, p->k, p->v, p->g, p->beta, p->out};
    place_slices(c, tensors, 2);
    place_slices(c, tensors, 4);
    for (int a = 0; a < STRIDED_ARGS; a++)
        if (c->options.layouts[a] != LAYOUT_FUSED)
            place_rows(c, (call_tensor)a, tensors[a], c->options.layouts[a]);
}

/* Slots may be part of a larger record: states begin `gap` elements after the start of the buffer. */
static void place_states(call *c, call_tensor which, int64_t slots, bool is_bf16, int64_t gap)
{
    const int64_t shape[] = {slots, c->problem->heads, DIM, DIM};
    flash_kda_tensor t = tensor_of(NULL, is_bf16 ? FLASH_KDA_BF16 : FLASH_KDA_F32, 4, shape);
    const size_t size = dtype_size(t.dtype);
    t.stride[0] += gap * 8;
    const int64_t elements = gap * 8 + slots * t.stride[0];
    if (c->options.k_first) t.stride[2] = 1, t.stride[3] = DIM;
    c->places[which].view = t;
    place_alone(c, which, (size_t)gap * 8 * size, (size_t)elements * size);
}

static void place_all_states(call *c)
{
    const call_options *o = &c->options;
    const problem *p = c->problem;
    const int64_t final_slots = p->state_indices && o->final_slots ? o->final_slots : p->slots;
    if (mode_reads(o->mode)) place_states(c, ARG_INITIAL_STATE, p->slots, o->bf16_state, o->slot_gap);
    if (o->mode == STATE_IN_PLACE)
        c->places[ARG_FINAL_STATE] = c->places[ARG_INITIAL_STATE];
    else if (mode_writes(o->mode))
        place_states(c, ARG_FINAL_STATE, final_slots, o->bf16_state, o->final_gap);
    if (p->checkpoint_rows)
        place_states(c, ARG_CHECKPOINT_STATES, p->checkpoint_rows, o->bf16_checkpoints, o->row_gap);
}

static void place_integers(call *c, call_tensor which, flash_kda_tensor t, bool is_i32)
{
    if (t.ndim && is_i32) t.dtype = FLASH_KDA_I32;
    place_contiguous(c, which, t);
}

/* A parameter of the gate in another shape of the same number of elements. */
static flash_kda_tensor reshaped(flash_kda_tensor t, int ndim)
{
    const int64_t count = elements_of(&t),
                  shapes[5][4] = {{0}, {count}, {1, count}, {count, 1, 1}, {1, 1, count, 1}};
    return ndim && t.ndim ? tensor_of(t.data, (flash_kda_dtype)t.dtype, ndim, shapes[ndim]) : t;
}

static void place_everything(call *c)
{
    const flash_kda_fwd_params *p = &c->params;
    const call_options *o = &c->options;
    place_tokens(c);
    place_contiguous(c, ARG_A_LOG, reshaped(p->A_log, o->parameter_ndim));
    place_contiguous(c, ARG_DT_BIAS, reshaped(p->dt_bias, o->parameter_ndim));
    place_all_states(c);
    place_integers(c, ARG_CU_SEQLENS, p->cu_seqlens, o->i32_seqlens);
    place_integers(c, ARG_STATE_INDICES, p->state_indices, o->i32_state_indices);
    place_contiguous(c, ARG_HAS_INITIAL_STATE, p->has_initial_state);
    place_integers(c, ARG_CHECKPOINT_OFFSETS, p->checkpoint_offsets, o->i32_offsets);
    place_integers(c, ARG_CHECKPOINT_INDICES, p->checkpoint_indices, o->i32_checkpoint_rows);
    place_integers(c, ARG_CHECKPOINT_STARTS, p->checkpoint_starts, o->i32_checkpoint_rows);
    if (o->counts_nonfinite) {
        const int64_t shape[] = {FLASH_KDA_CHECKED_TENSORS, 2};
        place_contiguous(c, ARG_NONFINITE, tensor_of(NULL, FLASH_KDA_I64, 2, shape));
    }
}

/* The argument as the call gets it, still without memory. */
static flash_kda_tensor argument_of(const call *c, call_tensor which)
{
    flash_kda_tensor t = c->places[which].view;
    const bool is_state =
        which == ARG_INITIAL_STATE || which == ARG_FINAL_STATE || which == ARG_CHECKPOINT_STATES;
    t.data = NULL;
    if (is_state && c->options.k_first) t.stride[2] = DIM, t.stride[3] = 1;
    for (int i = 0; c->options.rubbish_strides && i < t.ndim; i++)
        if (t.shape[i] == 1) t.stride[i] = i % 2 ? -77 : INT64_MAX / 3;
    return t;
}

static int64_t longest_sequence(const problem *p)
{
    int64_t longest = p->cu_seqlens ? 0 : p->tokens;
    for (int64_t n = 0; p->cu_seqlens && n < p->sequences; n++) {
        const int64_t length = p->cu_seqlens[n + 1] - p->cu_seqlens[n];
        if (length > longest) longest = length;
    }
    return longest;
}

/* ---- Calls --------------------------------------------------------------------------------------------- */

flash_kda_status call_open(call *c, const problem *p, call_options options)
{
    *c = (call){
        .params = problem_params(p, false),
        .options = options,
        .rows = problem_rows(p),
        .states = problem_states(p),
        .problem = p,
    };
    c->params.device = options.device;
    c->params.kernel = options.kernel;
    c->params.cpu_threads = options.threads;
    c->params.batch_invariant = options.batch_invariant;
    c->params.cut = options.cut;
    c->params.state_k_first = options.k_first;
    if (options.tells_longest) c->params.max_seqlen = longest_sequence(p);
    c->params.out = c->params.v;
    place_everything(c);
    for (int a = 0; a < ARGS; a++) *param_of(&c->params, (call_tensor)a) = argument_of(c, (call_tensor)a);
    size_t workspace_size = 0;
    flash_kda_status status =
        options.for_reference ? FLASH_KDA_OK : flash_kda_fwd_workspace_size(&c->params, &workspace_size);
    if (status != FLASH_KDA_OK) return status;
    c->buffers[WORKSPACE] =
        (buffer){.device = options.device, .bytes = workspace_size, .band = OUTPUT_BAND_BYTE};
    buffer_create(&c->buffers[WORKSPACE]);
    c->params.workspace = workspace_size ? buffer_start(&c->buffers[WORKSPACE]) : NULL;
    c->params.workspace_size = workspace_size;
    for (int a = 0; a < ARGS; a++) {
        const tensor_place *at = &c->places[a];
        buffer *b = &c->buffers[at->buffer];
        if (!at->view.ndim) continue;
        if (!b->base) buffer_create(b);
        param_of(&c->params, (call_tensor)a)->data = (char *)buffer_start(b) + at->offset;
    }
    for (int i = 0; i < BUFFERS; i++)
        if (c->buffers[i].base) fill_buffer(c, i);
    return FLASH_KDA_OK;
}

void call_close(call *c)
{
    for (int i = 0; i < BUFFERS; i++) buffer_free(&c->buffers[i]);
    *c = (call){0};
}

/* Whether a call may write to a buffer. */
static bool is_written(const call *c, int b)
{
    for (int a = 0; a < ARGS; a++)
        if (is_output(a) && is_in(c, a, b)) return true;
    return b == WORKSPACE;
}

void call_poison(call *c)
{
    for (int i = 0; i < BUFFERS; i++)
        if (c->buffers[i].base && is_written(c, i)) fill_buffer(c, i);
}

void *call_buffer(const call *c, int number)
{
    return buffer_start(&c->buffers[number]);
}

flash_kda_status call_run(call *c)
{
    flash_kda_status status = flash_kda_fwd(&c->params);
    return status == FLASH_KDA_OK ? flash_kda_synchronize(c->params.device, c->params.stream) : status;
}

void *call_read(const call *c, call_tensor which)
{
    const tensor_place *at = &c->places[which];
    unsigned char *all = buffer_read(&c->buffers[at->buffer]),
                  *elements = allocate((size_t)elements_of(&at->view), dtype_size(at->view.dtype));
    gather(&at->view, all + at->offset, elements);
    free(all);
    return elements;
}

/* Writes a part of a tensor, which begins `first` elements after the tensor's first one. */
static void write_part(call *c, call_tensor which, flash_kda_tensor part, int64_t first, const void *contents)
{
    const tensor_place *at = &c->places[which];
    unsigned char *all = buffer_read(&c->buffers[at->buffer]);
    scatter(&part, all + at->offset + first * (int64_t)dtype_size(part.dtype), contents);
    buffer_write(&c->buffers[at->buffer], all);
    free(all);
}

void call_write(call *c, call_tensor which, const void *contents)
{
    write_part(c, which, c->places[which].view, 0, contents);
}

void call_write_slot(call *c, call_tensor which, int64_t slot, const void *contents)
{
    flash_kda_tensor one = c->places[which].view;
    one.shape[0] = 1;
    write_part(c, which, one, slot * one.stride[0], contents);
}

uint16_t *call_read_out(const call *c)
{
    return call_read(c, ARG_OUT);
}

void *call_read_state(const call *c)
{
    return call_read(c, ARG_FINAL_STATE);
}

void call_read_nonfinite(const call *c, flash_kda_nonfinite records[FLASH_KDA_CHECKED_TENSORS])
{
    void *read = call_read(c, ARG_NONFINITE);
    memcpy(records, read, RECORD_BYTES);
    free(read);
}

/* ---- Damage -------------------------------------------------------------------------------------------- */

/* The contents of a buffer after a call, and what they may be. */
typedef struct inspection {
    const tensor_place *at;
    unsigned char *now;
    const unsigned char *image;
} inspection;

/* Puts back what a part of a tensor held before the call. */
static void put_back(const inspection *i, flash_kda_tensor part, int64_t first)
{
    const size_t size = dtype_size(part.dtype), bytes = (size_t)elements_of(&part) * size;
    const size_t at = i->at->offset + (size_t)(first * (int64_t)size);
    unsigned char *before = allocate(bytes, 1);
    gather(&part, i->image + at, before);
    scatter(&part, i->now + at, before);
    free(before);
}

static void put_back_slot(const inspection *i, int64_t slot)
{
    flash_kda_tensor one = i->at->view;
    one.shape[0] = 1;
    put_back(i, one, slot * one.stride[0]);
}

static void put_back_row(void *context, int64_t n, int64_t offset, int64_t row)
{
    (void)n, (void)offset;
    put_back_slot(context, row);
}

/* Puts back what a buffer held in elements that the call may write. */
static void put_back_outputs(const call *c, const problem *p, int b, unsigned char *now,
                             const unsigned char *image)
{
    for (int a = 0; a < ARGS; a++) {
        inspection i = {&c->places[a], now, image};
        if (!is_in(c, a, b) || !is_output(a)) continue;
        if (a == ARG_CHECKPOINT_STATES) {
            problem_checkpoints(p, put_back_row, &i);
        } else if (a == ARG_FINAL_STATE) {
            for (int64_t n = 0; n < p->sequences; n++) {
                const int64_t slot = problem_final_slot(p, i.at->view.shape[0], n);
                if (slot >= 0) put_back_slot(&i, slot);
            }
        } else {
            put_back(&i, i.at->view, 0);
        }
    }
}

static bool is_damaged(const call *c, const problem *p, int number)
{
    const buffer *b = &c->buffers[number];
    if (!b->base) return false;
    if (!buffer_is_intact(b)) return true;
    if (number == WORKSPACE) return false;
    unsigned char *now = buffer_read(b), *image = image_of(c, p, number);
    put_back_outputs(c, p, number, now, image);
    const bool same = memcmp(now, image, b->bytes) == 0;
    free(now);
    free(image);
    return !same;
}

const char *call_damage(const call *c, const problem *p)
{
    for (int i = 0; i < BUFFERS; i++)
        if (is_damaged(c, p, i))
            return i < ARGS ? argument_names[i] : i == WORKSPACE ? "workspace" : "the slices of one buffer";
    return NULL;
}

bool call_untouched(const call *c)
{
    for (int i = 0; i < WORKSPACE; i++) {
        const buffer *b = &c->buffers[i];
        if (!b->base) continue;
        unsigned char *now = buffer_read(b), *image = image_of(c, c->problem, i);
        const bool same = memcmp(now, image, b->bytes) == 0;
        free(now);
        free(image);
        if (!same) return false;
    }
    return true;
}
