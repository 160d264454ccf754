/* Checks every argument of decode_layer before anything is launched or written. A refusal is a sentence that
 * names the argument, what it was and what it must be. */
#include "check_decode_layer.h"

#include <math.h>
#include <string.h>

#include "check_decode.h"
#include "check_shared.h"
#include "kernel.h"

enum { BF16 = FLASH_KDA_BF16, F32 = FLASH_KDA_F32, I64 = FLASH_KDA_I64 };
enum {
    RECORD = FLASH_KDA_RECORD_ROWS * FKDA_DIM,
    PARTS = FKDA_CONV_PARTS,
    TAPS = FKDA_CONV_TAPS,
    WINDOW = FKDA_WINDOW,
};
static const int64_t MAX_TOKENS = INT32_MAX - 1024, MAX_HEADS = INT32_MAX / (PARTS * FKDA_DIM);

_Static_assert(offsetof(flash_kda_decode_layer_params, written_indices) + sizeof(flash_kda_tensor) ==
                   sizeof(flash_kda_decode_layer_params),
               "the struct must not end in padding: a later field there would read what an older caller left "
               "in it");

static bool has(const flash_kda_tensor *t)
{
    return t->data != NULL;
}

static flash_kda_status check_sizes(const flash_kda_decode_layer_params *p, fkda_decode_problem *out)
{
    const bool packed = has(&p->cu_seqlens);
    TRY(fkda_check_rank(&p->x, "x", packed ? "[1, total, 3 * H * D]" : "[N, T, 3 * H * D]", 3));
    TRY(fkda_check_rank(&p->g, "g", packed ? "[1, total, H, D]" : "[N, T, H, D]", 4));
    const int64_t rows = p->x.shape[0], T = p->x.shape[1], H = p->g.shape[2];
    int64_t tokens;
    if (p->g.shape[3] != FKDA_DIM)
        return INVALID("g has D = %lld; the head size D must be 128", (long long)p->g.shape[3]);
    if (H < 1 || H > MAX_HEADS)
        return INVALID("g has H = %lld; there must be at least 1 head and at most %lld", (long long)H,
                       (long long)MAX_HEADS);
    TRY(fkda_check_sequences(&p->x, "x", &p->cu_seqlens, &out->sequences));
    if (__builtin_mul_overflow(rows, T, &tokens) || tokens > MAX_TOKENS)
        return INVALID("x has %lld * %lld tokens; there must be at most %lld", (long long)rows, (long long)T,
                       (long long)MAX_TOKENS);
    TRY(fkda_check_states(out->sequences, H));
    out->tokens = T;
    out->heads = out->qk_heads = H;
    return FLASH_KDA_OK;
}

/* The arguments that decode has too. q, k, v and parents are absent. */
static flash_kda_decode_params decode_params_of(const flash_kda_decode_layer_params *p)
{
    return (flash_kda_decode_params){
        .device = p->device,
        .stream = p->stream,
        .g = p->g,
        .beta = p->beta,
        .out = p->out,
        .A_log = p->A_log,
        .dt_bias = p->dt_bias,
        .state = p->state,
        .state_indices = p->state_indices,
        .num_accepted_tokens = p->num_accepted_tokens,
        .cu_seqlens = p->cu_seqlens,
        .records = p->records,
        .rounding = p->rounding,
        .scale = p->scale,
        .lower_bound = p->lower_bound,
        .write_states = p->write_states,
        .gate = p->gate,
        .beta_kind = p->beta_kind,
        .qk_is_normalised = p->qk_is_normalised,
        .state_k_first = p->state_k_first,
        .cpu_threads = p->cpu_threads,
        .first_slot = p->first_slot,
        .interrupt = p->interrupt,
        .written_states = p->written_states,
        .written_indices = p->written_indices,
    };
}

static flash_kda_status check_options(const flash_kda_decode_layer_params *p)
{
    const flash_kda_decode_params decode = decode_params_of(p);
    TRY(fkda_check_decode_options(&decode));
    if (!isfinite(p->norm_eps) || p->norm_eps < 0.0f)
        return INVALID("norm_eps is not a finite number of at least 0; it must be one, usually 1e-5");
    if (p->reserved) return INVALID("reserved is %d; it must be 0", p->reserved);
    if (p->weight.ndim != 2 && p->weight.ndim != 3)
        return INVALID("weight has %d dimensions; it must have 2 or 3: [3 * H * D, 4] or [3, 4, H * D]",
                       p->weight.ndim);
    return FLASH_KDA_OK;
}

