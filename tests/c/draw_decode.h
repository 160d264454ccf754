/* Draws calls of flash_kda_decode() and flash_kda_apply() with every option. */
#ifndef TESTS_DRAW_DECODE_H
#define TESTS_DRAW_DECODE_H

#include "decode_call.h"
#include "draw.h"

/* A problem of at most that many tokens of all heads. A wild one has numbers in its tensors of integers that
 * only a GPU takes. */
decode_problem draw_decode(rng *r, int64_t most_tokens, bool is_wild);

decode_options draw_decode_options(rng *r, const decode_problem *d);

/* The same problem with numbers that are allowed and mean the same. A sequence of more than 16 tokens becomes
 * two, of which the second has no state. */
decode_problem allowed_decode(const decode_problem *d);

/* What a drawn call is, for a message. */
const char *describe_decode(const decode_problem *d, const decode_options *options, char text[240]);

#endif
