#include "safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct safetensors {
    char *header; /* text, ends with 0 */
    char *data;
    size_t data_size;
};

static bool read_file(FILE *stream, safetensors *file)
{
    unsigned char length[8];
    uint64_t header_size = 0;
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
        snprintf(why, 256, "%s can't be opened", path);
        return NULL;
    }
    safetensors *file = allocate(1, sizeof *file);
    bool good = read_file(stream, file) && file->header[0] == '{';
    fclose(stream);
    if (good) return file;
    snprintf(why, 256, "%s is not a safetensors file, or a part of one", path);
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

static int32_t dtype_of(const char *text)
{
    static const struct {
        const char *name;
        int32_t dtype;
    } types[] = {
        {"\"BF16\"", FLASH_KDA_BF16}, {"\"F32\"", FLASH_KDA_F32}, {"\"I32\"", FLASH_KDA_I32},
        {"\"I64\"", FLASH_KDA_I64},   {"\"F16\"", FLASH_KDA_F16}, {"\"F64\"", FLASH_KDA_F64},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strncmp(text, types[i].name, strlen(types[i].name)) == 0) return types[i].dtype;
    return FLASH_KDA_OTHER;
}

/* Up to max whole numbers of a list like [1, 2, 3]; -1 if it is anything else. */
static int numbers_of(const char *text, int64_t *numbers, int max)
{
    int count = 0;
    if (*text++ != '[') return -1;
    for (;;) {
        char *end;
        text += strspn(text, " ,");
        if (*text == ']') return count;
        long long number = strtoll(text, &end, 10);
        if (end == text || count == max || number < 0) return -1;
        numbers[count++] = number;
        text = end;
    }
}

/* Where the value of "key": starts, between text and the end of that tensor's {...}. */
static const char *value_of(const char *text, const char *key)
{
    const char *found = strstr(text, key), *end = strchr(text, '}');
    if (!found || !end || found > end) return NULL;
    found += strlen(key);
    return found + strspn(found, " :");
}

flash_kda_tensor safetensors_get(const safetensors *file, const char *name)
{
    const flash_kda_tensor none = {0};
    char key[64];
    int64_t shape[4], offsets[2];
    snprintf(key, sizeof key, "\"%s\"", name);
    const char *entry = strstr(file->header, key);
    if (!entry || !(entry = strchr(entry + strlen(key), '{'))) return none;
    const char *dtype = value_of(entry, "\"dtype\""), *sizes = value_of(entry, "\"shape\""),
               *range = value_of(entry, "\"data_offsets\"");
    if (!dtype || !sizes || !range) return none;
    int ndim = numbers_of(sizes, shape, 4);
    if (ndim < 0 || numbers_of(range, offsets, 2) != 2) return none;

    const flash_kda_dtype type = (flash_kda_dtype)dtype_of(dtype);
    size_t bytes = dtype_size(type);
    int64_t room = (int64_t)bytes; /* bytes, if sizes of 0 were 1: strides are such products */
    for (int i = 0; i < ndim; i++) {
        if (__builtin_mul_overflow(room, shape[i] ? shape[i] : 1, &room)) return none;
        bytes *= (size_t)shape[i];
    }
    bool inside = offsets[0] <= offsets[1] && (size_t)offsets[1] <= file->data_size &&
                  (size_t)(offsets[1] - offsets[0]) == bytes;
    /* Only now are the sizes known to be so small that strides and pointers can be computed with them. */
    return inside ? tensor_of(file->data + offsets[0], type, ndim, shape) : none;
}
