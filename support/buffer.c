#include "buffer.h"

#include <string.h>

/* AddressSanitizer has red zones of its own on either side, which reads must not touch either. */
#if defined(__SANITIZE_ADDRESS__)
enum { BAND = 0 };
#else
enum { BAND = 4096 };
#endif

static const flash_kda_device cpu = {FLASH_KDA_CPU, 0};

void *buffer_start(const buffer *b)
{
    return b->base ? b->base + BAND : NULL;
}

void buffer_write(const buffer *b, const void *contents)
{
    must(flash_kda_copy(b->device, buffer_start(b), cpu, contents, b->bytes));
}

unsigned char *buffer_read(const buffer *b)
{
    unsigned char *contents = allocate(b->bytes, 1);
    must(flash_kda_copy(cpu, contents, b->device, buffer_start(b), b->bytes));
    return contents;
}

void buffer_create(buffer *b)
{
    void *memory;
    must(flash_kda_malloc(b->device, b->bytes + 2 * BAND, &memory));
    b->base = memory;
    unsigned char bands[BAND + 1];
    memset(bands, b->band, sizeof bands);
    must(flash_kda_copy(b->device, b->base, cpu, bands, BAND));
    must(flash_kda_copy(b->device, b->base + BAND + b->bytes, cpu, bands, BAND));
}

void buffer_free(buffer *b)
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

bool buffer_is_intact(const buffer *b)
{
    unsigned char band[BAND + 1];
    if (!b->base) return true;
    must(flash_kda_copy(cpu, band, b->device, b->base, BAND));
    if (!all_bytes(band, BAND, b->band)) return false;
    must(flash_kda_copy(cpu, band, b->device, b->base + BAND + b->bytes, BAND));
    return all_bytes(band, BAND, b->band);
}
