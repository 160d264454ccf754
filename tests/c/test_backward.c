/*
 * The backward pass: the fp64 reference against finite differences of the forward pass's reference, and
 * kernels against the fp64 reference.
 *
 * FLASH_KDA_TEST_PROBLEMS says how many calls with drawn options are tried, and FLASH_KDA_TEST_SEED where
 * they begin.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bwd_call.h"
#include "bwd_compare.h"
#include "compare.h"
#include "draw.h"
#include "recorded.h"

/* ---- Errors -------------------------------------------------------------------------------------------- */

/* GPUs multiply in tf32; the CPU in fp32. */
static bool is_exact(void)
{
    return test.device.type == FLASH_KDA_CPU;
}

/* The kernel `hopper` carries gradients of states through all chunks but the first as the forward pass
 * carries states: what has faded by more than this on the way from the gradient of the final state, which is
 * about 1, is lost. */
static const double FADED = 0x1p-30;

static bool is_hopper(void)
{
    return !is_exact() && strcmp(test.kernel, "hopper") == 0;
}

/* The largest error of each gradient so far, as fp32 and as bf16. */
static double worst[GRADIENTS][2], worst_beyond;

static void hold_gradient(gradient which, const double *truth, const void *got, bool narrow, int64_t count)
{
    const gradient_bars most = gradient_bars_of(test.device);
    const double least = which == GRAD_INITIAL_STATE && is_hopper() ? FADED : GRADIENT_FLOOR,
                 error = gradient_error(truth, got, narrow, count, false, least),
                 bar = gradient_bar(&most, narrow, count);
    CHECK(error <= bar, "%s has relative error %.3g; it must be at most %.3g", gradient_names[which], error,
          bar);
    if (error > worst[which][narrow]) worst[which][narrow] = error;
    if (!narrow) return;
    const double beyond = gradient_error(truth, got, narrow, count, true, least);
    CHECK(beyond <= most.beyond_rounding,
          "%s has relative error %.3g beyond its rounding; it must be at most %.3g", gradient_names[which],
          beyond, most.beyond_rounding);
    if (beyond > worst_beyond) worst_beyond = beyond;
}

static void hold_A_log(const problem *p, const bwd_answer *truth, const float *got)
{
    const gradient_bars most = gradient_bars_of(test.device);
    const int64_t count = problem_rows(p) * DIM;
    double *g = allocate((size_t)count, sizeof *g);
    for (int64_t i = 0; i < count; i++)
        g[i] = p->g_f32 ? (double)p->g_f32[i] : (double)float_from_bf16(p->g[i]);
    const rate_terms terms = {.g = g,
                              .dt_bias = p->without_dt_bias ? NULL : p->dt_bias,
                              .rows = p->batch * p->tokens,
                              .heads = p->heads,
                              .gate = p->gate};
    const double error = rate_error(&terms, truth->of[GRAD_G], truth->of[GRAD_A_LOG], got, most.cancelling);
    free(g);
    CHECK(error <= most.f32, "dA_log has relative error %.3g; it must be at most %.3g", error, most.f32);
    if (!(error <= worst[GRAD_A_LOG][0])) worst[GRAD_A_LOG][0] = error;
}

static void hold(const bwd_call *c, const bwd_answer *truth)
{
    for (int i = READ_GRADIENTS; i < GRADIENTS; i++) {
        const flash_kda_tensor *t = &c->places[i].view;
        if (!t->ndim) continue;
        void *got = bwd_call_read(c, (gradient)i);
        if (i == GRAD_A_LOG)
            hold_A_log(c->problem->forward, truth, got);
        else
            hold_gradient((gradient)i, truth->of[i], got, t->dtype == FLASH_KDA_BF16,
                          gradient_elements(c->problem, (gradient)i));
        free(got);
    }
}

/* ---- Calls --------------------------------------------------------------------------------------------- */

/* What a call wrote; NULL for what it did not. */
typedef struct outcome {
    void *of[GRADIENTS];
    int64_t bytes[GRADIENTS];
} outcome;

static void outcome_free(outcome *o)
{
    for (int i = 0; i < GRADIENTS; i++) free(o->of[i]);
    *o = (outcome){{NULL}, {0}};
}

static bwd_options plain_options(void)
{
    return (bwd_options){.forward = options_of(STATE_IN, false)};
}

/* Runs a call, checks that it wrote gradients alone, and holds them to the answer unless that is NULL. */
static outcome run(const bwd_problem *b, const bwd_answer *truth, bwd_options options)
{
    bwd_call c;
    outcome o = {{NULL}, {0}};
    flash_kda_status status = bwd_call_open(&c, b, options);
    if (!CHECK(status == FLASH_KDA_OK, "workspace size: %s", flash_kda_last_error())) return o;
    status = bwd_call_run(&c);
    if (CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) {
        const char *damaged = bwd_call_damage(&c);
        CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);
        if (truth) hold(&c, truth);
        for (int i = READ_GRADIENTS; i < GRADIENTS; i++) {
            if (!c.places[i].view.ndim) continue;
            o.of[i] = bwd_call_read(&c, (gradient)i);
            o.bytes[i] = gradient_elements(b, (gradient)i) * (int64_t)dtype_size(c.places[i].view.dtype);
        }
    }
    bwd_call_close(&c);
    return o;
}

static void run_and_hold(const bwd_problem *b, bwd_options options)
{
    bwd_answer truth = bwd_problem_solve(b);
    outcome o = run(b, &truth, options);
    outcome_free(&o);
    bwd_answer_free(&truth);
}

/* That gradients which both calls wrote have equal bits. */
static void check_equal(const outcome *a, const outcome *b, const char *what)
{
    for (int i = READ_GRADIENTS; i < GRADIENTS; i++)
        if (a->of[i] && b->of[i])
            CHECK(memcmp(a->of[i], b->of[i], (size_t)a->bytes[i]) == 0, "%s depends on %s", gradient_names[i],
                  what);
}

/* ---- Finite differences of the reference --------------------------------------------------------------- */

/* Inputs lie on a grid of this step and within [-1, 1], so that they are exact in bf16 two steps further. */
static const float STEP = 0x1p-6f;

/* An input that can be moved. */
typedef struct movable {
    gradient which;
    uint16_t *narrow; /* or */
    float *wide;
    int64_t count;
} movable;

static void move(const movable *m, const int8_t *direction, float step)
{
    for (int64_t i = 0; i < m->count; i++) {
        const float by = step * (float)direction[i];
        if (m->wide)
            m->wide[i] += by;
        else
            m->narrow[i] = bf16_from_float(float_from_bf16(m->narrow[i]) + by);
    }
}

