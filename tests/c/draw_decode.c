#include "draw_decode.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = FLASH_KDA_MAX_DECODE_TOKENS, MOST_SEQUENCES = 6, LONGER = 8 };

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ---- Tokens -------------------------------------------------------------------------------------------- */

static int64_t draw_length(rng *r, int64_t most)
{
    if (one_in(r, 10) || most < 1) return 0;
    if (one_in(r, 3)) return 1;
    if (one_in(r, 6)) return smaller(MOST, most);
    return 1 + below(r, smaller(one_in(r, 2) ? 5 : MOST, most));
}

static problem *draw_tokens(rng *r, int64_t most_tokens, bool is_wild)
{
    static const int64_t groups[] = {1, 1, 1, 2, 3, 4};
    const int64_t shared = groups[below(r, 6)], qk_heads = 1 + below(r, shared > 2 ? 1 : 3),
                  heads = shared * qk_heads;
    int64_t lengths[MOST_SEQUENCES], left = most_tokens / heads;
    const int64_t count = 1 + below(r, MOST_SEQUENCES);
    problem *p;
    if (one_in(r, 2)) {
        p = problem_create(count, draw_length(r, left / count), heads);
    } else {
        for (int64_t n = 0; n < count; n++) {
            lengths[n] = draw_length(r, left);
            if (is_wild && one_in(r, 4)) lengths[n] = MOST + 1 + below(r, LONGER);
            left -= lengths[n];
        }
        p = problem_create_ragged(lengths, count, heads);
    }
    problem_group_heads(p, shared);
    const int options = draw_subset(r, ALL_OPTIONS);
    draw_contents(r, (drawing){.options = options, .tokens = most_tokens}, p);
    return p;
}

/* The tokens of the longest sequence that a call computes. */
static int64_t longest_of(const decode_problem *d)
{
    int64_t longest = 0;
    for (int64_t n = 0; n < d->tokens->sequences; n++)
        if (decode_length(d, n) > longest) longest = decode_length(d, n);
    return longest;
}

/* ---- The pool ------------------------------------------------------------------------------------------ */

/* Every slot belongs to one token of one sequence. Some entries are below first_slot. */
static void draw_slots(rng *r, decode_problem *d)
{
    problem *p = d->tokens;
    const bool each = d->write_states == FLASH_KDA_WRITE_EACH && !d->has_written,
               has_indices = each || !one_in(r, 4);
    d->slot_columns = each ? longest_of(d) + below(r, 3) : 1;
    if (d->slot_columns == 0) d->slot_columns = 1;
    const int64_t count = p->sequences * d->slot_columns, first = has_indices ? below(r, 3) : 0,
                  slots = first + count + below(r, 4);
    p->slots = slots;
    free(p->initial_state);
    p->initial_state = allocate((size_t)(slots * p->heads) * DIM * DIM, sizeof *p->initial_state);
    for (int64_t i = 0; i < slots * p->heads * DIM * DIM; i++)
        p->initial_state[i] = (float)(rng_bits(r) >> 57) * 0x1p-6f - 1.0f; /* exact in bf16 */
    if (!has_indices) return;
    d->first_slot = first;
    int64_t *all = allocate((size_t)slots, sizeof *all);
    for (int64_t i = first; i < slots; i++) all[i - first] = i;
    shuffle(r, all, slots - first);
    d->state_indices = allocate((size_t)count, sizeof *all);
    for (int64_t i = 0; i < count; i++)
        d->state_indices[i] = one_in(r, 6) ? first - 1 - below(r, first + 3) : all[i];
    free(all);
    if (!each || one_in(r, 3)) return;
    d->num_accepted_tokens = allocate((size_t)p->sequences, sizeof *all);
    for (int64_t n = 0; n < p->sequences; n++) d->num_accepted_tokens[n] = 1 + below(r, d->slot_columns);
}

/* As above, for written_states. Some entries are negative. */
static void draw_written(rng *r, decode_problem *d)
{
    const problem *p = d->tokens;
    const bool each = d->write_states == FLASH_KDA_WRITE_EACH;
    int64_t begin, end, states = p->sequences;
    problem_sequence(p, p->sequences - 1, &begin, &end);
    if (each) states = end;
    if (one_in(r, 3)) {
        d->written_slots = states + below(r, 3);
        d->written_columns = 1;
        return;
    }
    d->written_columns = each ? longest_of(d) + below(r, 3) : 1;
    const int64_t count = p->sequences * d->written_columns;
    d->written_slots = count + below(r, 4);
    d->written_indices = allocate((size_t)d->written_slots + 1, sizeof *d->written_indices);
    for (int64_t i = 0; i < d->written_slots; i++) d->written_indices[i] = i;
    shuffle(r, d->written_indices, d->written_slots);
    for (int64_t i = 0; i < count; i++)
        if (one_in(r, 6)) d->written_indices[i] = -1 - below(r, 3);
}

