#include "safetensors.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nearest.h"

struct safetensors {
    char *header; /* text, ends with 0 */
    char *data;
    size_t data_size;
};

/* ---- The file ---- */

/* False if the file can't be read, with errno set, or is not of the format, with errno 0. */
static bool read_file(FILE *stream, safetensors *file)
{
    unsigned char length[8];
    uint64_t header_size = 0;
    errno = 0;
    if (fread(length, 1, 8, stream) != 8) return false;
    for (int i = 7; i >= 0; i--) header_size = header_size << 8 | length[i];
    if (header_size > 1 << 24) return false;
    file->header = allocate((size_t)header_size + 1, 1);
    if (fread(file->header, 1, (size_t)header_size, stream) != header_size) return false;
    long begin = ftell(stream);
    if (begin < 0 || fseek(stream, 0, SEEK_END) != 0) return false;
    long end = ftell(stream);
    if (end < begin || fseek(stream, begin, SEEK_SET) != 0) return false;
    file->data_size = (size_t)(end - begin);
    file->data = allocate(file->data_size, 1);
    return fread(file->data, 1, file->data_size, stream) == file->data_size;
}

safetensors *safetensors_open(const char *path, char why[256])
{
    FILE *stream = fopen(path, "rb");
    if (!stream) {
        snprintf(why, 256, "%.150s can't be opened: %s", path, strerror(errno));
        return NULL;
    }
    safetensors *file = allocate(1, sizeof *file);
    const bool is_read = read_file(stream, file);
    const int reason = is_read ? 0 : errno;
    fclose(stream);
    if (is_read && file->header[0] == '{') return file;
    if (reason)
        snprintf(why, 256, "%.150s can't be read: %s", path, strerror(reason));
    else
        snprintf(why, 256, "%.150s is not a safetensors file, or a part of one", path);
    safetensors_close(file);
    return NULL;
}

void safetensors_close(safetensors *file)
{
    if (!file) return;
    free(file->header);
    free(file->data);
    free(file);
}

/* ---- The header, in JSON ---- */

static const char *skip_space(const char *at)
{
    return at + strspn(at, " \t\r\n");
}

/* What comes after the string that begins at `at`; NULL if it does not end. */
static const char *skip_string(const char *at)
{
    for (at++; *at && *at != '"'; at++) {
        if (*at != '\\') continue;
        at++;
        if (!*at) return NULL;
    }
    return *at ? at + 1 : NULL;
}

/* What comes after the value that begins at `at`; NULL if it does not end. */
static const char *skip_value(const char *at)
{
    int depth = 0;
    for (; *at; at++) {
        if (*at == '"') {
            if (!(at = skip_string(at))) return NULL;
            at--;
        } else if (*at == '{' || *at == '[') {
            depth++;
        } else if (*at == '}' || *at == ']') {
            if (depth == 0) return at;
            depth--;
        } else if (*at == ',' && depth == 0) {
            return at;
        }
    }
    return NULL;
}

/* A member of a JSON object: "key": value. */
typedef struct member {
    const char *key;
    int key_length;
    const char *value, *end; /* the value's first character, and what comes after it */
} member;

/* Reads the next member. `at` is after the object's brace or after the member before. False at the end. */
static bool next_member(const char *at, member *m)
{
    at = skip_space(at);
    if (*at == ',') at = skip_space(at + 1);
    if (*at != '"') return false;
    const char *after = skip_string(at);
    if (!after) return false;
    m->key = at + 1, m->key_length = (int)(after - 1 - m->key);
    after = skip_space(after);
    if (*after != ':') return false;
    m->value = skip_space(after + 1);
    m->end = skip_value(m->value);
    return m->end != NULL;
}

/* The member of that name in the object that begins at `object`. */
static bool find_member(const char *object, const char *name, member *m)
{
    if (*object != '{') return false;
    const int length = (int)strlen(name);
    for (const char *at = object + 1; next_member(at, m); at = m->end)
        if (m->key_length == length && memcmp(m->key, name, (size_t)length) == 0) return true;
    return false;
}

/* How much of a value a sentence quotes, without the space that may come after it. */
static int quoted(const member *m)
{
    int length = (int)(m->end - m->value);
    while (length > 0 && strchr(" \t\r\n", m->value[length - 1])) length--;
    return length < 70 ? length : 70;
}

/* Up to max whole numbers of a list like [1, 2, 3]; -1 if it is anything else. */
static int numbers_of(const char *text, int64_t *numbers, int max)
{
    int count = 0;
    if (*text++ != '[') return -1;
    for (text = skip_space(text); *text != ']'; text = skip_space(text)) {
        char *end;
        errno = 0;
        long long number = strtoll(text, &end, 10);
        if (end == text || errno || count == max || number < 0) return -1;
        numbers[count++] = number;
        text = skip_space(end);
        if (*text == ',')
            text++;
        else if (*text != ']')
            return -1;
    }
    return count;
}

