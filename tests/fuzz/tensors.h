/* Tensors of a call that a harness makes of bytes: their layouts, their memory, and what the call has done to
 * it. Every tensor gets exactly the bytes from its first to its last element in memory, so AddressSanitizer
 * sees each access beside it. */
#ifndef TESTS_FUZZ_TENSORS_H
#define TESTS_FUZZ_TENSORS_H

#include "fuzz.h"
#include "util.h"

enum { MOST_BYTES = 4 << 20, MOST_INTEGERS = 24 };

/* The numbers of the first tensors of every call. */
enum { Q, K, V, G, BETA, TOKEN_INPUTS };

/* Of what kind the inputs of a call are. */
typedef struct input_kinds {
    int32_t gate, beta_kind, qk_is_normalised;
} input_kinds;

typedef struct memory {
    unsigned char *bytes, *before; /* `before`: a copy of the contents before the call */
    size_t count;
} memory;

/* A contiguous tensor without memory. The sizes may be hostile. */
flash_kda_tensor shaped(flash_kda_dtype dtype, int ndim, const int64_t *shape);

flash_kda_dtype take_integer_type(input *from);

/* Other strides for a tensor of tokens: gaps, another order in memory, or backwards. */
void take_layout(flash_kda_tensor *t, input *from);

/* The bytes of a tensor from its first to its last element in memory, and those in front of element 0;
 * SIZE_MAX if no memory has them. */
size_t bytes_of(const flash_kda_tensor *t, size_t *in_front);

/* Whether every call with strides that reach so far is refused, so that there need be no memory. */
bool is_too_far(const flash_kda_tensor *t);

/* The elements of a tensor; 0 if it is absent. */
int64_t count_of(const flash_kda_tensor *t);

memory allocate_memory(size_t count);
void keep_copy(memory *m);
void forget(memory *m);

/* Random numbers, drawn once, since drawing takes longer than a call. */
void fill(const memory *m, int32_t dtype, rng *numbers);

/* Whether a kind asks for other numbers in this tensor than any: log decays that are negative, write
 * strengths that are not, keys of norm 1. */
bool is_of_a_kind(int which, input_kinds kinds);

/* Makes the numbers of a tensor what its kind asks for. */
void adapt(const memory *m, int32_t dtype, int which, input_kinds kinds);

/* Fills a tensor of integers, all behind the last one of MOST_INTEGERS with the last one. */
void fill_integers(const memory *m, int32_t dtype, const int64_t *integers);

/* Element i of a contiguous tensor of integers. */
int64_t integer_at(const flash_kda_tensor *t, int64_t i);

/* Ends the process unless flash_kda_last_error() has a sentence about the call, which was refused. */
void check_sentence(const char *call);

/* Whether all values have magnitudes that fp32 has. */
bool all_ordinary(const double *values, int64_t count);

/* A copy of the elements `first` to `first + count` - 1 of a tensor, which the caller frees. */
void *copy_elements(const flash_kda_tensor *t, int64_t first, int64_t count);

/* Sets the marks of all bytes of a tensor's elements, if the tensor lies in m; `marks` has one for each byte
 * of m. Returns whether one was set before. Without `sets` it looks alone. */
bool mark_bytes(const flash_kda_tensor *t, const memory *m, unsigned char *marks, bool sets);

/* Puts back what m held before the call in the elements `first` to `first + count` - 1 of an output, if the
 * output lies in m. */
void put_back(const flash_kda_tensor *t, const memory *m, int64_t first, int64_t count);

#endif
