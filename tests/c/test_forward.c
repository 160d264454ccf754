/* The forward pass against the fp64 recurrence, with the same tests for CPUs and GPUs. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "recorded.h"

static const test_case *ordinary_case(int64_t i)
{
    static const char *const names[] = {"random", "slow gates", "channels from fast to slow"};
    return find_case(names[i % 3]);
}

static void check_shape(int64_t batch, int64_t tokens, int64_t heads)
{
    const test_case *c = ordinary_case(batch + tokens + heads);
    problem *p = problem_create(batch, tokens, heads);
    fill_case(p, c, (uint64_t)(1000 * tokens + 10 * heads + batch));
    trying("B = %lld, T = %lld, H = %lld, %s", (long long)batch, (long long)tokens, (long long)heads,
           c->name);
    check_state_modes(p, case_bars(c, test.device));
    problem_free(p);
}

static void lengths(void)
{
    for (int64_t tokens = 1; tokens <= 70; tokens++) {
        bool near_chunk_end = tokens % 16 <= 1 || tokens % 16 == 15;
        if (test.quick && !near_chunk_end) continue;
        check_shape(1, tokens, 2);
    }
}

static void batches(void)
{
    static const int64_t sizes[] = {1, 2, 5};
    for (int i = 0; i < 3; i++) {
        check_shape(sizes[i], 16, 2);
        check_shape(sizes[i], 37, 3);
        if (!test.quick) check_shape(sizes[i], 150, 2);
    }
}

static void heads(void)
{
    static const int64_t counts[] = {1, 2, 3, 16, 96};
    for (int i = 0; i < (test.quick ? 4 : 5); i++) check_shape(1, test.quick ? 17 : 41, counts[i]);
}

/* Both types of cu_seqlens must give equal bits. */
static void check_ragged(const int64_t *sizes, int64_t count, int64_t head_count, uint64_t seed)
{
    const test_case *c = ordinary_case((int64_t)seed);
    problem *p = problem_create_ragged(sizes, count, head_count);
    fill_case(p, c, seed);
    trying("%lld sequences, T = %lld, H = %lld, %s, seed %lld", (long long)count, (long long)p->tokens,
           (long long)head_count, c->name, (long long)seed);
    check_state_modes(p, case_bars(c, test.device));

    call_options options = options_of(STATE_BOTH, false);
    result wide = run_and_check(p, NULL, (bars){0, 0}, options);
    options.i32_seqlens = true;
    result narrow = run_and_check(p, NULL, (bars){0, 0}, options);
    if (wide.out && narrow.out) {
        CHECK(first_difference(wide.out, narrow.out, 2, problem_rows(p) * DIM) < 0,
              "out differs between int64 and int32 cu_seqlens");
        CHECK(first_difference(wide.state, narrow.state, 4, problem_states(p) * DIM * DIM) < 0,
              "final_state differs between int64 and int32 cu_seqlens");
    }
    result_free(&wide);
    result_free(&narrow);
    problem_free(p);
}

static void ragged(void)
{
    static const int64_t by_hand[][5] = {
        {0, 1, 0, 16, 0}, {17, 0, 0, 31, 1}, {16, 16, 16, 16, 16}, {0, 0, 0, 0, 70}};
    for (int i = 0; i < 4; i++) check_ragged(by_hand[i], 5, 2, (uint64_t)i);
    for (int round = 0; round < (test.quick ? 2 : 9); round++) {
        int64_t sizes[64], longest = 20 + 40 * (round % 3);
        rng r = rng_seed(100 + (uint64_t)round);
        int64_t count = 1 + (int64_t)(rng_bits(&r) % (round % 3 ? 12 : 64));
        for (int64_t n = 0; n < count; n++)
            sizes[n] = rng_uniform(&r, 0, 1) < 0.25 ? 0 : (int64_t)(rng_bits(&r) % (uint64_t)longest);
        check_ragged(sizes, count, 1 + round % 3, (uint64_t)round);
    }
}

/* Far more heads of sequences than SMs, nearly all of them without a token: a persistent CTA must pass on the
 * states of many empty sequences in a row, between and after sequences with tokens. */
static void many(void)
{
    const bool large = test.device.type == FLASH_KDA_CUDA && !test.quick;
    int64_t sizes[300], count = large ? 300 : 60;
    for (int64_t n = 0; n < count; n++) sizes[n] = n % 16 == 3 ? 1 + 7 * n % 90 : 0;
    problem *p = problem_create_ragged(sizes, count, large ? 10 : 3);
    fill_case(p, find_case("random"), 21);
    trying("%lld sequences, T = %lld, H = %lld", (long long)count, (long long)p->tokens, (long long)p->heads);
    check_state_modes(p, ordinary_bars(test.device));
    problem_free(p);
}

