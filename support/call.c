#include "call.h"

#include <stdlib.h>
#include <string.h>

/* AddressSanitizer has red zones of its own on either side, which reads must not touch either. */
#if defined(__SANITIZE_ADDRESS__)
enum { BAND = 0 };
#else
enum { BAND = 4096 };
#endif

/* A byte that is a NaN in bf16 and in f32 when it is repeated (0xffff...), and the byte in the bands of
 * outputs. */
enum { NAN_BYTE = 0xff, OUTPUT_BAND_BYTE = 0xa5 };

/* What the records of nonfinite hold before a call: no record that a call could write. */
enum { RECORD_BYTE = 0x5a, RECORD_BYTES = FLASH_KDA_CHECKED_TENSORS * sizeof(flash_kda_nonfinite) };

static const flash_kda_device cpu = {FLASH_KDA_CPU, 0};

const char *const state_mode_names[STATE_MODES] = {"no state", "state in", "state out", "state in and out",
                                                   "state in place"};

static void *interior(const buffer *b)
{
    return b->base ? b->base + BAND : NULL;
}

/* `contents` NULL fills the interior with NaN. */
static void buffer_write(const buffer *b, const void *contents)
{
    unsigned char *image = allocate(b->bytes, 1);
    if (contents)
        memcpy(image, contents, b->bytes);
    else
        memset(image, NAN_BYTE, b->bytes);
    must(flash_kda_copy(b->device, interior(b), cpu, image, b->bytes));
    free(image);
}

static void *buffer_read(const buffer *b)
{
    void *contents = allocate(b->bytes, 1);
    must(flash_kda_copy(cpu, contents, b->device, interior(b), b->bytes));
    return contents;
}

/* The bands around an input are NaN, so that a result shows if a kernel read them as data. */
static buffer buffer_create(flash_kda_device device, size_t bytes, const void *contents, unsigned char band)
{
    buffer b = {.device = device, .bytes = bytes, .band = band};
    void *memory;
    must(flash_kda_malloc(device, bytes + 2 * BAND, &memory));
    b.base = memory;
    unsigned char bands[BAND + 1];
    memset(bands, band, sizeof bands);
    must(flash_kda_copy(device, b.base, cpu, bands, BAND));
    must(flash_kda_copy(device, b.base + BAND + bytes, cpu, bands, BAND));
    buffer_write(&b, contents);
    return b;
}

static void buffer_free(buffer *b)
{
    if (b->base) must(flash_kda_free(b->device, b->base));
    *b = (buffer){0};
}

static bool all_bytes(const unsigned char *x, size_t count, unsigned char value)
{
    for (size_t i = 0; i < count; i++)
        if (x[i] != value) return false;
    return true;
}

static bool bands_intact(const buffer *b)
{
    unsigned char band[BAND + 1];
    if (!b->base) return true;
    must(flash_kda_copy(cpu, band, b->device, b->base, BAND));
    if (!all_bytes(band, BAND, b->band)) return false;
    must(flash_kda_copy(cpu, band, b->device, b->base + BAND + b->bytes, BAND));
    return all_bytes(band, BAND, b->band);
}

static bool holds(const buffer *b, const void *contents)
{
    if (!b->base) return true;
    void *now = buffer_read(b);
    bool same = memcmp(now, contents, b->bytes) == 0;
    free(now);
    return same;
}

static size_t state_bytes(const call *c)
{
    return (size_t)c->states * DIM * DIM * (c->options.bf16_state ? 2 : 4);
}

/* The initial state in the dtype of the call. */
static void *state_image(const call *c)
{
    size_t count = (size_t)c->states * DIM * DIM;
    void *image = allocate(state_bytes(c), 1);
    if (c->options.bf16_state)
        for (size_t i = 0; i < count; i++) ((uint16_t *)image)[i] = bf16_from_float(c->initial_state[i]);
    else
        memcpy(image, c->initial_state, count * sizeof(float));
    return image;
}

