/*
 * Calls with every option of the forward pass, drawn from a seed: shapes, grouped heads, gates, betas, strides,
 * state pools and checkpoints. Every output, state and checkpoint is held to the fp64 recurrence, and every byte
 * that is no element of one must be as before.
 *
 * FLASH_KDA_TEST_PROBLEMS says how many calls are tried, FLASH_KDA_TEST_SEED where they begin, and
 * FLASH_KDA_TEST_OPTIONS which options they may have (draw.c has the names). A kernel may answer that it does
 * not take an option. Such draws are counted, and with FLASH_KDA_TEST_ALL_TAKEN=1 they are failures:
 *
 *     FLASH_KDA_TEST_PROBLEMS=2000 FLASH_KDA_TEST_ALL_TAKEN=1 build/tests/test_options --device cuda:0
 *     FLASH_KDA_TEST_OPTIONS=strides,k-first build/tests/test_options --device cpu drawn
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "draw.h"

/* ---- Running a call ------------------------------------------------------------------------------------ */

/* The outputs of a call, contiguous, states as [.., V, K] whatever the call's order is. */
typedef struct outputs {
    bool taken;
    uint16_t *out;     /* bf16 [B, T, HV, DIM] */
    void *state;       /* [slots, HV, DIM, DIM], or NULL */
    void *checkpoints; /* [rows, HV, DIM, DIM], or NULL */
    int64_t slots;
} outputs;

static void free_outputs(outputs *o)
{
    free(o->out);
    free(o->state);
    free(o->checkpoints);
    *o = (outputs){0};
}

static long not_taken;

/* Whether a kernel has answered that it does not take an option. */
static bool is_not_taken(flash_kda_status status)
{
    if (status != FLASH_KDA_UNAVAILABLE || !strstr(flash_kda_last_error(), "which does not take"))
        return false;
    not_taken++;
    const char *all = getenv("FLASH_KDA_TEST_ALL_TAKEN");
    CHECK(!all || strcmp(all, "1") != 0, "%s", flash_kda_last_error());
    return true;
}

/* How outputs come about: by the kernel, or by the reference in its place, which tests what is in this file. */
typedef flash_kda_status (*runner)(call *c);

