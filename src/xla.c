/* Handlers of XLA's FFI, through which JAX calls the library inside of compiled programs.
 *
 * Whoever traces a call (python/flash_kda/jax.py) fills in the call's argument struct, except for what is
 * known only when the program runs: pointers, stream and device. The struct travels in the program as an
 * attribute, beside the place in the struct of each argument and result. A handler completes a copy of the
 * struct and makes the call.
 *
 *   attribute  what it is
 *   params     s64 array: the bytes of the struct, whose struct_size says how many of them there are
 *   places     s64 array: for each argument and then for each result, the offset of its tensor in the struct
 *   kernel     string: a kernel's name, or "" for the best one
 *
 * A result that stands for the same tensor as an argument must be the same memory: the call updates it in
 * place. A program may have been compiled by another version of the library. As structs only grow at their
 * end, an older struct still means what it meant, and a newer one is refused. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "errors.h"
#include "xla_ffi.h"

typedef union params {
    struct {
        size_t struct_size;
        flash_kda_device device;
        void *stream;
    } head; /* with which every struct begins */
    flash_kda_fwd_params fwd;
    flash_kda_decode_params decode;
    unsigned char bytes[sizeof(flash_kda_fwd_params) > sizeof(flash_kda_decode_params)
                            ? sizeof(flash_kda_fwd_params)
                            : sizeof(flash_kda_decode_params)];
} params;

/* What differs between functions. Offsets are those of members of their structs. */
typedef struct function {
    const char *name;
    size_t size, first_tensor, kernel, interrupt;
    size_t workspace; /* 0: the function takes none */
    flash_kda_status (*call)(const params *);
} function;

static flash_kda_status call_fwd(const params *p)
{
    return flash_kda_fwd(&p->fwd);
}

static flash_kda_status call_decode(const params *p)
{
    return flash_kda_decode(&p->decode);
}

static const function FWD = {"flash_kda.fwd",
                             sizeof(flash_kda_fwd_params),
                             offsetof(flash_kda_fwd_params, q),
                             offsetof(flash_kda_fwd_params, kernel),
                             offsetof(flash_kda_fwd_params, interrupt),
                             offsetof(flash_kda_fwd_params, workspace),
                             call_fwd};
static const function DECODE = {"flash_kda.decode",
                                sizeof(flash_kda_decode_params),
                                offsetof(flash_kda_decode_params, q),
                                offsetof(flash_kda_decode_params, kernel),
                                offsetof(flash_kda_decode_params, interrupt),
                                0,
                                call_decode};

/* An optional tensor with a null pointer is absent. An empty buffer has no memory, but it is there, so its
 * tensor gets this address, which is never read. */
static unsigned char empty[64] __attribute__((aligned(64)));
enum { WORKSPACE_ALIGNMENT = 64, LONGEST_KERNEL_NAME = 63 };

/* ---- Errors -------------------------------------------------------------------------------------------- */

static ffi_error *error_of(const ffi_frame *frame, int32_t code, const char *sentence)
{
    ffi_error_args args = {sizeof args, NULL, sentence, code};
    return frame->api->create_error(&args);
}

/* A program that this version of the library cannot run, or one that jax.py did not make. */
static ffi_error *refuse(const ffi_frame *frame, const function *f, const char *what)
{
    char sentence[256];
    snprintf(sentence, sizeof sentence,
             "%s: %s; the program must be compiled by flash_kda.jax of flash_kda %s, or an older one",
             f->name, what, flash_kda_version());
    return error_of(frame, FFI_INVALID_ARGUMENT, sentence);
}

static ffi_error *error_of_status(const ffi_frame *frame, flash_kda_status status)
{
    switch (status) {
    case FLASH_KDA_OK: return NULL;
    case FLASH_KDA_INVALID_VALUE:
    case FLASH_KDA_INVALID_DTYPE: return error_of(frame, FFI_INVALID_ARGUMENT, flash_kda_last_error());
    case FLASH_KDA_UNAVAILABLE: return error_of(frame, FFI_FAILED_PRECONDITION, flash_kda_last_error());
    default: return error_of(frame, FFI_INTERNAL, flash_kda_last_error());
    }
}

/* ---- Attributes ---------------------------------------------------------------------------------------- */

static const void *attribute(const ffi_frame *frame, const char *name, int32_t type)
{
    const ffi_attributes *all = &frame->attributes;
    for (int64_t i = 0; i < all->size; i++) {
        const ffi_span *found = all->names[i];
        if (all->types[i] == type && found->size == strlen(name) && !memcmp(found->data, name, found->size))
            return all->values[i];
    }
    return NULL;
}

/* The s64 array with that name, or NULL. */
static const ffi_array *numbers(const ffi_frame *frame, const char *name)
{
    const ffi_array *array = attribute(frame, name, FFI_ATTRIBUTE_ARRAY);
    return array && array->dtype == FFI_S64 ? array : NULL;
}

/* ---- Tensors ------------------------------------------------------------------------------------------- */

static int32_t dtype_of(int32_t ffi_dtype)
{
    switch (ffi_dtype) {
    case FFI_BF16: return FLASH_KDA_BF16;
    case FFI_F32: return FLASH_KDA_F32;
    case FFI_S32: return FLASH_KDA_I32;
    case FFI_S64: return FLASH_KDA_I64;
    case FFI_F16: return FLASH_KDA_F16;
    case FFI_F64: return FLASH_KDA_F64;
    case FFI_BOOL: return FLASH_KDA_BOOL;
    default: return FLASH_KDA_OTHER;
    }
}

