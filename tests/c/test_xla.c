/* flash_kda_xla_fwd() and flash_kda_xla_decode(), with an XLA that is made up here: call frames of the calls
 * that flash_kda_fwd() and flash_kda_decode() get, whose results must have the same bits. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../src/xla_ffi.h"
#include "decode_call.h"
#include "harness.h"

/* ---- XLA ----------------------------------------------------------------------------------------------- */

struct ffi_error {
    char message[512];
    int32_t code;
};
static ffi_error last_error;
static int asked_for_stream;

static ffi_error *create_error(ffi_error_args *args)
{
    snprintf(last_error.message, sizeof last_error.message, "%s", args->message);
    last_error.code = args->code;
    return &last_error;
}

static ffi_error *get_stream(ffi_stream_args *args)
{
    asked_for_stream++;
    args->stream = NULL;
    return args->context == &last_error ? NULL : &last_error;
}

static ffi_error *get_ordinal(ffi_ordinal_args *args)
{
    args->ordinal = test.device.index;
    return NULL;
}

enum { MOST_BUFFERS = 24 };

/* A call frame and all that it points to. */
typedef struct frame {
    ffi_api api;
    ffi_frame ffi;
    ffi_buffer buffers[MOST_BUFFERS];
    ffi_buffer *list[MOST_BUFFERS];
    int32_t buffer_types[MOST_BUFFERS];
    int64_t places[MOST_BUFFERS];
    ffi_array arrays[2];
    ffi_span kernel, names[3], *name_list[3];
    int32_t attribute_types[3];
    void *values[3];
    union {
        size_t struct_size;
        flash_kda_fwd_params fwd;
        flash_kda_decode_params decode;
        int64_t numbers[1];
    } params;
    int count;
} frame;

static int32_t ffi_dtype(int32_t dtype)
{
    switch (dtype) {
    case FLASH_KDA_BF16: return FFI_BF16;
    case FLASH_KDA_F32: return FFI_F32;
    case FLASH_KDA_I32: return FFI_S32;
    case FLASH_KDA_I64: return FFI_S64;
    default: return FFI_BOOL;
    }
}

/* Moves a tensor's pointer from the struct to a buffer. */
static void add_tensor(frame *f, size_t offset)
{
    flash_kda_tensor *tensor = (flash_kda_tensor *)((unsigned char *)&f->params + offset);
    if (!tensor->data) return;
    f->places[f->count] = (int64_t)offset;
    f->buffers[f->count++] = (ffi_buffer){sizeof(ffi_buffer), NULL,         ffi_dtype(tensor->dtype),
                                          tensor->data,       tensor->ndim, tensor->shape};
    tensor->data = NULL;
}

static void add_tensors(frame *f, size_t first, size_t behind)
{
    for (size_t offset = first; offset < behind; offset += sizeof(flash_kda_tensor)) add_tensor(f, offset);
}

/* Arguments first, then `results` results. */
static void finish(frame *f, int results, const char *kernel)
{
    f->api = (ffi_api){.struct_size = sizeof f->api,
                       .version = {sizeof(ffi_version), NULL, 0, 3},
                       .create_error = create_error,
                       .get_stream = get_stream,
                       .get_device_ordinal = get_ordinal};
    for (int i = 0; i < MOST_BUFFERS; i++) f->list[i] = &f->buffers[i], f->buffer_types[i] = FFI_BUFFER;
    const int arguments = f->count - results;
    f->arrays[0] = (ffi_array){FFI_S64, f->params.struct_size / sizeof(int64_t), &f->params};
    f->arrays[1] = (ffi_array){FFI_S64, (size_t)f->count, f->places};
    f->kernel = (ffi_span){kernel ? kernel : "", kernel ? strlen(kernel) : 0};
    const char *names[] = {"kernel", "params", "places"};
    void *values[] = {&f->kernel, &f->arrays[0], &f->arrays[1]};
    for (int i = 0; i < 3; i++) {
        f->names[i] = (ffi_span){names[i], strlen(names[i])};
        f->name_list[i] = &f->names[i];
        f->attribute_types[i] = i ? FFI_ATTRIBUTE_ARRAY : FFI_ATTRIBUTE_STRING;
        f->values[i] = values[i];
    }
    f->ffi = (ffi_frame){
        .struct_size = sizeof f->ffi,
        .api = &f->api,
        .context = &last_error,
        .stage = FFI_STAGE_EXECUTE,
        .arguments = {sizeof(ffi_buffers), NULL, arguments, f->buffer_types, f->list},
        .results = {sizeof(ffi_buffers), NULL, results, f->buffer_types, f->list + arguments},
        .attributes = {sizeof(ffi_attributes), NULL, 3, f->attribute_types, f->name_list, f->values}};
}