static void open_inputs(call *c, const problem *p)
{
    flash_kda_device d = c->options.device;
    size_t rows = (size_t)c->rows, heads = (size_t)p->heads;
    c->q = buffer_create(d, rows * DIM * 2, p->q, NAN_BYTE);
    c->k = buffer_create(d, rows * DIM * 2, p->k, NAN_BYTE);
    c->v = buffer_create(d, rows * DIM * 2, p->v, NAN_BYTE);
    c->g = buffer_create(d, rows * DIM * 2, p->g, NAN_BYTE);
    c->beta = buffer_create(d, rows * 2, p->beta, NAN_BYTE);
    c->A_log = buffer_create(d, heads * 4, p->A_log, NAN_BYTE);
    c->dt_bias = buffer_create(d, heads * DIM * 4, p->dt_bias, NAN_BYTE);
    c->params.q.data = interior(&c->q);
    c->params.k.data = interior(&c->k);
    c->params.v.data = interior(&c->v);
    c->params.g.data = interior(&c->g);
    c->params.beta.data = interior(&c->beta);
    c->params.A_log.data = interior(&c->A_log);
    c->params.dt_bias.data = interior(&c->dt_bias);
}

static void open_seqlens(call *c, const problem *p)
{
    size_t count = (size_t)p->sequences + 1;
    if (!p->cu_seqlens) return;
    if (!c->options.i32_seqlens) {
        c->cu_seqlens = buffer_create(c->options.device, count * 8, p->cu_seqlens, NAN_BYTE);
    } else {
        int32_t *narrow = allocate(count, sizeof *narrow);
        for (size_t i = 0; i < count; i++) narrow[i] = (int32_t)p->cu_seqlens[i];
        c->cu_seqlens = buffer_create(c->options.device, count * 4, narrow, NAN_BYTE);
        c->params.cu_seqlens.dtype = FLASH_KDA_I32;
        free(narrow);
    }
    c->params.cu_seqlens.data = interior(&c->cu_seqlens);
}