/* The sum of out * dout and of final_state * dfinal_state. */
static double loss(const bwd_problem *b)
{
    const problem *p = b->forward;
    answer a = problem_solve(p, true);
    double sum = 0.0;
    for (int64_t i = 0; i < problem_rows(p) * DIM; i++) sum += a.out[i] * (double)float_from_bf16(b->dout[i]);
    for (int64_t i = 0; i < problem_states(p) * DIM * DIM; i++)
        sum += a.state[i] * (double)b->dfinal_state[i];
    answer_free(&a);
    return sum;
}

static double loss_at(const bwd_problem *b, const movable *m, const int8_t *direction, float steps)
{
    move(m, direction, steps * STEP);
    const double value = loss(b);
    move(m, direction, -steps * STEP);
    return value;
}

/* The derivative along a direction, with an error of the fourth power of the step. */
static double difference(const bwd_problem *b, const movable *m, const int8_t *direction)
{
    return (8.0 * (loss_at(b, m, direction, 1.0f) - loss_at(b, m, direction, -1.0f)) -
            (loss_at(b, m, direction, 2.0f) - loss_at(b, m, direction, -2.0f))) /
           (12.0 * (double)STEP);
}

static float on_grid(rng *r, double low, double high)
{
    return STEP * (float)floor(rng_uniform(r, low, high) / (double)STEP);
}

static void fill_on_grid(rng *r, uint16_t *to, int64_t count, double low, double high)
{
    for (int64_t i = 0; i < count; i++) to[i] = bf16_from_float(on_grid(r, low, high));
}

static bwd_problem *problem_on_grid(rng *r, flash_kda_gate gate, flash_kda_beta beta_kind, bool normalised)
{
    static const int64_t lengths[] = {4, 0, 3};
    problem *p = problem_create_ragged(lengths, 3, 2);
    const bool activated = gate == FLASH_KDA_GATE_ACTIVATED;
    const double size = normalised ? 0.2 : 1.0; /* so that keys do not make the state grow */
    problem_group_heads(p, 2);
    p->gate = gate;
    p->beta_kind = beta_kind;
    p->qk_is_normalised = normalised;
    fill_on_grid(r, p->q, problem_qk_rows(p) * DIM, -size, size);
    fill_on_grid(r, p->k, problem_qk_rows(p) * DIM, -size, size);
    fill_on_grid(r, p->v, problem_rows(p) * DIM, -1.0, 1.0);
    fill_on_grid(r, p->g, problem_rows(p) * DIM, -1.0, activated ? -0.1 : 1.0);
    fill_on_grid(r, p->beta, problem_rows(p), -1.0, 1.0);
    for (int64_t i = 0; i < p->heads; i++) p->A_log[i] = on_grid(r, -1.0, 1.0);
    for (int64_t i = 0; i < p->heads * DIM; i++) p->dt_bias[i] = on_grid(r, -1.0, 1.0);
    for (int64_t i = 0; i < problem_states(p) * DIM * DIM; i++) p->initial_state[i] = on_grid(r, -1.0, 1.0);
    return bwd_problem_create(p, rng_bits(r));
}

static void check_difference(rng *r, const bwd_problem *b, const movable *m, const double *gradients)
{
    int8_t *direction = allocate((size_t)m->count, 1);
    double expected = 0.0, size = 0.0;
    const bool single = one_in(r, 2); /* one element, or a third of all */
    for (int64_t i = 0; i < m->count; i++) direction[i] = single ? 0 : (int8_t)(below(r, 3) - 1);
    if (single) direction[below(r, m->count)] = 1;
    for (int64_t i = 0; i < m->count; i++) {
        expected += gradients[i] * direction[i];
        size += gradients[i] * gradients[i] * abs(direction[i]);
    }
    const double got = difference(b, m, direction), error = fabs(got - expected) / sqrt(size + 1e-12);
    CHECK(error <= 2e-5, "%s is %.9g along a direction, and the difference of losses is %.9g",
          gradient_names[m->which], expected, got);
    if (error > worst[m->which][0]) worst[m->which][0] = error;
    free(direction);
}

static void differences(void)
{
    static bool done; /* It is no kernel that is tried. */
    rng r = rng_seed(5);
    if (done) return;
    done = true;
    for (int i = 0; i < (test.quick ? 6 : 18); i++) {
        const flash_kda_gate gate = (flash_kda_gate)(i % 3);
        bwd_problem *b = problem_on_grid(&r, gate, (flash_kda_beta)(i / 3 % 3), i / 2 % 2);
        problem *p = b->forward;
        const bool activated = gate == FLASH_KDA_GATE_ACTIVATED;
        const int64_t qk_values = problem_qk_rows(p) * DIM, values = problem_rows(p) * DIM;
        const movable all[] = {
            {GRAD_Q, p->q, NULL, qk_values},
            {GRAD_K, p->k, NULL, qk_values},
            {GRAD_V, p->v, NULL, values},
            {GRAD_G, p->g, NULL, values},
            {GRAD_BETA, p->beta, NULL, problem_rows(p)},
            {GRAD_INITIAL_STATE, NULL, p->initial_state, problem_states(p) * DIM * DIM},
            {GRAD_A_LOG, NULL, p->A_log, p->heads},
            {GRAD_DT_BIAS, NULL, p->dt_bias, p->heads * DIM},
        };
        bwd_answer a = bwd_problem_solve(b);
        trying("gate %d, beta %d, %snormalised", (int)gate, (int)p->beta_kind,
               p->qk_is_normalised ? "" : "not ");
        for (int m = 0; m < (activated ? 6 : 8); m++)
            for (int k = 0; k < 3; k++) check_difference(&r, b, &all[m], a.of[all[m].which]);
        bwd_answer_free(&a);
        bwd_problem_free(b);
    }
    memset(worst, 0, sizeof worst); /* the rest is about kernels */
}

/* ---- Kernels against the reference --------------------------------------------------------------------- */

static void check_problem(problem *p, uint64_t seed)
{
    bwd_problem *b = bwd_problem_create(p, seed);
    run_and_hold(b, plain_options());
    bwd_problem_free(b);
}

