#include "refusals.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *text(const char *format, ...)
{
    static char words[512];
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    return words;
}

int64_t *copied(const int64_t *values, int64_t count)
{
    int64_t *copy = allocate((size_t)count, sizeof *copy);
    memcpy(copy, values, (size_t)count * sizeof *copy);
    return copy;
}

const volatile int32_t *unaligned_word(void)
{
    static const volatile int32_t words[2] = {0, 0};
    return (const volatile int32_t *)((const volatile char *)words + 2);
}

void expect_sentence(flash_kda_status got, flash_kda_status want, const char *sentence)
{
    CHECK(got == want, "%s; it must be %s", flash_kda_status_string(got), flash_kda_status_string(want));
    CHECK(strcmp(flash_kda_last_error(), sentence) == 0, "the sentence is: %s", flash_kda_last_error());
}

void expect_refusal(const call *c, const flash_kda_fwd_params *params, flash_kda_status want,
                    const char *sentence)
{
    trying("expected: %s", sentence);
    expect_sentence(flash_kda_fwd(params), want, sentence);
    must(flash_kda_synchronize(test.device, NULL));
    CHECK(call_untouched(c), "a buffer was written");
}