static void open_states(call *c, const problem *p)
{
    flash_kda_device d = c->options.device;
    const int64_t shape[] = {p->sequences, p->heads, DIM, DIM};
    flash_kda_dtype dtype = c->options.bf16_state ? FLASH_KDA_BF16 : FLASH_KDA_F32;
    state_mode mode = c->options.mode;
    void *image = state_image(c);
    if (mode_writes(mode)) {
        c->final = buffer_create(d, state_bytes(c), NULL, OUTPUT_BAND_BYTE);
        c->params.final_state = tensor_of(interior(&c->final), dtype, 4, shape);
    }
    if (mode == STATE_IN_PLACE) {
        c->params.initial_state = c->params.final_state;
    } else if (mode_reads(mode)) {
        c->initial = buffer_create(d, state_bytes(c), image, NAN_BYTE);
        c->params.initial_state = tensor_of(interior(&c->initial), dtype, 4, shape);
    }
    free(image);
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

flash_kda_status call_open(call *c, const problem *p, call_options options)
{
    *c = (call){
        .params = problem_params(p, false),
        .options = options,
        .rows = problem_rows(p),
        .states = problem_states(p),
        .initial_state = p->initial_state,
    };
    c->params.device = options.device;
    c->params.kernel = options.kernel;
    c->params.cpu_threads = options.threads;
    c->params.batch_invariant = options.batch_invariant;
    c->params.cut = options.cut;
    if (options.tells_longest) c->params.max_seqlen = longest_sequence(p);
    c->params.out = c->params.v;
    size_t workspace_size;
    flash_kda_status status = flash_kda_fwd_workspace_size(&c->params, &workspace_size);
    if (status != FLASH_KDA_OK) return status;
    open_inputs(c, p);
    open_seqlens(c, p);
    open_states(c, p);
    c->out = buffer_create(options.device, (size_t)c->rows * DIM * 2, NULL, OUTPUT_BAND_BYTE);
    c->params.out.data = interior(&c->out);
    c->workspace = buffer_create(options.device, workspace_size, NULL, OUTPUT_BAND_BYTE);
    c->params.workspace = workspace_size ? interior(&c->workspace) : NULL;
    c->params.workspace_size = workspace_size;
    if (options.counts_nonfinite) {
        const int64_t shape[] = {FLASH_KDA_CHECKED_TENSORS, 2};
        c->nonfinite = buffer_create(options.device, RECORD_BYTES, NULL, OUTPUT_BAND_BYTE);
        c->params.nonfinite = tensor_of(interior(&c->nonfinite), FLASH_KDA_I64, 2, shape);
    }
    call_poison(c);
    return FLASH_KDA_OK;
}

void call_close(call *c)
{
    enum { BUFFERS = 13 };
    buffer *all[BUFFERS] = {&c->q,     &c->k,         &c->v,          &c->g,       &c->beta,
                            &c->A_log, &c->dt_bias,   &c->cu_seqlens, &c->initial, &c->final,
                            &c->out,   &c->workspace, &c->nonfinite};
    for (int i = 0; i < BUFFERS; i++) buffer_free(all[i]);
}

void call_poison(call *c)
{
    buffer_write(&c->out, NULL);
    if (c->workspace.bytes) buffer_write(&c->workspace, NULL);
    if (c->nonfinite.base) {
        unsigned char records[RECORD_BYTES];
        memset(records, RECORD_BYTE, sizeof records);
        buffer_write(&c->nonfinite, records);
    }
    if (!c->final.base) return;
    void *image = c->options.mode == STATE_IN_PLACE ? state_image(c) : NULL;
    buffer_write(&c->final, image);
    free(image);
}

flash_kda_status call_run(call *c)
{
    flash_kda_status status = flash_kda_fwd(&c->params);
    return status == FLASH_KDA_OK ? flash_kda_synchronize(c->params.device, c->params.stream) : status;
}

uint16_t *call_read_out(const call *c)
{
    return buffer_read(&c->out);
}

void *call_read_state(const call *c)
{
    return buffer_read(&c->final);
}

void call_read_nonfinite(const call *c, flash_kda_nonfinite records[FLASH_KDA_CHECKED_TENSORS])
{
    void *read = buffer_read(&c->nonfinite);
    memcpy(records, read, RECORD_BYTES);
    free(read);
}

const char *call_damage(const call *c, const problem *p)
{
    const struct {
        const char *name;
        const buffer *b;
        const void *input; /* what it must still hold, or NULL */
    } all[] = {
        {"q", &c->q, p->q},
        {"k", &c->k, p->k},
        {"v", &c->v, p->v},
        {"g", &c->g, p->g},
        {"beta", &c->beta, p->beta},
        {"A_log", &c->A_log, p->A_log},
        {"dt_bias", &c->dt_bias, p->dt_bias},
        {"cu_seqlens", &c->cu_seqlens, c->options.i32_seqlens ? NULL : p->cu_seqlens},
        {"initial_state", &c->initial, c->options.bf16_state ? NULL : p->initial_state},
        {"final_state", &c->final, NULL},
        {"out", &c->out, NULL},
        {"workspace", &c->workspace, NULL},
        {"nonfinite", &c->nonfinite, NULL},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!bands_intact(all[i].b) || (all[i].input && !holds(all[i].b, all[i].input))) return all[i].name;
    return NULL;
}

static bool still_poisoned(const buffer *b, unsigned char poison)
{
    if (!b->base) return true;
    unsigned char *now = buffer_read(b);
    bool poisoned = all_bytes(now, b->bytes, poison);
    free(now);
    return poisoned;
}

bool call_untouched(const call *c)
{
    if (!still_poisoned(&c->out, NAN_BYTE) || !still_poisoned(&c->nonfinite, RECORD_BYTE)) return false;
    if (c->options.mode != STATE_IN_PLACE) return still_poisoned(&c->final, NAN_BYTE);
    void *image = state_image(c);
    bool same = holds(&c->final, image);
    free(image);
    return same;
}
