/* Draws calls of decode_layer, and holds them to the definition (layer_call.h). */
#include "layer_call.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BAND = 256, POISON = 0xe5, PARTS = 3, TAPS = 4, WINDOW = 3, RECORD = 3 * DIM };

/* The error that a call may have, as relative RMS, beside the error that the truth has when it is rounded to
 * the type of the tensor; and the whole error of a state that is rounded at random. */
static const double BAR = 1e-5, AT_RANDOM_BAR = 4.6e-3;

static const struct {
    const char *name;
    size_t offset; /* in flash_kda_decode_layer_params */
} names[LAYER_TENSORS] = {
#define NAME(x)                                                                                              \
    {                                                                                                        \
#x, offsetof(flash_kda_decode_layer_params, x)                                                       \
    }
    NAME(x),
    NAME(weight),
    NAME(bias),
    NAME(conv_state),
    NAME(g),
    NAME(beta),
    NAME(out),
    NAME(A_log),
    NAME(dt_bias),
    NAME(output_gate),
    NAME(norm_weight),
    NAME(state),
    NAME(state_indices),
    NAME(num_accepted_tokens),
    NAME(cu_seqlens),
    NAME(records),
    NAME(conv_windows),
    NAME(rounding),
    NAME(written_states),
    NAME(written_indices),
};

static int64_t below(rng *r, int64_t count)
{
    return (int64_t)(rng_bits(r) % (uint64_t)count);
}

static bool one_in(rng *r, int64_t count)
{
    return below(r, count) == 0;
}

layer_sizes layer_any_sizes(rng *r)
{
    static const int64_t few[] = {1, 1, 1, 2, 3, 4, 5, 0};
    const int32_t write = (int32_t)below(r, 3);
    return (layer_sizes){.sequences = 1 + below(r, test.quick ? 3 : 5),
                         .heads = 1 + below(r, 3),
                         .tokens = one_in(r, 12) ? 16 : few[below(r, 8)],
                         .write = write,
                         .packed = one_in(r, 3),
                         .apart = write != FLASH_KDA_WRITE_NONE && one_in(r, 3)};
}

/* ---- Tensors in memory ---- */

/* How a tensor may lie: the innermost dimensions that stay contiguous, and what strides are multiples of. */
typedef struct lie {
    int fixed; /* innermost dimensions that are contiguous */
    int64_t unit;
} lie;

/* Gives a tensor strides: its outer dimensions in any order, with gaps. Returns its elements from the first
 * to the last. */
static int64_t draw_strides(rng *r, flash_kda_tensor *t, lie how)
{
    int order[4], outer = t->ndim > how.fixed ? t->ndim - how.fixed : 0;
    int64_t reach = 1;
    for (int i = t->ndim - 1; i >= outer; i--) t->stride[i] = reach, reach *= t->shape[i] ? t->shape[i] : 1;
    for (int i = 0; i < outer; i++) order[i] = outer - 1 - i;
    if (one_in(r, 2))
        for (int i = outer - 1; i > 0; i--) {
            const int other = (int)below(r, i + 1), kept = order[i];
            order[i] = order[other];
            order[other] = kept;
        }
    for (int i = 0; i < outer; i++) {
        const int64_t size = t->shape[order[i]] ? t->shape[order[i]] : 1;
        if (one_in(r, 3)) reach += how.unit * (1 + below(r, 9));
        reach = (reach + how.unit - 1) / how.unit * how.unit;
        t->stride[order[i]] = reach;
        reach *= size;
    }
    return reach;
}

static void *at_element(const layer_call *c, layer_tensor which, unsigned char *base, const int64_t *index)
{
    const layer_argument *a = &c->arguments[which];
    int64_t element = 0;
    for (int i = 0; i < a->tensor.ndim; i++) element += index[i] * a->tensor.stride[i];
    return base + a->at + element * (int64_t)dtype_size(a->tensor.dtype);
}

/* Calls act for every element of a tensor, with its number as if the tensor were contiguous. */
static void for_each(layer_call *c, layer_tensor which,
                     void (*act)(layer_call *c, layer_tensor which, const int64_t *index, void *context),
                     void *context)
{
    const flash_kda_tensor *t = &c->arguments[which].tensor;
    int64_t index[4] = {0}, count = 1;
    if (!c->arguments[which].present) return;
    for (int i = 0; i < t->ndim; i++) count *= t->shape[i];
    for (int64_t n = 0; n < count; n++) {
        int64_t rest = n;
        for (int i = t->ndim - 1; i >= 0; i--) index[i] = rest % t->shape[i], rest /= t->shape[i];
        act(c, which, index, context);
    }
}

static void make_memory(layer_memory *m, size_t bytes)
{
    m->bytes = bytes + 2 * BAND;
    m->before = allocate(m->bytes, 1);
    m->after = allocate(m->bytes, 1);
    m->may_change = allocate(m->bytes, sizeof *m->may_change);
    memset(m->before, POISON, m->bytes);
    must(flash_kda_malloc(test.device, m->bytes, &m->device));
}

static void place(rng *r, layer_call *c, layer_tensor which, flash_kda_dtype dtype, int ndim,
                  const int64_t *shape, lie how)
{
    layer_argument *a = &c->arguments[which];
    a->present = true;
    a->tensor.dtype = dtype;
    a->tensor.ndim = ndim;
    for (int i = 0; i < ndim; i++) a->tensor.shape[i] = shape[i];
    a->memory = (int)which;
    a->at = BAND + (how.unit == 1 && one_in(r, 2) ? dtype_size(dtype) : 0);
    const int64_t elements = draw_strides(r, &a->tensor, how);
    make_memory(&c->memories[which], (size_t)elements * dtype_size(dtype) + 16);
}

