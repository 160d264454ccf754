/*
 * The option "nonfinite": counts and first places of values that are not finite, against a plain loop over
 * what the tensors hold, and results that do not depend on the option.
 *
 * CTest runs this program for every kernel and cut, on the emulator too.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "draw.h"
#include "records.h"

enum { TENSORS = FLASH_KDA_CHECKED_TENSORS };

static const char *const names[TENSORS] = {
    "q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "out", "final_state"};

/* Memory of a tensor on the host. */
typedef struct values {
    const void *data; /* NULL: absent */
    int64_t count;
    bool is_bf16;
} values;

static flash_kda_nonfinite expected(values x)
{
    flash_kda_nonfinite record = {0, -1};
    for (int64_t i = x.count - 1; x.data && i >= 0; i--) {
        const float value =
            x.is_bf16 ? float_from_bf16(((const uint16_t *)x.data)[i]) : ((const float *)x.data)[i];
        if (isfinite(value)) continue;
        record.count++;
        record.first = i;
    }
    return record;
}

static values bf16_values(const uint16_t *data, int64_t count)
{
    return (values){data, count, true};
}

static values f32_values(const float *data, int64_t count)
{
    return (values){data, count, false};
}

/* Where `beta` and `A_log` lie: this many elements behind an address that 256 divides. */
typedef struct offsets {
    int beta, A_log;
} offsets;

static void *move(flash_kda_tensor *t, const void *contents, size_t count, size_t size, int offset)
{
    const flash_kda_device cpu = {FLASH_KDA_CPU, 0};
    void *memory;
    must(flash_kda_malloc(test.device, (count + (size_t)offset + 1) * size, &memory));
    t->data = (char *)memory + (size_t)offset * size;
    must(flash_kda_copy(test.device, t->data, cpu, contents, count * size));
    return memory;
}

static void check_plain_records(const problem *p, const call *c, const result *r)
{
    const int64_t rows = problem_rows(p), states = problem_states(p) * DIM * DIM;
    const call_options *options = &c->options;
    const bool bf16 = options->bf16_state;
    flash_kda_nonfinite got[TENSORS];
    values all[TENSORS] = {
        [FLASH_KDA_CHECKED_Q] = bf16_values(p->q, rows * DIM),
        [FLASH_KDA_CHECKED_K] = bf16_values(p->k, rows * DIM),
        [FLASH_KDA_CHECKED_V] = bf16_values(p->v, rows * DIM),
        [FLASH_KDA_CHECKED_G] = bf16_values(p->g, rows * DIM),
        [FLASH_KDA_CHECKED_BETA] = bf16_values(p->beta, rows),
        [FLASH_KDA_CHECKED_A_LOG] = f32_values(p->A_log, p->heads),
        [FLASH_KDA_CHECKED_DT_BIAS] = f32_values(p->dt_bias, p->heads * DIM),
        [FLASH_KDA_CHECKED_OUT] = bf16_values(r->out, rows * DIM),
    };
    if (mode_reads(options->mode))
        all[FLASH_KDA_CHECKED_INITIAL_STATE] = f32_values(p->initial_state, states);
    if (mode_writes(options->mode)) all[FLASH_KDA_CHECKED_FINAL_STATE] = (values){r->state, states, bf16};
    call_read_nonfinite(c, got);
    for (int i = 0; i < TENSORS; i++) {
        const flash_kda_nonfinite want = expected(all[i]);
        CHECK(got[i].count == want.count && got[i].first == want.first,
              "%s has %lld, the first at %lld; the call found %lld, the first at %lld", names[i],
              (long long)want.count, (long long)want.first, (long long)got[i].count, (long long)got[i].first);
    }
}

static bool equal(const void *a, const void *b, int64_t count, size_t size)
{
    if (!a || !b) return a == b;
    return memcmp(a, b, (size_t)count * size) == 0;
}

/* Runs the problem with the option. Unless plain is NULL, holds the result's bits to those of a call without
 * the option, and runs twice: the second call must not add to what the first one has found. */
