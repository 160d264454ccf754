/* Long sequences, which a kernel may cut into segments: that cutting adds no error, and that results do not depend on the batch
 * where that is asked for. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "recorded.h"

/* How much larger the error may be of a result for which sequences were cut; and the error of a state below which that is not asked: fp32's
 * own rounding, which is all there is where a state does little but decay. */
static const double MOST_ADDED = 1.02, ROUNDING = 1e-6;

static bool kernel_can_cut(void)
{
    return strcmp(test.kernel, "hopper") == 0;
}

static bool kernel_cuts(void)
{
    return kernel_can_cut() && test.cut == FLASH_KDA_CUT_ALWAYS;
}

typedef struct errors {
    double out, state;
} errors;

static errors errors_of(const problem *p, const answer *truth, flash_kda_cut cut, bool batch_invariant)
{
    call_options options = options_of(STATE_BOTH, false);
    options.cut = cut, options.batch_invariant = batch_invariant;
    result r = run_and_check(p, NULL, (bars){0, 0}, options);
    errors e = {relative_rms(truth->out, r.out, FLASH_KDA_BF16, problem_rows(p) * DIM),
                relative_rms(truth->state, r.state, FLASH_KDA_F32, problem_states(p) * DIM * DIM)};
    result_free(&r);
    return e;
}

/* Nothing is written and less than fp32's rounding of the initial state is left of it, in a few channels, whose errors by chance are up to 14%
 * less or more if cut: such a state is held to its bars alone. */
static bool has_faded(const problem *p, const answer *truth)
{
    double left = 0.0, began = 0.0;
    for (int64_t i = 0; i < problem_states(p) * DIM * DIM; i++) {
        left += truth->state[i] * truth->state[i];
        began += (double)p->initial_state[i] * p->initial_state[i];
    }
    return left < ROUNDING * ROUNDING * began;
}

static bool kernel_mixes(void)
{
    return kernel_can_cut() && test.cut == FLASH_KDA_CUT_MIXED;
}

/* Holds the result to its bars, and to the error of the kernel that does not cut. With many heads that has chunks of 16 tokens, in which states
 * come out up to a tenth more exact than in those of 32 that pairs of blocks have: of a mixture, where some heads have the ones and some the others,
 * it is made to have the latter. */
static void check_cutting(const problem *p, bars limits)
{
    answer truth = problem_solve(p, true);
    errors whole = errors_of(p, &truth, FLASH_KDA_CUT_NEVER, kernel_mixes()),
           cut = errors_of(p, &truth, test.cut, false);
    check_error("out", cut.out, limits.out);
    check_error("state", cut.state, limits.state);
    CHECK(cut.out <= MOST_ADDED * whole.out, "out has error %.4g, uncut %.4g", cut.out, whole.out);
    if (!has_faded(p, &truth))
        CHECK(cut.state <= fmax(MOST_ADDED * whole.state, ROUNDING), "state has error %.4g, uncut %.4g",
              cut.state, whole.state);
    answer_free(&truth);
}

static void cases(void)
{
    if (!kernel_cuts()) return;
    for (int i = 0; i < test_case_count; i++) {
        const test_case *c = &test_cases[i];
        problem *p = problem_create(1, test.quick ? 1024 : 8192, test.quick ? 2 : 4);
        fill_case(p, c, 71);
        trying("%s, T = %lld, H = %lld", c->name, (long long)p->tokens, (long long)p->heads);
        check_cutting(p, case_bars(c, test.device));
        problem_free(p);
    }
}

static uint16_t *repeat(uint16_t *from, int64_t count, int times)
{
    uint16_t *to = allocate((size_t)(count * times), sizeof *to);
    for (int i = 0; i < times; i++) memcpy(to + i * count, from, (size_t)count * sizeof *to);
    free(from);
    return to;
}

/* The window that was recorded, over and over: real slow channels through many segments. */
static void recorded(void)
{
    const int times = test.quick ? 1 : 8;
    if (!kernel_cuts()) return;
    for (int i = 0; i < 2; i++) {
        char path[512], why[256];
        snprintf(path, sizeof path, "%s/%s", FLASH_KDA_DATA, recorded_files[i]);
        problem *p = recorded_load(path, why);
        if (!CHECK(p, "%s", why)) continue;
        const int64_t tokens = problem_rows(p);
        uint16_t **tensors[] = {&p->q, &p->k, &p->v, &p->g};
        for (int t = 0; t < 4; t++) *tensors[t] = repeat(*tensors[t], tokens * DIM, times);
        p->beta = repeat(p->beta, tokens, times);
        p->tokens *= times;
        trying("%s, %d times", recorded_files[i], times);
        check_cutting(p, case_bars(&recorded_cases[i], test.device));
        problem_free(p);
    }
}

