/*
 * Values that a caller should not pass: NaN and infinities in one element of one token. A token must not harm
 * a token before it, another head or another sequence: their outputs and states have the bits that they have
 * without it. What depends on the token must show the fault: results that look right would hide it.
 *
 * Only the CPU backend promises this so far. On a GPU a bad token can reach earlier tokens of its own chunk.
 *
 * tests/CMakeLists.txt registers this program with CTest. `.venv/bin/ctest --test-dir build -R test_hostile`
 * runs this test alone, and `build/tests/test_hostile --device cpu one-bad-token` one of its groups.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"
#include "harness.h"

enum { HEADS = 2, BAD_HEAD = 1 };
static const int64_t lengths[] = {20, 37, 18}; /* the second sequence has the bad token */

typedef struct tensor {
    const char *name;
    uint16_t *data;
    int64_t row;      /* elements of a token and head */
    bool any_value;   /* infinities are valid values: a sigmoid makes numbers of them */
    bool reads_state; /* the token's own output alone depends on it */
} tensor;

static int64_t first_different(const uint16_t *a, const uint16_t *b, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (a[i] != b[i]) return i;
    return -1;
}

static bool any_not_finite(const uint16_t *x, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(float_from_bf16(x[i]))) return true;
    return false;
}

static bool state_is_finite(const float *x)
{
    for (int i = 0; i < DIM * DIM; i++)
        if (!isfinite(x[i])) return false;
    return true;
}

/* Outputs of one head that must not change: all of other heads and sequences, and the tokens before the bad
 * one. */
static void check_outputs(const problem *p, const result *good, const result *bad, int64_t bad_token)
{
    const int64_t begin = p->cu_seqlens[1], end = p->cu_seqlens[2];
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t h = 0; h < HEADS; h++) {
            const bool may_change = h == BAD_HEAD && t >= bad_token && t < end;
            const int64_t at = (t * HEADS + h) * DIM;
            const int64_t i = may_change ? -1 : first_different(good->out + at, bad->out + at, DIM);
            if (!CHECK(i < 0, "out of token %lld of %lld, head %lld, differs in channel %lld",
                       (long long)(t - begin), (long long)(end - begin), (long long)h, (long long)i))
                return;
        }
}

static void check_states(const result *good, const result *bad, bool must_be_finite, bool must_show)
{
    const int64_t count = (int64_t)(sizeof lengths / sizeof *lengths) * HEADS, size = DIM * DIM;
    const float *expected = good->state, *state = bad->state;
    for (int64_t i = 0; i < count; i++) {
        const bool is_bad = i == 1 * HEADS + BAD_HEAD;
        const bool same = memcmp(expected + i * size, state + i * size, (size_t)size * sizeof *state) == 0;
        if (!is_bad || must_be_finite) CHECK(same, "state %lld differs", (long long)i);
        if (is_bad && must_show) CHECK(!state_is_finite(state + i * size), "the state hides the fault");
    }
}

static void one_bad_token(void)
{
    static const struct {
        const char *name;
        uint16_t bits;
    } values[] = {{"NaN", 0x7fc0}, {"inf", 0x7f80}, {"-inf", 0xff80}};
    problem *p = problem_create_ragged(lengths, sizeof lengths / sizeof *lengths, HEADS);
    fill_case(p, find_case("channels from fast to slow"), 7);
    const tensor tensors[] = {{"q", p->q, DIM, false, true},
                              {"k", p->k, DIM, false, false},
                              {"v", p->v, DIM, false, false},
                              {"g", p->g, DIM, true, false},
                              {"beta", p->beta, 1, true, false}};
    const call_options options = options_of(STATE_BOTH, false);
    result good = run_and_check(p, NULL, (bars){0, 0}, options);
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        for (size_t v = 0; v < sizeof values / sizeof *values; v++)
            for (int64_t t = p->cu_seqlens[1]; t < p->cu_seqlens[2]; t++) {
                const tensor *x = &tensors[i];
                uint16_t *element = x->data + (t * HEADS + BAD_HEAD) * x->row + (5 * t + 3) % x->row;
                const uint16_t kept = *element;
                const bool is_fault = v == 0 || !x->any_value;
                *element = values[v].bits;
                trying("%s in %s of token %lld", values[v].name, x->name, (long long)(t - p->cu_seqlens[1]));
                result bad = run_and_check(p, NULL, (bars){0, 0}, options);
                *element = kept;
                check_outputs(p, &good, &bad, t);
                check_states(&good, &bad, x->reads_state, is_fault && !x->reads_state);
                if (is_fault)
                    CHECK(any_not_finite(bad.out + (t * HEADS + BAD_HEAD) * DIM, DIM),
                          "the token's output hides the fault");
                result_free(&bad);
            }
    result_free(&good);
    problem_free(p);
}

/* A value of 1e30 late in a chunk costs earlier tokens no precision: their bits stay. */
static void huge_value(void)
{
    problem *p = problem_create_ragged(lengths, sizeof lengths / sizeof *lengths, HEADS);
    fill_case(p, find_case("slow gates"), 8);
    const call_options options = options_of(STATE_BOTH, false);
    result good = run_and_check(p, NULL, (bars){0, 0}, options);
    for (int64_t t = p->cu_seqlens[1]; t < p->cu_seqlens[2]; t++) {
        uint16_t *element = p->v + (t * HEADS + BAD_HEAD) * DIM + 5;
        const uint16_t kept = *element;
        *element = bf16_from_float(1e30f);
        trying("v of 1e30 at token %lld", (long long)(t - p->cu_seqlens[1]));
        result bad = run_and_check(p, NULL, (bars){0, 0}, options);
        *element = kept;
        check_outputs(p, &good, &bad, t);
        result_free(&bad);
    }
    result_free(&good);
    problem_free(p);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"one-bad-token", one_bad_token}, {"huge-value", huge_value}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