/* Whether the call writes to state and conv_state. */
static bool writes_pools(const flash_kda_decode_layer_params *p)
{
    return p->write_states != FLASH_KDA_WRITE_NONE && !has(&p->written_states);
}

/* Both pools, and their columns. */
static flash_kda_status check_pools(const flash_kda_decode_layer_params *p, const fkda_decode_problem *s)
{
    const int64_t slots = p->state.shape[0], columns = p->conv_state.shape[2];
    if (p->conv_state.shape[0] != slots)
        return INVALID("conv_state has %lld slots and state %lld; they must have as many",
                       (long long)p->conv_state.shape[0], (long long)slots);
    TRY(fkda_check_slots(&p->state, has(&p->state_indices), s->sequences));
    if (columns < WINDOW)
        return INVALID("conv_state has L = %lld; it must be at least %d", (long long)columns, WINDOW);
    if (p->write_states == FLASH_KDA_WRITE_EACH && !has(&p->written_states) && columns > WINDOW &&
        columns < p->state_indices.shape[1] + WINDOW - 1)
        return INVALID("conv_state has L = %lld and state_indices S = %lld; L must be 3 or at least S + 2",
                       (long long)columns, (long long)p->state_indices.shape[1]);
    return FLASH_KDA_OK;
}

static flash_kda_status check_tensors(const flash_kda_decode_layer_params *p, const fkda_decode_problem *s,
                                      bool for_reference, bool with_memory)
{
    const flash_kda_decode_params decode = decode_params_of(p);
    const bool packed = has(&p->cu_seqlens), each = p->write_states == FLASH_KDA_WRITE_EACH,
               has_columns = fkda_has_slots_of_tokens(&decode),
               writes_state = writes_pools(p) && !for_reference, on_gpu = p->device.type == FLASH_KDA_CUDA;
    const int64_t N = s->sequences, T = s->tokens, H = s->heads, D = FKDA_DIM, ANY = FKDA_ANY_SIZE,
                  rows = packed ? 1 : N;
    const char *const dims = packed ? "[1, total, H, D]" : "[N, T, H, D]",
                      *const x_dims = packed ? "[1, total, 3 * H * D]" : "[N, T, 3 * H * D]",
                      *const beta_dims = packed ? "[1, total, H]" : "[N, T, H]",
                      *const state_dims = p->state_k_first ? "[slots, H, K, V]" : "[slots, H, V, K]",
                      *const written_dims = p->state_k_first ? "[slots2, H, K, V]" : "[slots2, H, V, K]";
    const fkda_requirement by_part = {"weight", "[3, 4, H * D]", 3,    {PARTS, TAPS, H * D}, {F32, BF16},
                                      0,        FKDA_FREE,       false},
                           by_channel = {"weight", "[3 * H * D, 4]", 2,    {PARTS * H * D, TAPS}, {F32, BF16},
                                         0,        FKDA_FREE,        false};
    const struct {
        const flash_kda_tensor *tensor;
        bool optional;
        bool by_element; /* The kernels read and write it element by element. */
        fkda_requirement must;
    } tensors[] = {
        {&p->x, false, true, {"x", x_dims, 3, {rows, T, PARTS * H * D}, {BF16}, 0, FKDA_ROWS, false}},
        {&p->weight, false, true, p->weight.ndim == 3 ? by_part : by_channel},
        {&p->bias,
         true,
         true,
         {"bias", "3 * H * D", 0, {PARTS * H * D}, {F32, BF16}, 0, FKDA_CONTIGUOUS, false}},
        {&p->conv_state,
         false,
         true,
         {"conv_state",
          "[slots, 3 * H * D, L]",
          3,
          {ANY, PARTS * H * D, ANY},
          {BF16},
          0,
          FKDA_FREE,
          writes_state}},
        {&p->g, false, true, {"g", dims, 4, {rows, T, H, D}, {BF16, F32}, 0, FKDA_ROWS, false}},
        {&p->beta, false, true, {"beta", beta_dims, 3, {rows, T, H}, {BF16, F32}, 0, FKDA_FREE, false}},
        {&p->out, for_reference, true, {"out", dims, 4, {rows, T, H, D}, {BF16}, 0, FKDA_ROWS, true}},
        {&p->A_log, true, true, {"A_log", "H", 0, {H}, {F32}, 0, FKDA_CONTIGUOUS, false}},
        {&p->dt_bias, true, true, {"dt_bias", "H * D", 0, {H * D}, {F32}, 0, FKDA_CONTIGUOUS, false}},
        {&p->output_gate,
         true,
         true,
         {"output_gate", dims, 4, {rows, T, H, D}, {BF16, F32}, 0, FKDA_ROWS, false}},
        {&p->norm_weight, true, true, {"norm_weight", "D", 0, {D}, {F32, BF16}, 0, FKDA_CONTIGUOUS, false}},
        {&p->state,
         false,
         false,
         {"state", state_dims, 4, {ANY, H, D, D}, {F32, BF16}, 16, FKDA_SLOTS, writes_state}},
        {&p->state_indices, true, true,
         fkda_integers("state_indices", has_columns ? "[N, S]" : "[N]", has_columns ? 2 : 1, N, ANY)},
        {&p->num_accepted_tokens, true, true, fkda_integers("num_accepted_tokens", "[N]", 1, N, 0)},
        {&p->cu_seqlens, true, true, fkda_integers("cu_seqlens", "[N + 1]", 1, N + 1, 0)},
        {&p->records,
         true,
         true,
         {"records", "[N, R, H, 3 * K]", 4, {N, ANY, H, RECORD}, {F32}, 0, FKDA_CONTIGUOUS, !for_reference}},
        {&p->conv_windows,
         true,
         true,
         {"conv_windows",
          "[N, C, 3 * H * D, 3]",
          4,
          {N, ANY, PARTS * H * D, WINDOW},
          {BF16},
          0,
          FKDA_FREE,
          !for_reference}},
        {&p->rounding, true, true, {"rounding", "[2]", 1, {2}, {I64}, 0, FKDA_CONTIGUOUS, false}},
        {&p->written_states,
         true,
         false,
         {"written_states", written_dims, 4, {ANY, H, D, D}, {F32, BF16}, 16, FKDA_SLOTS, !for_reference}},
        {&p->written_indices, true, true,
         fkda_integers("written_indices", each ? "[N, W]" : "[N]", each ? 2 : 1, N, ANY)},
    };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        if (tensors[i].optional && !has(tensors[i].tensor)) continue;
        TRY(fkda_check_tensor(tensors[i].tensor, &tensors[i].must, packed ? N + 1 : 0, with_memory,
                              on_gpu && !tensors[i].by_element));
    }
    const int64_t columns = packed ? 0 : T; /* On the CPU the lengths in cu_seqlens are looked at later. */
    TRY(fkda_check_written(&decode, s));
    if (has_columns)
        TRY(fkda_check_columns(&p->state_indices, "state_indices", "S", columns > 0 ? columns : 1));
    if (has(&p->records)) TRY(fkda_check_columns(&p->records, "records", "R", columns));
    if (has(&p->conv_windows)) TRY(fkda_check_columns(&p->conv_windows, "conv_windows", "C", columns));
    return check_pools(p, s);
}

