/*
 * Values that a caller should not pass, and values at the ends of the range of bf16.
 *
 * NaN and infinities in one element of one token: the token must not harm a token before it, another head or
 * another sequence. Their outputs and states have the bits that they have without it. What depends on the
 * token must show the fault: results that look right would hide it.
 *
 * CTest runs this program for every kernel and cut, on the emulator too; one group alone:
 * build/tests/test_hostile --device cpu one-bad-token
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"
#include "harness.h"
#include "kinds.h"

enum { HEADS = 2, BAD_HEAD = 1, SEQUENCES = 3 };
static const int64_t lengths[SEQUENCES] = {20, 37, 18}; /* the second sequence has the bad token */

typedef struct tensor {
    const char *name;
    uint16_t *data;
    int64_t row;      /* elements of a token and head */
    int64_t step;     /* from one element's upper 16 bits to the next one's */
    bool any_value;   /* infinities are valid values, of which gates make numbers, or nothing is promised */
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
    const int64_t count = SEQUENCES * HEADS, size = DIM * DIM;
    const float *expected = good->state, *state = bad->state;
    for (int64_t i = 0; i < count; i++) {
        const bool is_bad = i == 1 * HEADS + BAD_HEAD;
        const bool same = memcmp(expected + i * size, state + i * size, (size_t)size * sizeof *state) == 0;
        if (!is_bad || must_be_finite) CHECK(same, "state %lld differs", (long long)i);
        if (is_bad && must_show) CHECK(!state_is_finite(state + i * size), "the state hides the fault");
    }
}

/* Tokens of the second sequence that are tried: all, or in quick runs the first and last of chunks. */
static bool is_tried(int64_t token, int64_t length)
{
    if (length > 100) return token % (test.quick ? 350 : 61) == 11 || token == length - 1;
    return !test.quick || token % 16 < 2 || token % 8 == 7 || token == length - 1;
}

/* Whether the kernel under test takes the problem's gate. */
static bool gate_is_taken(const problem *p)
{
    call c;
    const flash_kda_status status = call_open(&c, p, options_of(STATE_BOTH, false));
    if (status == FLASH_KDA_OK) call_close(&c);
    CHECK(status == FLASH_KDA_OK || status == FLASH_KDA_UNAVAILABLE, "%s", flash_kda_last_error());
    return status == FLASH_KDA_OK;
}

/* `decays` means something for gates without a bound. */
static void try_bad_tokens(const int64_t *of_lengths, bool all_values, flash_kda_gate gate, bool is_f32,
                           decays how)
{
    static const struct {
        const char *name;
        uint16_t bits;
    } values[] = {{"NaN", 0x7fc0}, {"inf", 0x7f80}, {"-inf", 0xff80}};
    problem *p = problem_create_ragged(of_lengths, SEQUENCES, HEADS);
    fill_case(p, find_case("channels from fast to slow"), 7);
    p->gate = gate;
    if (gate != FLASH_KDA_GATE_BOUNDED)
        fill_decays(p, how, is_f32, 7);
    else if (is_f32)
        widen_gates(p, 7);
    if (!gate_is_taken(p)) {
        problem_free(p);
        return;
    }
    const tensor tensors[] = {{"q", p->q, DIM, 1, false, true},
                              {"k", p->k, DIM, 1, false, false},
                              {"v", p->v, DIM, 1, false, false},
                              {"g", is_f32 ? (uint16_t *)p->g_f32 + 1 : p->g, DIM, 1 + is_f32, true, false},
                              {"beta", p->beta, 1, 1, true, false}};
    const call_options options = options_of(STATE_BOTH, false);
    result good = run_and_check(p, NULL, (bars){0, 0}, options);
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        for (size_t v = 0; v < (all_values ? sizeof values / sizeof *values : 1); v++)
            for (int64_t t = p->cu_seqlens[1]; t < p->cu_seqlens[2]; t++) {
                if (!is_tried(t - p->cu_seqlens[1], of_lengths[1])) continue;
                /* In quick runs a token has one of the values in each tensor. */
                if (test.quick && all_values && (t + (int64_t)i) % 3 != (int64_t)v) continue;
                const tensor *x = &tensors[i];
                uint16_t *element =
                    x->data + ((t * HEADS + BAD_HEAD) * x->row + (5 * t + 3) % x->row) * x->step;
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
                if (is_fault && !x->reads_state && t + 1 < p->cu_seqlens[2])
                    CHECK(any_not_finite(bad.out + ((p->cu_seqlens[2] - 1) * HEADS + BAD_HEAD) * DIM, DIM),
                          "the sequence's last output hides the fault");
                result_free(&bad);
            }
    result_free(&good);
    problem_free(p);
}

