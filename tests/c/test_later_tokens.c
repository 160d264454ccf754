/*
 * A token changes no bit of the tokens before it, of other sequences or of checkpoints before it, whatever it
 * holds and whatever options the call has. Calls are drawn as in test_options. Each runs twice: as it is, and
 * with hostile numbers in one token of a sequence and in some of the tokens after it.
 *
 * FLASH_KDA_TEST_PROBLEMS says how many calls each group draws, FLASH_KDA_TEST_SEED where they begin.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "draw.h"

/* ---- Hostile tokens ------------------------------------------------------------------------------------ */

static void set(uint16_t *narrow, float *wide, int64_t at, float value)
{
    if (wide)
        wide[at] = value;
    else
        narrow[at] = bf16_from_float(value);
}

static float draw_hostile(rng *r)
{
    const float values[] = {NAN, INFINITY, -INFINITY, 3.38e38f, -3.38e38f, 1e30f, -300.0f, 0.0f};
    return values[below(r, sizeof values / sizeof *values)];
}

/* Anything, in single elements of every tensor. */
static void scatter(rng *r, problem *p, int64_t token)
{
    for (int64_t row = token * p->heads; row < (token + 1) * p->heads; row++) {
        for (int64_t at = row * DIM; at < (row + 1) * DIM; at++) {
            if (one_in(r, 40)) set(p->v, NULL, at, draw_hostile(r));
            if (one_in(r, 20)) set(p->g, p->g_f32, at, draw_hostile(r));
        }
        if (one_in(r, 4)) set(p->beta, p->beta_f32, row, draw_hostile(r));
    }
    for (int64_t at = token * p->qk_heads * DIM; at < (token + 1) * p->qk_heads * DIM; at++) {
        if (one_in(r, 40)) set(p->q, NULL, at, draw_hostile(r));
        if (one_in(r, 40)) set(p->k, NULL, at, draw_hostile(r));
    }
}

static void scale_row(uint16_t *row, float factor)
{
    for (int c = 0; c < DIM; c++)
        row[c] = bf16_from_float(fmaxf(fminf(float_from_bf16(row[c]) * factor, 3.38e38f), -3.38e38f));
}

/* Finite numbers out of which others may grow that fp32 does not hold: rows of q and k that are not
 * normalised, gates above zero, large values and betas. */
static void enlarge(rng *r, problem *p, int64_t token)
{
    const float sizes[] = {1e5f, 1e15f, 1e30f, 3.38e38f, -3.38e38f, -1e4f};
    for (int64_t h = 0; h < p->heads; h++) {
        const int64_t row = token * p->heads + h, of = token * p->qk_heads + below(r, p->qk_heads);
        const float size = sizes[below(r, sizeof sizes / sizeof *sizes)];
        switch (below(r, 5)) {
        case 0: scale_row(p->q + of * DIM, size); break;
        case 1: scale_row(p->k + of * DIM, size); break;
        case 2: scale_row(p->v + row * DIM, size); break;
        case 3:
            for (int c = 0; c < DIM; c++) set(p->g, p->g_f32, row * DIM + c, size);
            break;
        default: set(p->beta, p->beta_f32, row, size);
        }
    }
}

/* ---- Comparing ----------------------------------------------------------------------------------------- */

typedef struct outputs {
    uint16_t *out;
    char *checkpoints; /* or NULL */
} outputs;

/* Whether the kernel takes the call's options. */
static bool run(const problem *p, call_options options, outputs *o)
{
    call c;
    *o = (outputs){0};
    flash_kda_status status = call_open(&c, p, options);
    const bool is_open = status == FLASH_KDA_OK;
    if (is_open) status = call_run(&c);
    const bool is_taken = status == FLASH_KDA_OK;
    if (!is_taken)
        CHECK(status == FLASH_KDA_UNAVAILABLE && strstr(flash_kda_last_error(), "which does not take"), "%s",
              flash_kda_last_error());
    if (is_taken) {
        o->out = call_read_out(&c);
        if (p->checkpoint_rows) o->checkpoints = call_read(&c, ARG_CHECKPOINT_STATES);
    }
    if (is_open) call_close(&c);
    return is_taken;
}

typedef struct comparison {
    const problem *p;
    int64_t sequence, token; /* tokens of the sequence from that one on may differ */
    outputs a, b;
    size_t row_bytes; /* of checkpoint_states */
} comparison;

static void compare_checkpoint(void *context, int64_t n, int64_t offset, int64_t row)
{
    const comparison *c = context;
    int64_t begin, end;
    problem_sequence(c->p, n, &begin, &end);
    if (n == c->sequence && begin + offset > c->token) return;
    const size_t at = (size_t)row * c->row_bytes;
    CHECK(memcmp(c->a.checkpoints + at, c->b.checkpoints + at, c->row_bytes) == 0,
          "the checkpoint of sequence %lld after %lld tokens depends on later tokens", (long long)n,
          (long long)offset);
}

static void compare(const comparison *c)
{
    const int64_t of_token = c->p->heads * DIM;
    int64_t begin, end;
    problem_sequence(c->p, c->sequence, &begin, &end);
    for (int64_t t = 0; t < c->p->batch * c->p->tokens; t++)
        if (t < c->token || t >= end)
            CHECK(memcmp(c->a.out + t * of_token, c->b.out + t * of_token, (size_t)of_token * 2) == 0,
                  "out of token %lld depends on token %lld", (long long)t, (long long)c->token);
    if (c->a.checkpoints) problem_checkpoints(c->p, compare_checkpoint, (void *)c);
}

static void try_seed(uint64_t seed, void (*spoil)(rng *r, problem *p, int64_t token))
{
    rng r = rng_seed(seed);
    const drawing how = {draw_subset(&r, ALL_OPTIONS), 100};
    problem *p = draw_problem(&r, how);
    const call_options options = without_layouts(draw_options(&r, how, p));
    const int64_t n = below(&r, p->sequences);
    char text[160];
    int64_t begin, end;
    trying("seed %llu: %s", (unsigned long long)seed, describe(p, &options, text));
    problem_sequence(p, n, &begin, &end);
    if (end > begin) {
        problem *spoiled = problem_copy(p);
        comparison c = {.p = p, .sequence = n, .token = begin + below(&r, end - begin)};
        c.row_bytes = (size_t)(p->heads * DIM * DIM) * (options.bf16_checkpoints ? 2 : 4);
        spoil(&r, spoiled, c.token);
        for (int64_t t = c.token + 1; t < end; t++)
            if (one_in(&r, 3)) spoil(&r, spoiled, t);
        if (run(p, options, &c.a) && run(spoiled, options, &c.b)) compare(&c);
        free(c.a.out), free(c.a.checkpoints);
        free(c.b.out), free(c.b.checkpoints);
        problem_free(spoiled);
    }
    problem_free(p);
}

static void try_seeds(void (*spoil)(rng *r, problem *p, int64_t token))
{
    const char *first = getenv("FLASH_KDA_TEST_SEED"), *asked = getenv("FLASH_KDA_TEST_PROBLEMS");
    const uint64_t from = first ? strtoull(first, NULL, 10) : 1, usual = test.quick ? 20 : 300;
    const uint64_t count = asked ? strtoull(asked, NULL, 10) : usual;
    for (uint64_t i = 0; i < count; i++) try_seed(from + i, spoil);
}

static void scattered(void)
{
    try_seeds(scatter);
}

static void large(void)
{
    try_seeds(enlarge);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"scattered", scattered}, {"large", large}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