/* state and conv_state page after page in one buffer: a slot of one, then a slot of the other. */
static void place_pages(rng *r, layer_call *c, flash_kda_dtype state_dtype, const int64_t *state_shape,
                        const int64_t *conv_shape)
{
    layer_argument *state = &c->arguments[LAYER_STATE], *conv = &c->arguments[LAYER_CONV_STATE];
    const int64_t state_bytes =
                      state_shape[1] * state_shape[2] * state_shape[3] * (int64_t)dtype_size(state_dtype),
                  conv_bytes = (conv_shape[1] * conv_shape[2] * 2 + 15) / 16 * 16,
                  page = state_bytes + conv_bytes;
    const bool channels_last = one_in(r, 2);
    state->present = conv->present = true;
    state->memory = conv->memory = LAYER_STATE;
    state->tensor = (flash_kda_tensor){.dtype = state_dtype, .ndim = 4};
    conv->tensor = (flash_kda_tensor){.dtype = FLASH_KDA_BF16, .ndim = 3};
    for (int i = 0; i < 4; i++) state->tensor.shape[i] = state_shape[i];
    for (int i = 0; i < 3; i++) conv->tensor.shape[i] = conv_shape[i];
    const int64_t of_state[] = {page / (int64_t)dtype_size(state_dtype), DIM * DIM, DIM, 1},
                  of_conv[] = {page / 2, channels_last ? 1 : conv_shape[2],
                               channels_last ? conv_shape[1] : 1};
    memcpy(state->tensor.stride, of_state, sizeof of_state);
    memcpy(conv->tensor.stride, of_conv, sizeof of_conv);
    conv->at = BAND;
    state->at = BAND + (size_t)conv_bytes;
    make_memory(&c->memories[LAYER_STATE], (size_t)(page * state_shape[0]));
}

/* ---- Contents ---- */

typedef struct numbers {
    rng *r;
    double mean, deviation;
} numbers;

static void put(layer_call *c, layer_tensor which, const int64_t *index, double value)
{
    const layer_argument *a = &c->arguments[which];
    unsigned char *to = at_element(c, which, c->memories[a->memory].before, index);
    const uint16_t half = bf16_from_float((float)value);
    const float single = (float)value;
    const int32_t small = (int32_t)value;
    const int64_t large = (int64_t)value;
    switch (a->tensor.dtype) {
    case FLASH_KDA_BF16: memcpy(to, &half, sizeof half); break;
    case FLASH_KDA_F32: memcpy(to, &single, sizeof single); break;
    case FLASH_KDA_I32: memcpy(to, &small, sizeof small); break;
    default: memcpy(to, &large, sizeof large);
    }
}

static void put_normal(layer_call *c, layer_tensor which, const int64_t *index, void *context)
{
    const numbers *x = context;
    put(c, which, index, x->mean + x->deviation * rng_normal(x->r));
}

static void fill(rng *r, layer_call *c, layer_tensor which, double mean, double deviation)
{
    numbers x = {r, mean, deviation};
    for_each(c, which, put_normal, &x);
}

/* ---- Drawing ---- */

static flash_kda_dtype either(rng *r)
{
    return one_in(r, 2) ? FLASH_KDA_F32 : FLASH_KDA_BF16;
}

static flash_kda_dtype draw_index_type(rng *r)
{
    return one_in(r, 2) ? FLASH_KDA_I32 : FLASH_KDA_I64;
}

static void draw_lengths(rng *r, layer_call *c)
{
    const layer_sizes *s = &c->sizes;
    c->total = s->packed ? 0 : s->tokens;
    for (int64_t n = 0; n < s->sequences; n++) {
        c->length[n] = s->packed ? below(r, s->tokens + 1) : s->tokens;
        c->begin[n] = s->packed ? c->total : 0;
        if (s->packed) c->total += c->length[n];
    }
    if (!s->packed) return;
    const int64_t shape = s->sequences + 1;
    place(r, c, LAYER_SEQLENS, draw_index_type(r), 1, &shape, (lie){1, 1});
    for (int64_t n = 0; n < shape; n++)
        put(c, LAYER_SEQLENS, &n, (double)(n < s->sequences ? c->begin[n] : c->total));
}

/* Whether state_indices has a slot for each token. */
static bool has_slots_of_tokens(const layer_call *c)
{
    return c->sizes.write == FLASH_KDA_WRITE_EACH && !c->sizes.apart;
}

