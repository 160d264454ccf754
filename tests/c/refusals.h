/* What the tests of refused calls share. */
#ifndef TESTS_REFUSALS_H
#define TESTS_REFUSALS_H

#include "harness.h"

/* A sentence, which is valid until the next call of text(). */
const char *text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* flash_kda_fwd() refuses the parameters with that sentence, and writes to no buffer of the call. */
void expect_refusal(const call *c, const flash_kda_fwd_params *params, flash_kda_status want,
                    const char *sentence);

/* REFUSED(call, status, sentence, changes): the call's parameters `p` after the changes are refused. */
#define REFUSED(c, status, sentence, ...)                                                                    \
    do {                                                                                                     \
        flash_kda_fwd_params p = (c).params;                                                                 \
        __VA_ARGS__;                                                                                         \
        expect_refusal(&(c), &p, FLASH_KDA_##status, sentence);                                              \
    } while (0)

/* Moves a tensor, which is at that offset in the parameters, by some bytes, and expects the sentence about
 * alignment. */
void expect_misaligned(const call *c, size_t tensor_offset, const char *name, size_t by, size_t alignment);
#define MISALIGNED(c, name, by, alignment)                                                                   \
    expect_misaligned(&(c), offsetof(flash_kda_fwd_params, name), #name, by, alignment)

#endif