static flash_kda_status check_memory(const flash_kda_decode_layer_params *p)
{
    enum { STATE = 14, CONV_STATE, OUT, RECORDS, WINDOWS, WRITTEN, COUNT };
    const fkda_extent all[COUNT] = {
        fkda_extent_of("x", &p->x),
        fkda_extent_of("weight", &p->weight),
        fkda_extent_of("bias", &p->bias),
        fkda_extent_of("g", &p->g),
        fkda_extent_of("beta", &p->beta),
        fkda_extent_of("A_log", &p->A_log),
        fkda_extent_of("dt_bias", &p->dt_bias),
        fkda_extent_of("output_gate", &p->output_gate),
        fkda_extent_of("norm_weight", &p->norm_weight),
        fkda_extent_of("state_indices", &p->state_indices),
        fkda_extent_of("num_accepted_tokens", &p->num_accepted_tokens),
        fkda_extent_of("cu_seqlens", &p->cu_seqlens),
        fkda_extent_of("rounding", &p->rounding),
        fkda_extent_of("written_indices", &p->written_indices),
        [STATE] = fkda_extent_of("state", &p->state),
        [CONV_STATE] = fkda_extent_of("conv_state", &p->conv_state),
        [OUT] = fkda_extent_of("out", &p->out),
        [RECORDS] = fkda_extent_of("records", &p->records),
        [WINDOWS] = fkda_extent_of("conv_windows", &p->conv_windows),
        [WRITTEN] = fkda_extent_of("written_states", &p->written_states),
    };
    for (int w = writes_pools(p) ? STATE : OUT; w < COUNT; w++) TRY(fkda_check_own_memory(&all[w], all, w));
    return FLASH_KDA_OK;
}