/* ---- Tensors ---- */

static const struct {
    const char *name;
    flash_kda_dtype dtype;
} dtypes[] = {
    {"BF16", FLASH_KDA_BF16}, {"F32", FLASH_KDA_F32}, {"I32", FLASH_KDA_I32},
    {"I64", FLASH_KDA_I64},   {"F16", FLASH_KDA_F16}, {"F64", FLASH_KDA_F64},
};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

const char *safetensors_dtype(int32_t dtype)
{
    for (int i = 0; i < DTYPES; i++)
        if ((int32_t)dtypes[i].dtype == dtype) return dtypes[i].name;
    return "another dtype";
}

static flash_kda_dtype dtype_of(const member *m)
{
    for (int i = 0; i < DTYPES; i++) {
        const int length = (int)strlen(dtypes[i].name);
        if (quoted(m) == length + 2 && m->value[0] == '"' &&
            memcmp(m->value + 1, dtypes[i].name, (size_t)length) == 0)
            return dtypes[i].dtype;
    }
    return FLASH_KDA_OTHER;
}

static void say_missing(const safetensors *file, const char *name, char why[256])
{
    enum { MOST = 256, BYTES = 64 };
    char *words = allocate(MOST, BYTES), hint[HINT_BYTES];
    const char **names = allocate(MOST, sizeof *names);
    int count = 0;
    member m;
    for (const char *at = file->header + 1; count < MOST && next_member(at, &m); at = m.end) {
        snprintf(words + count * BYTES, BYTES, "%.*s", m.key_length < BYTES ? m.key_length : BYTES, m.key);
        names[count] = words + count * BYTES;
        count++;
    }
    snprintf(why, 256, "%.64s is missing in the file%s", name, nearest_hint(name, names, count, hint));
    free(names);
    free(words);
}

/* The bytes of a tensor; -1 if they, or the strides of its shape, leave 63 bits. */
static int64_t bytes_of(size_t element, const int64_t *shape, int ndim)
{
    int64_t bytes = (int64_t)element, room = bytes; /* room: if sizes of 0 were 1, as strides count them */
    for (int i = 0; i < ndim; i++) {
        if (__builtin_mul_overflow(room, shape[i] ? shape[i] : 1, &room)) return -1;
        bytes *= shape[i]; /* at most room */
    }
    return bytes;
}

flash_kda_tensor safetensors_get(const safetensors *file, const char *name, char why[256])
{
    const flash_kda_tensor none = {0};
    member entry, dtype, sizes, range;
    int64_t shape[4], offsets[2];
    if (!find_member(file->header, name, &entry)) {
        say_missing(file, name, why);
        return none;
    }
    if (!find_member(entry.value, "dtype", &dtype) || !find_member(entry.value, "shape", &sizes) ||
        !find_member(entry.value, "data_offsets", &range)) {
        snprintf(why, 256, "%.64s must have a dtype, a shape and data_offsets in the file's header", name);
        return none;
    }
    const flash_kda_dtype type = dtype_of(&dtype);
    if (type == FLASH_KDA_OTHER) {
        snprintf(why, 256, "%.64s has dtype %.*s; it must be BF16, F16, F32, F64, I32 or I64", name,
                 quoted(&dtype), dtype.value);
        return none;
    }
    const int ndim = numbers_of(sizes.value, shape, 4);
    if (ndim < 0) {
        snprintf(why, 256, "%.64s has shape %.*s; it must be a list of at most 4 whole numbers", name,
                 quoted(&sizes), sizes.value);
        return none;
    }
    const int64_t bytes = bytes_of(dtype_size(type), shape, ndim);
    if (bytes < 0) {
        snprintf(why, 256, "%.64s has shape %.*s, which is more than any memory has", name, quoted(&sizes),
                 sizes.value);
        return none;
    }
    if (numbers_of(range.value, offsets, 2) != 2 || offsets[0] > offsets[1] ||
        (size_t)offsets[1] > file->data_size) {
        snprintf(why, 256, "%.64s has data_offsets %.*s; they must be a begin and an end in [0, %zu]", name,
                 quoted(&range), range.value, file->data_size);
        return none;
    }
    if (offsets[1] - offsets[0] != bytes) {
        snprintf(why, 256, "%.64s has data_offsets %.*s, %lld bytes; its shape %.*s of %s has %lld", name,
                 quoted(&range), range.value, (long long)(offsets[1] - offsets[0]), quoted(&sizes),
                 sizes.value, safetensors_dtype((int32_t)type), (long long)bytes);
        return none;
    }
    return tensor_of(file->data + offsets[0], type, ndim, shape);
}
