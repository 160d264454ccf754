#include "draw.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SEQUENCES = 6, MOST_COLUMNS = 3 };

int64_t below(rng *r, int64_t count)
{
    return (int64_t)(rng_bits(r) % (uint64_t)count);
}

bool one_in(rng *r, int64_t count)
{
    return below(r, count) == 0;
}

const char *const option_names[OPTIONS] = {
    [OPTION_STRIDES] = "strides",
    [OPTION_POOL] = "pool",
    [OPTION_CHECKPOINTS] = "checkpoints",
    [OPTION_GROUPED] = "grouped",
    [OPTION_SOFTPLUS] = "softplus",
    [OPTION_ACTIVATED] = "activated",
    [OPTION_NO_PARAMETER] = "no-parameter",
    [OPTION_F32] = "f32",
    [OPTION_BETA] = "beta",
    [OPTION_NORMALISED] = "normalised",
    [OPTION_K_FIRST] = "k-first",
};

int draw_subset(rng *r, int options)
{
    const int64_t how = below(r, 4);
    if (how == 0) return options;
    if (how > 1) return options & (int)rng_bits(r) & (how == 2 ? ALL_OPTIONS : (int)rng_bits(r));
    for (;;) {
        const int one = 1 << below(r, OPTIONS);
        if (options & one || options == 0) return options & one;
    }
}

/* Whether the option is among those that may be drawn, and is drawn with a probability of 1 in `count`. */
static bool drawn(rng *r, drawing how, option o, int64_t count)
{
    return one_in(r, count) && how.options >> o & 1;
}

/* ---- Problems ------------------------------------------------------------------------------------------ */

/* Around the sizes of chunks, now and then none or many; or long. */
static int64_t draw_length(rng *r, drawing how, int64_t most)
{
    if (one_in(r, 10)) return 0;
    if (how.is_long) return most < 300 ? most : 300 + below(r, (most < 900 ? most : 900) - 299);
    const int64_t usual = one_in(r, 3) ? 130 : one_in(r, 2) ? 70 : 34;
    return 1 + below(r, usual < most ? usual : most);
}

static problem *draw_shape(rng *r, drawing how)
{
    static const int64_t groups[] = {1, 1, 1, 2, 3, 4};
    const int64_t shared = drawn(r, how, OPTION_GROUPED, 1) ? groups[below(r, 6)] : 1,
                  qk_heads = 1 + below(r, shared > 2 ? 1 : 3), heads = shared * qk_heads,
                  most = 1 + how.tokens / heads;
    problem *p;
    if (one_in(r, 4)) {
        const int64_t batch = 1 + below(r, 3);
        p = problem_create(batch, draw_length(r, how, most / batch + 1), heads);
    } else {
        int64_t lengths[MOST_SEQUENCES], left = most;
        const int64_t count = 1 + below(r, MOST_SEQUENCES);
        for (int64_t i = 0; i < count; i++) {
            lengths[i] = left > 0 ? draw_length(r, how, left) : 0;
            left -= lengths[i];
        }
        p = problem_create_ragged(lengths, count, heads);
    }
    problem_group_heads(p, shared);
    return p;
}

void draw_contents(rng *r, drawing how, problem *p)
{
    static const char *const cases[] = {"random", "slow gates", "channels from fast to slow", "g = -8",
                                        "g = 8"};
    static const decays kinds[] = {DECAYS_SLOW,  DECAYS_ORDINARY,        DECAYS_FAST,
                                   DECAYS_MIXED, DECAYS_ISOLATED_TOKENS, DECAYS_ISOLATED,
                                   DECAYS_NONE,  DECAYS_EXTREME};
    const bool wide_gates = drawn(r, how, OPTION_F32, 3);
    fill_case(p, find_case(cases[below(r, 5)]), rng_bits(r));
    p->scale = one_in(r, 4) ? (float)rng_uniform(r, -2.0, 2.0) : p->scale;
    if (drawn(r, how, OPTION_SOFTPLUS, 2))
        p->gate = FLASH_KDA_GATE_SOFTPLUS;
    else if (drawn(r, how, OPTION_ACTIVATED, 2))
        p->gate = FLASH_KDA_GATE_ACTIVATED;
    if (p->gate == FLASH_KDA_GATE_BOUNDED) {
        if (one_in(r, 4)) p->lower_bound = (float)-rng_uniform(r, 0.0, 5.0);
        p->without_A_log = drawn(r, how, OPTION_NO_PARAMETER, 3);
        p->without_dt_bias = drawn(r, how, OPTION_NO_PARAMETER, 3);
        if (wide_gates) widen_gates(p, rng_bits(r));
    } else {
        p->without_dt_bias = drawn(r, how, OPTION_NO_PARAMETER, 3);
        fill_decays(p, kinds[below(r, DECAY_KINDS)], wide_gates, rng_bits(r));
    }
    if (drawn(r, how, OPTION_BETA, 1)) p->beta_kind = (flash_kda_beta)below(r, 3);
    activate_betas(p);
    if (drawn(r, how, OPTION_F32, 3)) widen_betas(p, rng_bits(r));
    if (drawn(r, how, OPTION_NORMALISED, 3)) normalise_keys(p);
}