/* ---- Calls with one token of each sequence, whose tensors have no dimension of tokens ---- */

/* Gives a tensor a dimension of size 1 at that place. */
static void insert_dimension(flash_kda_tensor *t, int place)
{
    for (int i = t->ndim++; i > place; i--) {
        t->shape[i] = t->shape[i - 1];
        t->stride[i] = t->stride[i - 1];
    }
    t->shape[place] = 1;
    t->stride[place] = 0;
}

/* Makes [N, 1, ..] of [N, ..] and of [1, N, ..], and with cu_seqlens [1, total, ..] of [total, ..]. `rest` is
 * how many dimensions follow. What is neither stays as it is, and is refused later. */
static void add_tokens(flash_kda_tensor *t, int rest, int64_t rows, bool packed)
{
    if (!has(t)) return;
    if (t->ndim == rest + 1) {
        insert_dimension(t, packed ? 0 : 1);
    } else if (!packed && t->ndim == rest + 2 && t->shape[0] == 1 && t->shape[1] == rows) {
        t->shape[0] = rows;
        t->stride[0] = t->stride[1];
        t->shape[1] = 1;
    }
}

/* x without a dimension of tokens says that the other tensors may lack it too. */
static const flash_kda_decode_layer_params *with_tokens(const flash_kda_decode_layer_params *p,
                                                        flash_kda_decode_layer_params *complete)
{
    if (p->x.ndim != 2) return p;
    if (p != complete) *complete = *p;
    const int64_t rows = p->x.shape[0];
    const bool packed = has(&p->cu_seqlens);
    insert_dimension(&complete->x, packed ? 0 : 1);
    add_tokens(&complete->g, 2, rows, packed);
    add_tokens(&complete->beta, 1, rows, packed);
    add_tokens(&complete->out, 2, rows, packed);
    add_tokens(&complete->output_gate, 2, rows, packed);
    return complete;
}

/* ---- Views ---- */

/* A tensor of which dimension `channels` has 3 H D elements, the parts q, k and v one after the other, and
 * dimension `columns`, if it has one, the columns. */
static fkda_channel_view channel_view(const flash_kda_tensor *t, int64_t heads, int channels, int columns)
{
    if (!has(t)) return (fkda_channel_view){0};
    const int64_t step = fkda_stride_of(t, channels);
    return (fkda_channel_view){.data = t->data,
                               .part_stride = heads * FKDA_DIM * step,
                               .channel_stride = step,
                               .column_stride = columns < 0 ? 0 : fkda_stride_of(t, columns),
                               .dtype = t->dtype};
}

static fkda_channel_view weight_view(const flash_kda_tensor *t, int64_t heads)
{
    if (t->ndim == 2) return channel_view(t, heads, 0, 1);
    return (fkda_channel_view){.data = t->data,
                               .part_stride = t->stride[0],
                               .channel_stride = t->stride[2],
                               .column_stride = t->stride[1],
                               .dtype = t->dtype};
}

/* x, in which a head of a part is what a head is in other tensors. */
static fkda_token_view x_view(const flash_kda_tensor *t)
{
    return (fkda_token_view){.data = t->data,
                             .batch_stride = fkda_stride_of(t, 0),
                             .token_stride = fkda_stride_of(t, 1),
                             .head_stride = FKDA_DIM,
                             .dtype = t->dtype};
}