static void try_problem(const problem *p, call_options options, offsets at, const result *plain)
{
    call c;
    options.counts_nonfinite = true;
    must(call_open(&c, p, options));
    void *beta = move(&c.params.beta, p->beta, (size_t)problem_rows(p), 2, at.beta);
    void *A_log = move(&c.params.A_log, p->A_log, (size_t)p->heads, 4, at.A_log);
    for (int i = 0; i < (plain ? 2 : 1); i++) {
        if (i && options.mode == STATE_IN_PLACE) call_poison(&c);
        const flash_kda_status status = call_run(&c);
        if (!CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) break;
        const char *damaged = call_damage(&c, p);
        CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);
        result r = {.out = call_read_out(&c)};
        if (mode_writes(options.mode)) r.state = call_read_state(&c);
        check_plain_records(p, &c, &r);
        if (plain) {
            CHECK(equal(plain->out, r.out, problem_rows(p) * DIM, 2), "out differs with the option");
            CHECK(equal(plain->state, r.state, problem_states(p) * DIM * DIM, options.bf16_state ? 2 : 4),
                  "final_state differs with the option");
        }
        result_free(&r);
    }
    must(flash_kda_free(test.device, beta));
    must(flash_kda_free(test.device, A_log));
    call_close(&c);
}

/* A value in one element of one input: the bits of a bf16, and of an fp32 below them. */
static const struct {
    const char *name;
    uint32_t bits;
} special[] = {
    {"NaN", 0x7fc00000},
    {"inf", 0x7f800000},
    {"-inf", 0xff800000},
    {"a signalling NaN", 0xff810000},
    {"the largest bf16", 0x7f7f0000},
    {"-0", 0x80000000},
};
enum { SPECIAL = sizeof special / sizeof *special };

/* The input number i of a problem. */
static values input(const problem *p, int i)
{
    const int64_t rows = problem_rows(p);
    switch (i) {
    case FLASH_KDA_CHECKED_Q: return bf16_values(p->q, rows * DIM);
    case FLASH_KDA_CHECKED_K: return bf16_values(p->k, rows * DIM);
    case FLASH_KDA_CHECKED_V: return bf16_values(p->v, rows * DIM);
    case FLASH_KDA_CHECKED_G: return bf16_values(p->g, rows * DIM);
    case FLASH_KDA_CHECKED_BETA: return bf16_values(p->beta, rows);
    case FLASH_KDA_CHECKED_A_LOG: return f32_values(p->A_log, p->heads);
    case FLASH_KDA_CHECKED_DT_BIAS: return f32_values(p->dt_bias, p->heads * DIM);
    default: return f32_values(p->initial_state, problem_states(p) * DIM * DIM);
    }
}

/* Sets element `at`, and returns the bits that it had. */
static uint32_t set_bits(values x, int64_t at, uint32_t bits)
{
    uint32_t before = 0;
    if (x.is_bf16) {
        uint16_t *to = (uint16_t *)x.data + at;
        before = (uint32_t)*to << 16;
        *to = (uint16_t)(bits >> 16);
    } else {
        memcpy(&before, (float *)x.data + at, sizeof before);
        memcpy((float *)x.data + at, &bits, sizeof bits);
    }
    return before;
}

/* One value in the first, the last and some other element of each input. */
static void places(void)
{
    static const int64_t lengths[] = {9, 0, 20};
    problem *p = problem_create_ragged(lengths, 3, 3);
    fill_case(p, find_case("random"), 1);
    for (int i = 0; i < FLASH_KDA_CHECKED_OUT; i++) {
        const values x = input(p, i);
        const int64_t tried[] = {0, x.count - 1, x.count / 2 + 1, 1};
        for (int v = 0; v < SPECIAL; v++)
            for (int t = 0; t < 4; t++) {
                if (test.quick && t != (v + i) % 4) continue;
                const int64_t at = tried[t] % x.count;
                const uint32_t before = set_bits(x, at, special[v].bits);
                trying("%s in %s[%lld]", special[v].name, names[i], (long long)at);
                const call_options options = options_of(STATE_BOTH, false);
                const bool compares = v == (i + t) % SPECIAL;
                result plain = {0};
                if (compares) plain = run_and_check(p, NULL, (bars){0, 0}, options);
                try_problem(p, options, (offsets){0, 0}, compares ? &plain : NULL);
                result_free(&plain);
                set_bits(x, at, before);
            }
    }
    problem_free(p);
}