/* ---- Trees --------------------------------------------------------------------------------------------- */

static int64_t draw_parent(rng *r, int64_t i)
{
    if (one_in(r, 8)) return -1 - below(r, 20);
    if (one_in(r, 2)) return i - 1;
    return below(r, i + 1) - 1;
}

static void draw_tree(rng *r, decode_problem *d)
{
    d->parent_columns = longest_of(d) + below(r, 3);
    const int64_t count = d->tokens->sequences * d->parent_columns;
    d->parents = allocate((size_t)count + 1, sizeof *d->parents);
    for (int64_t i = 0; i < count; i++) d->parents[i] = draw_parent(r, i % d->parent_columns);
    /* A number beyond a sequence's tokens may be any. */
    for (int64_t n = 0; n < d->tokens->sequences; n++)
        for (int64_t i = decode_length(d, n); i < d->parent_columns; i++)
            if (one_in(r, 2)) d->parents[n * d->parent_columns + i] = below(r, 1000);
}

/* ---- What is applied ----------------------------------------------------------------------------------- */

/* The tokens from the starting state to token `last`, in order. Returns how many there are. */
static int64_t path_to(const decode_problem *d, int64_t n, int64_t last, int64_t path[MOST])
{
    int64_t count = 0;
    for (int64_t i = last; i >= 0; i = decode_parent(d, n, i)) count++;
    for (int64_t i = last, at = count; i >= 0; i = decode_parent(d, n, i)) path[--at] = i;
    return count;
}

/* Every sequence gets the tokens up to one of its tokens, or none. */
static void draw_applied(rng *r, decode_problem *d)
{
    const int64_t N = d->tokens->sequences, longest = longest_of(d);
    d->record_columns = longest + below(r, 3);
    d->applied = allocate((size_t)N, sizeof *d->applied);
    const bool listed = d->parents || one_in(r, 3);
    d->accepted_columns = longest + below(r, 3);
    if (listed) d->accepted = allocate((size_t)(N * d->accepted_columns) + 1, sizeof *d->accepted);
    for (int64_t i = 0; listed && i < N * d->accepted_columns; i++)
        d->accepted[i] =
            one_in(r, 2) ? -1 - below(r, 9) : below(r, 1000); /* What is not applied may be any. */
    for (int64_t n = 0; n < N; n++) {
        int64_t path[MOST];
        d->applied[n] = path_to(d, n, below(r, decode_length(d, n) + 1) - 1, path);
        for (int64_t i = 0; listed && i < d->applied[n]; i++)
            d->accepted[n * d->accepted_columns + i] = path[i];
    }
}

/* ---- Numbers that only a GPU takes --------------------------------------------------------------------- */

static int64_t draw_beyond(rng *r, int64_t least)
{
    static const int64_t beyond[] = {0, 1, 17, 1 << 20, INT32_MAX};
    const int64_t x = beyond[below(r, 5)];
    return x == INT32_MAX ? x : least + x;
}

static void make_wild(rng *r, decode_problem *d)
{
    const int64_t N = d->tokens->sequences;
    for (int64_t i = 0; d->state_indices && i < N * d->slot_columns; i++)
        if (one_in(r, 5)) d->state_indices[i] = draw_beyond(r, d->tokens->slots);
    for (int64_t i = 0; d->written_indices && i < N * d->written_columns; i++)
        if (one_in(r, 5)) d->written_indices[i] = draw_beyond(r, d->written_slots);
    for (int64_t n = 0; d->num_accepted_tokens && n < N; n++)
        if (one_in(r, 4))
            d->num_accepted_tokens[n] = one_in(r, 2) ? -below(r, 9) : draw_beyond(r, d->slot_columns + 1);
    for (int64_t i = 0; d->parents && i < N * d->parent_columns; i++)
        if (one_in(r, 8)) d->parents[i] = draw_beyond(r, i % d->parent_columns);
}

/* Lists that are ended by what is no token, of which more than there is seems to be applied. */
static void make_wild_lists(rng *r, decode_problem *d)
{
    for (int64_t n = 0; d->applied && n < d->tokens->sequences; n++) {
        const int64_t end = d->applied[n];
        if (one_in(r, 6)) d->applied[n] = -1 - below(r, 9);
        if (!d->accepted || end >= d->accepted_columns || !one_in(r, 2)) continue;
        d->applied[n] = draw_beyond(r, end);
        d->accepted[n * d->accepted_columns + end] =
            one_in(r, 2) ? -1 - below(r, 9) : draw_beyond(r, d->record_columns);
    }
}

/* ---- All of it ----------------------------------------------------------------------------------------- */