/* The frame of a call of fwd, whose struct the frame then has without pointers. */
static frame *fwd_frame(const call *c)
{
    frame *f = allocate(1, sizeof *f);
    f->params.fwd = c->params;
    add_tensors(f, offsetof(flash_kda_fwd_params, q), offsetof(flash_kda_fwd_params, out));
    add_tensors(f, offsetof(flash_kda_fwd_params, A_log), offsetof(flash_kda_fwd_params, final_state));
    add_tensor(f, offsetof(flash_kda_fwd_params, cu_seqlens));
    add_tensors(f, offsetof(flash_kda_fwd_params, state_indices), offsetof(flash_kda_fwd_params, first_slot));
    const int arguments = f->count;
    add_tensor(f, offsetof(flash_kda_fwd_params, out));
    add_tensor(f, offsetof(flash_kda_fwd_params, final_state));
    static int64_t bytes;
    bytes = (int64_t)c->params.workspace_size;
    f->places[f->count] = offsetof(flash_kda_fwd_params, workspace);
    f->buffers[f->count++] = (ffi_buffer){sizeof(ffi_buffer), NULL, 6, c->params.workspace, 1, &bytes};
    f->params.fwd.workspace = NULL;
    /* What the program was traced with means nothing when it runs. */
    static const int32_t set = 1;
    f->params.fwd.interrupt = &set;
    f->params.fwd.kernel = "none";
    finish(f, f->count - arguments, c->params.kernel);
    return f;
}

static frame *decode_frame(const decode_call *c)
{
    frame *f = allocate(1, sizeof *f);
    f->params.decode = c->decode;
    const size_t out = offsetof(flash_kda_decode_params, out),
                 scale = offsetof(flash_kda_decode_params, scale);
    add_tensors(f, offsetof(flash_kda_decode_params, q), out);
    add_tensors(f, out + sizeof(flash_kda_tensor), scale);
    const int arguments = f->count;
    add_tensor(f, out);
    const size_t state = offsetof(flash_kda_decode_params, state);
    for (int i = 0; i < arguments; i++)
        if (f->places[i] == (int64_t)state) {
            f->places[f->count] = (int64_t)state;
            f->buffers[f->count++] = f->buffers[i];
        }
    finish(f, f->count - arguments, c->decode.kernel);
    return f;
}

/* ---- The tests ----------------------------------------------------------------------------------------- */

static void check_runs(void *(*handler)(void *), frame *f)
{
    asked_for_stream = 0;
    const ffi_error *error = handler(&f->ffi);
    CHECK(!error, "%s", error ? error->message : "");
    must(flash_kda_synchronize(test.device, NULL));
    CHECK(asked_for_stream == (test.device.type == FLASH_KDA_CUDA), "asked %d times for a stream",
          asked_for_stream);
}

static void same_as_fwd(const problem *p, call_options options)
{
    call c;
    must(call_open(&c, p, options));
    must(call_run(&c));
    result expected = {call_read_out(&c), call_read_state(&c)};
    call_poison(&c);
    frame *f = fwd_frame(&c);
    check_runs(flash_kda_xla_fwd, f);
    result now = {call_read_out(&c), call_read_state(&c)};
    CHECK(first_difference(expected.out, now.out, 2, problem_rows(p) * DIM) < 0, "out differs");
    if (mode_writes(options.mode))
        CHECK(first_difference(expected.state, now.state, 4, p->slots * p->heads * DIM * DIM) < 0,
              "the final state differs");
    const char *damaged = call_damage(&c, p);
    CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);
    result_free(&expected);
    result_free(&now);
    free(f);
    call_close(&c);
}

