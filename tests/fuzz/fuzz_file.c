/* The reader of safetensors files, and of recorded activations in them. The first byte says whether the
 * length of the header is made to fit, and whether data follows; the rest is the file. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"
#include "recorded.h"
#include "safetensors.h"

enum { AS_IT_IS = 1, NO_DATA = 2, TOO_LONG = 4, TOO_SHORT = 8, DATA_BYTES = 4096 };

static int file = -1;
static char path[64];

static void put(const void *bytes, size_t count)
{
    if (write(file, bytes, count) != (ssize_t)count) wrong("the file can't be written");
}

static void write_file(const uint8_t *data, size_t size)
{
    static const char filler[DATA_BYTES] = {0x3f};
    if (file < 0) {
        file = memfd_create("fuzz_file", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    if (file < 0 || ftruncate(file, 0) != 0 || lseek(file, 0, SEEK_SET) != 0) wrong("there is no file");
    const int mode = size ? data[0] : AS_IT_IS;
    if (size) data++, size--;
    if (mode & AS_IT_IS) {
        put(data, size);
        return;
    }
    const uint8_t *end = memchr(data, 0, size);
    const size_t header = end ? (size_t)(end - data) : size;
    const uint64_t length = header + (mode & TOO_LONG ? 1 : 0) - (mode & TOO_SHORT && header ? 1 : 0);
    put(&length, sizeof length);
    put(data, header);
    if (end) put(end + 1, size - header - 1);
    if (!(mode & NO_DATA)) put(filler, sizeof filler);
}

static unsigned sum_of(const void *bytes, size_t count)
{
    unsigned sum = 0;
    for (size_t i = 0; i < count; i++) sum += ((const unsigned char *)bytes)[i];
    return sum;
}

/* The reads above must happen. */
static void use(unsigned sum)
{
    __asm__ volatile("" : : "r"(sum));
}

static void read_tensors(safetensors *opened)
{
    static const char *const names[] = {
        "q", "k", "v", "g", "beta", "A_log", "dt_bias", "__metadata__", "", "dtype", "shape", "a\"b"};
    static const size_t sizes[] = {
        [FLASH_KDA_BF16] = 2, [FLASH_KDA_F32] = 4, [FLASH_KDA_I32] = 4,   [FLASH_KDA_I64] = 8,
        [FLASH_KDA_F16] = 2,  [FLASH_KDA_F64] = 8, [FLASH_KDA_OTHER] = 4,
    };
    unsigned sum = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char why[256] = "";
        const flash_kda_tensor t = safetensors_get(opened, names[i], why);
        if (!t.data && !*why) wrong("no sentence about a tensor that can't be read");
        if (!t.data) continue;
        size_t bytes = sizes[t.dtype];
        for (int d = 0; d < t.ndim; d++) bytes *= (size_t)t.shape[d];
        sum += sum_of(t.data, bytes);
    }
    use(sum);
}

static void read_all(void *unused)
{
    (void)unused;
    char why[256] = "";
    safetensors *opened = safetensors_open(path, why);
    if (opened)
        read_tensors(opened);
    else if (!*why)
        wrong("no sentence about a file that can't be opened");
    safetensors_close(opened);
    *why = 0;
    problem *p = recorded_load(path, why);
    if (!p && !*why) wrong("no sentence about a file without activations");
    if (!p) return;
    const size_t channels = (size_t)problem_rows(p) * DIM;
    use(sum_of(p->q, 2 * channels) + sum_of(p->k, 2 * channels) + sum_of(p->v, 2 * channels) +
        sum_of(p->g, 2 * channels) + sum_of(p->dt_bias, (size_t)p->heads * DIM * sizeof(float)));
    problem_free(p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    write_file(data, size);
    const int status = run_until_exit(read_all, NULL);
    if (status != -1) wrong("the reader ended the process with status %d", status);
    return 0;
}