/* Many values in many tensors of a problem for which a GPU uses several CTAs for each tensor. */
static void many(void)
{
    static const int64_t lengths[] = {300, 1, 80, 700};
    const int64_t heads = test.quick ? 2 : 5;
    problem *p = problem_create_ragged(lengths, test.quick ? 3 : 4, heads);
    rng r = rng_seed(3);
    for (int round = 0; round < (test.quick ? 2 : 4); round++) {
        fill_case(p, find_case("random"), (uint64_t)round);
        for (int i = 0; i < FLASH_KDA_CHECKED_OUT; i++) {
            const values x = input(p, i);
            const int64_t most[] = {0, 1, 5, 200, x.count};
            const int64_t count = most[rng_bits(&r) % 4];
            for (int64_t n = 0; n < count; n++)
                set_bits(x, (int64_t)(rng_bits(&r) % (uint64_t)x.count), special[rng_bits(&r) % 4].bits);
            if (round == 1 && i % 2) /* all of it */
                for (int64_t at = 0; at < x.count; at++) set_bits(x, at, special[at % 4].bits);
        }
        trying("many values, round %d", round);
        call_options options = options_of(STATE_BOTH, false);
        options.tells_longest = true;
        options.threads = round % 4;
        result plain = run_and_check(p, NULL, (bars){0, 0}, options);
        try_problem(p, options, (offsets){round, 2 * round + 1}, &plain);
        result_free(&plain);
    }
    problem_free(p);
}

/* Every way to pass a state, of both dtypes, with a fault in the state; the option beside other options. */
static void states(void)
{
    problem *p = problem_create(2, 21, 3);
    for (int fault = 0; fault < 2; fault++) {
        fill_case(p, find_case("random"), 5);
        if (fault) p->initial_state[3 * DIM * DIM + 70] = -INFINITY;
        if (fault) p->beta[101] = 0x7f81;
        for (int mode = 0; mode < STATE_MODES; mode++)
            for (int bf16_state = 0; bf16_state < 2; bf16_state++) {
                trying("%s, %s, %s", state_mode_names[mode], bf16_state ? "bf16" : "f32",
                       fault ? "with a fault" : "all is finite");
                call_options options = options_of(mode, bf16_state);
                options.batch_invariant = mode % 2;
                options.threads = 1 + mode % 3;
                result plain = run_and_check(p, NULL, (bars){0, 0}, options);
                try_problem(p, options, (offsets){0, 0}, &plain);
                result_free(&plain);
            }
    }
    problem_free(p);
}

/* beta and A_log may begin anywhere: elements before the first and behind the last vector of 16 bytes. */
static void unaligned(void)
{
    for (int size = 1; size <= 19; size += test.quick ? 6 : 1) {
        problem *p = problem_create(1, size, size % 5 + 1);
        fill_case(p, find_case("random"), 6);
        const int64_t rows = problem_rows(p);
        for (int offset = 0; offset < 9; offset += test.quick ? 3 : 1) {
            trying("%d tokens, offset %d", size, offset);
            for (int64_t i = 0; i < rows; i++) p->beta[i] = (i + offset) % 7 == 2 ? 0xff80 : 0x3f80;
            if (offset % 2) p->beta[rows - 1] = 0x7fff;
            p->A_log[p->heads - 1] = offset % 3 ? 0.5f : NAN;
            try_problem(p, options_of(STATE_NONE, false), (offsets){offset, offset}, NULL);
        }
        problem_free(p);
    }
}

/* No tokens: the tensors of tokens are empty, and the states are not. */
static void empty(void)
{
    problem *p = problem_create(3, 0, 2);
    fill_case(p, find_case("random"), 7);
    p->initial_state[12345] = NAN;
    for (int mode = 0; mode < STATE_MODES; mode++) {
        trying("no tokens, %s", state_mode_names[mode]);
        try_problem(p, options_of(mode, mode % 2), (offsets){0, 0}, NULL);
    }
    problem_free(p);
}