/* Slots, and which of them sequences start from and end in. Every slot has at most one sequence. */
static void draw_slots(rng *r, layer_call *c)
{
    const layer_sizes *s = &c->sizes;
    const bool each = has_slots_of_tokens(c), indexed = each || one_in(r, 2);
    int64_t longest = 1;
    for (int64_t n = 0; n < s->sequences; n++)
        if (c->length[n] > longest) longest = c->length[n];
    c->slot_columns = each ? longest + below(r, 2) : 1;
    const int64_t wanted = s->sequences * c->slot_columns;
    c->params.first_slot = indexed ? below(r, 3) : 0;
    c->slots = wanted + c->params.first_slot + below(r, 3);
    for (int64_t n = 0; n < s->sequences; n++) c->from[n] = n;
    if (!indexed) return;

    int64_t *order = allocate((size_t)c->slots, sizeof *order);
    const int64_t usable = c->slots - c->params.first_slot;
    for (int64_t i = 0; i < usable; i++) {
        const int64_t other = below(r, i + 1);
        order[i] = order[other];
        order[other] = c->params.first_slot + i;
    }
    const int64_t shape[] = {s->sequences, c->slot_columns};
    place(r, c, LAYER_STATE_INDICES, draw_index_type(r), each ? 2 : 1, shape, (lie){2, 1});
    const bool has_accepted = each && one_in(r, 2);
    if (has_accepted) place(r, c, LAYER_ACCEPTED, draw_index_type(r), 1, shape, (lie){1, 1});
    for (int64_t n = 0; n < s->sequences; n++) {
        const int64_t accepted = has_accepted ? 1 + below(r, c->slot_columns) : 1;
        if (has_accepted) put(c, LAYER_ACCEPTED, &n, (double)accepted);
        for (int64_t i = 0; i < c->slot_columns; i++) {
            const int64_t index[] = {n, i};
            int64_t slot = order[n * c->slot_columns + i];
            if (one_in(r, 8)) slot = c->params.first_slot - 1 - below(r, 3);
            if (test.device.type == FLASH_KDA_CUDA && one_in(r, 12)) slot = c->slots + below(r, 1000);
            put(c, LAYER_STATE_INDICES, index, (double)slot);
        }
    }
    free(order);
}

/* Element i of state_indices of sequence n, or -1: there is no slot. */
static int64_t slot_at(const layer_call *c, int64_t n, int64_t i)
{
    const layer_argument *a = &c->arguments[LAYER_STATE_INDICES];
    if (!a->present) return n;
    const int64_t index[] = {n, i};
    int64_t slot;
    const void *at = at_element(c, LAYER_STATE_INDICES, c->memories[a->memory].before, index);
    slot = a->tensor.dtype == FLASH_KDA_I32 ? *(const int32_t *)at : *(const int64_t *)at;
    return slot < c->params.first_slot || slot >= c->slots ? -1 : slot;
}

static int64_t accepted_at(const layer_call *c, int64_t n)
{
    const layer_argument *a = &c->arguments[LAYER_ACCEPTED];
    if (!a->present) return 1;
    const void *at = at_element(c, LAYER_ACCEPTED, c->memories[a->memory].before, &n);
    return a->tensor.dtype == FLASH_KDA_I32 ? *(const int32_t *)at : *(const int64_t *)at;
}

static bool keeps_drafts(const layer_call *c)
{
    return has_slots_of_tokens(c) && c->window_columns > WINDOW;
}

/* A second pool, and which of its slots states are written to. Each state has a slot of its own, or none. */
static void draw_written(rng *r, layer_call *c)
{
    const layer_sizes *s = &c->sizes;
    const bool each = s->write == FLASH_KDA_WRITE_EACH;
    const flash_kda_dtype dtype = (flash_kda_dtype)c->arguments[LAYER_STATE].tensor.dtype;
    int64_t longest = 1;
    if (!s->apart) return;
    for (int64_t n = 0; n < s->sequences; n++)
        if (c->length[n] > longest) longest = c->length[n];
    c->written_columns = each ? longest + below(r, 2) : 1;
    const int64_t wanted = s->sequences * c->written_columns;
    c->written_slots = wanted + below(r, 3);
    const int64_t shape[] = {c->written_slots, s->heads, DIM, DIM},
                  indices[] = {s->sequences, c->written_columns};
    place(r, c, LAYER_WRITTEN, dtype, 4, shape, (lie){3, dtype == FLASH_KDA_F32 ? 4 : 8});
    if (one_in(r, 2)) return;
    place(r, c, LAYER_WRITTEN_INDICES, draw_index_type(r), each ? 2 : 1, indices, (lie){2, 1});
    for (int64_t i = 0; i < wanted; i++) {
        const int64_t index[] = {i / c->written_columns, i % c->written_columns};
        int64_t slot = c->written_slots - 1 - i;
        if (one_in(r, 8)) slot = -1 - below(r, 3);
        if (test.device.type == FLASH_KDA_CUDA && one_in(r, 12)) slot = c->written_slots + below(r, 1000);
        put(c, LAYER_WRITTEN_INDICES, index, (double)slot);
    }
}

/* The slot of written_states for the state after token t of sequence n, or -1. */
static int64_t written_slot_at(const layer_call *c, int64_t n, int64_t t)
{
    const layer_argument *a = &c->arguments[LAYER_WRITTEN_INDICES];
    const bool each = c->sizes.write == FLASH_KDA_WRITE_EACH;
    if (!a->present) return !each ? n : c->sizes.packed ? c->begin[n] + t : n * c->total + t;
    const int64_t index[] = {n, each ? t : 0};
    const void *at = at_element(c, LAYER_WRITTEN_INDICES, c->memories[a->memory].before, index);
    const int64_t slot = a->tensor.dtype == FLASH_KDA_I32 ? *(const int32_t *)at : *(const int64_t *)at;
    return slot < 0 || slot >= c->written_slots ? -1 : slot;
}

