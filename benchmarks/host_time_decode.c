/* Host time of flash_kda_decode(), flash_kda_decode_layer() and flash_kda_apply(). These calls keep no plan,
 * so each call of a kind costs what every other costs, once the kernels are loaded. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>

#include "host_time.h"

static flash_kda_status decode(const void *params)
{
    return flash_kda_decode(params);
}

static flash_kda_status decode_layer(const void *params)
{
    return flash_kda_decode_layer(params);
}

static flash_kda_status apply(const void *params)
{
    return flash_kda_apply(params);
}

static void time_call(const char *what, pretended_decode s, flash_kda_status (*call)(const void *),
                      const void *params, int repeats, const pretended_counts *counts)
{
    double *times = allocate((size_t)repeats, sizeof *times);
    must(call(params)); /* loads kernels */
    const pretended_counts before = *counts;
    must(call(params));
    const unsigned long launches = counts->launches - before.launches, calls = counts->calls - before.calls;
    for (int i = 0; i < repeats; i++) {
        const double start = now_seconds();
        const flash_kda_status status = call(params);
        times[i] = 1e6 * (now_seconds() - start);
        must(status);
    }
    const double us = median(times, repeats);
    free(times);
    printf("%-32s %9lld %5lld %6lld %9.2f %-6s %8lu %6lu\n", what, (long long)s.sequences, (long long)s.heads,
           (long long)s.tokens, us, verdict(us, MOST_AGAIN_US), launches, calls);
    fflush(stdout);
}

void time_decode_calls(int repeats, const pretended_counts *counts)
{
    static const struct {
        const char *what;
        pretended_decode of;
    } shapes[] = {
        {"decode", {.sequences = 1, .tokens = 1, .heads = 12}},
        {"decode", {.sequences = 256, .tokens = 1, .heads = 32}},
        {"decode", {.sequences = 256, .tokens = 4, .heads = 32}},
        {"decode, each state", {.sequences = 256, .tokens = 4, .heads = 32, .writes = FLASH_KDA_WRITE_EACH}},
        {"decode, records",
         {.sequences = 256, .tokens = 4, .heads = 32, .writes = FLASH_KDA_WRITE_NONE, .has_records = true}},
        {"decode, a tree, records",
         {.sequences = 256,
          .tokens = 8,
          .heads = 32,
          .writes = FLASH_KDA_WRITE_NONE,
          .has_records = true,
          .is_tree = true}},
    };
    printf("\n%-32s %9s %5s %6s %9s %-6s %8s %6s\n", "call", "sequences", "heads", "tokens", "again us", "",
           "launches", "driver");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const flash_kda_decode_params p = pretended_decode_params(shapes[i].of);
        time_call(shapes[i].what, shapes[i].of, decode, &p, repeats, counts);
    }
    for (int tokens = 1; tokens <= 4; tokens += 3) {
        const pretended_decode s = {.sequences = 256, .tokens = tokens, .heads = 32};
        const flash_kda_decode_layer_params p = pretended_layer_params(s);
        time_call("decode_layer", s, decode_layer, &p, repeats, counts);
    }
    const pretended_decode s = {.sequences = 256, .tokens = 4, .heads = 32};
    const flash_kda_apply_params p = pretended_apply_params(s);
    time_call("apply", s, apply, &p, repeats, counts);
}
