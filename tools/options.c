/* What the values of options mean, and the sentences about wrong ones. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "nearest.h"
#include "problem.h"

enum { MAX_SEQUENCES = 65536, MAX_HEADS = 4096, MAX_TOKENS = 1 << 24 };

flash_kda_device device_option(const char *text)
{
    flash_kda_device device;
    if (!parse_device(text, &device)) die("--device is '%s'; it must be cpu or cuda:N", text);
    return device;
}

flash_kda_cut cut_option(const char *text)
{
    flash_kda_cut cut;
    if (!parse_cut(text, &cut)) die("--cut is '%s'; it must be auto, never, always or mixed", text);
    return cut;
}

int64_t number_option(const char *option, const char *text, int64_t max)
{
    char *end;
    long long number = strtoll(text, &end, 10);
    if (end == text || *end || number < 1 || number > max)
        die("%s is '%s'; it must be a whole number from 1 to %lld", option, text, (long long)max);
    return number;
}

int64_t heads_option(const char *text)
{
    return number_option("--heads", text, MAX_HEADS);
}

int64_t default_heads(flash_kda_device device)
{
    return device.type == FLASH_KDA_CPU ? 8 : 96;
}

int64_t lengths_option(const char *text, int64_t **lengths)
{
    int64_t count = 0, *found = allocate(MAX_SEQUENCES, sizeof *found);
    const char *at = text;
    for (;;) {
        char *end;
        long long tokens = strtoll(at, &end, 10), times = 1;
        if (end == at || tokens < 0 || tokens > MAX_TOKENS) break;
        if (*end == 'x') {
            at = end + 1;
            times = strtoll(at, &end, 10);
            if (end == at || times < 1) break;
        }
        if (times > MAX_SEQUENCES - count) die("--lengths has more than %d sequences", MAX_SEQUENCES);
        while (times-- > 0) found[count++] = tokens;
        *lengths = found;
        if (*end == 0) return count;
        if (*end != ',') break;
        at = end + 1;
    }
    die("--lengths is '%s'; it must be like 8192, or 1300,547, or 1024x8", text);
}

void refuse_option(const char *command, char **argv, const struct option *options, int found)
{
    enum { MOST = 32 };
    const char *names[MOST];
    char hint[HINT_BYTES], word[64];
    int count = 0;
    const char *option = optind > 0 && argv[optind - 1] ? argv[optind - 1] : "";
    if (found == ':') die("%s needs a value; flash-kda %s --help explains it", option, command);
    for (; count < MOST && options[count].name; count++) names[count] = options[count].name;
    snprintf(word, sizeof word, "%.*s", (int)strcspn(option, "="), option);
    const char *nearest = nearest_name(word + strspn(word, "-"), names, count);
    hint[0] = 0;
    if (nearest) snprintf(hint, sizeof hint, ", did you mean --%.63s?", nearest);
    die("'%s' is not an option here%s%s flash-kda %s --help lists them", option, hint, nearest ? "" : ";",
        command);
}

flash_kda_fwd_params shape_params(const int64_t *lengths, int64_t count, int64_t heads)
{
    flash_kda_fwd_params p = {.struct_size = sizeof p};
    int64_t tokens = 0;
    for (int64_t n = 0; n < count; n++) {
        tokens += lengths[n];
        if (lengths[n] > p.max_seqlen) p.max_seqlen = lengths[n];
    }
    const int64_t rows[] = {1, tokens, heads, DIM}, bias[] = {heads, DIM}, borders = count + 1;
    p.q = p.k = p.v = p.g = p.out = tensor_of(NULL, FLASH_KDA_BF16, 4, rows);
    p.beta = tensor_of(NULL, FLASH_KDA_BF16, 3, rows);
    p.A_log = tensor_of(NULL, FLASH_KDA_F32, 1, bias);
    p.dt_bias = tensor_of(NULL, FLASH_KDA_F32, 2, bias);
    if (count > 1) p.cu_seqlens = tensor_of(NULL, FLASH_KDA_I64, 1, &borders);
    return p;
}