static void lengths(void)
{
    for (int64_t tokens = 1; tokens <= 50; tokens++) {
        const bool near_chunk_end = tokens % 16 <= 1 || tokens % 16 == 15;
        if (test.quick && !near_chunk_end) continue;
        problem *p = problem_create(1, tokens, 1);
        fill_case(p, find_case("channels from fast to slow"), (uint64_t)tokens);
        trying("T = %lld", (long long)tokens);
        check_problem(p, (uint64_t)tokens);
    }
}

static void ragged(void)
{
    static const int64_t by_hand[][5] = {
        {0, 1, 0, 16, 0}, {17, 0, 0, 31, 1}, {16, 16, 16, 16, 16}, {0, 0, 0, 0, 70}, {0, 0, 0, 0, 0}};
    for (int i = 0; i < 5; i++) {
        problem *p = problem_create_ragged(by_hand[i], 5, 2);
        fill_case(p, find_case("random"), (uint64_t)i);
        trying("ragged %d", i);
        check_problem(p, (uint64_t)i);
    }
    problem *p = problem_create(3, 40, 2);
    fill_case(p, find_case("slow gates"), 7);
    trying("3 batch rows");
    check_problem(p, 7);
}

static void cases(void)
{
    for (int i = 0; i < test_case_count; i++) {
        /* Errors grow from token to token where keys are alike, so these cases are never short. */
        const bool are_alike =
            test_cases[i].keys == KEYS_IDENTICAL || test_cases[i].keys == KEYS_NEARLY_IDENTICAL;
        problem *p = problem_create(1, test.quick && !are_alike ? 35 : 200, 1);
        fill_case(p, &test_cases[i], 11);
        trying("%s, T = %lld", test_cases[i].name, (long long)p->tokens);
        check_problem(p, 11);
    }
}

static void gates(void)
{
    for (int i = 0; i < DECAY_KINDS; i++) {
        for (int softplus = 0; softplus < 2; softplus++) {
            for (int wide = 0; wide < 2; wide++) {
                if (test.quick && (i + softplus) % 2 != wide) continue;
                problem *p = problem_create(1, test.quick ? 20 : 100, 1);
                fill_case(p, find_case("random"), 3);
                p->gate = softplus ? FLASH_KDA_GATE_SOFTPLUS : FLASH_KDA_GATE_ACTIVATED;
                fill_decays(p, (decays)i, wide, 17);
                trying("%s, %s gate in %s", decays_names[i], softplus ? "softplus" : "activated",
                       wide ? "f32" : "bf16");
                check_problem(p, 17);
            }
        }
    }
}

/* Gates that forget everything: an infinite one, and the largest finite one. */
static void endless_gates(void)
{
    static const float values[] = {-INFINITY, -3e38f, -200.0f, 0.0f};
    for (int gate = 0; gate < 3; gate++) {
        for (int i = 0; i < 4; i++) {
            problem *p = problem_create(1, 37, 1);
            fill_case(p, find_case("random"), 3);
            p->gate = (flash_kda_gate)gate;
            for (int64_t at = 0; at < 37 * DIM; at += i == 3 ? 1 : 3)
                p->g[at] = bf16_from_float(p->gate == FLASH_KDA_GATE_ACTIVATED ? values[i] : -values[i]);
            trying("gate %d, every third g is %g", gate, (double)values[i]);
            if (p->gate == FLASH_KDA_GATE_ACTIVATED)
                for (int64_t at = 0; at < 37 * DIM; at++) p->g[at] |= 0x8000;
            check_problem(p, 3);
        }
    }
}

/* Every channel forgets nearly all of a state within a chunk, and nothing else reaches the gradients: of the
 * initial state with a gradient of the final state alone, and of the last queries with an initial state
 * alone. These gradients are small, and right.
 *
 * The kernel `hopper` has states and triangular inverses in fp16. Where tokens forget much and an initial
 * state alone is read, their small elements count as much as their large ones, so such problems forget less
 * there. */
static void forgotten(void)
{
    static const float decays_of_token[] = {-0.7f, -1.5f, -2.5f};
    static const int64_t sizes[] = {70, 33, 20};
    for (int i = 0; i < 3; i++) {
        for (int forwards = 0; forwards < 2; forwards++) {
            if (forwards && i > 0 && is_hopper()) continue;
            const float decay = decays_of_token[i] * (forwards && is_hopper() ? 0.15f : 1.0f);
            const int64_t tokens = sizes[i], values = tokens * DIM, last = (tokens - 1) / 16 * 16 * DIM;
            problem *p = problem_create(1, tokens, 1);
            fill_case(p, find_case("random"), 67);
            p->gate = FLASH_KDA_GATE_ACTIVATED;
            p->g_f32 = allocate((size_t)values, sizeof *p->g_f32);
            for (int64_t at = 0; at < values; at++)
                p->g_f32[at] = decay * (1.0f + (float)(at % DIM) / (2 * DIM));
            if (forwards) memset(p->v, 0, (size_t)values * sizeof *p->v);
            bwd_problem *b = bwd_problem_create(p, 67);
            if (forwards) memset(b->dout, 0, (size_t)last * sizeof *b->dout);
            b->without_dout = !forwards;
            b->without_dfinal_state = forwards;
            trying("%lld tokens forget %g nats each, %s", (long long)tokens, (double)-decay,
                   forwards ? "the last chunk reads the initial state"
                            : "only the final state has a gradient");
            run_and_hold(b, plain_options());
            bwd_problem_free(b);
        }
    }
}

/* All that reaches the gradient of the initial state comes from the final one through several chunks, each of
 * which leaves little of it. `dout` is absent, or zeros. */
static void faded(void)
{
    static const int64_t sizes[] = {168, 150};
    for (int i = 0; i < 2; i++) {
        problem *p = problem_create(1, sizes[i], 1);
        fill_case(p, find_case("random"), 1);
        p->gate = i ? FLASH_KDA_GATE_SOFTPLUS : FLASH_KDA_GATE_ACTIVATED;
        fill_decays(p, DECAYS_ISOLATED, true, 1);
        bwd_problem *b = bwd_problem_create(p, 1);
        if (i)
            memset(b->dout, 0, (size_t)(sizes[i] * DIM) * sizeof *b->dout);
        else
            b->without_dout = true;
        trying("%lld tokens with isolated fast channels, dout is %s", (long long)sizes[i],
               i ? "zeros" : "absent");
        run_and_hold(b, plain_options());
        bwd_problem_free(b);
    }
}

/* So few tokens that errors do not average out. Write strengths lie in the middle between two numbers of
 * fp16, queries, keys and decays are exact in tf32, and nothing but outputs has a gradient. */