void shuffle(rng *r, int64_t *values, int64_t count)
{
    for (int64_t i = count - 1; i > 0; i--) {
        const int64_t j = below(r, i + 1), value = values[i];
        values[i] = values[j];
        values[j] = value;
    }
}

/* Sequences with a slot have one each. Some have none: their index is below first_slot. */
void draw_pool(rng *r, problem *p)
{
    const int64_t first = below(r, 3), slots = first + p->sequences + below(r, 4);
    int64_t *free_slots = allocate((size_t)slots, sizeof *free_slots);
    problem_make_pool(p, slots);
    p->first_slot = first;
    for (int64_t i = first; i < slots; i++) free_slots[i - first] = i;
    shuffle(r, free_slots, slots - first);
    for (int64_t n = 0; n < p->sequences; n++)
        p->state_indices[n] = one_in(r, 5) ? first - 1 - below(r, first + 3) : free_slots[n];
    for (int64_t i = 0; i < slots * p->heads * DIM * DIM; i++)
        p->initial_state[i] = (float)(rng_bits(r) >> 57) * 0x1p-6f - 1.0f; /* exact in bf16 */
    free(free_slots);
}

static void draw_flags(rng *r, problem *p)
{
    p->has_initial_state = allocate((size_t)p->sequences, 1);
    /* Any byte but 0 is true. */
    for (int64_t n = 0; n < p->sequences; n++)
        p->has_initial_state[n] = one_in(r, 3) ? 0 : one_in(r, 3) ? 0x80 : 1;
}

static void draw_every(rng *r, problem *p)
{
    p->checkpoint_every = 16 * (1 + below(r, 4));
    int64_t rows = 0, starts[MOST_SEQUENCES];
    const bool has_starts = one_in(r, 2);
    int64_t order[MOST_SEQUENCES];
    for (int64_t n = 0; n < p->sequences; n++) order[n] = n;
    if (has_starts) shuffle(r, order, p->sequences);
    for (int64_t i = 0; i < p->sequences; i++) {
        int64_t begin, end;
        problem_sequence(p, order[i], &begin, &end);
        if (has_starts) rows += below(r, 2);
        starts[order[i]] = rows;
        rows += (end - begin) / p->checkpoint_every;
    }
    p->checkpoint_rows = rows + below(r, 2);
    if (has_starts) {
        p->checkpoint_starts = allocate((size_t)p->sequences, sizeof *starts);
        memcpy(p->checkpoint_starts, starts, (size_t)p->sequences * sizeof *starts);
    }
}

/* Offsets in any order, repeated ones, and many that ask for none. */
static void draw_offsets(rng *r, problem *p)
{
    p->checkpoint_columns = below(r, MOST_COLUMNS + 1);
    const int64_t columns = p->checkpoint_columns ? p->checkpoint_columns : 1, count = p->sequences * columns;
    p->checkpoint_offsets = allocate((size_t)count, sizeof *p->checkpoint_offsets);
    for (int64_t i = 0; i < count; i++) {
        int64_t begin, end;
        problem_sequence(p, i / columns, &begin, &end);
        const int64_t units = (end - begin) / 16;
        p->checkpoint_offsets[i] = one_in(r, 4) ? -below(r, 40) : 16 * below(r, units + 1);
        if (one_in(r, 4)) p->checkpoint_offsets[i] = 16 * units;
    }
    p->checkpoint_rows = count + below(r, 3);
    if (one_in(r, 2)) return;
    int64_t *rows = allocate((size_t)p->checkpoint_rows, sizeof *rows);
    for (int64_t i = 0; i < p->checkpoint_rows; i++) rows[i] = i;
    shuffle(r, rows, p->checkpoint_rows);
    p->checkpoint_indices = allocate((size_t)count, sizeof *rows);
    memcpy(p->checkpoint_indices, rows, (size_t)count * sizeof *rows);
    /* The row of an offset that asks for none means nothing. */
    for (int64_t i = 0; i < count; i++)
        if (p->checkpoint_offsets[i] <= 0 && one_in(r, 2)) p->checkpoint_indices[i] = -7 + below(r, 1000);
    free(rows);
}