/* Numbers of segments around those at which maps are joined in one group, two, three; and lengths that leave a rest. */
static void levels(void)
{
    static const int64_t segments[] = {2, 3, 4, 25, 26, 27, 28, 38, 39, 51, 64};
    const test_case *c = find_case("slow gates");
    if (!kernel_cuts()) return;
    for (size_t i = 0; i < sizeof segments / sizeof *segments; i += test.quick ? 2 : 1) {
        problem *p = problem_create(1, 64 * segments[i] + (int64_t)i * 5 % 64, 1);
        fill_case(p, c, 80 + i);
        trying("%lld segments, T = %lld", (long long)segments[i], (long long)p->tokens);
        check_cutting(p, case_bars(c, test.device));
        problem_free(p);
    }
}

/* More heads than can be under way at once, which then are divided: against the recurrence, and undivided ones. On 9
 * multiprocessors, as in an emulated GPU, or 132. */
static void divided(void)
{
    static const int64_t shapes[][3] = {{1, 2405, 6}, {3, 1200, 5}, {1, 8192, 96}, {2, 3000, 100}};
    const test_case *c = find_case("channels from fast to slow");
    if (!kernel_can_cut() || test.cut != FLASH_KDA_CUT_NEVER) return;
    for (int i = 0; i < (test.quick ? 2 : 4); i++) {
        problem *p = problem_create(shapes[i][0], shapes[i][1], shapes[i][2]);
        fill_case(p, c, 120 + (uint64_t)i);
        trying("B = %lld, T = %lld, H = %lld", (long long)p->batch, (long long)p->tokens,
               (long long)p->heads);
        if (i == 0) check_state_modes(p, case_bars(c, test.device));
        answer truth = problem_solve(p, true);
        errors e = errors_of(p, &truth, FLASH_KDA_CUT_NEVER, false);
        bars limits = case_bars(c, test.device);
        check_error("out", e.out, limits.out);
        check_error("state", e.state, limits.state);
        answer_free(&truth);
        problem_free(p);
    }
}

/* In one launch, so many heads for the pairs that there are that these share segments, of which heads have one, two or none, in
 * twos, threes and fours: for 22 multiprocessors, as in an emulated GPU, or 132. */
static void shared(void)
{
    static const int64_t heads[] = {4, 2, 3, 6, 7, 8};
    const test_case *c = find_case("channels from fast to slow");
    if (!kernel_cuts()) return;
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        problem *p = problem_create(1, 2411, test.quick ? heads[i] : 6 * heads[i]);
        fill_case(p, c, 140 + i);
        trying("T = %lld, H = %lld", (long long)p->tokens, (long long)p->heads);
        if (i == 0) check_state_modes(p, case_bars(c, test.device));
        check_cutting(p, case_bars(c, test.device));
        problem_free(p);
    }
    problem *rows = problem_create(2, 2000, test.quick ? 2 : 12);
    fill_case(rows, c, 146);
    trying("2 rows of 2000 tokens, H = %lld", (long long)rows->heads);
    check_cutting(rows, case_bars(c, test.device));
    problem_free(rows);
}

/* Long and short sequences in one batch, so many heads that a few are cut and none, and sequences without tokens. */
static void mixtures(void)
{
    static const int64_t lengths[][8] = {
        {1500, 0, 17, 100, 64, 1, 130, 0},
        {1, 128, 127, 129, 192, 191, 16, 1000},
        {0, 0, 0, 0, 0, 0, 0, 700},
        {200, 200, 200, 200, 200, 200, 200, 200},
    };
    const test_case *c = find_case("channels from fast to slow");
    if (!kernel_cuts()) return;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        problem *p = problem_create_ragged(lengths[i], 8, 1 + (int64_t)i % 3);
        fill_case(p, c, 90 + i);
        trying("mixture %zu, T = %lld, H = %lld", i, (long long)p->tokens, (long long)p->heads);
        check_state_modes(p, case_bars(c, test.device));
        if (!test.quick) check_cutting(p, case_bars(c, test.device));
        problem_free(p);
    }
    problem *rows = problem_create(3, 150, 2);
    fill_case(rows, c, 95);
    trying("3 rows of 150 tokens");
    check_state_modes(rows, case_bars(c, test.device));
    problem_free(rows);
}

/* The launch that finds out which sequences are long, for 22 multiprocessors, as in an emulated GPU, or 132: one or a few that are cut or have
 * pairs of their own, with a rest that pairs share out or blocks of their own, that is divided or not, or with none; and none that is long. */