static void few_tokens(void)
{
    static const int64_t sizes[] = {1, 11};
    for (int i = 0; i < 4; i++) {
        const int64_t tokens = sizes[i / 2];
        problem *p = problem_create(1, tokens, 1);
        fill_case(p, find_case("random"), 3);
        normalise_keys(p);
        p->gate = FLASH_KDA_GATE_ACTIVATED;
        fill_decays(p, DECAYS_NONE, true, 3);
        p->beta_kind = FLASH_KDA_BETA_ACTIVATED;
        activate_betas(p);
        widen_betas(p, 3);
        for (int64_t t = 0; t < tokens; t++) p->beta_f32[t] = i % 2 ? 0x1.00201p-1f : 0x1.001ffp-1f;
        bwd_problem *b = bwd_problem_create(p, 3);
        b->without_dfinal_state = true;
        trying("%lld tokens, write strengths of %g", (long long)tokens, (double)p->beta_f32[0]);
        run_and_hold(b, plain_options());
        bwd_problem_free(b);
    }
}

static void groups(void)
{
    for (int64_t shared = 2; shared <= (test.quick ? 2 : 4); shared++) {
        static const int64_t sizes[] = {33, 0, 16, 1};
        problem *p = problem_create_ragged(sizes, 4, 2 * shared);
        problem_group_heads(p, shared);
        fill_case(p, find_case("channels from fast to slow"), (uint64_t)shared);
        trying("%lld value heads for 2 heads of q and k", (long long)p->heads);
        check_problem(p, (uint64_t)shared);
    }
}

static void scalars(void)
{
    static const float scales[] = {0.0f, -1.0f, 1e15f, 1e-15f},
                       lower_bounds[] = {-5.0f, -1.0f, -1e-3f, -0.0f, 0.0f};
    for (int i = 0; i < 9; i++) {
        problem *p = problem_create(1, 37, 1);
        fill_case(p, find_case("channels from fast to slow"), 21);
        if (i < 4)
            p->scale = scales[i];
        else
            p->lower_bound = lower_bounds[i - 4];
        trying("scale = %g, lower_bound = %g", (double)p->scale, (double)p->lower_bound);
        check_problem(p, 21);
    }
}

/* Sequences that end just before, at and just after a border between the segments of a GPU, for segments of
 * 128, 256 and 512 tokens. */
static void segments(void)
{
    static const int64_t sizes[] = {127, 128, 129, 1, 255, 256, 257, 511, 512, 513};
    problem *p = problem_create_ragged(sizes, 10, 1);
    fill_case(p, find_case("channels from fast to slow"), 31);
    trying("sequences that end near borders of segments");
    check_problem(p, 31);
}

/* Long sequences. The CPU computes sequences of these lengths in stretches of 320 tokens. */
static void stretches(void)
{
    static const int64_t sizes[] = {700, 5, 340};
    for (int64_t shared = test.quick ? 2 : 1; shared <= 2; shared++) {
        problem *p = problem_create_ragged(sizes + test.quick, 3 - test.quick, shared);
        problem_group_heads(p, shared);
        fill_case(p, find_case("slow gates"), 23);
        trying("long sequences, %lld heads", (long long)shared);
        check_problem(p, 23);
    }
    if (test.quick) return;
    problem *p = problem_create(1, 4000, 1);
    fill_case(p, find_case("channels from fast to slow"), 29);
    trying("T = 4000");
    check_problem(p, 29);
}

/* Few heads of sequences so long that a GPU cuts them into parts and goes through all parts at the same
 * time. */
static void parts(void)
{
    for (int i = 0; i < 3; i++) {
        static const int64_t size = 3000;
        problem *p = i == 1 ? problem_create_ragged(&size, 1, 1) : problem_create(i == 2 ? 2 : 1, 2700, 1);
        fill_case(p, find_case(i ? "slow gates" : "channels from fast to slow"), 37);
        if (i == 1) {
            p->gate = FLASH_KDA_GATE_SOFTPLUS;
            fill_decays(p, DECAYS_MIXED, false, 37);
        }
        trying("long sequences of few heads, %d", i);
        check_problem(p, 37);
    }
}

/* Channels that forget 1e-6 nats a token: the gradient of each of them must be right, not only that of all
 * together. */
static void slow_channels(void)
{
    const int64_t tokens = test.quick ? 330 : 2000;
    problem *p = problem_create(1, tokens, 1);
    fill_case(p, find_case("random"), 31);
    p->gate = FLASH_KDA_GATE_ACTIVATED;
    p->g_f32 = allocate((size_t)tokens * DIM, sizeof *p->g_f32);
    for (int64_t i = 0; i < tokens * DIM; i++) p->g_f32[i] = i % DIM % 8 ? -0.5f : -1e-6f;
    bwd_problem *b = bwd_problem_create(p, 31);
    bwd_answer truth = bwd_problem_solve(b);
    trying("slow channels, T = %lld", (long long)tokens);
    outcome o = run(b, &truth, plain_options());
    double largest = 0.0;
    for (int channel = 0; o.of[GRAD_G] && channel < DIM; channel++) {
        double wrong = 0.0, all = 0.0;
        for (int64_t i = channel; i < tokens * DIM; i += DIM) {
            wrong += pow((double)((float *)o.of[GRAD_G])[i] - truth.of[GRAD_G][i], 2.0);
            all += pow(truth.of[GRAD_G][i], 2.0);
        }
        const double error = sqrt(wrong / all);
        if (!(error <= largest)) largest = error; /* a NaN stays */
    }
    const double bar = is_exact() ? 1e-4 : 1e-2;
    CHECK(largest <= bar, "dg of the worst channel has relative error %.3g; it must be at most %.3g", largest,
          bar);
    outcome_free(&o);
    bwd_answer_free(&truth);
    bwd_problem_free(b);
}

static void recorded(void)
{
    for (int i = 0; i < (test.quick ? 1 : RECORDED_CASES); i++) {
        char path[512], why[256];
        snprintf(path, sizeof path, "%s/%s", FLASH_KDA_DATA, recorded_files[i]);
        problem *p = recorded_load(path, why);
        if (!CHECK(p, "%s", why)) continue;
        p->tokens = test.quick ? 50 : p->tokens < 600 ? p->tokens : 600;
        trying("%s", recorded_files[i]);
        check_problem(p, 37);
    }
}

/* ---- Bits ---------------------------------------------------------------------------------------------- */