static void draw_pools(rng *r, layer_call *c)
{
    const int64_t H = c->sizes.heads, C = PARTS * H * DIM;
    const bool each = has_slots_of_tokens(c);
    c->window_columns = one_in(r, 2) ? WINDOW
                        : each       ? c->slot_columns + 2 + below(r, 2)
                                     : WINDOW + below(r, 4);
    const int64_t state_shape[] = {c->slots, H, DIM, DIM}, conv_shape[] = {c->slots, C, c->window_columns};
    const flash_kda_dtype dtype = either(r);
    if (one_in(r, 2)) {
        place_pages(r, c, dtype, state_shape, conv_shape);
    } else {
        place(r, c, LAYER_STATE, dtype, 4, state_shape, (lie){3, dtype == FLASH_KDA_F32 ? 4 : 8});
        place(r, c, LAYER_CONV_STATE, FLASH_KDA_BF16, 3, conv_shape, (lie){0, 1});
    }
    fill(r, c, LAYER_STATE, 0.0, 0.5);
    fill(r, c, LAYER_CONV_STATE, 0.0, 1.0);
    for (int64_t n = 0; n < c->sizes.sequences; n++) {
        c->from[n] = slot_at(c, n, accepted_at(c, n) - 1);
        if (keeps_drafts(c) && slot_at(c, n, 0) < 0) c->from[n] = -1;
    }
    if (dtype == FLASH_KDA_BF16 && one_in(r, 2)) {
        const int64_t two = 2, first = 0, second = 1;
        place(r, c, LAYER_ROUNDING, FLASH_KDA_I64, 1, &two, (lie){1, 1});
        put(c, LAYER_ROUNDING, &first, 1e15 + (double)below(r, 1000000));
        put(c, LAYER_ROUNDING, &second, (double)below(r, 1000000));
    }
}

static void draw_weights(rng *r, layer_call *c)
{
    const int64_t H = c->sizes.heads, C = PARTS * H * DIM, by_part[] = {PARTS, TAPS, H * DIM},
                  by_channel[] = {C, TAPS}, dim = DIM;
    if (one_in(r, 2))
        place(r, c, LAYER_WEIGHT, either(r), 3, by_part, (lie){0, 1});
    else
        place(r, c, LAYER_WEIGHT, either(r), 2, by_channel, (lie){0, 1});
    /* Keys that are not normalised must be short, or states grow from token to token. */
    const double size = c->params.qk_is_normalised ? 0.05 : 0.5;
    fill(r, c, LAYER_WEIGHT, 0.0, size);
    if (one_in(r, 2)) {
        place(r, c, LAYER_BIAS, either(r), 1, &C, (lie){1, 1});
        fill(r, c, LAYER_BIAS, 0.0, size);
    }
    if (one_in(r, 3)) return;
    place(r, c, LAYER_NORM_WEIGHT, either(r), 1, &dim, (lie){1, 1});
    fill(r, c, LAYER_NORM_WEIGHT, 1.0, 0.3);
}

static void draw_gates(rng *r, layer_call *c, const int64_t *shape)
{
    flash_kda_decode_layer_params *p = &c->params;
    const int64_t H = c->sizes.heads, of_heads = H * DIM;
    p->gate = (int32_t)below(r, 3);
    p->beta_kind = (int32_t)below(r, 3);
    p->lower_bound = -5.0f * (float)rng_uniform(r, 0.1, 1.0);
    place(r, c, LAYER_G, either(r), 4, shape, (lie){1, 1});
    place(r, c, LAYER_BETA, either(r), 3, shape, (lie){0, 1});
    if (p->gate != FLASH_KDA_GATE_ACTIVATED) {
        if (p->gate == FLASH_KDA_GATE_SOFTPLUS || one_in(r, 2)) {
            place(r, c, LAYER_A_LOG, FLASH_KDA_F32, 1, &H, (lie){1, 1});
            fill(r, c, LAYER_A_LOG, 0.0, 0.5);
        }
        if (one_in(r, 2)) {
            place(r, c, LAYER_DT_BIAS, FLASH_KDA_F32, 1, &of_heads, (lie){1, 1});
            fill(r, c, LAYER_DT_BIAS, -1.0, 1.0);
        }
        fill(r, c, LAYER_G, one_in(r, 3) ? -6.0 : 0.0, 1.0);
    } else {
        fill(r, c, LAYER_G, -8.0, 1.0);
    }
    fill(r, c, LAYER_BETA, p->beta_kind == FLASH_KDA_BETA_ACTIVATED ? 0.5 : 0.0,
         p->beta_kind == FLASH_KDA_BETA_ACTIVATED ? 0.1 : 1.0);
}

static void describe(layer_call *c)
{
    static const char *const writes[] = {"last", "none", "each"};
    const flash_kda_decode_layer_params *p = &c->params;
    snprintf(c->text, sizeof c->text,
             "N %lld, H %lld, T %lld%s, %s%s, S %lld, L %lld, %s state%s%s%s, gate %d, beta %d%s%s%s%s%s",
             (long long)c->sizes.sequences, (long long)c->sizes.heads, (long long)c->total,
             c->sizes.packed ? " packed" : "", writes[c->sizes.write],
             !c->sizes.apart                               ? ""
             : c->arguments[LAYER_WRITTEN_INDICES].present ? " into written_states by indices"
                                                           : " into written_states",
             (long long)c->slot_columns, (long long)c->window_columns,
             c->arguments[LAYER_STATE].tensor.dtype == FLASH_KDA_F32 ? "f32" : "bf16",
             p->state_k_first ? " K first" : "",
             c->arguments[LAYER_STATE].memory == c->arguments[LAYER_CONV_STATE].memory ? " in pages" : "",
             c->arguments[LAYER_ROUNDING].present ? " rounded at random" : "", p->gate, p->beta_kind,
             c->arguments[LAYER_NORM_WEIGHT].present ? ", norm" : "",
             c->arguments[LAYER_OUTPUT_GATE].present ? ", output gate" : "",
             c->arguments[LAYER_RECORDS].present ? ", records" : "",
             c->arguments[LAYER_WINDOWS].present ? ", windows" : "",
             p->qk_is_normalised ? ", q and k as they are" : "");
}