static void fwd(void)
{
    static const int64_t lengths[] = {5, 0, 40};
    problem *whole = problem_create(2, 50, 2), *ragged = problem_create_ragged(lengths, 3, 2);
    fill_case(whole, find_case("random"), 1);
    fill_case(ragged, find_case("random"), 2);
    for (int mode = 0; mode < STATE_MODES; mode++) {
        trying("%s", state_mode_names[mode]);
        same_as_fwd(whole, options_of((state_mode)mode, false));
        same_as_fwd(ragged, options_of((state_mode)mode, false));
    }
    problem_free(whole);
    problem_free(ragged);

    trying("a call without tokens, whose buffers have no memory");
    problem *none = problem_create(1, 0, 2);
    call c;
    must(call_open(&c, none, options_of(STATE_OUT, false)));
    frame *f = fwd_frame(&c);
    for (int i = 0; i < f->count; i++)
        if (f->buffers[i].rank == 4 && f->buffers[i].dims[1] == 0) f->buffers[i].data = NULL;
    check_runs(flash_kda_xla_fwd, f);
    free(f);
    call_close(&c);
    problem_free(none);
}

static void decode(void)
{
    decode_problem d = {.tokens = problem_create(3, 2, 2), .slot_columns = 1};
    fill_case(d.tokens, find_case("random"), 3);
    decode_options options = {.tokens = options_of(STATE_IN_PLACE, false)};
    decode_call c;
    decode_call_open(&c, &d, options);
    must(decode_call_run(&c));
    uint16_t *out = decode_call_read_out(&c);
    float *pool = decode_call_read_pool(&c);
    decode_call_restore_pool(&c);
    frame *f = decode_frame(&c);
    check_runs(flash_kda_xla_decode, f);
    uint16_t *out_now = decode_call_read_out(&c);
    float *pool_now = decode_call_read_pool(&c);
    CHECK(first_difference(out, out_now, 2, problem_rows(d.tokens) * DIM) < 0, "out differs");
    CHECK(first_difference(pool, pool_now, 4, d.tokens->slots * d.tokens->heads * DIM * DIM) < 0,
          "the pool differs");
    const char *damaged = decode_call_damage(&c, false);
    CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);

    trying("a state in two memories");
    f->buffers[f->count - 1].data = f->buffers[0].data;
    const ffi_error *error = flash_kda_xla_decode(&f->ffi);
    CHECK(error && strstr(error->message, "a tensor that is updated in place has two memories"), "%s",
          error ? error->message : "was taken");
    free(out), free(out_now), free(pool), free(pool_now), free(f);
    decode_call_close(&c);
    decode_problem_free(&d);
}

/* A frame with something wrong is refused with a sentence, and nothing is written. */
static void check_refused(const call *c, frame *f, int32_t code, const char *sentence)
{
    const ffi_error *error = flash_kda_xla_fwd(&f->ffi);
    CHECK(error != NULL, "was taken; expected: %s", sentence);
    if (error) {
        CHECK(strstr(error->message, sentence), "%s; expected: %s", error->message, sentence);
        CHECK(error->code == code, "code %d", (int)error->code);
    }
    CHECK(call_untouched(c), "something was written");
    free(f);
}