static void determinism(void)
{
    static const int64_t sizes[] = {130, 0, 64, 33, 200};
    problem *p = problem_create_ragged(sizes, 5, 4);
    problem_group_heads(p, 2);
    fill_case(p, find_case("random"), 41);
    bwd_problem *b = bwd_problem_create(p, 41);
    bwd_options options = plain_options();
    options.forward.threads = 1;
    outcome first = run(b, NULL, options);
    /* The emulator takes seconds for a run, and knows no number of threads. */
    const int runs = !test.quick ? 12 : test.device.type == FLASH_KDA_CPU ? 4 : 2;
    for (int i = 0; i < runs; i++) {
        options.forward.threads = i;
        trying("run %d, cpu_threads = %d", i, i);
        outcome again = run(b, NULL, options);
        check_equal(&first, &again, "the number of threads");
        outcome_free(&again);
    }
    outcome_free(&first);
    bwd_problem_free(b);
}

/* Gradients have the same bits with and without what the forward pass saved, and the forward pass writes the
 * same output. */
static void saved(void)
{
    if (!is_exact()) return; /* limited() has saved states on GPUs, where bits may differ */
    static const int64_t sizes[] = {700, 0, 321, 5, 320, 644};
    for (int64_t shared = 1; shared <= (test.quick ? 1 : 3); shared++) {
        problem *p = shared == 2 ? problem_create(2, 900, 2)
                                 : problem_create_ragged(sizes, test.quick ? 3 : 6, shared);
        problem_group_heads(p, shared);
        fill_case(p, find_case("slow gates"), 47);
        bwd_problem *b = bwd_problem_create(p, 47);
        bwd_options options = plain_options();
        trying("%lld value heads for a head of q and k", (long long)shared);
        outcome computed = run(b, NULL, options);
        for (int threads = 1; threads < 4; threads += 2) {
            options.saves = true;
            options.forward.threads = threads;
            outcome read = run(b, NULL, options);
            check_equal(&computed, &read, "whether states were saved");
            outcome_free(&read);
        }
        outcome_free(&computed);
        bwd_problem_free(b);
    }
}

static size_t bytes_needed(const bwd_problem *b, bwd_options options)
{
    bwd_call c;
    must(bwd_call_open(&c, b, options));
    const size_t bytes = c.params.workspace_size;
    bwd_call_close(&c);
    return bytes;
}

/* The call reads what was saved: NaN there reach the gradients. */
static void saved_is_read(void)
{
    if (!is_exact() && !is_hopper()) return; /* the kernel "portable" saves nothing */
    const int64_t interval = is_exact() ? 320 : 512, tokens = 2 * interval + 10;
    problem *p = problem_create(1, tokens, 1);
    fill_case(p, find_case("slow gates"), 53);
    bwd_problem *b = bwd_problem_create(p, 53);
    bwd_options options = plain_options();
    options.workspace_limit = 2 * bytes_needed(b, options) / 3; /* three stretches on a GPU */
    options.saves = true;
    bwd_call c;
    must(bwd_call_open(&c, b, options));
    trying("NaN in what was saved");
    void *nan = malloc(c.saved.bytes);
    memset(nan, NAN_BYTE, c.saved.bytes);
    buffer_write(&c.saved, nan);
    free(nan);
    must(bwd_call_run(&c));
    uint16_t *dq = bwd_call_read(&c, GRAD_Q);
    for (int64_t i = 0; i < tokens * DIM; i++)
        CHECK(isnan(float_from_bf16(dq[i])) == (i >= interval * DIM), "dq[%lld] is %g", (long long)i,
              (double)float_from_bf16(dq[i]));
    free(dq);
    bwd_call_close(&c);
    bwd_problem_free(b);
}

/* What is saved is at most a fifth of q, k, v and g, whatever the shape; on a GPU at most a quarter. */
static void saved_bytes(void)
{
    for (int64_t shared = 1; shared <= 64; shared *= 2) {
        for (int64_t tokens = 0; tokens < 5000; tokens += 1 + tokens / 7) {
            const int64_t qk[] = {2, tokens, 3, DIM}, values[] = {2, tokens, 3 * shared, DIM};
            flash_kda_fwd_params p = {
                .struct_size = sizeof p,
                .device = test.device,
                .kernel = test.kernel,
                .q = tensor_of(NULL, FLASH_KDA_BF16, 4, qk),
                .v = tensor_of(NULL, FLASH_KDA_BF16, 4, values),
                .beta = tensor_of(NULL, FLASH_KDA_BF16, 3, values),
            };
            p.k = p.q;
            p.g = p.out = p.v;
            size_t bytes = SIZE_MAX;
            must(flash_kda_fwd_saved_size(&p, &bytes));
            const int64_t inputs = 2 * 2 * tokens * DIM * (2 * 3 + 2 * 3 * shared);
            trying("T = %lld, %lld value heads for a head of q and k", (long long)tokens, (long long)shared);
            const int part = is_exact() ? 5 : 4;
            CHECK((int64_t)bytes * part <= inputs, "%zu bytes are saved of %lld", bytes, (long long)inputs);
            if (is_exact() || is_hopper())
                CHECK(bytes > 0 || tokens <= 640, "nothing is saved");
            else
                CHECK(bytes == 0, "%zu bytes are saved, which nobody reads", bytes);
        }
    }
}

/* Several waves of heads, with a wave of fewer heads at the end, have the gradients of all heads at once. */
static void waves(void)
{
    static const int64_t sizes[] = {60, 0, 33, 7};
    enum { HEADS = 10, GROUP = 2 };
    problem *p = problem_create_ragged(sizes, 4, HEADS);
    problem_group_heads(p, GROUP);
    fill_case(p, find_case("random"), 53);
    bwd_problem *b = bwd_problem_create(p, 53);
    bwd_options options = plain_options();
    options.batch_invariant = true;
    outcome whole = run(b, NULL, options);
    const size_t most = bytes_needed(b, options);
    options.workspace_limit = 1;
    const size_t least = bytes_needed(b, options), limits[] = {1, (least + most) / 2, most - 1, SIZE_MAX};
    CHECK(is_exact() || (0 < least && least < most), "%zu bytes are needed, and %zu at once", least, most);
    for (int i = 0; i < (test.quick ? 2 : 4); i++) {
        options.workspace_limit = limits[i];
        trying("at most %zu of %zu bytes of workspace", limits[i], most);
        const size_t bytes = bytes_needed(b, options);
        CHECK(is_exact() || bytes <= limits[i] || bytes == least, "%zu bytes are needed", bytes);
        outcome some = run(b, NULL, options);
        check_equal(&whole, &some, "the limit of the workspace");
        outcome_free(&some);
    }
    outcome_free(&whole);
    options.workspace_limit = 1;
    run_and_hold(b, options);
    bwd_problem_free(b);
}