static void unlike(void)
{
    enum { MANY = 60 };
    static const struct {
        int64_t longer[4], count, shorter, heads; /* so many shorter ones, of about so many tokens */
    } mixes[] = {
        {{1500}, 7, 60, 1},     {{1500}, 7, 60, 2},
        {{1400}, 3, 90, 3},     {{700, 90, 800, 600}, 4, 40, 1},
        {{900, 1000}, 0, 0, 2}, {{1500}, MANY, 30, 2},
        {{300}, MANY, 40, 5},   {{0}, 9, 200, 2},
        {{0}, 4, 200, 2},       {{2300, 0, 2300}, 1, 0, 2},
    };
    const test_case *c = find_case("channels from fast to slow");
    if (!kernel_mixes()) return;
    for (size_t i = 0; i < sizeof mixes / sizeof *mixes; i++) {
        int64_t lengths[MANY + 4], count = 0;
        for (int64_t n = 0; n < mixes[i].count; n++) {
            if (n % 3 == 1 && n / 3 < 4) lengths[count++] = mixes[i].longer[n / 3];
            lengths[count++] = mixes[i].shorter + n * 7 % 5 * (mixes[i].shorter > 0);
        }
        for (int64_t n = (mixes[i].count + 1) / 3; n < 4; n++) lengths[count++] = mixes[i].longer[n];
        const int64_t times = test.quick ? 1 : 6;
        for (int64_t n = 0; n < count; n++)
            if (lengths[n] > 250) lengths[n] *= times;
        problem *p = problem_create_ragged(lengths, count, times * mixes[i].heads);
        fill_case(p, c, 170 + i);
        trying("mixture %zu, T = %lld, N = %lld, H = %lld", i, (long long)p->tokens, (long long)count,
               (long long)p->heads);
        if (i % 4 == 0) check_state_modes(p, case_bars(c, test.device));
        check_cutting(p, case_bars(c, test.device));
        problem_free(p);
    }
}

/* The part of a problem's tensor that belongs to some tokens. */
static void copy_tokens(uint16_t *to, const uint16_t *from, int64_t first, int64_t count, int64_t width)
{
    memcpy(to, from + first * width, (size_t)(count * width) * sizeof *to);
}

/* Sequence n of a problem by itself. */
static problem *alone(const problem *p, int64_t n)
{
    const int64_t first = p->cu_seqlens[n], count = p->cu_seqlens[n + 1] - first,
                  states = p->heads * DIM * DIM;
    problem *one = problem_create(1, count, p->heads);
    copy_tokens(one->q, p->q, first, count, p->heads * DIM);
    copy_tokens(one->k, p->k, first, count, p->heads * DIM);
    copy_tokens(one->v, p->v, first, count, p->heads * DIM);
    copy_tokens(one->g, p->g, first, count, p->heads * DIM);
    copy_tokens(one->beta, p->beta, first, count, p->heads);
    memcpy(one->A_log, p->A_log, (size_t)p->heads * sizeof *p->A_log);
    memcpy(one->dt_bias, p->dt_bias, (size_t)(p->heads * DIM) * sizeof *p->dt_bias);
    memcpy(one->initial_state, p->initial_state + n * states, (size_t)states * sizeof *p->initial_state);
    return one;
}

/* A sequence that is shorter on the device than the tensors, for which the cut was planned. */
static void shorter(void)
{
    static const int64_t tokens[] = {2380, 1900, 1000, 300, 1}, heads[] = {4, 2, 7};
    const test_case *c = find_case("channels from fast to slow");
    if (!kernel_cuts()) return;
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        const int64_t all = 2411;
        problem *p = problem_create_ragged(&all, 1, heads[i % 3]);
        fill_case(p, c, 150 + i);
        p->cu_seqlens[1] = tokens[i];
        trying("%lld of %lld tokens, H = %lld", (long long)tokens[i], (long long)all, (long long)p->heads);
        problem *one = alone(p, 0);
        answer truth = problem_solve(one, true);
        result r = run_and_check(p, NULL, (bars){0, 0}, options_of(STATE_BOTH, false));
        if (r.out) {
            check_error("out", relative_rms(truth.out, r.out, FLASH_KDA_BF16, problem_rows(one) * DIM),
                        case_bars(c, test.device).out);
            check_error("state",
                        relative_rms(truth.state, r.state, FLASH_KDA_F32, problem_states(one) * DIM * DIM),
                        case_bars(c, test.device).state);
        }
        result_free(&r);
        answer_free(&truth);
        problem_free(one);
        problem_free(p);
    }
}