static void fill_problem(const flash_kda_decode_layer_params *p, fkda_decode_layer_problem *out)
{
    const flash_kda_decode_params decode = decode_params_of(p);
    const int64_t H = out->decode.heads;
    fkda_fill_decode(&decode, &out->decode);
    out->x = x_view(&p->x);
    out->x_part_stride = H * FKDA_DIM;
    out->weight = weight_view(&p->weight, H);
    out->bias = (fkda_channel_view){p->bias.data, H * FKDA_DIM, 1, 0, p->bias.dtype};
    out->conv_state = channel_view(&p->conv_state, H, 1, 2);
    out->conv_slot_stride = fkda_stride_of(&p->conv_state, 0);
    out->window_columns = p->conv_state.shape[2];
    out->windows = channel_view(&p->conv_windows, H, 2, 3);
    out->windows_sequence_stride = has(&p->conv_windows) ? fkda_stride_of(&p->conv_windows, 0) : 0;
    out->windows_token_stride = has(&p->conv_windows) ? fkda_stride_of(&p->conv_windows, 1) : 0;
    out->windows_columns = has(&p->conv_windows) ? p->conv_windows.shape[1] : 0;
    if (has(&p->output_gate)) out->output_gate = fkda_token_view_of(&p->output_gate);
    out->norm_weight = p->norm_weight.data;
    out->norm_weight_dtype = p->norm_weight.dtype;
    out->norm_eps = p->norm_eps;
}

/* For a call on the CPU: conv_windows has a place for each token. The rest is what decode looks at. */
static flash_kda_status check_indices(const fkda_decode_layer_problem *p)
{
    TRY(fkda_check_decode_indices(&p->decode));
    for (int64_t n = 0; p->windows.data && n < p->decode.sequences; n++) {
        const fkda_sequence sequence = fkda_decode_sequence_at(&p->decode, n);
        const int64_t length = sequence.end - sequence.begin;
        if (length > p->windows_columns)
            return INVALID("conv_windows has C = %lld and sequence %lld has %lld tokens; C must be at least "
                           "the longest sequence",
                           (long long)p->windows_columns, (long long)n, (long long)length);
    }
    if (!fkda_keeps_drafts(p)) return FLASH_KDA_OK;
    for (int64_t n = 0; n < p->decode.sequences; n++) {
        const int64_t slot = fkda_index_at(&p->decode.state_indices, n * p->decode.slot_columns);
        if (slot >= p->decode.first_slot && slot >= p->decode.state.slots)
            return INVALID("state_indices[%lld, 0] is %lld; it must be less than %lld, the slots of state",
                           (long long)n, (long long)slot, (long long)p->decode.state.slots);
    }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_decode_layer(const flash_kda_decode_layer_params *p, bool for_reference,
                                         fkda_decode_layer_problem *out)
{
    flash_kda_decode_layer_params complete;
    const void *params = p;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_struct(&params, &complete, offsetof(flash_kda_decode_layer_params, kernel),
                             sizeof complete, "flash_kda_decode_layer_params"));
    p = with_tokens(params, &complete);
    if (for_reference && p->device.type != FLASH_KDA_CPU)
        return INVALID("device is not the CPU; the reference takes tensors in CPU memory");
    TRY(check_sizes(p, &out->decode));
    TRY(check_options(p));
    TRY(check_tensors(p, &out->decode, for_reference, true));
    if (!for_reference) TRY(check_memory(p));
    TRY(fkda_find_kernel(p->device, p->kernel, for_reference ? 0 : FKDA_DECODE_LAYER, &out->decode.kernel));
    fill_problem(p, out);
    if (p->device.type != FLASH_KDA_CPU) return FLASH_KDA_OK;
    TRY(fkda_check_interrupt(p->interrupt));
    return check_indices(out);
}

flash_kda_status fkda_check_decode_layer_shapes(const flash_kda_decode_layer_params *p,
                                                fkda_decode_layer_problem *out)
{
    flash_kda_decode_layer_params complete;
    const void *params = p;
    memset(out, 0, sizeof *out);
    TRY(fkda_complete_struct(&params, &complete, offsetof(flash_kda_decode_layer_params, kernel),
                             sizeof complete, "flash_kda_decode_layer_params"));
    p = with_tokens(params, &complete);
    TRY(check_sizes(p, &out->decode));
    TRY(check_options(p));
    TRY(check_tensors(p, &out->decode, false, false));
    TRY(fkda_find_kernel(p->device, p->kernel, FKDA_DECODE_LAYER, &out->decode.kernel));
    fill_problem(p, out);
    return FLASH_KDA_OK;
}