/* Sequences of equal lengths in stretches of tokens, of which the last one may be short, by the same limits
 * with few heads, grouped ones, several rows, strides, states that are absent, in bf16 or [.., K, V]. The
 * states before stretches are saved or found anew. */
static void limited(void)
{
    static const struct {
        int64_t batch, tokens, heads, group;
        bool bf16, no_states;
    } all[] = {
        {1, 1100, 4, 2, false, false}, {2, 777, 2, 1, false, true},  {1, 1600, 3, 1, true, false},
        {3, 530, 6, 3, false, false},  {1, 3100, 1, 1, true, false},
    };
    for (size_t i = 0; i < (test.quick ? 3 : sizeof all / sizeof *all); i++) {
        problem *p = problem_create(all[i].batch, all[i].tokens, all[i].heads);
        problem_group_heads(p, all[i].group);
        fill_case(p, find_case(i % 2 ? "slow gates" : "channels from fast to slow"), 61);
        bwd_problem *b = bwd_problem_create(p, 61);
        bwd_options options = plain_options();
        options.forward = options_of(all[i].no_states ? STATE_NONE : STATE_IN, all[i].bf16);
        for (int j = 0; j < GRADIENTS; j++) options.layouts[j] = (layout)(((size_t)j + i) % 3);
        for (int j = 0; j < STRIDED_ARGS; j++) options.forward.layouts[j] = (layout)(((size_t)j + i) % 3);
        options.forward.k_first = i == 2 || i == 4;
        const size_t most = bytes_needed(b, options);
        for (size_t part = test.quick ? 3 : 2; part <= (test.quick ? 3 : 5); part++) {
            options.workspace_limit = most / part + 1;
            options.saves = (i + part) % 2;
            trying("B = %lld, T = %lld, HV = %lld, at most %zu bytes of workspace of %zu, saves: %d",
                   (long long)all[i].batch, (long long)all[i].tokens, (long long)all[i].heads,
                   options.workspace_limit, most, options.saves);
            run_and_hold(b, options);
        }
        bwd_problem_free(b);
    }
}

/* A call that is told the longest of its sequences keeps to the workspace that it has asked for. */
static void told_longest(void)
{
    enum { ROOM = 1 << 20, UNTOUCHED = 0x5a };
    static const int64_t sizes[][3] = {{1, 1, 0}, {33, 2, 64}};
    for (int which = 0; which < 2; which++) {
        for (int64_t heads = 1; heads <= (test.quick ? 2 : 6); heads++) {
            problem *p = problem_create_ragged(sizes[which], 2 + which, heads);
            fill_case(p, find_case("random"), 67);
            bwd_problem *b = bwd_problem_create(p, 67);
            bwd_options options = plain_options();
            options.forward.tells_longest = true;
            bwd_call c;
            must(bwd_call_open(&c, b, options));
            const size_t bytes = c.params.workspace_size;
            buffer_free(&c.workspace);
            c.workspace = (buffer){.device = test.device, .bytes = bytes + ROOM, .band = OUTPUT_BAND_BYTE};
            buffer_create(&c.workspace);
            unsigned char *contents = malloc(bytes + ROOM);
            memset(contents, UNTOUCHED, bytes + ROOM);
            buffer_write(&c.workspace, contents);
            free(contents);
            c.params.workspace = buffer_start(&c.workspace);
            trying("sequences %d, %lld heads, %zu bytes of workspace", which, (long long)heads, bytes);
            CHECK(bwd_call_run(&c) == FLASH_KDA_OK, "%s", flash_kda_last_error());
            contents = buffer_read(&c.workspace);
            size_t written = ROOM;
            while (written > 0 && contents[bytes + written - 1] == UNTOUCHED) written--;
            CHECK(written == 0, "%zu bytes behind the workspace were used", written);
            free(contents);
            bwd_call_close(&c);
            bwd_problem_free(b);
        }
    }
}

static void ask_for_bytes(int64_t batch, int64_t tokens, int64_t heads, int64_t shared)
{
    const int64_t qk[] = {batch, tokens, heads / shared, DIM}, values[] = {batch, tokens, heads, DIM};
    flash_kda_bwd_params p = {
        .struct_size = sizeof p,
        .device = test.device,
        .kernel = test.kernel,
        .q = tensor_of(NULL, FLASH_KDA_BF16, 4, qk),
        .v = tensor_of(NULL, FLASH_KDA_BF16, 4, values),
        .beta = tensor_of(NULL, FLASH_KDA_BF16, 3, values),
        .A_log = tensor_of(NULL, FLASH_KDA_F32, 1, &heads),
    };
    p.k = p.dq = p.dk = p.q;
    p.g = p.dout = p.dv = p.dg = p.v;
    p.dA_log = p.A_log;
    size_t bytes = SIZE_MAX, all_at_once = 0, least = 0;
    must(flash_kda_bwd_workspace_size(&p, &bytes));
    p.workspace_limit = 1;
    must(flash_kda_bwd_workspace_size(&p, &least));
    p.workspace_limit = SIZE_MAX;
    must(flash_kda_bwd_workspace_size(&p, &all_at_once));
    const int64_t inputs = batch * tokens * 2 * DIM * (2 * (heads / shared) + 2 * heads),
                  allowed = inputs < 128 << 20 ? 96 << 20 : inputs / 2;
    trying("B = %lld, T = %lld, HV = %lld, H = %lld", (long long)batch, (long long)tokens, (long long)heads,
           (long long)(heads / shared));
    CHECK((int64_t)bytes <= allowed || bytes == least, "%zu bytes are needed; %lld may be", bytes,
          (long long)allowed);
    CHECK(bytes <= all_at_once, "%zu bytes are needed by default, and %zu at once", bytes, all_at_once);
    CHECK((int64_t)all_at_once > allowed || bytes == all_at_once, "%zu bytes could have been %zu", bytes,
          all_at_once);
}

/* The default workspace is at most half of q, k, v and g, or 96 MiB if these have less than 128 MiB, or what
 * a head of q and k needs. */