layer_call *layer_draw(rng *r, layer_sizes sizes)
{
    layer_call *c = allocate(1, sizeof *c);
    flash_kda_decode_layer_params *p = &c->params;
    const int64_t N = sizes.sequences, H = sizes.heads;
    c->sizes = sizes;
    p->struct_size = sizeof *p;
    p->device = test.device;
    p->kernel = test.kernel;
    p->scale = 0.08838834764f * (float)rng_uniform(r, 0.5, 2.0);
    p->norm_eps = one_in(r, 2) ? 1e-5f : 1e-6f;
    p->write_states = sizes.write;
    p->state_k_first = one_in(r, 4);
    p->qk_is_normalised = one_in(r, 8);
    draw_lengths(r, c);
    draw_slots(r, c);
    draw_pools(r, c);
    draw_written(r, c);
    draw_weights(r, c);
    const int64_t rows = sizes.packed ? 1 : N, shape[] = {rows, c->total, H, DIM},
                  x_shape[] = {rows, c->total, PARTS * H * DIM};
    int64_t columns = below(r, 2);
    for (int64_t n = 0; n < N; n++)
        if (columns < c->length[n]) columns = c->length[n] + below(r, 2);
    draw_gates(r, c, shape);
    place(r, c, LAYER_X, FLASH_KDA_BF16, 3, x_shape, (lie){1, 1});
    fill(r, c, LAYER_X, 0.0, 1.0);
    place(r, c, LAYER_OUT, FLASH_KDA_BF16, 4, shape, (lie){1, 1});
    if (!one_in(r, 3)) {
        place(r, c, LAYER_OUTPUT_GATE, either(r), 4, shape, (lie){1, 1});
        fill(r, c, LAYER_OUTPUT_GATE, 0.0, 2.0);
    }
    if (one_in(r, 3)) {
        const int64_t records[] = {N, columns, H, RECORD};
        place(r, c, LAYER_RECORDS, FLASH_KDA_F32, 4, records, (lie){4, 1});
    }
    if (one_in(r, 3)) {
        const int64_t windows[] = {N, columns, PARTS * H * DIM, WINDOW};
        place(r, c, LAYER_WINDOWS, FLASH_KDA_BF16, 4, windows, (lie){0, 1});
    }
    c->dropped_tokens = (int)below(r, 512);
    describe(c);
    return c;
}

void layer_free(layer_call *c)
{
    for (int i = 0; i < LAYER_TENSORS; i++) {
        free(c->memories[i].before);
        free(c->memories[i].after);
        free(c->memories[i].may_change);
        if (c->memories[i].bytes) must(flash_kda_free(test.device, c->memories[i].device));
    }
    free(c);
}

/* ---- Running ---- */

flash_kda_decode_layer_params layer_params(const layer_call *c, bool on_host)
{
    flash_kda_decode_layer_params p = c->params;
    if (on_host) p.device = (flash_kda_device){FLASH_KDA_CPU, 0};
    if (on_host) p.kernel = NULL;
    for (int i = 0; i < LAYER_TENSORS; i++) {
        const layer_argument *a = &c->arguments[i];
        const layer_memory *m = &c->memories[a->memory];
        flash_kda_tensor t = a->tensor;
        if (!a->present) continue;
        t.data = (on_host ? m->before : (unsigned char *)m->device) + a->at;
        memcpy((char *)&p + names[i].offset, &t, sizeof t);
    }
    return p;
}

/* Takes the dimension of size 1 out of a tensor [N, 1, ..] or [1, total, ..]. */
static void drop_tokens(flash_kda_tensor *t, bool packed)
{
    if (!t->data) return;
    for (int i = packed ? 0 : 1; i + 1 < t->ndim; i++) {
        t->shape[i] = t->shape[i + 1];
        t->stride[i] = t->stride[i + 1];
    }
    t->ndim--;
}

/* [1, N, ..] of [N, 1, ..]. */
static void put_row_first(flash_kda_tensor *t)
{
    if (!t->data) return;
    t->shape[1] = t->shape[0];
    t->stride[1] = t->stride[0];
    t->shape[0] = 1;
}

/* The same call, with tensors that have no dimension of tokens, as far as the bits of `how` say. */
static void drop_some_tokens(const layer_call *c, flash_kda_decode_layer_params *p, int how)
{
    flash_kda_tensor *const others[] = {&p->g, &p->beta, &p->out, &p->output_gate};
    if (!(how & 1) || (!c->sizes.packed && c->total != 1)) return;
    drop_tokens(&p->x, c->sizes.packed);
    for (int i = 0; i < 4; i++) {
        if (how >> (i + 1) & 1)
            drop_tokens(others[i], c->sizes.packed);
        else if (!c->sizes.packed && how >> (i + 5) & 1)
            put_row_first(others[i]);
    }
}

static void copy_all(layer_call *c, bool to_device)
{
    const flash_kda_device host = {FLASH_KDA_CPU, 0};
    for (int i = 0; i < LAYER_TENSORS; i++) {
        layer_memory *m = &c->memories[i];
        if (!m->bytes) continue;
        if (to_device)
            must(flash_kda_copy(test.device, m->device, host, m->before, m->bytes));
        else
            must(flash_kda_copy(host, m->after, test.device, m->device, m->bytes));
    }
}