decode_problem draw_decode(rng *r, int64_t most_tokens, bool is_wild)
{
    decode_problem d = {.tokens = draw_tokens(r, most_tokens, is_wild)};
    d.write_states = (flash_kda_write_states)below(r, 3);
    d.has_written = d.write_states != FLASH_KDA_WRITE_NONE && one_in(r, 2);
    draw_slots(r, &d);
    if (d.has_written) draw_written(r, &d);
    if (d.write_states != FLASH_KDA_WRITE_LAST && one_in(r, 2)) draw_tree(r, &d);
    if (is_wild) make_wild(r, &d);
    if (one_in(r, 2)) draw_applied(r, &d);
    if (is_wild) make_wild_lists(r, &d);
    if (one_in(r, 2)) {
        d.rounding = allocate(2, sizeof *d.rounding);
        d.rounding[0] = (int64_t)rng_bits(r);
        d.rounding[1] = one_in(r, 2) ? (int64_t)rng_bits(r) : below(r, 100);
    }
    return d;
}

decode_options draw_decode_options(rng *r, const decode_problem *d)
{
    decode_options options = {.tokens = draw_options(r, (drawing){.options = ALL_OPTIONS}, d->tokens)};
    options.tokens.counts_nonfinite = false;
    options.i32_slots = one_in(r, 2);
    options.i32_accepted = one_in(r, 2);
    options.i32_parents = one_in(r, 2);
    options.i32_written = one_in(r, 2);
    options.written_gap = one_in(r, 2) ? 8 * below(r, 20) : 0;
    return options;
}

decode_problem allowed_decode(const decode_problem *d)
{
    const problem *p = d->tokens;
    problem *q = problem_copy(p);
    decode_problem to = *d;
    const int64_t N = p->sequences, most = 2 * N, S = d->slot_columns, P = d->parent_columns;
    int64_t count = 0, *borders = allocate((size_t)most + 1, sizeof *borders);
    to.tokens = q;
    to.rounding = to.applied = to.accepted = to.written_indices = NULL;
    to.state_indices = allocate((size_t)(most * S), sizeof *to.state_indices);
    if (d->parents) to.parents = allocate((size_t)(most * P) + 1, sizeof *to.parents);
    if (d->num_accepted_tokens) to.num_accepted_tokens = allocate((size_t)most, sizeof *to.parents);
    for (int64_t n = 0; n < N; n++) {
        int64_t begin, end;
        problem_sequence(p, n, &begin, &end);
        const int64_t length = decode_length(d, n);
        for (int64_t i = 0; i < S; i++) {
            const int64_t slot = d->state_indices ? d->state_indices[n * S + i] : n;
            to.state_indices[count * S + i] = slot < d->first_slot || slot >= p->slots ? -1 : slot;
        }
        for (int64_t i = 0; i < P; i++) to.parents[count * P + i] = i < length ? decode_parent(d, n, i) : -1;
        if (d->num_accepted_tokens) {
            const int64_t start = d->num_accepted_tokens[n];
            to.num_accepted_tokens[count] = start < 1 ? 1 : start > S ? S : start;
        }
        borders[++count] = begin + length;
        if (begin + length == end) continue;
        for (int64_t i = 0; i < S; i++) to.state_indices[count * S + i] = -1;
        for (int64_t i = 0; i < P; i++) to.parents[count * P + i] = -1;
        if (d->num_accepted_tokens) to.num_accepted_tokens[count] = 1;
        borders[++count] = end;
    }
    if (p->cu_seqlens) {
        free(q->cu_seqlens);
        q->cu_seqlens = borders;
        q->sequences = count;
    } else {
        free(borders);
    }
    return to;
}

const char *describe_decode(const decode_problem *d, const decode_options *options, char text[240])
{
    static const char *const writes[] = {"last", "none", "each"}, *const gates[] = {"bounded", "softplus",
                                                                                    "activated"};
    const problem *p = d->tokens;
    char layouts[STRIDED_ARGS + 1] = "";
    for (int a = 0; a < STRIDED_ARGS; a++) layouts[a] = "cphtfr"[options->tokens.layouts[a]];
    snprintf(text, 240,
             "%lld %s, longest %lld, %lld/%lld heads, %s%s, beta %d, layouts %s, %s state%s%s%s, writes "
             "%s%s%s%s%s",
             (long long)p->sequences, p->cu_seqlens ? "packed" : "rows", (long long)longest_of(d),
             (long long)p->heads, (long long)p->qk_heads, gates[p->gate], p->g_f32 ? " f32" : "",
             (int)p->beta_kind, layouts, options->tokens.bf16_state ? "bf16" : "f32",
             options->tokens.k_first ? " K first" : "", d->rounding ? " at random" : "",
             d->state_indices ? " in a pool" : "", writes[d->write_states],
             !d->has_written      ? ""
             : d->written_indices ? " elsewhere by indices"
                                  : " elsewhere",
             d->parents ? ", a tree" : "", d->record_columns ? ", records" : "",
             d->accepted ? " listed" : "");
    return text;
}