/* ---- Drawn calls: strides, fp32 inputs, grouped heads and pools ---------------------------------------- */

/* The tensors of a problem as it gives them to a call; q and k have fewer rows. */
static values drawn_input(const problem *p, int i)
{
    const int64_t rows = problem_rows(p), of_slot = p->heads * DIM * DIM;
    if (i == FLASH_KDA_CHECKED_Q || i == FLASH_KDA_CHECKED_K)
        return bf16_values(i == FLASH_KDA_CHECKED_Q ? p->q : p->k, problem_qk_rows(p) * DIM);
    if (i == FLASH_KDA_CHECKED_G && p->g_f32) return f32_values(p->g_f32, rows * DIM);
    if (i == FLASH_KDA_CHECKED_BETA && p->beta_f32) return f32_values(p->beta_f32, rows);
    if (i == FLASH_KDA_CHECKED_INITIAL_STATE) return f32_values(p->initial_state, p->slots * of_slot);
    return input(p, i);
}

static void spoil(rng *r, problem *p)
{
    for (int i = 0; i < FLASH_KDA_CHECKED_OUT; i++) {
        const values x = drawn_input(p, i);
        const int64_t most[] = {0, 1, 3, 40}, count = x.count ? most[rng_bits(r) % 4] : 0;
        for (int64_t n = 0; n < count; n++)
            set_bits(x, (int64_t)(rng_bits(r) % (uint64_t)x.count), special[rng_bits(r) % 4].bits);
    }
}

/* Whether the kernel takes the call. */
static bool try_drawn(uint64_t seed)
{
    rng r = rng_seed(seed);
    const drawing how = {.options = draw_subset(&r, ALL_OPTIONS), .tokens = test.quick ? 150 : 1000};
    call c;
    flash_kda_nonfinite inputs[TENSORS];
    char text[DESCRIPTION];
    problem *p = draw_problem(&r, how);
    call_options options = draw_options(&r, how, p);
    options.counts_nonfinite = true;
    spoil(&r, p);
    trying("seed %llu: %s", (unsigned long long)seed, describe(p, &options, text));
    flash_kda_status status = call_open(&c, p, options);
    if (status == FLASH_KDA_OK) {
        records_of_inputs(&c, inputs);
        status = call_run(&c);
        if (status == FLASH_KDA_OK) check_records(&c, inputs);
        call_close(&c);
    }
    CHECK(status == FLASH_KDA_OK || status == FLASH_KDA_UNAVAILABLE, "%s", flash_kda_last_error());
    problem_free(p);
    return status == FLASH_KDA_OK;
}

static void drawn(void)
{
    const int count = test.device.type == FLASH_KDA_CPU ? test.quick ? 60 : 400 : test.quick ? 20 : 200;
    int taken = 0;
    for (int seed = 1; seed <= count; seed++) taken += try_drawn((uint64_t)seed);
    if (taken < count) printf("    %d of %d draws have a call that is not taken\n", count - taken, count);
}

/* A call that is stopped before it begins writes no record. */
static void interrupted(void)
{
    call c;
    const volatile int32_t stop = 1;
    if (test.device.type != FLASH_KDA_CPU) return;
    problem *p = problem_create(1, 20, 2);
    fill_case(p, find_case("random"), 8);
    call_options options = options_of(STATE_OUT, false);
    options.counts_nonfinite = true;
    must(call_open(&c, p, options));
    c.params.interrupt = &stop;
    CHECK(flash_kda_fwd(&c.params) == FLASH_KDA_INTERRUPTED, "it was not interrupted");
    CHECK(call_untouched(&c), "an output was written");
    call_close(&c);
    problem_free(p);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"places", places},          {"many", many},   {"states", states},
                                   {"unaligned", unaligned},    {"empty", empty}, {"drawn", drawn},
                                   {"interrupted", interrupted}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