static void one_bad_token(void)
{
    try_bad_tokens(lengths, true, FLASH_KDA_GATE_BOUNDED, false, DECAYS_NONE);
}

/* Gates without a bound, with tokens that forget everything and tokens that forget nothing. */
static void bad_token_of_unbounded_gates(void)
{
    try_bad_tokens(lengths, true, FLASH_KDA_GATE_SOFTPLUS, false, DECAYS_MIXED);
    try_bad_tokens(lengths, true, FLASH_KDA_GATE_ACTIVATED, false, DECAYS_ISOLATED);
}

static void bad_token_of_fp32_gates(void)
{
    try_bad_tokens(lengths, false, FLASH_KDA_GATE_BOUNDED, true, DECAYS_NONE);
    try_bad_tokens(lengths, false, FLASH_KDA_GATE_ACTIVATED, true, DECAYS_ORDINARY);
    try_bad_tokens(lengths, false, FLASH_KDA_GATE_ACTIVATED, true, DECAYS_ISOLATED);
}

/* In a sequence that is cut into segments. */
static void bad_token_of_long_sequence(void)
{
    static const int64_t long_lengths[] = {20, 700, 18};
    if (test.cut == FLASH_KDA_CUT_NEVER) return;
    try_bad_tokens(long_lengths, false, FLASH_KDA_GATE_BOUNDED, false, DECAYS_NONE);
    try_bad_tokens(long_lengths, false, FLASH_KDA_GATE_SOFTPLUS, false, DECAYS_ISOLATED_TOKENS);
}

/* Several bad tokens in one chunk, of several tensors: the first one counts. */
static void many_bad_tokens(void)
{
    problem *p = problem_create_ragged(lengths, SEQUENCES, HEADS);
    fill_case(p, find_case("channels from fast to slow"), 9);
    const call_options options = options_of(STATE_BOTH, false);
    result good = run_and_check(p, NULL, (bars){0, 0}, options);
    uint16_t *const tensors[] = {p->k, p->v, p->g, p->q};
    for (int64_t first = 0; first < lengths[1]; first += 5) {
        trying("everything is NaN from token %lld on", (long long)first);
        for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
            for (int64_t t = p->cu_seqlens[1] + first; t < p->cu_seqlens[2]; t++)
                memset(tensors[i] + (t * HEADS + BAD_HEAD) * DIM, 0xff, DIM * sizeof **tensors);
        result bad = run_and_check(p, NULL, (bars){0, 0}, options);
        check_outputs(p, &good, &bad, p->cu_seqlens[1] + first);
        check_states(&good, &bad, false, true);
        result_free(&bad);
        fill_case(p, find_case("channels from fast to slow"), 9);
    }
    result_free(&good);
    problem_free(p);
}

/* The error of the outputs of BAD_HEAD from token `begin` on up to token `end`. */
static double error_of_tokens(const answer *truth, const uint16_t *out, int64_t begin, int64_t end)
{
    double wrong = 0, all = 0;
    for (int64_t t = begin; t < end; t++)
        for (int c = 0; c < DIM; c++) {
            const int64_t at = (t * HEADS + BAD_HEAD) * DIM + c;
            const double difference = float_from_bf16(out[at]) - truth->out[at];
            wrong += difference * difference, all += truth->out[at] * truth->out[at];
        }
    return sqrt(wrong / all);
}

