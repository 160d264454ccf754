/*
 * Random problems with hostile values mixed in: shapes, inputs, options and faults are drawn from a seed, and
 * every result is held to the fp64 recurrence.
 *
 * An output or a state element that is not finite in the definition must not be finite in the result. All
 * others must be finite, and their error must be within the bar of their kind of input; except in a head
 * after a value 1e30 times as large as others, after which no accuracy is promised.
 *
 * FLASH_KDA_TEST_PROBLEMS says how many problems are tried, FLASH_KDA_TEST_SEED where they begin:
 *
 *     FLASH_KDA_TEST_PROBLEMS=10000 build/tests/test_random --device cuda:0
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

enum { MOST_SEQUENCES = 12, MOST_HEADS = 5, NEVER = -1 };

/* ---- Drawing ------------------------------------------------------------------------------------------- */

static int64_t below(rng *r, int64_t count)
{
    return (int64_t)(rng_bits(r) % (uint64_t)count);
}

static bool one_in(rng *r, int64_t count)
{
    return below(r, count) == 0;
}

/* Mostly short, around the sizes of chunks; now and then long enough to be cut. */
static int64_t draw_length(rng *r)
{
    if (one_in(r, 12)) return 0;
    if (!test.quick && one_in(r, 16)) return 300 + below(r, 1500);
    return 1 + below(r, one_in(r, 3) ? 160 : 40);
}

static problem *draw_problem(rng *r)
{
    const int64_t heads = 1 + below(r, MOST_HEADS);
    if (one_in(r, 4)) return problem_create(1 + below(r, 3), draw_length(r), heads);
    int64_t lengths[MOST_SEQUENCES];
    const int64_t count = 1 + below(r, MOST_SEQUENCES);
    for (int64_t i = 0; i < count; i++) lengths[i] = draw_length(r);
    return problem_create_ragged(lengths, count, heads);
}

static call_options draw_options(rng *r)
{
    call_options options = options_of((state_mode)below(r, STATE_MODES), one_in(r, 3));
    if (test.device.type == FLASH_KDA_CUDA && strcmp(test.kernel, "hopper") == 0 &&
        test.cut == FLASH_KDA_CUT_AUTO)
        options.cut = (flash_kda_cut)below(r, 4);
    options.i32_seqlens = one_in(r, 4);
    options.batch_invariant = one_in(r, 4);
    options.tells_longest = one_in(r, 3);
    return options;
}

/* ---- Hostile values ------------------------------------------------------------------------------------ */

/* The token of each head from which on no accuracy is promised, counted over all batch rows; or NEVER. */
typedef struct loose {
    int64_t *from; /* [N, H] */
} loose;

static int64_t sequence_of(const problem *p, int64_t token)
{
    if (!p->cu_seqlens) return token / p->tokens;
    int64_t n = 0;
    while (p->cu_seqlens[n + 1] <= token) n++;
    return n;
}

static void scale_row(uint16_t *row, float factor)
{
    for (int c = 0; c < DIM; c++) row[c] = bf16_from_float(float_from_bf16(row[c]) * factor);
}

/* `size` is the size of ordinary values: no accuracy is promised to tokens in front of values more than 1e30
 * times as large as they are. */
static void add_hostile_value(rng *r, problem *p, const loose *after, float size)
{
    const int64_t token = below(r, p->batch * p->tokens), head = below(r, p->heads);
    const int64_t row = token * p->heads + head, at = row * DIM + below(r, DIM);
    static const uint16_t bits[] = {0x7fc0, 0xffff, 0x7f80, 0xff80}; /* NaN, NaN, inf, -inf */
    uint16_t *const tensors[] = {p->q, p->k, p->v, p->g};
    switch (below(r, 5)) {
    case 0: tensors[below(r, 4)][at] = bits[below(r, 4)]; break;
    case 1: p->beta[row] = bits[below(r, 4)]; break;
    case 2: scale_row(tensors[below(r, 2)] + row * DIM, one_in(r, 2) ? 1e25f : 1e35f); break;
    case 3: scale_row(tensors[below(r, 2)] + row * DIM, 1e-4f); break;
    default: {
        int64_t *from = &after->from[sequence_of(p, token) * p->heads + head];
        p->v[at] = bf16_from_float((one_in(r, 2) ? 1e30f : -1e30f) * fminf(size, 1.0f));
        if (*from == NEVER || token < *from) *from = token;
    }
    }
}

/* ---- Checking ------------------------------------------------------------------------------------------ */

typedef struct sums {
    double wrong, all;
} sums;

