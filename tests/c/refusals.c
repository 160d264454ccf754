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

void expect_refusal(const call *c, const flash_kda_fwd_params *params, flash_kda_status want,
                    const char *sentence)
{
    trying("expected: %s", sentence);
    flash_kda_status got = flash_kda_fwd(params);
    CHECK(got == want, "%s; it must be %s", flash_kda_status_string(got), flash_kda_status_string(want));
    CHECK(strcmp(flash_kda_last_error(), sentence) == 0, "the sentence is: %s", flash_kda_last_error());
    must(flash_kda_synchronize(test.device, NULL));
    CHECK(call_untouched(c), "a buffer was written");
}

void expect_misaligned(const call *c, size_t tensor_offset, const char *name, size_t by, size_t alignment)
{
    flash_kda_fwd_params p = c->params;
    flash_kda_tensor *t = (flash_kda_tensor *)((char *)&p + tensor_offset);
    t->data = (char *)t->data + by;
    expect_refusal(c, &p, FLASH_KDA_INVALID_VALUE,
                   text("%s is at address %p; it must be aligned to %zu bytes", name, t->data, alignment));
}
