#define _POSIX_C_SOURCE 200809L
#include "util.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void die(const char *format, ...)
{
    va_list args;
    fflush(stdout);
    fputs("error: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(2);
}

void must(flash_kda_status status)
{
    if (status != FLASH_KDA_OK) die("%s", flash_kda_last_error());
}

void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory) die("no memory for %zu items of %zu bytes", count, size);
    return memory;
}

uint16_t bf16_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float float_from_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

rng rng_seed(uint64_t seed)
{
    return (rng){.state = seed};
}

uint64_t rng_bits(rng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

double rng_uniform(rng *r, double low, double high)
{
    return low + (high - low) * ((double)(rng_bits(r) >> 11) * 0x1p-53);
}

double rng_normal(rng *r)
{
    if (r->has_spare) {
        r->has_spare = false;
        return r->spare;
    }
    double radius = sqrt(-2.0 * log(1.0 - rng_uniform(r, 0.0, 1.0)));
    double angle = rng_uniform(r, 0.0, 6.283185307179586);
    r->spare = radius * sin(angle);
    r->has_spare = true;
    return radius * cos(angle);
}

double now_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, ascending);
    return count % 2 ? values[count / 2] : 0.5 * (values[count / 2 - 1] + values[count / 2]);
}

bool parse_device(const char *text, flash_kda_device *device)
{
    if (strcmp(text, "cpu") == 0) {
        *device = (flash_kda_device){FLASH_KDA_CPU, 0};
        return true;
    }
    if (strncmp(text, "cuda", 4) != 0) return false;
    *device = (flash_kda_device){FLASH_KDA_CUDA, 0};
    if (text[4] == 0) return true;
    if (text[4] != ':' || text[5] < '0' || text[5] > '9') return false;
    char *end;
    long index = strtol(text + 5, &end, 10);
    if (*end || index > 1 << 20) return false;
    device->index = (int32_t)index;
    return true;
}

const char *device_text(flash_kda_device device, char text[16])
{
    if (device.type == FLASH_KDA_CPU)
        snprintf(text, 16, "cpu");
    else
        snprintf(text, 16, "cuda:%d", device.index);
    return text;
}

bool parse_cut(const char *text, flash_kda_cut *cut)
{
    static const char *const names[] = {
        [FLASH_KDA_CUT_AUTO] = "auto",
        [FLASH_KDA_CUT_NEVER] = "never",
        [FLASH_KDA_CUT_ALWAYS] = "always",
        [FLASH_KDA_CUT_MIXED] = "mixed",
    };
    for (int i = 0; i < (int)(sizeof names / sizeof *names); i++) {
        if (strcmp(text, names[i]) != 0) continue;
        *cut = (flash_kda_cut)i;
        return true;
    }
    return false;
}

size_t dtype_size(int32_t dtype)
{
    switch (dtype) {
    case FLASH_KDA_BOOL: return 1;
    case FLASH_KDA_BF16:
    case FLASH_KDA_F16: return 2;
    case FLASH_KDA_I64:
    case FLASH_KDA_F64: return 8;
    default: return 4;
    }
}
