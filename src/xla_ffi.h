/* What XLA's foreign function interface (FFI) passes to a handler: its C structs, version 0, as far as
 * xla.c reads them. XLA gives the size of each struct, adds fields at the end alone, and keeps the order of
 * the functions in ffi_api, so these declarations fit every jaxlib from 0.6 on. They are written out here
 * because the header is part of jaxlib, which the build does not need. */
#ifndef FLASH_KDA_XLA_FFI_H
#define FLASH_KDA_XLA_FFI_H

#include <stddef.h>
#include <stdint.h>

typedef struct ffi_extension {
    size_t struct_size;
    int32_t type; /* FFI_METADATA */
    struct ffi_extension *next;
} ffi_extension;

typedef struct ffi_version {
    size_t struct_size;
    ffi_extension *extensions;
    int major, minor;
} ffi_version;

typedef struct ffi_error ffi_error; /* XLA's own */

/* Codes of errors, which are Abseil's. */
enum { FFI_INVALID_ARGUMENT = 3, FFI_FAILED_PRECONDITION = 9, FFI_INTERNAL = 13 };

typedef struct ffi_error_args {
    size_t struct_size;
    ffi_extension *extensions;
    const char *message; /* is copied */
    int32_t code;
} ffi_error_args;

typedef struct ffi_stream_args {
    size_t struct_size;
    ffi_extension *extensions;
    void *context;
    void *stream; /* is set: a CUstream */
} ffi_stream_args;

typedef struct ffi_ordinal_args {
    size_t struct_size;
    ffi_extension *extensions;
    void *context;
    int32_t ordinal; /* is set: of the CUDA device */
} ffi_ordinal_args;

/* The functions of XLA that a handler may call. */
typedef struct ffi_api {
    size_t struct_size;
    ffi_extension *extensions;
    ffi_version version;
    const void *internal;
    ffi_error *(*create_error)(ffi_error_args *);
    void (*get_message)(void *);
    void (*destroy_error)(void *);
    void *register_handler;
    ffi_error *(*get_stream)(ffi_stream_args *);
    void *others[12];
    ffi_error *(*get_device_ordinal)(ffi_ordinal_args *);
} ffi_api;

/* Types of elements, of which these are known to both sides. */
enum { FFI_BOOL = 1, FFI_S32 = 4, FFI_S64 = 5, FFI_F16 = 10, FFI_F32 = 11, FFI_F64 = 12, FFI_BF16 = 16 };

/* An argument or a result: row-major, in memory of the device. */
typedef struct ffi_buffer {
    size_t struct_size;
    ffi_extension *extensions;
    int32_t dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
} ffi_buffer;

/* Arguments, or results. */
typedef struct ffi_buffers {
    size_t struct_size;
    ffi_extension *extensions;
    int64_t size;
    int32_t *types; /* FFI_BUFFER */
    ffi_buffer **buffers;
} ffi_buffers;

enum { FFI_BUFFER = 1 };

typedef struct ffi_span {
    const char *data; /* without a zero at its end */
    size_t size;
} ffi_span;

typedef struct ffi_array {
    int32_t dtype;
    size_t size; /* in elements */
    const void *data;
} ffi_array;

enum { FFI_ATTRIBUTE_ARRAY = 1, FFI_ATTRIBUTE_STRING = 4 };

typedef struct ffi_attributes {
    size_t struct_size;
    ffi_extension *extensions;
    int64_t size;
    int32_t *types;
    ffi_span **names;
    void **values; /* an ffi_array or an ffi_span */
} ffi_attributes;

enum { FFI_STAGE_EXECUTE = 3 };

typedef struct ffi_frame {
    size_t struct_size;
    ffi_extension *extensions;
    const ffi_api *api;
    void *context;
    int32_t stage;
    ffi_buffers arguments, results;
    ffi_attributes attributes;
} ffi_frame;

/* A handler is called once with this extension, and says for which version it is made. */
enum { FFI_METADATA = 1 };

typedef struct ffi_metadata {
    size_t struct_size;
    ffi_version version;
    uint32_t traits; /* 0: XLA must not capture calls into a CUDA graph, since a first call loads kernels */
} ffi_metadata;

typedef struct ffi_metadata_extension {
    ffi_extension base;
    ffi_metadata *metadata;
} ffi_metadata_extension;

#endif