void draw_checkpoints(rng *r, problem *p)
{
    if (one_in(r, 3))
        draw_every(r, p);
    else
        draw_offsets(r, p);
    if (p->checkpoint_rows == 0) p->checkpoint_rows = 1;
}

problem *draw_problem(rng *r, drawing how)
{
    problem *p = draw_shape(r, how);
    draw_contents(r, how, p);
    if (drawn(r, how, OPTION_POOL, 2)) draw_pool(r, p);
    if (drawn(r, how, OPTION_POOL, 2)) draw_flags(r, p);
    if (drawn(r, how, OPTION_CHECKPOINTS, 2)) draw_checkpoints(r, p);
    return p;
}

/* ---- Options ------------------------------------------------------------------------------------------- */

/* Layouts of one call often go together, as slices of one projection do. */
static void draw_layouts(rng *r, call_options *options)
{
    const bool on_cpu = test.device.type == FLASH_KDA_CPU;
    const layout usual = (layout)below(r, LAYOUTS - 1);
    if (one_in(r, 4)) return;
    for (int a = 0; a < STRIDED_ARGS; a++) {
        options->layouts[a] = one_in(r, 3) ? (layout)below(r, LAYOUTS) : usual;
        if (options->layouts[a] == LAYOUT_REVERSED && !on_cpu && a != ARG_BETA)
            options->layouts[a] = LAYOUT_CONTIGUOUS;
    }
    options->odd_gaps = on_cpu && one_in(r, 3);
    options->rubbish_strides = one_in(r, 2);
}

/* The least number of slots with which no index is beyond the last. */
static int64_t least_slots(const problem *p)
{
    int64_t most = 0;
    for (int64_t n = 0; n < p->sequences; n++)
        if (p->state_indices[n] > most) most = p->state_indices[n];
    return most + 1;
}

call_options draw_options(rng *r, drawing how, const problem *p)
{
    const bool strides = drawn(r, how, OPTION_STRIDES, 1);
    call_options options = options_of((state_mode)below(r, STATE_MODES), one_in(r, 3));
    const bool is_hopper = test.device.type == FLASH_KDA_CUDA && strcmp(test.kernel, "hopper") == 0;
    if (is_hopper && test.cut == FLASH_KDA_CUT_AUTO) options.cut = (flash_kda_cut)below(r, 4);
    options.threads = test.device.type == FLASH_KDA_CPU ? (int)below(r, 3) : 0;
    options.i32_seqlens = one_in(r, 3);
    options.batch_invariant = one_in(r, 4);
    options.tells_longest = one_in(r, 3);
    options.counts_nonfinite = one_in(r, 8);
    if (strides) draw_layouts(r, &options);
    options.k_first = drawn(r, how, OPTION_K_FIRST, 2);
    if (strides && one_in(r, 2)) options.slot_gap = below(r, 50);
    if (strides && one_in(r, 2)) options.final_gap = below(r, 50);
    if (strides && one_in(r, 2)) options.row_gap = below(r, 50);
    if (p->state_indices && one_in(r, 2)) options.final_slots = least_slots(p) + below(r, 3);
    options.bf16_checkpoints = one_in(r, 2);
    options.i32_state_indices = one_in(r, 2);
    options.i32_offsets = one_in(r, 2);
    options.i32_checkpoint_rows = one_in(r, 2);
    options.parameter_ndim = (int)below(r, 5);
    return options;
}

call_options without_layouts(call_options options)
{
    memset(options.layouts, 0, sizeof options.layouts);
    options.odd_gaps = options.rubbish_strides = false;
    options.slot_gap = options.final_gap = options.row_gap = 0;
    options.parameter_ndim = 0;
    return options;
}

const char *describe(const problem *p, const call_options *options, char text[DESCRIPTION])
{
    static const char *const gates[] = {"bounded", "softplus", "activated"};
    char layouts[STRIDED_ARGS + 1] = "";
    const long long tokens = (long long)p->batch * (long long)p->tokens;
    for (int a = 0; a < STRIDED_ARGS; a++) layouts[a] = "cphtfr"[options->layouts[a]];
    snprintf(text, DESCRIPTION,
             "%lld sequences, %lld tokens, %lld/%lld heads, %s%s, beta %d%s, layouts %s, %s, %s, %lld rows "
             "of checkpoints, cut %d",
             (long long)p->sequences, tokens, (long long)p->heads, (long long)p->qk_heads, gates[p->gate],
             p->g_f32 ? " f32" : "", (int)p->beta_kind, p->qk_is_normalised ? ", normalised" : "", layouts,
             state_mode_names[options->mode], p->state_indices ? "pool" : "no pool",
             (long long)p->checkpoint_rows, (int)options->cut);
    return text;
}
