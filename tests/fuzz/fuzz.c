#include "fuzz.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

uint64_t take(input *from, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes && from->left; i++, from->at++, from->left--)
        value |= (uint64_t)*from->at << 8 * i;
    return value;
}

int64_t take_between(input *from, int64_t least, int64_t most)
{
    const uint64_t count = (uint64_t)most - (uint64_t)least + 1;
    const int bytes = !count ? 8 : count <= 1 << 8 ? 1 : count <= 1 << 16 ? 2 : 8;
    const uint64_t value = take(from, bytes);
    return (int64_t)((uint64_t)least + (count ? value % count : value));
}

bool take_bool(input *from)
{
    return take(from, 1) & 1;
}

int64_t take_hostile(input *from)
{
    static const int64_t edges[] = {0,
                                    1,
                                    -1,
                                    2,
                                    3,
                                    15,
                                    16,
                                    17,
                                    127,
                                    128,
                                    129,
                                    256,
                                    65536,
                                    INT64_MAX,
                                    INT64_MIN,
                                    INT32_MAX,
                                    INT32_MIN,
                                    (int64_t)INT32_MAX + 1,
                                    (int64_t)1 << 33,
                                    (int64_t)1 << 56,
                                    (int64_t)1 << 62,
                                    INT32_MAX - 1024,
                                    INT32_MAX - 1023,
                                    INT32_MAX / 128,
                                    INT32_MAX / 128 + 1};
    const uint64_t which = take(from, 1);
    if (which < 128) return edges[which % (sizeof edges / sizeof *edges)];
    return (int64_t)take(from, 8);
}

void wrong(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("wrong: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    abort();
}
