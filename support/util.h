/* Small functions that the tests, the command and the benchmarks share. */
#ifndef SUPPORT_UTIL_H
#define SUPPORT_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "flash_kda.h"

enum { DIM = 128 }; /* K and V */

/* Prints "error: sentence" to stderr, and ends the process with status 2. */
void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Ends the process with the library's sentence unless the status is FLASH_KDA_OK. */
void must(flash_kda_status status);

/* calloc() that does not fail. */
void *allocate(size_t count, size_t size);

/* Bytes of an element of a flash_kda_dtype; 4 for numbers that are none. */
size_t dtype_size(int32_t dtype);

/* Rounds to the nearest bf16, ties to even. NaN stays NaN. */
uint16_t bf16_from_float(float value);
float float_from_bf16(uint16_t bits);

/* splitmix64: a stream of random numbers that is the same on every machine. */
typedef struct rng {
    uint64_t state;
    double spare; /* the second of a pair of normal numbers */
    bool has_spare;
} rng;

rng rng_seed(uint64_t seed);
uint64_t rng_bits(rng *r);
double rng_uniform(rng *r, double low, double high);
double rng_normal(rng *r);

double now_seconds(void);
double median(double *values, int count); /* reorders values */

/* Reads "cpu", "cuda" or "cuda:N". False for any other text. */
bool parse_device(const char *text, flash_kda_device *device);

/* Reads "auto", "never", "always" or "mixed". False for any other text. */
bool parse_cut(const char *text, flash_kda_cut *cut);

/* Writes "cpu" or "cuda:N", and returns text. */
const char *device_text(flash_kda_device device, char text[16]);

#endif