/* No token at all: the final state is the initial state, bit for bit, or zeros. */
static void empty(void)
{
    static const int64_t none[3] = {0, 0, 0};
    for (int with_seqlens = 0; with_seqlens < 2; with_seqlens++) {
        problem *p = with_seqlens ? problem_create_ragged(none, 3, 2) : problem_create(2, 0, 3);
        fill_case(p, find_case("random"), 5);
        trying("T = 0, %s", with_seqlens ? "cu_seqlens of zeros" : "without cu_seqlens");
        check_state_modes(p, (bars){0, 0});
        result kept = run_and_check(p, NULL, (bars){0, 0}, options_of(STATE_BOTH, false));
        if (kept.state)
            CHECK(first_difference(p->initial_state, kept.state, 4, problem_states(p) * DIM * DIM) < 0,
                  "final_state is not initial_state");
        result_free(&kept);
        problem_free(p);
    }
}

static void cases(void)
{
    for (int i = 0; i < test_case_count; i++) {
        const test_case *c = &test_cases[i];
        problem *p = problem_create(1, test.quick ? 100 : 1024, test.quick ? 1 : 3);
        fill_case(p, c, 11);
        trying("%s, T = %lld, H = %lld", c->name, (long long)p->tokens, (long long)p->heads);
        check_state_modes(p, case_bars(c, test.device));
        problem_free(p);
    }
}

static void recorded(void)
{
    for (int i = 0; i < (test.quick ? 1 : RECORDED_CASES); i++) {
        char path[512], why[256];
        snprintf(path, sizeof path, "%s/%s", FLASH_KDA_DATA, recorded_files[i]);
        problem *p = recorded_load(path, why);
        if (!CHECK(p, "%s", why)) continue;
        if (test.quick) p->tokens = 200;
        trying("%s", recorded_files[i]);
        answer truth = problem_solve(p, false);
        result r = run_and_check(p, &truth, case_bars(&recorded_cases[i], test.device),
                                 options_of(STATE_OUT, false));
        result_free(&r);
        answer_free(&truth);
        problem_free(p);
    }
}

static void scalars(void)
{
    static const float scales[] = {0.0f, -1.0f, 1e20f, 1e-20f};
    static const float lower_bounds[] = {-5.0f, -1.0f, -1e-3f, -0.0f, 0.0f};
    const test_case *c = find_case("channels from fast to slow");
    problem *p = problem_create(1, 40, 2);
    fill_case(p, c, 21);
    for (int i = 0; i < 4; i++) {
        p->scale = scales[i];
        trying("scale = %g", (double)p->scale);
        check_state_modes(p, case_bars(c, test.device));
    }
    p->scale = 0.088f;
    for (int i = 0; i < 5; i++) {
        p->lower_bound = lower_bounds[i];
        trying("lower_bound = %g", (double)p->lower_bound);
        check_state_modes(p, case_bars(c, test.device));
    }
    problem_free(p);
}

/*
 * With k = 0 the state only decays, and a closed formula gives the truth. Over 8192 tokens of a slow gate, a
 * small relative error of the gate would add up if its sign were always equal, and a state in bf16 could not
 * shrink at all.
 */
static void slow_channels(void)
{
    static const double dt_bias[] = {-11.5, -10.0, -8.0};
    const int64_t tokens = test.quick ? 512 : 8192;
    problem *p = problem_create(1, tokens, 3);
    fill_case(p, find_case("zero keys"), 31);
    memset(p->g, 0, (size_t)problem_rows(p) * DIM * 2);
    for (int64_t i = 0; i < 3 * DIM; i++) p->dt_bias[i] = (float)dt_bias[i / DIM];
    for (int64_t i = 0; i < 3 * DIM * DIM; i++) p->initial_state[i] = 1.0f + 0.5f * (float)(i % 7);
    trying("k = 0, T = %lld", (long long)tokens);
    result r = run_and_check(p, NULL, (bars){0, 0}, options_of(STATE_BOTH, false));
    const float *final = r.state;
    double worst = 0.0;
    for (int64_t i = 0; final && i < 3 * DIM * DIM; i++) {
        double truth = -5.0 * (double)tokens / (1.0 + exp(-dt_bias[i / (DIM * DIM)]));
        double error = fabs(log((double) final[i] / p->initial_state[i]) - truth);
        if (!(error <= worst)) worst = error; /* a NaN stays */
    }
    check_error("state", worst, 1e-3);
    result_free(&r);
    problem_free(p);
}

static void check_large(int64_t batch, int64_t tokens, int64_t head_count)
{
    const test_case *c = find_case("channels from fast to slow");
    problem *p = problem_create(batch, tokens, head_count);
    fill_case(p, c, 61);
    trying("B = %lld, T = %lld, H = %lld", (long long)batch, (long long)tokens, (long long)head_count);
    answer truth = problem_solve(p, true);
    result r = run_and_check(p, &truth, case_bars(c, test.device), options_of(STATE_BOTH, false));
    result_free(&r);
    answer_free(&truth);
    problem_free(p);
}