static void default_workspace(void)
{
    if (is_exact()) return; /* the CPU takes what its threads need */
    ask_for_bytes(1, 2048, 12, 1);
    ask_for_bytes(1, 8192, 16, 1);
    ask_for_bytes(1, 8192, 32, 1);
    ask_for_bytes(1, 8192, 96, 1);
    ask_for_bytes(4, 2048, 32, 1);
    ask_for_bytes(1, 65536, 8, 1);
    ask_for_bytes(3, 5000, 97, 1);
    ask_for_bytes(1, 8192, 96, 2);
    for (int64_t heads = 5; heads < 150; heads += 7)
        for (int64_t tokens = 300; tokens < 40000; tokens += tokens / 2) ask_for_bytes(1, tokens, heads, 1);
}

/* With batch_invariant the gradients of a sequence have the same bits alone and among others. */
static void batch_invariance(void)
{
    enum { HEADS = 2, MOST = 3 };
    static const int64_t sizes[][MOST] = {{150, 47, 1}, {1600, 0, 200}}; /* long enough for parts */
    for (int which = 0; which < (is_exact() ? 1 : 2); which++) {         /* the CPU has no parts */
        problem *p = problem_create_ragged(sizes[which], MOST, HEADS);
        fill_case(p, find_case("random"), 59);
        bwd_problem *b = bwd_problem_create(p, 59);
        bwd_options options = plain_options();
        options.batch_invariant = true;
        outcome together = run(b, NULL, options);
        for (int n = 0; n < MOST; n++) {
            const int64_t first = p->cu_seqlens[n], count = sizes[which][n], width = HEADS * DIM,
                          state = width * DIM;
            if (!count) continue;
            problem *one = problem_create(1, count, HEADS);
            fill_case(one, find_case("random"), 59);
            const struct {
                uint16_t *to;
                const uint16_t *from;
            } rows[] = {{one->q, p->q}, {one->k, p->k}, {one->v, p->v}, {one->g, p->g}};
            for (int i = 0; i < 4; i++)
                memcpy(rows[i].to, rows[i].from + first * width, (size_t)(count * width) * 2);
            memcpy(one->beta, p->beta + first * HEADS, (size_t)(count * HEADS) * 2);
            memcpy(one->A_log, p->A_log, HEADS * sizeof(float));
            memcpy(one->dt_bias, p->dt_bias, width * sizeof(float));
            memcpy(one->initial_state, p->initial_state + n * state, (size_t)state * 4);
            bwd_problem *alone = bwd_problem_create(one, 59);
            memcpy(alone->dout, b->dout + first * width, (size_t)(count * width) * 2);
            memcpy(alone->dfinal_state, b->dfinal_state + n * state, (size_t)state * 4);
            outcome own = run(alone, NULL, options);
            trying("sequence %d of %lld tokens", n, (long long)count);
            for (int i = GRAD_Q; i <= GRAD_BETA; i++) {
                const int64_t row = i == GRAD_BETA ? HEADS : width;
                CHECK(!own.of[i] || !memcmp(own.of[i], (uint16_t *)together.of[i] + first * row,
                                            (size_t)(count * row) * 2),
                      "%s depends on other sequences", gradient_names[i]);
            }
            CHECK(!own.of[GRAD_INITIAL_STATE] ||
                      !memcmp(own.of[GRAD_INITIAL_STATE],
                              (float *)together.of[GRAD_INITIAL_STATE] + n * state, (size_t)state * 4),
                  "dinitial_state depends on other sequences");
            outcome_free(&own);
            bwd_problem_free(alone);
        }
        outcome_free(&together);
        bwd_problem_free(b);
    }
}

/* A gradient has the same bits whatever others are wanted. */
static void absent(void)
{
    static const int64_t sizes[] = {40, 0, 17};
    problem *p = problem_create_ragged(sizes, 3, 2);
    fill_case(p, find_case("random"), 43);
    bwd_problem *b = bwd_problem_create(p, 43);
    bwd_options options = plain_options();
    outcome all = run(b, NULL, options);
    for (int i = READ_GRADIENTS; i < GRADIENTS; i++) {
        for (int others = test.quick; others < 2; others++) {
            options.absent = others ? (1 << GRADIENTS) - 1 - (1 << i) : 1 << i;
            trying("%s %s", others ? "only" : "without", gradient_names[i]);
            outcome some = run(b, NULL, options);
            check_equal(&all, &some, "which gradients are wanted");
            outcome_free(&some);
        }
    }
    outcome_free(&all);
    for (int i = 1; i < 8; i++) {
        b->without_dout = i & 1, b->without_dfinal_state = i & 2, b->without_initial_state = i & 4;
        trying("%s%s%s", i & 1 ? "without dout " : "", i & 2 ? "without dfinal_state " : "",
               i & 4 ? "without initial_state" : "");
        run_and_hold(b, plain_options());
    }
    bwd_problem_free(b);
}

/* The gradient of the initial state alone needs no states, and has the same bits. */
static void only_initial_state(void)
{
    const bool few = test.quick && test.device.type == FLASH_KDA_CUDA; /* on the emulator */
    const int64_t sizes[] = {few ? 340 : 700, 5, 0, 40};
    for (int gate = 0; gate < 3; gate++) {
        problem *p = problem_create_ragged(sizes, 4, 2);
        problem_group_heads(p, 2);
        fill_case(p, find_case("random"), 47);
        p->gate = (flash_kda_gate)gate;
        if (gate) fill_decays(p, DECAYS_MIXED, false, 47);
        bwd_problem *b = bwd_problem_create(p, 47);
        trying("gate %d, only dinitial_state", gate);
        bwd_options options = plain_options();
        outcome all = run(b, NULL, options);
        options.absent = (1 << GRADIENTS) - 1 - (1 << GRAD_INITIAL_STATE);
        outcome one = run(b, NULL, options);
        CHECK(all.of[GRAD_INITIAL_STATE] && one.of[GRAD_INITIAL_STATE], "dinitial_state is missing");
        check_equal(&all, &one, "which gradients are wanted");
        outcome_free(&all);
        outcome_free(&one);
        bwd_problem_free(b);
    }
}

static void fill_nan(uint16_t *at, int64_t count)
{
    for (int64_t i = 0; i < count; i++) at[i] = 0x7fc0;
}