/* Whether the buffer is what the call was traced for. A partitioner may have cut it. */
static bool fits(const flash_kda_tensor *tensor, const ffi_buffer *buffer)
{
    if (buffer->rank != tensor->ndim || dtype_of(buffer->dtype) != tensor->dtype) return false;
    for (int64_t i = 0; i < buffer->rank; i++)
        if (buffer->dims[i] != tensor->shape[i]) return false;
    return true;
}

static void *aligned(unsigned char *data)
{
    const size_t over = (uintptr_t)data % WORKSPACE_ALIGNMENT;
    return over ? data + (WORKSPACE_ALIGNMENT - over) : data;
}

/* Puts a buffer into its place in the struct. Returns what is wrong with it, or NULL. */
static const char *place(const function *f, params *p, const ffi_buffer *buffer, int64_t offset)
{
    if (offset < (int64_t)f->first_tensor || offset > (int64_t)(f->size - sizeof(void *)) ||
        offset % (int64_t)sizeof(void *) != 0)
        return "a place is outside of its struct";
    if (f->workspace && offset == (int64_t)f->workspace) {
        p->fwd.workspace = aligned(buffer->data);
        return NULL;
    }
    if (offset > (int64_t)(f->size - sizeof(flash_kda_tensor))) return "a place is outside of its struct";
    flash_kda_tensor *tensor = (flash_kda_tensor *)(p->bytes + offset);
    if (!fits(tensor, buffer)) return "an array has another shape or dtype than when the call was traced";
    void *data = buffer->data ? buffer->data : empty;
    if (tensor->data && tensor->data != data) return "a tensor that is updated in place has two memories";
    tensor->data = data;
    return NULL;
}

static const char *place_all(const function *f, params *p, const ffi_frame *frame)
{
    const ffi_buffers *all[] = {&frame->arguments, &frame->results};
    const ffi_array *places = numbers(frame, "places");
    if (!places || (int64_t)places->size != all[0]->size + all[1]->size)
        return "the places of its arrays are missing";
    const int64_t *next = places->data;
    for (int i = 0; i < 2; i++)
        for (int64_t j = 0; j < all[i]->size; j++) {
            if (all[i]->types[j] != FFI_BUFFER) return "an argument is no array";
            const char *wrong = place(f, p, all[i]->buffers[j], *next++);
            if (wrong) return wrong;
        }
    return NULL;
}

/* ---- The call ------------------------------------------------------------------------------------------ */

static ffi_error *set_device(const ffi_frame *frame, params *p)
{
    if (p->head.device.type != FLASH_KDA_CUDA) return NULL;
    const ffi_api *api = frame->api;
    if (api->struct_size < offsetof(ffi_api, get_device_ordinal) + sizeof api->get_device_ordinal)
        return error_of(frame, FFI_FAILED_PRECONDITION, "flash_kda on a GPU needs jaxlib 0.6 or newer");
    ffi_stream_args stream = {sizeof stream, NULL, frame->context, NULL};
    ffi_ordinal_args ordinal = {sizeof ordinal, NULL, frame->context, 0};
    ffi_error *error = api->get_stream(&stream);
    if (!error) error = api->get_device_ordinal(&ordinal);
    if (error) return error;
    p->head.stream = stream.stream;
    p->head.device.index = ordinal.ordinal;
    return NULL;
}

static void set_pointer(params *p, size_t offset, const void *pointer)
{
    memcpy(p->bytes + offset, &pointer, sizeof pointer);
}

static ffi_error *run(const ffi_frame *frame, const function *f)
{
    const ffi_array *given = numbers(frame, "params");
    const ffi_span *kernel = attribute(frame, "kernel", FFI_ATTRIBUTE_STRING);
    params p;
    memset(&p, 0, sizeof p);
    if (!given || !kernel) return refuse(frame, f, "its arguments are missing");
    const size_t bytes = given->size * sizeof(int64_t);
    if (bytes < sizeof p.head || bytes > f->size)
        return refuse(frame, f, "its arguments are of another size");
    memcpy(&p, given->data, bytes);
    if (p.head.struct_size != bytes) return refuse(frame, f, "its arguments are of another size");

    char name[LONGEST_KERNEL_NAME + 1] = "";
    if (kernel->size)
        memcpy(name, kernel->data, kernel->size < sizeof name ? kernel->size : LONGEST_KERNEL_NAME);
    set_pointer(&p, f->kernel, name[0] ? name : NULL);
    set_pointer(&p, f->interrupt, NULL);
    const char *wrong = place_all(f, &p, frame);
    if (wrong) return refuse(frame, f, wrong);
    ffi_error *error = set_device(frame, &p);
    return error ? error : error_of_status(frame, f->call(&p));
}

static ffi_error *handle(ffi_frame *frame, const function *f)
{
    if (frame->extensions && frame->extensions->type == FFI_METADATA) {
        ffi_metadata *metadata = ((ffi_metadata_extension *)frame->extensions)->metadata;
        /* The version that calls, since the structs above are the same in all versions with major 0. */
        metadata->version.struct_size = sizeof metadata->version;
        metadata->version.extensions = NULL;
        metadata->version.major = 0;
        metadata->version.minor = frame->api ? frame->api->version.minor : 1;
        metadata->traits = 0;
        return NULL;
    }
    return frame->stage == FFI_STAGE_EXECUTE ? run(frame, f) : NULL;
}

void *flash_kda_xla_fwd(void *call_frame)
{
    return handle(call_frame, &FWD);
}

void *flash_kda_xla_decode(void *call_frame)
{
    return handle(call_frame, &DECODE);
}