/* The largest sizes that are promised for a GPU, and smaller ones where the tests should stay short. */
static void large(void)
{
    bool gpu = test.device.type == FLASH_KDA_CUDA && !test.quick;
    check_large(1, gpu ? 1048576 : test.quick ? 4096 : 16384, 1);
    check_large(1, 5, 256);
    check_large(64, 5, gpu ? 256 : 3);
}

/* Every run gives equal bits, on a CPU with any number of threads. */
static void determinism(void)
{
    static const int64_t sizes[] = {130, 0, 64, 33, 200};
    problem *p = problem_create_ragged(sizes, 5, 5);
    fill_case(p, find_case("random"), 41);
    call_options options = options_of(STATE_BOTH, false);
    result first = run_and_check(p, NULL, (bars){0, 0}, options);
    for (int i = 0; i < (test.quick ? 4 : 12); i++) {
        options.threads = test.device.type == FLASH_KDA_CPU ? i : 0;
        trying("run %d, cpu_threads = %d", i, options.threads);
        result again = run_and_check(p, NULL, (bars){0, 0}, options);
        if (first.out && again.out) {
            CHECK(first_difference(first.out, again.out, 2, problem_rows(p) * DIM) < 0, "out differs");
            CHECK(first_difference(first.state, again.state, 4, problem_states(p) * DIM * DIM) < 0,
                  "final_state differs");
        }
        result_free(&again);
    }
    result_free(&first);
    problem_free(p);
}

static void fill_nan(uint16_t *at, int64_t count)
{
    for (int64_t i = 0; i < count; i++) at[i] = 0x7fc0;
}

/* The result of a sequence does not depend on the sequences beside it. Here they hold nothing but NaN, and
 * share a run of 16 tokens of the batch row with it. */
static void neighbours(void)
{
    static const int64_t sizes[] = {13, 20, 7};
    problem *p = problem_create_ragged(sizes, 3, 3);
    const int64_t width = p->heads * DIM, states = p->heads * DIM * DIM;
    fill_case(p, find_case("random"), 61);
    call_options options = options_of(STATE_BOTH, false);
    result before = run_and_check(p, NULL, (bars){0, 0}, options);
    for (int n = 0; n < 3; n += 2) {
        const int64_t first = p->cu_seqlens[n];
        fill_nan(p->q + first * width, sizes[n] * width);
        fill_nan(p->k + first * width, sizes[n] * width);
        fill_nan(p->v + first * width, sizes[n] * width);
        fill_nan(p->g + first * width, sizes[n] * width);
        fill_nan(p->beta + first * p->heads, sizes[n] * p->heads);
    }
    trying("NaN before and after a sequence");
    result after = run_and_check(p, NULL, (bars){0, 0}, options);
    if (before.out && after.out) {
        const int64_t from = sizes[0] * width;
        CHECK(first_difference(before.out + from, after.out + from, 2, sizes[1] * width) < 0, "out differs");
        CHECK(first_difference((float *)before.state + states, (float *)after.state + states, 4, states) < 0,
              "final_state differs");
    }
    result_free(&before);
    result_free(&after);
    problem_free(p);
}

/* Wrong values in cu_seqlens, which a GPU does not refuse: no memory outside the tensors may be touched. A
 * CPU refuses wrong values (test_arguments). */
static void wild_seqlens(void)
{
    static const int64_t wild[][4] = {
        {0, 60, 20, 90},
        {-5, 10, 20, 90},
        {0, 1000000, 2000000, 3000000},
        {INT64_MIN, INT64_MAX, INT64_MIN, INT64_MAX},
        {INT32_MIN, INT32_MAX, -1, 91},
        {90, 60, 30, 0},
        {50, 50, 91, 10000},
    };
    static const int64_t sizes[] = {30, 30, 30};
    if (test.device.type == FLASH_KDA_CPU) return;
    for (size_t i = 0; i < sizeof wild / sizeof *wild; i++) {
        for (int narrow = 0; narrow < 2; narrow++) {
            problem *p = problem_create_ragged(sizes, 3, 2);
            fill_case(p, find_case("random"), 51);
            memcpy(p->cu_seqlens, wild[i], sizeof wild[i]);
            call_options options = options_of(STATE_BOTH, false);
            options.i32_seqlens = narrow;
            trying("cu_seqlens %lld, %lld, %lld, %lld as %s", (long long)wild[i][0], (long long)wild[i][1],
                   (long long)wild[i][2], (long long)wild[i][3], narrow ? "int32" : "int64");
            result r = run_and_check(p, NULL, (bars){0, 0}, options);
            result_free(&r);
            problem_free(p);
        }
    }
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"lengths", lengths},
        {"batches", batches},
        {"heads", heads},
        {"ragged", ragged},
        {"many", many},
        {"empty", empty},
        {"scalars", scalars},
        {"cases", cases},
        {"recorded", recorded},
        {"slow-channels", slow_channels},
        {"large", large},
        {"determinism", determinism},
        {"neighbours", neighbours},
        {"wild-seqlens", wild_seqlens},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
