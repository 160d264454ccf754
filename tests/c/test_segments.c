/* Long sequences, which a kernel may cut into segments: cutting adds no error, and results do not depend on
 * the batch where that is asked for. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "recorded.h"

/* The most by which the error of a result may be larger if sequences were cut. */
static const double MOST_ADDED = 1.02;

/* The rounding of fp32. A state with a smaller error is not compared: where a state does little but decay,
 * fp32's rounding is all the error there is. */
static const double ROUNDING = 1e-6;

/* Whether the kernel and the cut under test are hopper and this cut. */
static bool testing_cut(flash_kda_cut cut)
{
    return strcmp(test.kernel, "hopper") == 0 && test.cut == cut;
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

/* Whether nothing was written and less than fp32's rounding is left of the initial state. What is left is in
 * a few channels, whose errors are by chance up to 14% smaller or larger if the sequence is cut. Such a state
 * is held to its bars alone. */
static bool has_faded(const problem *p, const answer *truth)
{
    double left = 0.0, began = 0.0;
    for (int64_t i = 0; i < problem_states(p) * DIM * DIM; i++) {
        left += truth->state[i] * truth->state[i];
        began += (double)p->initial_state[i] * p->initial_state[i];
    }
    return left < ROUNDING * ROUNDING * began;
}

/* Holds the result to its bars, and to the error of the same kernel without cuts. With many heads the kernel
 * without cuts uses solo CTAs, whose chunks of 16 tokens make states up to a tenth more exact than the chunks
 * of 32 tokens of CTA pairs. The mixed schedule uses both for different heads, so it is compared with CTA
 * pairs, which batch_invariant asks for. */
static void check_cutting(const problem *p, bars limits)
{
    answer truth = problem_solve(p, true);
    errors whole = errors_of(p, &truth, FLASH_KDA_CUT_NEVER, testing_cut(FLASH_KDA_CUT_MIXED)),
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
    if (!testing_cut(FLASH_KDA_CUT_ALWAYS)) return;
    for (int i = 0; i < test_case_count; i++) {
        const test_case *c = &test_cases[i];
        problem *p = problem_create(1, test.quick ? 1024 : 8192, test.quick ? 1 + (i == 0) : 4);
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

/* The recorded window, repeated: slow channels of a trained model through many segments. */
static void recorded(void)
{
    const int times = test.quick ? 1 : 8;
    if (!testing_cut(FLASH_KDA_CUT_ALWAYS)) return;
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

/* Numbers of segments near those at which the join has one group more, and lengths that are no multiple of a
 * segment. */
static void join_groups(void)
{
    static const int64_t segments[] = {2, 3, 4, 25, 26, 27, 28, 38, 39, 51, 64};
    const test_case *c = find_case("slow gates");
    if (!testing_cut(FLASH_KDA_CUT_ALWAYS)) return;
    for (size_t i = 0; i < sizeof segments / sizeof *segments; i += test.quick ? 3 : 1) {
        problem *p = problem_create(1, 128 * segments[i] + (int64_t)i * 5 % 64, 1);
        fill_case(p, c, 80 + i);
        trying("%lld segments, T = %lld", (long long)segments[i], (long long)p->tokens);
        check_cutting(p, case_bars(c, test.device));
        problem_free(p);
    }
}

/* More heads than workers, so that share borders divide heads: on a GPU with 132 SMs, or emulated with 9. */
static void even_shares(void)
{
    static const struct {
        int64_t batch, tokens, heads;
    } shapes[] = {
        {.batch = 1, .tokens = 2405, .heads = 6},
        {.batch = 3, .tokens = 1200, .heads = 5},
        {.batch = 1, .tokens = 8192, .heads = 96},
        {.batch = 2, .tokens = 3000, .heads = 100},
    };
    const test_case *c = find_case("channels from fast to slow");
    if (!testing_cut(FLASH_KDA_CUT_NEVER)) return;
    for (int i = 0; i < (test.quick ? 2 : 4); i++) {
        problem *p = problem_create(shapes[i].batch, shapes[i].tokens, shapes[i].heads);
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

/* Relays in which a CTA pair has a segment of two, three or four heads, and a head has no, one or two
 * segments that are shared so: on a GPU with 132 SMs, or emulated with 22. */
static void shared_segments(void)
{
    static const int64_t heads[] = {4, 3, 6, 7, 2, 8};
    const test_case *c = find_case("channels from fast to slow");
    if (!testing_cut(FLASH_KDA_CUT_ALWAYS)) return;
    for (size_t i = 0; i < (test.quick ? 4 : sizeof heads / sizeof *heads); i++) {
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

/* The final state takes the place of the initial state, which spare pairs of a relay read late. Whether a
 * wrong order shows is chance, so there are many rounds. */
static void in_place(void)
{
    if (!testing_cut(FLASH_KDA_CUT_ALWAYS)) return;
    problem *p = problem_create(1, test.quick ? 384 : 2048, test.quick ? 4 : 12);
    const int64_t values = problem_rows(p) * DIM, states = problem_states(p) * DIM * DIM;
    fill_case(p, find_case("channels from fast to slow"), 170);
    result apart = run_and_check(p, NULL, (bars){0, 0}, options_of(STATE_BOTH, false));
    for (int round = 0; round < (test.quick ? 12 : 300); round++) {
        trying("round %d", round);
        result here = run_and_check(p, NULL, (bars){0, 0}, options_of(STATE_IN_PLACE, false));
        CHECK(first_difference(apart.out, here.out, 2, values) < 0, "out differs in place");
        CHECK(first_difference(apart.state, here.state, 4, states) < 0, "final_state differs in place");
        result_free(&here);
    }
    result_free(&apart);
    problem_free(p);
}

/* Batches in which some sequences are cut and others are not, and some have no tokens. */
static void lengths_differ(void)
{
    static const int64_t lengths[][8] = {
        {1500, 0, 17, 100, 64, 1, 130, 0},
        {1, 128, 127, 129, 192, 191, 16, 1000},
        {0, 0, 0, 0, 0, 0, 0, 700},
        {200, 200, 200, 200, 200, 200, 200, 200},
    };
    const test_case *c = find_case("channels from fast to slow");
    if (!testing_cut(FLASH_KDA_CUT_ALWAYS)) return;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        problem *p = problem_create_ragged(lengths[i], 8, 1 + (int64_t)i % 3);
        fill_case(p, c, 90 + i);
        trying("batch %zu, T = %lld, H = %lld", i, (long long)p->tokens, (long long)p->heads);
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

/* A batch for the mixed schedule: up to four long sequences, and short ones around them. */
enum { MOST_LONG = 4, MOST_SHORT = 60 };
typedef struct mixed_batch {
    int64_t long_tokens[MOST_LONG];
    int64_t short_count, short_tokens; /* about as many tokens each */
    int64_t heads;
} mixed_batch;

/* Writes the lengths of the sequences, in their order in the batch, and returns how many there are. A long
 * sequence stands after every third short one while there are both. */
static int64_t mixed_lengths(const mixed_batch *b, int64_t lengths[MOST_LONG + MOST_SHORT])
{
    int64_t count = 0, used = 0;
    for (int64_t n = 0; n < b->short_count; n++) {
        if (n % 3 == 1 && used < MOST_LONG) lengths[count++] = b->long_tokens[used++];
        lengths[count++] = b->short_tokens + n * 7 % 5 * (b->short_tokens > 0);
    }
    while (used < MOST_LONG) lengths[count++] = b->long_tokens[used++];
    return count;
}

/* The mixed schedule: one or a few long sequences, cut or with CTA pairs of their own; short ones in even
 * shares of CTA pairs or of solo CTAs, divided or not, or no short ones; and batches without a long one. On a
 * GPU with 132 SMs, or emulated with 22. */
static void mixed(void)
{
    static const mixed_batch batches[] = {
        {.long_tokens = {1500}, .short_count = 7, .short_tokens = 60, .heads = 1},
        {.long_tokens = {1500}, .short_count = 7, .short_tokens = 60, .heads = 2},
        {.long_tokens = {1400}, .short_count = 3, .short_tokens = 90, .heads = 3},
        {.long_tokens = {700, 90, 800, 600}, .short_count = 4, .short_tokens = 40, .heads = 1},
        {.long_tokens = {900, 1000}, .heads = 2},
        {.long_tokens = {1500}, .short_count = MOST_SHORT, .short_tokens = 30, .heads = 2},
        {.long_tokens = {300}, .short_count = MOST_SHORT, .short_tokens = 40, .heads = 5},
        {.short_count = 9, .short_tokens = 200, .heads = 2},
        {.short_count = 4, .short_tokens = 200, .heads = 2},
        {.long_tokens = {2300, 0, 2300}, .short_count = 1, .short_tokens = 0, .heads = 2},
    };
    const test_case *c = find_case("channels from fast to slow");
    if (!testing_cut(FLASH_KDA_CUT_MIXED)) return;
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
        int64_t lengths[MOST_LONG + MOST_SHORT], count = mixed_lengths(&batches[i], lengths);
        const int64_t times = test.quick ? 1 : 6;
        for (int64_t n = 0; n < count; n++)
            if (lengths[n] > 250) lengths[n] *= times;
        problem *p = problem_create_ragged(lengths, count, times * batches[i].heads);
        fill_case(p, c, 170 + i);
        trying("batch %zu, T = %lld, N = %lld, H = %lld", i, (long long)p->tokens, (long long)count,
               (long long)p->heads);
        if (i % 4 == 0) check_state_modes(p, case_bars(c, test.device));
        check_cutting(p, case_bars(c, test.device));
        problem_free(p);
    }
}

/* Copies the rows of a tensor that belong to some tokens. */
static void copy_tokens(uint16_t *to, const uint16_t *from, int64_t first, int64_t count, int64_t width)
{
    memcpy(to, from + first * width, (size_t)(count * width) * sizeof *to);
}

/* A problem that is sequence n of another problem by itself. */
static problem *one_sequence(const problem *p, int64_t n)
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

/* A sequence that is shorter on the device than the tensors for which its cut was planned. */
static void shorter(void)
{
    static const int64_t tokens[] = {2380, 1900, 1000, 300, 1}, heads[] = {4, 2, 7};
    const test_case *c = find_case("channels from fast to slow");
    if (!testing_cut(FLASH_KDA_CUT_ALWAYS)) return;
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        const int64_t all = 2411;
        problem *p = problem_create_ragged(&all, 1, heads[i % 3]);
        fill_case(p, c, 150 + i);
        p->cu_seqlens[1] = tokens[i];
        trying("%lld of %lld tokens, H = %lld", (long long)tokens[i], (long long)all, (long long)p->heads);
        problem *one = one_sequence(p, 0);
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

/* With batch_invariant a sequence has the same bits in a batch as by itself, in a row without cu_seqlens. */
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
            problem *one = one_sequence(p, n);
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

/* The bytes of q, k, v and g. */
static size_t input_bytes(const flash_kda_fwd_params *p)
{
    return (size_t)(p->q.shape[1] * p->q.shape[2]) * DIM * 4 * 2;
}

/* Holds the workspace to `share` of the bytes of q, k, v and g, and `more` bytes. */
static void check_workspace(const flash_kda_fwd_params *p, double share, double more)
{
    size_t bytes;
    trying("T = %lld, H = %lld, N of cu_seqlens = %lld, longest %lld, batch_invariant = %d",
           (long long)p->q.shape[1], (long long)p->q.shape[2],
           p->cu_seqlens.ndim ? (long long)p->cu_seqlens.shape[0] - 1 : 0, (long long)p->max_seqlen,
           p->batch_invariant);
    flash_kda_status status = flash_kda_fwd_workspace_size(p, &bytes);
    if (!CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) return;
    CHECK((double)bytes <= share * (double)input_bytes(p) + more, "%zu bytes of workspace for %zu of inputs",
          bytes, input_bytes(p));
}

/* The promises about the workspace. Where T x H is above a million it is at most a quarter of the bytes of q,
 * k, v and g. With batch_invariant a segment has at least 1024 tokens, and each segment of a head has a map
 * and a state of 64 KiB and a sixth of a map for groups; what lists and even shares need is below 16 MB. */
static void workspace(void)
{
    static const struct {
        int64_t tokens, heads;
    } shapes[] = {
        {.tokens = 1048576, .heads = 1}, {.tokens = 1048576, .heads = 96}, {.tokens = 65536, .heads = 17},
        {.tokens = 16384, .heads = 65},  {.tokens = 8192, .heads = 129},   {.tokens = 10923, .heads = 97},
    };
    static const int64_t longest[] = {8192, 19619, 100000, 1000000}, borders = 54;
    const double batch_invariant_share = (2 + 1.0 / 6) * 65536 / (1024 * 4 * 2 * DIM);
    if (test.device.type != FLASH_KDA_CUDA) return;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int64_t rows[] = {1, shapes[i].tokens, shapes[i].heads, DIM}, bias[] = {shapes[i].heads, DIM};
        flash_kda_fwd_params p = {
            .struct_size = sizeof p,
            .device = test.device,
            .kernel = test.kernel,
            .cut = test.cut,
            .beta = tensor_of(NULL, FLASH_KDA_BF16, 3, rows),
            .A_log = tensor_of(NULL, FLASH_KDA_F32, 1, bias),
            .dt_bias = tensor_of(NULL, FLASH_KDA_F32, 2, bias),
        };
        p.q = p.k = p.v = p.g = p.out = tensor_of(NULL, FLASH_KDA_BF16, 4, rows);
        check_workspace(&p, 0.25, 0);
        p.batch_invariant = 1;
        check_workspace(&p, 0.25, 0);
        check_workspace(&p, batch_invariant_share, 16e6);
        p.cu_seqlens = tensor_of(NULL, FLASH_KDA_I64, 1, &borders);
        check_workspace(&p, batch_invariant_share, 16e6);
        p.batch_invariant = 0;
        for (size_t n = 0; n < sizeof longest / sizeof *longest && longest[n] <= shapes[i].tokens; n++) {
            p.max_seqlen = longest[n];
            check_workspace(&p, 0.25, 0);
        }
    }
}

/* Far longer sequences: the error of a sequence that is cut does not grow with its length. */
static void long_sequences(void)
{
    static const int64_t tokens[] = {16384, 65536, 262144};
    const test_case *c = find_case("channels from fast to slow");
    if (!testing_cut(FLASH_KDA_CUT_ALWAYS) || test.quick) return;
    for (int i = 0; i < 3; i++) {
        problem *p = problem_create(1, tokens[i], 1);
        fill_case(p, c, 110);
        trying("T = %lld", (long long)tokens[i]);
        check_cutting(p, case_bars(c, test.device));
        problem_free(p);
    }
}

/* The smallest problems that make each schedule of a cut: for make test on the emulator. On 22 SMs a relay
 * with and without spare pairs, passes with lists, the mixed schedule; on 9 SMs and cut never CTA pairs, solo
 * CTAs, and solo CTAs in even shares. */
static void small(void)
{
    static const struct {
        int64_t lengths[4], count, heads;
    } batches[] = {
        {{400}, 1, 1}, {{300, 30, 0, 7}, 4, 1}, {{60, 40}, 2, 5}, {{40, 40, 40, 40}, 4, 2}, {{60}, 1, 3},
    };
    const test_case *c = find_case("channels from fast to slow");
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
        problem *p = problem_create_ragged(batches[i].lengths, batches[i].count, batches[i].heads);
        fill_case(p, c, 190 + i);
        trying("batch %zu", i);
        answer truth = problem_solve(p, true);
        result r = run_and_check(p, &truth, case_bars(c, test.device),
                                 options_of(i % 2 ? STATE_BOTH : STATE_IN_PLACE, false));
        result_free(&r);
        answer_free(&truth);
        problem_free(p);
    }
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"small", small},
        {"cases", cases},
        {"recorded", recorded},
        {"join-groups", join_groups},
        {"even-shares", even_shares},
        {"shared-segments", shared_segments},
        {"in-place", in_place},
        {"lengths-differ", lengths_differ},
        {"shorter", shorter},
        {"invariance", invariance},
        {"mixed", mixed},
        {"workspace", workspace},
        {"long", long_sequences},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