/* With batch_invariant a sequence has the same bits in a batch as alone, where a row without cu_seqlens is its batch. */
static void invariance(void)
{
    static const int64_t lengths[][5] = {{2100, 3, 0, 5000, 700}, {40, 2048, 2047, 16, 1}};
    for (size_t i = 0; i < (test.quick ? 1 : 2); i++) {
        problem *p = problem_create_ragged(lengths[i], 5, 2);
        fill_case(p, find_case("slow gates"), 100 + i);
        call_options options = options_of(STATE_BOTH, false);
        options.batch_invariant = true;
        trying("batch %zu", i);
        result all = run_and_check(p, NULL, (bars){0, 0}, options);
        for (int64_t n = 0; all.out && n < 5; n++) {
            problem *one = alone(p, n);
            trying("sequence %lld of batch %zu", (long long)n, i);
            result single = run_and_check(one, NULL, (bars){0, 0}, options);
            const int64_t values = p->heads * DIM, states = p->heads * DIM * DIM;
            if (single.out) {
                CHECK(first_difference(all.out + p->cu_seqlens[n] * values, single.out, 2,
                                       lengths[i][n] * values) < 0,
                      "out differs");
                CHECK(first_difference((float *)all.state + n * states, single.state, 4, states) < 0,
                      "final_state differs");
            }
            result_free(&single);
            problem_free(one);
        }
        result_free(&all);
        problem_free(p);
    }
}

/* What is promised of the workspace where T x H is above a million: under a quarter of the bytes of q, k, v and g. */
static void workspace(void)
{
    static const int64_t shapes[][2] = {{1048576, 1}, {1048576, 96}, {65536, 17},
                                        {16384, 65},  {8192, 129},   {10923, 97}};
    static const int64_t longest[] = {8192, 19619, 100000, 1000000};
    for (size_t i = 0; test.device.type == FLASH_KDA_CUDA && i < sizeof shapes / sizeof *shapes; i++) {
        const int64_t tokens = shapes[i][0], head_count = shapes[i][1], rows[] = {1, tokens, head_count, DIM};
        const int64_t bias[] = {head_count, DIM};
        flash_kda_fwd_params p = {
            .struct_size = sizeof p, .device = test.device, .kernel = test.kernel, .cut = test.cut};
        p.q = p.k = p.v = p.g = p.out = tensor_of(NULL, FLASH_KDA_BF16, 4, rows);
        p.beta = tensor_of(NULL, FLASH_KDA_BF16, 3, rows);
        p.A_log = tensor_of(NULL, FLASH_KDA_F32, 1, bias);
        p.dt_bias = tensor_of(NULL, FLASH_KDA_F32, 2, bias);
        for (p.batch_invariant = 0; p.batch_invariant < 2; p.batch_invariant++) {
            size_t bytes, inputs = (size_t)(tokens * head_count) * DIM * 4 * 2;
            trying("T = %lld, H = %lld, batch_invariant = %d", (long long)tokens, (long long)head_count,
                   p.batch_invariant);
            flash_kda_status status = flash_kda_fwd_workspace_size(&p, &bytes);
            if (!CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) continue;
            CHECK(bytes < inputs / 4, "%zu bytes of workspace for %zu of inputs", bytes, inputs);
        }
        const int64_t borders = 54;
        p.cu_seqlens = tensor_of(NULL, FLASH_KDA_I64, 1, &borders);
        p.batch_invariant = 0;
        for (size_t n = 0; n < sizeof longest / sizeof *longest && longest[n] <= tokens; n++) {
            size_t bytes, inputs = (size_t)(tokens * head_count) * DIM * 4 * 2;
            p.max_seqlen = longest[n];
            trying("T = %lld, H = %lld, the longest of %lld sequences has %lld", (long long)tokens,
                   (long long)head_count, (long long)borders - 1, (long long)longest[n]);
            flash_kda_status status = flash_kda_fwd_workspace_size(&p, &bytes);
            if (!CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) continue;
            CHECK(bytes < inputs / 4, "%zu bytes of workspace for %zu of inputs", bytes, inputs);
        }
    }
}

/* Far longer sequences, against the fp64 recurrence; also the error of what is cut must not grow with the length. */
static void lengths(void)
{
    static const int64_t tokens[] = {16384, 65536, 262144};
    const test_case *c = find_case("channels from fast to slow");
    if (!kernel_cuts() || test.quick) return;
    for (int i = 0; i < 3; i++) {
        problem *p = problem_create(1, tokens[i], 1);
        fill_case(p, c, 110);
        trying("T = %lld", (long long)tokens[i]);
        check_cutting(p, case_bars(c, test.device));
        problem_free(p);
    }
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"cases", cases},   {"recorded", recorded},   {"levels", levels},   {"divided", divided},
        {"shared", shared}, {"mixtures", mixtures},   {"shorter", shorter}, {"invariance", invariance},
        {"unlike", unlike}, {"workspace", workspace}, {"lengths", lengths},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