static bool run(layer_call *c)
{
    flash_kda_decode_layer_params p = layer_params(c, false);
    drop_some_tokens(c, &p, c->dropped_tokens);
    CHECK(flash_kda_check_decode_layer(&p) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    copy_all(c, true);
    const flash_kda_status status = flash_kda_decode_layer(&p);
    if (!CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) return false;
    must(flash_kda_synchronize(test.device, NULL));
    copy_all(c, false);
    return true;
}

/* ---- Checking ---- */

static double get(const layer_call *c, layer_tensor which, const int64_t *index)
{
    const layer_argument *a = &c->arguments[which];
    const void *at = at_element(c, which, c->memories[a->memory].after, index);
    float single;
    uint16_t half;
    if (a->tensor.dtype == FLASH_KDA_F32) {
        memcpy(&single, at, sizeof single);
        return single;
    }
    memcpy(&half, at, sizeof half);
    return float_from_bf16(half);
}

static void allow(layer_call *c, layer_tensor which, const int64_t *index)
{
    const layer_argument *a = &c->arguments[which];
    layer_memory *m = &c->memories[a->memory];
    unsigned char *at = at_element(c, which, m->before, index);
    for (size_t i = 0; i < dtype_size(a->tensor.dtype); i++)
        m->may_change[at - m->before + (ptrdiff_t)i] = true;
}

/* Sums of squares of what was got, against the truth. */
typedef struct errors {
    double error, truth;
    double rounding; /* of the truth to bf16 */
    int64_t count;
} errors;

static void compare(errors *e, double got, double truth)
{
    const double difference = got - truth;
    e->error += isfinite(got) ? difference * difference : INFINITY;
    e->truth += truth * truth;
    const double rounding = (double)float_from_bf16(bf16_from_float((float)truth)) - truth;
    e->rounding += rounding * rounding;
    e->count++;
}

static void check_errors(const char *what, const errors *e, bool is_bf16, bool at_random)
{
    const double bar = at_random ? AT_RANDOM_BAR : is_bf16 ? sqrt(e->rounding / e->truth) + BAR : BAR;
    if (!e->count) return;
    check_error(what, e->error == 0.0 ? 0.0 : sqrt(e->error / e->truth), bar);
}

/* The number of a token among the rows of the answers. */
static int64_t answer_row(const layer_call *c, int64_t n, int64_t t, int64_t h)
{
    return ((c->sizes.packed ? c->begin[n] : n * c->total) + t) * c->sizes.heads + h;
}

static void check_out(layer_call *c, const double *out)
{
    errors e = {0};
    for (int64_t n = 0; n < c->sizes.sequences; n++)
        for (int64_t t = 0; t < c->length[n]; t++)
            for (int64_t h = 0; h < c->sizes.heads; h++)
                for (int64_t v = 0; v < DIM; v++) {
                    const int64_t index[] = {c->sizes.packed ? 0 : n, c->begin[n] + t, h, v};
                    const double truth = out[answer_row(c, n, t, h) * DIM + v],
                                 got = get(c, LAYER_OUT, index);
                    allow(c, LAYER_OUT, index);
                    if (c->from[n] < 0)
                        CHECK(got == 0.0 && !signbit(got), "out of a sequence without a state is %g", got);
                    else
                        compare(&e, got, truth);
                }
    check_errors("out", &e, true, false);
}

static void check_state_of(layer_call *c, layer_tensor pool, int64_t slot, int64_t row, const double *states,
                           errors *e)
{
    for (int64_t h = 0; h < c->sizes.heads; h++)
        for (int64_t v = 0; v < DIM; v++)
            for (int64_t k = 0; k < DIM; k++) {
                const int64_t index[] = {slot, h, c->params.state_k_first ? k : v,
                                         c->params.state_k_first ? v : k};
                allow(c, pool, index);
                compare(e, get(c, pool, index), states[((row + h) * DIM + v) * DIM + k]);
            }
}

/* Input t of a channel of sequence n, from -3 on, as bits. */
static uint16_t input_at(const layer_call *c, int64_t n, int64_t channel, int64_t t)
{
    uint16_t bits;
    if (c->from[n] < 0) return 0;
    if (t < 0) {
        const int64_t column = keeps_drafts(c) ? accepted_at(c, n) - 1 : 0,
                      index[] = {keeps_drafts(c) ? slot_at(c, n, 0) : c->from[n], channel,
                                 column + t + WINDOW};
        memcpy(
            &bits,
            at_element(c, LAYER_CONV_STATE, c->memories[c->arguments[LAYER_CONV_STATE].memory].before, index),
            sizeof bits);
        return bits;
    }
    const int64_t index[] = {c->sizes.packed ? 0 : n, c->begin[n] + t, channel};
    memcpy(&bits, at_element(c, LAYER_X, c->memories[LAYER_X].before, index), sizeof bits);
    return bits;
}

/* Columns 0 to count - 1 of a slot or token are the inputs from `first` on. */
static void check_columns(layer_call *c, layer_tensor which, const int64_t *place_of, int dimensions,
                          int64_t n, int64_t first, int64_t count)
{
    for (int64_t channel = 0; channel < PARTS * DIM * c->sizes.heads; channel++)
        for (int64_t j = 0; j < count; j++) {
            int64_t index[4] = {0};
            uint16_t got;
            for (int i = 0; i < dimensions; i++) index[i] = place_of[i];
            index[dimensions] = channel;
            index[dimensions + 1] = j;
            allow(c, which, index);
            memcpy(&got, at_element(c, which, c->memories[c->arguments[which].memory].after, index),
                   sizeof got);
            const uint16_t want = input_at(c, n, channel, first + j);
            if (got == want) continue;
            CHECK(false, "%s of sequence %lld, channel %lld, column %lld is %04x; it must be %04x",
                  names[which].name, (long long)n, (long long)channel, (long long)j, got, want);
            return;
        }
    CHECK(true, "%s", names[which].name);
}

static void check_states(layer_call *c, const double *states)
{
    const int32_t write = c->sizes.write;
    const bool is_bf16 = c->arguments[LAYER_STATE].tensor.dtype == FLASH_KDA_BF16;
    errors e = {0};
    for (int64_t n = 0; n < c->sizes.sequences; n++) {
        const int64_t length = c->length[n];
        if (c->from[n] < 0 || !length) continue;
        if (c->sizes.apart) {
            for (int64_t t = write == FLASH_KDA_WRITE_EACH ? 0 : length - 1; t < length; t++)
                if (written_slot_at(c, n, t) >= 0)
                    check_state_of(c, LAYER_WRITTEN, written_slot_at(c, n, t), answer_row(c, n, t, 0), states,
                                   &e);
            continue;
        }
        if (write == FLASH_KDA_WRITE_LAST) {
            check_state_of(c, LAYER_STATE, c->from[n], answer_row(c, n, length - 1, 0), states, &e);
            check_columns(c, LAYER_CONV_STATE, &c->from[n], 1, n, length - WINDOW, WINDOW);
        }
        for (int64_t t = 0; write == FLASH_KDA_WRITE_EACH && t < length; t++) {
            const int64_t slot = slot_at(c, n, t);
            if (slot < 0) continue;
            check_state_of(c, LAYER_STATE, slot, answer_row(c, n, t, 0), states, &e);
            if (!keeps_drafts(c)) check_columns(c, LAYER_CONV_STATE, &slot, 1, n, t + 1 - WINDOW, WINDOW);
        }
        const int64_t slot = slot_at(c, n, 0);
        if (keeps_drafts(c)) check_columns(c, LAYER_CONV_STATE, &slot, 1, n, 1 - WINDOW, length + 2);
    }
    check_errors(is_bf16 ? "bf16 state" : "state", &e, is_bf16, c->arguments[LAYER_ROUNDING].present);
}

static void check_windows(layer_call *c)
{
    for (int64_t n = 0; c->arguments[LAYER_WINDOWS].present && n < c->sizes.sequences; n++)
        for (int64_t t = 0; t < c->length[n]; t++) {
            const int64_t place_of[] = {n, t};
            check_columns(c, LAYER_WINDOWS, place_of, 2, n, t + 1 - WINDOW, WINDOW);
        }
}

/* The records of a sequence bring its state from the start to the state after each token: S = decay S + k u^T
 * in fp64. */
static void check_records(layer_call *c, const double *states)
{
    errors e = {0};
    double *S = allocate(DIM * DIM, sizeof *S);
    for (int64_t n = 0; c->arguments[LAYER_RECORDS].present && n < c->sizes.sequences; n++)
        for (int64_t h = 0; h < c->sizes.heads; h++) {
            for (int64_t i = 0; c->from[n] >= 0 && i < DIM * DIM; i++) {
                const int64_t v = i / DIM, k = i % DIM,
                              index[] = {c->from[n], h, c->params.state_k_first ? k : v,
                                         c->params.state_k_first ? v : k};
                const layer_argument *a = &c->arguments[LAYER_STATE];
                const void *at = at_element(c, LAYER_STATE, c->memories[a->memory].before, index);
                S[i] = a->tensor.dtype == FLASH_KDA_F32 ? (double)*(const float *)at
                                                        : (double)float_from_bf16(*(const uint16_t *)at);
            }
            for (int64_t t = 0; t < c->length[n]; t++) {
                double record[RECORD];
                for (int64_t i = 0; i < RECORD; i++) {
                    const int64_t index[] = {n, t, h, i};
                    allow(c, LAYER_RECORDS, index);
                    record[i] = get(c, LAYER_RECORDS, index);
                    if (c->from[n] < 0) CHECK(record[i] == 0.0, "a record without a state is not zeros");
                }
                for (int64_t i = 0; c->from[n] >= 0 && i < DIM * DIM; i++) {
                    const int64_t v = i / DIM, k = i % DIM;
                    S[i] = S[i] * record[k] + record[DIM + k] * record[2 * DIM + v];
                    compare(&e, S[i], states[answer_row(c, n, t, h) * DIM * DIM + i]);
                }
            }
        }
    free(S);
    check_errors("state", &e, false, false);
}

static void check_damage(const layer_call *c)
{
    for (int i = 0; i < LAYER_TENSORS; i++) {
        const layer_memory *m = &c->memories[i];
        size_t at = 0;
        while (at < m->bytes && (m->may_change[at] || m->before[at] == m->after[at])) at++;
        if (m->bytes)
            CHECK(at == m->bytes, "byte %zu of the %zu around %s was written", at, m->bytes, names[i].name);
    }
}

/* The definition, which refuses indices beyond the pool: it gets -1 for them, which means the same. It writes
 * to no pool, so it does without written_states. */
static flash_kda_status solve(layer_call *c, double *out, double *states)
{
    const layer_argument *a = &c->arguments[LAYER_STATE_INDICES];
    layer_memory *m = &c->memories[LAYER_STATE_INDICES];
    flash_kda_decode_layer_params p = layer_params(c, true);
    if (c->sizes.apart) {
        p.written_states.data = p.written_indices.data = NULL;
        p.write_states = FLASH_KDA_WRITE_NONE;
    }
    unsigned char *kept = allocate(m->bytes + 1, 1);
    if (a->present) memcpy(kept, m->before, m->bytes);
    for (int64_t n = 0; a->present && n < c->sizes.sequences; n++)
        for (int64_t i = 0; i < c->slot_columns; i++) {
            const int64_t index[] = {n, i};
            if (slot_at(c, n, i) < 0) put(c, LAYER_STATE_INDICES, index, -1.0);
        }
    const flash_kda_status status = flash_kda_decode_layer_reference(&p, out, states);
    if (a->present) memcpy(m->before, kept, m->bytes);
    free(kept);
    return status;
}

void layer_run_and_check(layer_call *c)
{
    const int64_t rows = (c->sizes.packed ? c->total : c->total * c->sizes.sequences) * c->sizes.heads;
    double *out = allocate((size_t)rows * DIM + 1, sizeof *out),
           *states = allocate((size_t)rows * DIM * DIM + 1, sizeof *states);
    const bool solved = solve(c, out, states) == FLASH_KDA_OK;
    if (CHECK(solved, "%s", flash_kda_last_error()) && run(c)) {
        check_out(c, out);
        check_states(c, states);
        check_windows(c);
        check_records(c, states);
        check_damage(c);
    }
    free(out);
    free(states);
}

/* Whether what a call has left in the memory of a tensor has the bits of `other`. */
static void check_equal(const layer_call *c, layer_tensor which, const unsigned char *other, const char *how)
{
    const layer_memory *m = &c->memories[which];
    if (m->bytes)
        CHECK(memcmp(m->after, other, m->bytes) == 0, "%s has other bits %s", names[which].name, how);
}

/* Narrows a tensor to token t. */
static void narrow(flash_kda_tensor *tensor, int64_t t)
{
    if (!tensor->data) return;
    tensor->data = (char *)tensor->data + t * tensor->stride[1] * (int64_t)dtype_size(tensor->dtype);
    tensor->shape[1] = 1;
}

void layer_check_one_by_one(layer_call *c)
{
    static const layer_tensor written[] = {LAYER_OUT, LAYER_STATE, LAYER_CONV_STATE};
    unsigned char *kept[3];
    if (c->arguments[LAYER_STATE].tensor.dtype == FLASH_KDA_BF16)
        return; /* It is rounded between the calls. */
    if (!run(c)) return;
    for (int i = 0; i < 3; i++) {
        const layer_memory *m = &c->memories[written[i]];
        kept[i] = allocate(m->bytes + 1, 1);
        if (m->bytes) memcpy(kept[i], m->after, m->bytes);
    }
    copy_all(c, true);
    for (int64_t t = 0; t < c->total; t++) {
        flash_kda_decode_layer_params p = layer_params(c, false);
        narrow(&p.x, t);
        narrow(&p.g, t);
        narrow(&p.beta, t);
        narrow(&p.out, t);
        narrow(&p.output_gate, t);
        p.records.data = p.conv_windows.data = NULL;
        const flash_kda_status status = flash_kda_decode_layer(&p);
        CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error());
    }
    must(flash_kda_synchronize(test.device, NULL));
    copy_all(c, false);
    for (int i = 0; i < 3; i++) {
        check_equal(c, written[i], kept[i], "when its tokens are computed in calls of their own");
        free(kept[i]);
    }
}