/* The gradients of a sequence do not depend on the sequences beside it. Here they hold nothing but NaN. */
static void neighbours(void)
{
    static const int64_t sizes[] = {13, 20, 7};
    problem *p = problem_create_ragged(sizes, 3, 2);
    const int64_t width = p->heads * DIM, state = p->heads * DIM * DIM;
    fill_case(p, find_case("random"), 61);
    bwd_problem *b = bwd_problem_create(p, 61);
    outcome before = run(b, NULL, plain_options());
    for (int n = 0; n < 3; n += 2) {
        const int64_t first = p->cu_seqlens[n];
        uint16_t *const tensors[] = {p->q, p->k, p->v, p->g, b->dout};
        for (int i = 0; i < 5; i++) fill_nan(tensors[i] + first * width, sizes[n] * width);
        fill_nan(p->beta + first * p->heads, sizes[n] * p->heads);
    }
    trying("NaN before and after a sequence");
    outcome after = run(b, NULL, plain_options());
    for (int i = GRAD_Q; before.of[GRAD_Q] && after.of[GRAD_Q] && i <= GRAD_BETA; i++) {
        const int64_t row = i == GRAD_BETA ? p->heads : width;
        CHECK(memcmp((uint16_t *)before.of[i] + sizes[0] * row, (uint16_t *)after.of[i] + sizes[0] * row,
                     (size_t)(sizes[1] * row) * 2) == 0,
              "%s differs", gradient_names[i]);
    }
    if (before.of[GRAD_INITIAL_STATE] && after.of[GRAD_INITIAL_STATE])
        CHECK(first_difference((float *)before.of[GRAD_INITIAL_STATE] + state,
                               (float *)after.of[GRAD_INITIAL_STATE] + state, 4, state) < 0,
              "dinitial_state differs");
    outcome_free(&before);
    outcome_free(&after);
    bwd_problem_free(b);
}

/* ---- Drawn options ------------------------------------------------------------------------------------- */

static void try_seed(uint64_t seed, bool is_long)
{
    rng r = rng_seed(seed);
    const int64_t tokens = is_long ? 1200 : test.quick ? 150 : 600;
    const drawing how = {ALL_OPTIONS & ~(1 << OPTION_POOL | 1 << OPTION_CHECKPOINTS), tokens, is_long};
    problem *p = draw_problem(&r, how);
    bwd_problem *b = bwd_problem_create(p, rng_bits(&r));
    bwd_options options = {.forward = draw_options(&r, how, p)};
    options.forward.counts_nonfinite = false;
    options.forward.cut = FLASH_KDA_CUT_AUTO;
    options.bf16_dfinal_state = one_in(&r, 2);
    options.saves = one_in(&r, 3);
    b->without_dout = one_in(&r, 6);
    b->without_dfinal_state = one_in(&r, 3);
    b->without_initial_state = one_in(&r, 3);
    for (int i = 0; i < GRADIENTS; i++) options.layouts[i] = (layout)below(&r, 3);
    if (one_in(&r, 3)) options.absent = (int)below(&r, 1 << GRADIENTS) & ~(1 << (GRAD_Q + below(&r, 5)));
    if (one_in(&r, 3)) options.workspace_limit = 1; /* a head of q and k after the other */
    options.batch_invariant = one_in(&r, 4);
    if (is_long && !options.workspace_limit &&
        one_in(&r, 2)) /* for stretches of tokens, if lengths are equal */
        options.workspace_limit = bytes_needed(b, options) / 4 * (size_t)(2 + below(&r, 2)) + 1;
    char text[DESCRIPTION];
    trying("seed %llu: %s", (unsigned long long)seed, describe(p, &options.forward, text));
    run_and_hold(b, options);
    bwd_problem_free(b);
}

static void drawn(void)
{
    const uint64_t first = number_from("FLASH_KDA_TEST_SEED", 1),
                   count = number_from("FLASH_KDA_TEST_PROBLEMS", test.quick ? 10 : 100);
    for (uint64_t seed = first; seed < first + count; seed++) try_seed(seed, false);
}

/* Sequences with borders between the segments of a GPU. */
static void drawn_long(void)
{
    const uint64_t first = number_from("FLASH_KDA_TEST_SEED", 1),
                   count = number_from("FLASH_KDA_TEST_PROBLEMS", test.quick ? 6 : 40);
    for (uint64_t seed = first; seed < first + count; seed++) try_seed(seed, true);
}

/* ---- Interruption -------------------------------------------------------------------------------------- */

static void interrupted(void)
{
    if (!is_exact()) return; /* calls on a GPU return at once */
    problem *p = problem_create(1, 40, 2);
    fill_case(p, find_case("random"), 71);
    bwd_problem *b = bwd_problem_create(p, 71);
    const volatile int32_t interrupt = 1;
    bwd_call c;
    must(bwd_call_open(&c, b, plain_options()));
    c.params.interrupt = &interrupt;
    trying("*interrupt is 1 when the call begins");
    CHECK(bwd_call_run(&c) == FLASH_KDA_INTERRUPTED, "the call was not given up");
    CHECK(bwd_call_untouched(&c), "a call that was given up wrote");
    bwd_call_close(&c);
    bwd_problem_free(b);
}

static void print_worst(void)
{
    printf("  errors:");
    for (int i = READ_GRADIENTS; i < GRADIENTS; i++) {
        if (worst[i][1] > 0.0) printf(" %s bf16 %.2e", gradient_names[i], worst[i][1]);
        if (worst[i][0] > 0.0) printf(" %s f32 %.2e", gradient_names[i], worst[i][0]);
    }
    printf(" beyond rounding %.2e\n", worst_beyond);
    worst_beyond = 0.0;
    memset(worst, 0, sizeof worst);
}

int main(int argc, char **argv)
{
    static const group all[] = {
        {"differences", differences},
        {"lengths", lengths},
        {"ragged", ragged},
        {"cases", cases},
        {"gates", gates},
        {"endless-gates", endless_gates},
        {"forgotten", forgotten},
        {"faded", faded},
        {"few-tokens", few_tokens},
        {"scalars", scalars},
        {"groups", groups},
        {"segments", segments},
        {"stretches", stretches},
        {"parts", parts},
        {"slow-channels", slow_channels},
        {"recorded", recorded},
        {"determinism", determinism},
        {"saved", saved},
        {"saved-is-read", saved_is_read},
        {"saved-bytes", saved_bytes},
        {"waves", waves},
        {"limited", limited},
        {"told-longest", told_longest},
        {"default-workspace", default_workspace},
        {"batch-invariance", batch_invariance},
        {"absent", absent},
        {"only-initial-state", only_initial_state},
        {"neighbours", neighbours},
        {"drawn", drawn},
        {"drawn-long", drawn_long},
        {"interrupted", interrupted},
        {"worst", print_worst},
    };
    harness_start(argc, argv);
    return harness_run(all, sizeof all / sizeof *all);
}