static uint64_t number_from(const char *variable, uint64_t otherwise)
{
    const char *text = getenv(variable);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

/* ---- Counts of values that are not finite --------------------------------------------------------------- */

static const argument counted[FLASH_KDA_CHECKED_TENSORS] = {
    ARG_Q, ARG_K, ARG_V, ARG_G, ARG_BETA, ARG_A_LOG, ARG_DT_BIAS, ARG_INITIAL_STATE, ARG_OUT, ARG_FINAL_STATE,
};

/* Adds the values of elements first to first + count - 1. */
static void count_values(flash_kda_nonfinite *record, const flash_kda_tensor *t, const void *values,
                         int64_t first, int64_t count)
{
    for (int64_t i = first; i < first + count; i++) {
        const float value = t->dtype == FLASH_KDA_BF16 ? float_from_bf16(((const uint16_t *)values)[i])
                                                       : ((const float *)values)[i];
        if (isfinite(value)) continue;
        record->count++;
        if (record->first < 0 || i < record->first) record->first = i;
    }
}

static flash_kda_nonfinite count_nonfinite(const call *c, argument which)
{
    const flash_kda_tensor *t = &c->places[which].view;
    const problem *p = c->problem;
    const bool is_initial = which == ARG_INITIAL_STATE, is_state = is_initial || which == ARG_FINAL_STATE;
    flash_kda_nonfinite record = {0, -1};
    int64_t count = t->ndim ? 1 : 0;
    for (int i = 0; i < t->ndim; i++) count *= t->shape[i];
    if (count == 0) return record;
    void *values = call_read(c, which);
    if (!is_state) count_values(&record, t, values, 0, count);
    for (int64_t n = 0; is_state && n < p->sequences; n++) { /* the states that the call uses */
        const int64_t slot =
            is_initial ? problem_initial_slot(p, t->shape[0], n) : problem_final_slot(p, t->shape[0], n);
        const int64_t of_slot = p->heads * DIM * DIM;
        if (slot >= 0) count_values(&record, t, values, slot * of_slot, of_slot);
    }
    free(values);
    return record;
}

/* `inputs` are the records of the inputs, from before the call. */
static void check_records(const call *c, const flash_kda_nonfinite *inputs)
{
    flash_kda_nonfinite got[FLASH_KDA_CHECKED_TENSORS];
    call_read_nonfinite(c, got);
    for (int i = 0; i < FLASH_KDA_CHECKED_TENSORS; i++) {
        const flash_kda_nonfinite want =
            i < FLASH_KDA_CHECKED_OUT ? inputs[i] : count_nonfinite(c, counted[i]);
        CHECK(got[i].count == want.count && got[i].first == want.first,
              "nonfinite of %s is %lld, first %lld; it must be %lld, first %lld", argument_names[counted[i]],
              (long long)got[i].count, (long long)got[i].first, (long long)want.count, (long long)want.first);
    }
}

static outputs run_with(const problem *p, call_options options, runner run)
{
    call c;
    outputs o = {0};
    flash_kda_nonfinite inputs[FLASH_KDA_CHECKED_TENSORS];
    flash_kda_status status = call_open(&c, p, options);
    if (is_not_taken(status)) return o;
    if (!CHECK(status == FLASH_KDA_OK, "workspace size: %s", flash_kda_last_error())) return o;
    for (int i = 0; options.counts_nonfinite && i < FLASH_KDA_CHECKED_OUT; i++)
        inputs[i] = count_nonfinite(&c, counted[i]);
    status = run(&c);
    if (is_not_taken(status)) {
        CHECK(call_untouched(&c), "a call that was not taken wrote to an output");
    } else if (CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) {
        const char *damaged = call_damage(&c, p);
        CHECK(!damaged, "bytes of %s, or around it, were written that are no part of an output", damaged);
        if (options.counts_nonfinite) check_records(&c, inputs);
        o.taken = true;
        o.out = call_read_out(&c);
        if (mode_writes(options.mode)) o.state = call_read_state(&c);
        if (o.state) o.slots = c.places[ARG_FINAL_STATE].view.shape[0];
        if (p->checkpoint_rows) o.checkpoints = call_read(&c, ARG_CHECKPOINT_STATES);
    }
    call_close(&c);
    return o;
}

/* ---- The reference in the place of a kernel ------------------------------------------------------------- */

/* A state of all heads, rounded to the type of an argument. */
static void store_state(call *c, argument which, int64_t slot, const double *state)
{
    const int64_t count = c->problem->heads * DIM * DIM;
    float *wide = allocate((size_t)count, sizeof *wide);
    uint16_t *narrow = allocate((size_t)count, sizeof *narrow);
    for (int64_t i = 0; i < count; i++) narrow[i] = bf16_from_float(wide[i] = (float)state[i]);
    call_write_slot(c, which, slot,
                    c->places[which].view.dtype == FLASH_KDA_F32 ? (void *)wide : (void *)narrow);
    free(wide);
    free(narrow);
}

typedef struct checkpoint_store {
    call *c;
    const double *checkpoints;
} checkpoint_store;

static void store_checkpoint(void *context, int64_t n, int64_t offset, int64_t row)
{
    (void)n, (void)offset;
    const checkpoint_store *s = context;
    store_state(s->c, ARG_CHECKPOINT_STATES, row, s->checkpoints + row * s->c->problem->heads * DIM * DIM);
}

/* Computes the call by the reference, from the tensors as they lie in memory, rounds its results, and writes
 * them where a kernel would. They must have the bits of the reference on contiguous tensors. */
static flash_kda_status run_reference(call *c)
{
    const problem *p = c->problem;
    const bool reads = mode_reads(c->options.mode);
    const int64_t values = problem_rows(p) * DIM, of_state = p->heads * DIM * DIM;
    answer plain = problem_solve(p, reads);
    answer a = {.out = allocate((size_t)values, sizeof *a.out),
                .state = allocate((size_t)(p->sequences * of_state), sizeof *a.state)};
    if (plain.checkpoints) a.checkpoints = allocate((size_t)(p->checkpoint_rows * of_state), sizeof(double));
    for (int64_t i = 0; a.checkpoints && i < p->checkpoint_rows * of_state; i++) a.checkpoints[i] = NAN;
    const flash_kda_status status = flash_kda_reference(&c->params, a.out, a.state, a.checkpoints);
    if (status == FLASH_KDA_OK) {
        CHECK(first_difference(a.out, plain.out, 8, values) < 0, "the reference's out depends on strides");
        CHECK(first_difference(a.state, plain.state, 8, p->sequences * of_state) < 0,
              "the reference's state depends on strides");
        CHECK(!a.checkpoints ||
                  first_difference(a.checkpoints, plain.checkpoints, 8, p->checkpoint_rows * of_state) < 0,
              "the reference's checkpoints depend on strides");
        uint16_t *out = allocate((size_t)values, sizeof *out);
        for (int64_t i = 0; i < values; i++) out[i] = bf16_from_float((float)a.out[i]);
        call_write(c, ARG_OUT, out);
        free(out);
        for (int64_t n = 0; mode_writes(c->options.mode) && n < p->sequences; n++) {
            const int64_t slot = problem_final_slot(p, c->places[ARG_FINAL_STATE].view.shape[0], n);
            if (slot >= 0) store_state(c, ARG_FINAL_STATE, slot, a.state + n * of_state);
        }
        checkpoint_store store = {c, a.checkpoints};
        problem_checkpoints(p, store_checkpoint, &store);
    }
    answer_free(&a);
    answer_free(&plain);
    return status;
}

/* ---- Errors -------------------------------------------------------------------------------------------- */

typedef struct sums {
    double wrong, all;
    long elements;
} sums;

static double error_of(sums s)
{
    if (isnan(s.wrong) || isnan(s.all)) return INFINITY;
    return s.all > 0.0 ? sqrt(s.wrong / s.all) : s.wrong > 0.0 ? INFINITY : 0.0;
}

static void add_to(sums *all, sums s)
{
    all->wrong += s.wrong;
    all->all += s.all;
    all->elements += s.elements;
}

static void add_element(sums *s, double truth, double got)
{
    s->wrong += (got - truth) * (got - truth);
    s->all += truth * truth;
    s->elements++;
}

/* What all draws of a group have in sum. */
static struct {
    sums out, state;
} total;

/* The size that a token's own value has in its output, squared, if q and k are random. Where q happens to be
 * nearly orthogonal to k, the output is much smaller, but not what roundings of q and k do to it. In whole
 * tensors such rows do not show; where few rows are compared, they would. */
static double usual_size(const problem *p, int64_t row)
{
    double v = 0.0;
    for (int64_t i = row * DIM; i < (row + 1) * DIM; i++)
        v += (double)float_from_bf16(p->v[i]) * (double)float_from_bf16(p->v[i]);
    const double beta = p->beta_f32 ? (double)p->beta_f32[row] : (double)float_from_bf16(p->beta[row]),
                 strength = p->beta_kind == FLASH_KDA_BETA_ACTIVATED ? beta : 1.0 / (1.0 + exp(-beta)),
                 twice = p->beta_kind == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.0 : 1.0;
    return pow(p->scale * strength * twice, 2.0) * v / DIM;
}

static sums out_sums(const problem *p, const answer *truth, const uint16_t *out)
{
    sums s = {0};
    for (int64_t row = 0; row < problem_rows(p); row++) {
        const double before = s.all;
        for (int64_t i = row * DIM; i < (row + 1) * DIM; i++)
            add_element(&s, truth->out[i], float_from_bf16(out[i]));
        s.all = fmax(s.all, before + usual_size(p, row));
    }
    return s;
}

static void add_state(sums *s, const problem *p, const double *truth, const void *states, int64_t slot,
                      bool is_bf16)
{
    const int64_t count = p->heads * DIM * DIM, first = slot * count;
    for (int64_t i = 0; i < count; i++)
        add_element(s, truth[i],
                    is_bf16 ? float_from_bf16(((const uint16_t *)states)[first + i])
                            : ((const float *)states)[first + i]);
}

static void check_states(sums s, bool is_bf16, const char *what, bars limits)
{
    if (s.elements == 0) return;
    if (!is_bf16) add_to(&total.state, s);
    const double bar = is_bf16 ? bar_of_bf16_state(limits.state) : limits.state;
    CHECK(error_of(s) <= bar, "%s has relative error %.3g; it must be at most %.3g", what, error_of(s), bar);
    check_error(is_bf16 ? "bf16 state" : "state", error_of(s), bar);
}

/* The sums of a tensor of checkpoints, for problem_checkpoints(). */
typedef struct checkpoint_sums {
    const problem *p;
    const double *truth;
    const void *checkpoints;
    bool is_bf16;
    sums s;
} checkpoint_sums;

static void add_checkpoint(void *context, int64_t n, int64_t offset, int64_t row)
{
    (void)n, (void)offset;
    checkpoint_sums *c = context;
    add_state(&c->s, c->p, c->truth + row * c->p->heads * DIM * DIM, c->checkpoints, row, c->is_bf16);
}

/* `p` is the problem whose indices are all allowed: `o` may be of one with others besides. */
static void check_outputs(const problem *p, const answer *truth, const outputs *o,
                          const call_options *options, bars limits)
{
    if (!o->taken) return;
    const sums out = out_sums(p, truth, o->out);
    add_to(&total.out, out);
    check_error("out", error_of(out), limits.out);
    sums states = {0};
    for (int64_t n = 0; o->state && n < p->sequences; n++) {
        const int64_t slot = problem_final_slot(p, o->slots, n);
        if (slot >= 0)
            add_state(&states, p, truth->state + n * p->heads * DIM * DIM, o->state, slot,
                      options->bf16_state);
    }
    check_states(states, options->bf16_state, "final_state", limits);
    checkpoint_sums c = {.p = p,
                         .truth = truth->checkpoints,
                         .checkpoints = o->checkpoints,
                         .is_bf16 = options->bf16_checkpoints};
    if (o->checkpoints) problem_checkpoints(p, add_checkpoint, &c);
    check_states(c.s, options->bf16_checkpoints, "checkpoint_states", limits);
}

/* The errors that are promised: for each draw, and for all draws of a group in sum, in which the roundings of
 * few rows of bf16 average out. */
static bars limits_of_draw(void)
{
    if (test.device.type == FLASH_KDA_CPU) return (bars){.out = 2.2e-3, .state = 1e-5};
    return (bars){.out = 2.5e-3, .state = 8e-4};
}

static void check_total(void)
{
    const bars cpu = {.out = 1.75e-3, .state = 1e-5}, gpu = {.out = 1.8e-3, .state = 8e-4},
               limits = test.device.type == FLASH_KDA_CPU ? cpu : gpu;
    trying("all draws together");
    CHECK(total.out.elements < 100000 || error_of(total.out) <= limits.out,
          "out has relative error %.3g; it must be at most %.3g", error_of(total.out), limits.out);
    CHECK(error_of(total.state) <= limits.state, "states have relative error %.3g; it must be at most %.3g",
          error_of(total.state), limits.state);
}

/* ---- Groups -------------------------------------------------------------------------------------------- */

static int64_t most_tokens(void)
{
    return test.device.type == FLASH_KDA_CPU ? test.quick ? 300 : 600 : test.quick ? 100 : 600;
}

/* The options that FLASH_KDA_TEST_OPTIONS names, or all. */
static int options_to_draw(void)
{
    const char *names = getenv("FLASH_KDA_TEST_OPTIONS");
    int options = 0;
    if (!names) return ALL_OPTIONS;
    for (size_t length; *names; names += length + (names[length] == ',')) {
        int o = 0;
        length = strcspn(names, ",");
        while (o < OPTIONS && (strlen(option_names[o]) != length || strncmp(names, option_names[o], length)))
            o++;
        if (o == OPTIONS) die("FLASH_KDA_TEST_OPTIONS has '%.*s', which is no option", (int)length, names);
        options |= 1 << o;
    }
    return options;
}

static drawing what_to_draw(rng *r)
{
    return (drawing){draw_subset(r, options_to_draw()), most_tokens()};
}

static void say(uint64_t seed, const problem *p, const call_options *options)
{
    char text[160];
    trying("seed %llu: %s", (unsigned long long)seed, describe(p, options, text));
}

static void try_draw(uint64_t seed, runner run)
{
    rng r = rng_seed(seed);
    const drawing how = what_to_draw(&r);
    problem *p = draw_problem(&r, how);
    call_options options = draw_options(&r, how, p);
    options.for_reference = run == run_reference;
    options.counts_nonfinite &= !options.for_reference;
    say(seed, p, &options);
    outputs o = run_with(p, options, run);
    if (o.taken) {
        answer truth = problem_solve(p, mode_reads(options.mode));
        check_outputs(p, &truth, &o, &options, limits_of_draw());
        answer_free(&truth);
    }
    free_outputs(&o);
    problem_free(p);
}

/* Tries as many seeds as the group has, and says how many were not taken. */
static void try_seeds(uint64_t share, void (*try)(uint64_t seed))
{
    const uint64_t first = number_from("FLASH_KDA_TEST_SEED", 1);
    const uint64_t asked = number_from("FLASH_KDA_TEST_PROBLEMS", test.quick ? 60 : 400);
    const uint64_t count = asked / share + 1;
    not_taken = 0;
    memset(&total, 0, sizeof total);
    for (uint64_t i = 0; i < count; i++) try(first + i);
    if (not_taken)
        printf("    %ld of %llu draws have a call that kernel %s does not take\n", not_taken,
               (unsigned long long)count, test.kernel);
}

static void try_kernel(uint64_t seed)
{
    try_draw(seed, call_run);
}

static void drawn(void)
{
    try_seeds(1, try_kernel);
    check_total();
}

static void try_reference(uint64_t seed)
{
    try_draw(seed, run_reference);
}

/* Of the draws themselves, and of the reference on strides. */
static void reference(void)
{
    if (test.device.type == FLASH_KDA_CPU && strcmp(test.kernel, "cpu") == 0) try_seeds(4, try_reference);
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"drawn", drawn},
        {"reference", reference},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