void layer_check_threads(layer_call *c, int count)
{
    unsigned char *kept[LAYER_TENSORS] = {NULL};
    c->params.cpu_threads = 1;
    if (!run(c)) return;
    for (int i = 0; i < LAYER_TENSORS; i++) {
        const layer_memory *m = &c->memories[i];
        kept[i] = allocate(m->bytes + 1, 1);
        if (m->bytes) memcpy(kept[i], m->after, m->bytes);
    }
    c->params.cpu_threads = count;
    if (run(c))
        for (int i = 0; i < LAYER_TENSORS; i++) check_equal(c, (layer_tensor)i, kept[i], "with more threads");
    for (int i = 0; i < LAYER_TENSORS; i++) free(kept[i]);
}

static void allow_element(layer_call *c, layer_tensor which, const int64_t *index, void *context)
{
    (void)context;
    allow(c, which, index);
}

static void put_wild(layer_call *c, layer_tensor which, const int64_t *index, void *context)
{
    static const double wild[] = {-1.0, 0.0,    1.0,     2.0,          5.0,
                                  17.0, 1000.0, -1000.0, 2147483647.0, -2147483648.0};
    put(c, which, index, wild[below(context, sizeof wild / sizeof *wild)]);
}

void layer_check_wild(rng *r, layer_call *c)
{
    static const layer_tensor indices[] = {LAYER_STATE_INDICES, LAYER_ACCEPTED, LAYER_SEQLENS,
                                           LAYER_WRITTEN_INDICES},
                              pools[] = {LAYER_STATE, LAYER_CONV_STATE},
                              written[] = {LAYER_OUT, LAYER_RECORDS, LAYER_WINDOWS, LAYER_WRITTEN};
    for (int i = 0; i < 4; i++) for_each(c, indices[i], put_wild, r);
    for (int i = 0; i < 4; i++) for_each(c, written[i], allow_element, NULL);
    for (int i = 0; i < 2 && !c->sizes.apart; i++) for_each(c, pools[i], allow_element, NULL);
    if (run(c)) check_damage(c);
}