/* Adds an element to the sums of the error. Returns whether it is finite exactly where it must be. */
static bool add_element(sums *s, double truth, double got)
{
    if (!isfinite(truth)) return !isfinite(got);
    if (!isfinite(got)) return false;
    s->wrong += (got - truth) * (got - truth);
    s->all += truth * truth;
    return true;
}

/* The size that a token's own value has in its output, squared, if q and k are random: their product is about
 * 1 / sqrt(DIM) then. Where q happens to be nearly orthogonal to k, the output is much smaller, but not what
 * roundings of q and k do to it. In whole tensors such rows do not show; where few rows are compared, they
 * would. */
static double usual_size(const problem *p, int64_t row)
{
    double v = 0.0;
    for (int64_t i = row * DIM; i < (row + 1) * DIM; i++)
        v += (double)float_from_bf16(p->v[i]) * (double)float_from_bf16(p->v[i]);
    const double strength = p->scale / (1.0 + exp(-(double)float_from_bf16(p->beta[row])));
    return isfinite(v) && isfinite(strength) ? strength * strength * v / DIM : 0.0;
}

static double error_of(sums s)
{
    return s.all > 0.0 ? sqrt(s.wrong / s.all) : s.wrong > 0.0 ? INFINITY : 0.0;
}

static void check_out(const problem *p, const answer *truth, const uint16_t *out, const loose *after,
                      double bar)
{
    sums s = {0};
    for (int64_t row = 0; row < problem_rows(p); row++) {
        const int64_t token = row / p->heads, head = row % p->heads;
        const int64_t from = after->from[sequence_of(p, token) * p->heads + head];
        if (from != NEVER && token >= from) continue;
        const double before = s.all;
        for (int64_t i = row * DIM; i < (row + 1) * DIM; i++)
            if (!add_element(&s, truth->out[i], float_from_bf16(out[i]))) {
                CHECK(false, "out of token %lld, head %lld, is %g; the definition has %g", (long long)token,
                      (long long)head, (double)float_from_bf16(out[i]), truth->out[i]);
                return;
            }
        s.all = fmax(s.all, before + usual_size(p, row));
    }
    check_error("out", error_of(s), bar);
}

static void check_state(const problem *p, const answer *truth, const void *state, bool is_bf16,
                        const loose *after, double bar)
{
    sums s = {0};
    for (int64_t n = 0; n < problem_states(p); n++) {
        if (after->from[n] != NEVER) continue;
        for (int64_t i = n * DIM * DIM; i < (n + 1) * DIM * DIM; i++) {
            const double got =
                is_bf16 ? float_from_bf16(((const uint16_t *)state)[i]) : ((const float *)state)[i];
            if (!add_element(&s, truth->state[i], got)) {
                CHECK(false, "state %lld has %g; the definition has %g", (long long)n, got, truth->state[i]);
                return;
            }
        }
    }
    check_error(is_bf16 ? "bf16 state" : "state", error_of(s), is_bf16 ? bar_of_bf16_state(bar) : bar);
}

static void try_problem(uint64_t seed)
{
    rng r = rng_seed(seed);
    problem *p = draw_problem(&r);
    const test_case *c = &test_cases[below(&r, test_case_count)];
    const bars limits = case_bars(c, test.device);
    const call_options options = draw_options(&r);
    const loose after = {allocate((size_t)problem_states(p) + 1, sizeof *after.from)};
    for (int64_t n = 0; n < problem_states(p); n++) after.from[n] = NEVER;
    fill_case(p, c, rng_bits(&r));
    const int64_t tokens = p->batch * p->tokens;
    const int64_t hostile = tokens > 0 && one_in(&r, 2) ? 1 + below(&r, 3) : 0;
    for (int64_t i = 0; i < hostile; i++) add_hostile_value(&r, p, &after, c->sizes.v);
    trying("seed %llu: %s, %lld sequences, %lld tokens, %lld heads, cut %d, %lld hostile values",
           (unsigned long long)seed, c->name, (long long)p->sequences, (long long)tokens, (long long)p->heads,
           (int)options.cut, (long long)hostile);
    answer truth = problem_solve(p, mode_reads(options.mode));
    result got = run_and_check(p, NULL, limits, options);
    if (got.out) check_out(p, &truth, got.out, &after, limits.out);
    if (got.state) check_state(p, &truth, got.state, options.bf16_state, &after, limits.state);
    result_free(&got);
    answer_free(&truth);
    free(after.from);
    problem_free(p);
}

static void random_problems(void)
{
    const uint64_t first = number_from("FLASH_KDA_TEST_SEED", 1);
    const uint64_t count = number_from("FLASH_KDA_TEST_PROBLEMS", test.quick ? 60 : 120);
    for (uint64_t i = 0; i < count; i++) try_problem(first + i);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"random", random_problems}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