static void refusals(void)
{
    problem *p = problem_create(1, 20, 2);
    fill_case(p, find_case("random"), 4);
    call c;
    must(call_open(&c, p, options_of(STATE_BOTH, false)));
    call_poison(&c);
    const int32_t wrong = FFI_INVALID_ARGUMENT;

    frame *f = fwd_frame(&c);
    f->names[1].size--;
    check_refused(&c, f, wrong, "flash_kda.fwd: its arguments are missing; the program must be compiled by");
    f = fwd_frame(&c);
    f->attribute_types[0] = FFI_ATTRIBUTE_ARRAY;
    check_refused(&c, f, wrong, "its arguments are missing");
    f = fwd_frame(&c);
    f->arrays[0].dtype = FFI_S32;
    check_refused(&c, f, wrong, "its arguments are missing");
    f = fwd_frame(&c);
    f->arrays[0].size++;
    check_refused(&c, f, wrong, "its arguments are of another size");
    f = fwd_frame(&c);
    f->params.struct_size += 8;
    check_refused(&c, f, wrong, "its arguments are of another size");
    f = fwd_frame(&c);
    f->arrays[0].size = 1;
    check_refused(&c, f, wrong, "its arguments are of another size");
    f = fwd_frame(&c);
    f->arrays[1].size--;
    check_refused(&c, f, wrong, "the places of its arrays are missing");
    const int64_t places[] = {-8,
                              0,
                              (int64_t)sizeof(flash_kda_fwd_params),
                              INT64_MAX,
                              (int64_t)sizeof(flash_kda_fwd_params) - 8,
                              offsetof(flash_kda_fwd_params, q) + 1};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        f = fwd_frame(&c);
        f->places[0] = places[i];
        check_refused(&c, f, wrong, "a place is outside of its struct");
    }
    f = fwd_frame(&c);
    f->buffer_types[2] = 9;
    check_refused(&c, f, wrong, "an argument is no array");
    f = fwd_frame(&c);
    f->buffers[1].dtype = FFI_F16;
    check_refused(&c, f, wrong, "an array has another shape or dtype than when the call was traced");
    f = fwd_frame(&c);
    f->buffers[1].rank = 3;
    check_refused(&c, f, wrong, "an array has another shape");
    f = fwd_frame(&c);
    int64_t dims[] = {1, 20, 1, DIM};
    f->buffers[1].dims = dims;
    check_refused(&c, f, wrong, "an array has another shape");
    f = fwd_frame(&c);
    f->params.fwd.scale = INFINITY;
    check_refused(&c, f, wrong, "scale is inf; it must be finite");
    f = fwd_frame(&c);
    const char *none = "no such kernel, with a name that is longer than any kernel's name";
    f->kernel = (ffi_span){none, strlen(none)};
    check_refused(&c, f, wrong, "no such kernel");
    if (test.device.type == FLASH_KDA_CUDA) {
        f = fwd_frame(&c);
        f->api.struct_size = offsetof(ffi_api, get_device_ordinal);
        check_refused(&c, f, FFI_FAILED_PRECONDITION, "flash_kda on a GPU needs jaxlib 0.6 or newer");
        f = fwd_frame(&c);
        f->ffi.context = NULL;
        last_error = (ffi_error){"no stream", FFI_INTERNAL};
        check_refused(&c, f, FFI_INTERNAL, "no stream");
    }

    trying("another stage");
    f = fwd_frame(&c);
    for (int32_t stage = 0; stage < FFI_STAGE_EXECUTE; stage++) {
        f->ffi.stage = stage;
        CHECK(!flash_kda_xla_fwd(&f->ffi), "an error");
    }
    CHECK(call_untouched(&c), "something was written");
    free(f);
    call_close(&c);
    problem_free(p);
}

static void metadata(void)
{
    ffi_metadata told = {.struct_size = sizeof told, .traits = 7};
    ffi_metadata_extension extension = {{sizeof extension, FFI_METADATA, NULL}, &told};
    ffi_api api = {.struct_size = sizeof api, .version = {sizeof(ffi_version), NULL, 0, 5}};
    ffi_frame f = {.struct_size = sizeof f, .extensions = &extension.base, .api = &api};
    CHECK(!flash_kda_xla_fwd(&f), "an error");
    CHECK(told.version.major == 0 && told.version.minor == 5 && told.traits == 0, "version %d.%d, traits %u",
          told.version.major, told.version.minor, told.traits);
    f.api = NULL;
    CHECK(!flash_kda_xla_decode(&f), "an error");
    CHECK(told.version.major == 0 && told.version.minor == 1, "version %d.%d", told.version.major,
          told.version.minor);
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"fwd", fwd}, {"decode", decode}, {"refusals", refusals}, {"metadata", metadata}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