/* A value of 1e30 late in a chunk: earlier tokens keep their accuracy, and on the CPU their bits. */
static void huge_value(void)
{
    problem *p = problem_create_ragged(lengths, SEQUENCES, HEADS);
    fill_case(p, find_case("slow gates"), 8);
    const call_options options = options_of(STATE_BOTH, false);
    const answer truth = problem_solve(p, true);
    const bars limits = case_bars(find_case("slow gates"), test.device);
    const int64_t begin = p->cu_seqlens[1];
    for (int64_t t = begin; t < p->cu_seqlens[2]; t++) {
        if (!is_tried(t - begin, lengths[1])) continue;
        uint16_t kept[DIM], *const row = p->v + (t * HEADS + BAD_HEAD) * DIM;
        memcpy(kept, row, sizeof kept);
        for (int c = 0; c < DIM; c++)
            if (c % 3 != 1) row[c] = bf16_from_float(c % 2 ? 1e30f : -3e25f);
        trying("v of 1e30 at token %lld", (long long)(t - begin));
        result bad = run_and_check(p, NULL, (bars){0, 0}, options);
        memcpy(row, kept, sizeof kept);
        if (t > begin) check_error("out", error_of_tokens(&truth, bad.out, begin, t), limits.out);
        CHECK(!any_not_finite(bad.out + begin * HEADS * DIM, lengths[1] * HEADS * DIM), "out is not finite");
        result_free(&bad);
    }
    answer_free((answer *)&truth);
    problem_free(p);
}

/* NaN in the parameters of a head: all its outputs and states show it, and no other head changes. */
static void bad_head(void)
{
    problem *p = problem_create_ragged(lengths, SEQUENCES, HEADS);
    fill_case(p, find_case("channels from fast to slow"), 10);
    const call_options options = options_of(STATE_BOTH, false);
    result good = run_and_check(p, NULL, (bars){0, 0}, options);
    float *const elements[] = {&p->A_log[BAD_HEAD], &p->dt_bias[BAD_HEAD * DIM + 77]};
    for (int i = 0; i < 2; i++) {
        const float kept = *elements[i];
        *elements[i] = NAN;
        trying("NaN in %s", i ? "dt_bias" : "A_log");
        result bad = run_and_check(p, NULL, (bars){0, 0}, options);
        *elements[i] = kept;
        for (int64_t t = 0; t < p->tokens; t++)
            for (int64_t h = 0; h < HEADS; h++) {
                const int64_t at = (t * HEADS + h) * DIM;
                if (h == BAD_HEAD)
                    CHECK(any_not_finite(bad.out + at, DIM), "token %lld hides the fault", (long long)t);
                else
                    CHECK(first_different(good.out + at, bad.out + at, DIM) < 0,
                          "token %lld of head %lld differs", (long long)t, (long long)h);
            }
        result_free(&bad);
    }
    result_free(&good);
    problem_free(p);
}

/* Infinities for which the definition is finite: a sigmoid makes numbers of them. */
static void infinite_parameters(void)
{
    problem *p = problem_create_ragged(lengths, SEQUENCES, HEADS);
    const float infinities[] = {INFINITY, -INFINITY};
    for (int i = 0; i < 4; i++) {
        fill_case(p, find_case("channels from fast to slow"), 11);
        if (i < 2)
            p->dt_bias[BAD_HEAD * DIM + 5] = infinities[i];
        else
            p->A_log[BAD_HEAD] = infinities[i - 2];
        trying("%s of %g", i < 2 ? "dt_bias" : "A_log", infinities[i % 2]);
        answer truth = problem_solve(p, true);
        result r = run_and_check(p, &truth, case_bars(find_case("channels from fast to slow"), test.device),
                                 options_of(STATE_BOTH, false));
        result_free(&r);
        answer_free(&truth);
    }
    problem_free(p);
}

/* Queries and keys of every size from the documented least norm to the largest bf16. */
static void sizes_of_keys(void)
{
    static const float sizes[] = {1e-6f, 1e-4f, 1e-2f, 1e2f, 1e18f, 3e19f, 1e25f, 1e37f};
    problem *p = problem_create_ragged(lengths, SEQUENCES, HEADS);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        test_case c = *find_case("slow gates");
        c.sizes.q = c.sizes.k = sizes[i];
        fill_case(p, &c, 12);
        trying("q and k of %g", sizes[i]);
        answer truth = problem_solve(p, false);
        result r = run_and_check(p, &truth, case_bars(&c, test.device), options_of(STATE_OUT, false));
        result_free(&r);
        answer_free(&truth);
    }
    problem_free(p);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"one-bad-token", one_bad_token},
                                   {"unbounded-gates", bad_token_of_unbounded_gates},
                                   {"fp32-gates", bad_token_of_fp32_gates},
                                   {"long-sequence", bad_token_of_long_sequence},
                                   {"many-bad-tokens", many_bad_tokens},
                                   {"huge-value", huge_value},
                                   {"bad-head", bad_head},
                                   {"infinities", infinite_parameters},
                                   {"sizes-of-keys", sizes_of_keys}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
