/*
 * Calls with every option of the forward pass, drawn from a seed: shapes, grouped heads, gates, betas,
 * strides, state pools and checkpoints. Every output, state and checkpoint is held to the fp64 recurrence,
 * and every byte that is no element of one must be as before.
 *
 * FLASH_KDA_TEST_PROBLEMS says how many calls are tried, FLASH_KDA_TEST_SEED where they begin, and
 * FLASH_KDA_TEST_OPTIONS which options they may have (draw.c has the names). A kernel may answer that it does
 * not take an option. Such calls are counted, and with FLASH_KDA_TEST_ALL_TAKEN=1 they are failures. With
 * FLASH_KDA_TEST_REFERENCE=1 the reference computes calls on the CPU in place of a kernel, from tensors as
 * they lie in memory, which tests this file and what the reference makes of strides:
 *
 *     FLASH_KDA_TEST_PROBLEMS=2000 FLASH_KDA_TEST_ALL_TAKEN=1 build/tests/test_options --device cuda:0
 *     FLASH_KDA_TEST_OPTIONS=strides,k-first build/tests/test_options --device cpu drawn
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "draw.h"
#include "records.h"

/* ---- Running a call ----------------------------------------------------------------------------------- */

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

static bool by_reference(void)
{
    return number_from("FLASH_KDA_TEST_REFERENCE", 0) && test.device.type == FLASH_KDA_CPU;
}

static flash_kda_status run_reference(call *c);

static outputs run_with(const problem *p, call_options options)
{
    call c;
    outputs o = {0};
    options.for_reference = by_reference();
    options.counts_nonfinite &= !options.for_reference;
    flash_kda_nonfinite inputs[FLASH_KDA_CHECKED_TENSORS];
    flash_kda_status status = call_open(&c, p, options);
    if (is_not_taken(status)) return o;
    if (!CHECK(status == FLASH_KDA_OK, "workspace size: %s", flash_kda_last_error())) return o;
    if (options.counts_nonfinite) records_of_inputs(&c, inputs);
    status = options.for_reference ? run_reference(&c) : call_run(&c);
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

/* ---- The reference in the place of a kernel ------------------------------------------------------------ */

/* A state of all heads, rounded to the type of an argument. */
static void store_state(call *c, call_tensor which, int64_t slot, const double *state)
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

/* ---- Errors ------------------------------------------------------------------------------------------- */

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
    if (CHECK(error_of(s) <= bar, "%s has relative error %.3g; it must be at most %.3g", what, error_of(s),
              bar))
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

/* ---- Groups ------------------------------------------------------------------------------------------- */

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
        while (o < OPTIONS &&
               (strlen(option_names[o]) != length || strncmp(names, option_names[o], length) != 0))
            o++;
        if (o == OPTIONS) die("FLASH_KDA_TEST_OPTIONS has '%.*s', which is no option", (int)length, names);
        options |= 1 << o;
    }
    return options;
}

static drawing what_to_draw(rng *r)
{
    return (drawing){draw_subset(r, options_to_draw()), most_tokens(), false};
}

static void say(uint64_t seed, const problem *p, const call_options *options)
{
    char text[DESCRIPTION];
    trying("seed %llu: %s", (unsigned long long)seed, describe(p, options, text));
}

static void hold_draw(uint64_t seed, bool is_long)
{
    rng r = rng_seed(seed);
    drawing how = what_to_draw(&r);
    if (is_long) how.tokens = 1200, how.is_long = true;
    problem *p = draw_problem(&r, how);
    call_options options = draw_options(&r, how, p);
    say(seed, p, &options);
    outputs o = run_with(p, options);
    if (o.taken) {
        answer truth = problem_solve(p, mode_reads(options.mode));
        check_outputs(p, &truth, &o, &options, limits_of_draw());
        answer_free(&truth);
    }
    free_outputs(&o);
    problem_free(p);
}

static void try_draw(uint64_t seed)
{
    hold_draw(seed, false);
}

/* Sequences that kernels cut into segments. */
static void try_long_draw(uint64_t seed)
{
    hold_draw(seed, true);
}

/* Tries as many seeds as the group has, and says how many were not taken. */
static void try_seeds(uint64_t share, void (*try)(uint64_t seed))
{
    const uint64_t first = number_from("FLASH_KDA_TEST_SEED", 1);
    const bool is_variant = strncmp(test.kernel, "cpu-", 4) == 0; /* The kernel "cpu" has all draws. */
    const uint64_t asked = number_from("FLASH_KDA_TEST_PROBLEMS", test.quick ? 60 : is_variant ? 150 : 600);
    const uint64_t count = asked / share + 1;
    not_taken = 0;
    memset(&total, 0, sizeof total);
    for (uint64_t i = 0; i < count; i++) try(first + i);
    if (not_taken)
        printf("    kernel %s does not take %ld calls of %llu draws\n", test.kernel, not_taken,
               (unsigned long long)count);
}

static void drawn(void)
{
    try_seeds(1, try_draw);
    check_total();
}

static void long_draws(void)
{
    try_seeds(20, try_long_draw);
    check_total();
}

/* Every gate in both types, in sequences of several chunks with decays that take the usual way through a
 * chunk, and with a single token that forgets nearly everything. Few draws are like this. */
static void try_gate(flash_kda_gate gate, bool is_f32, decays how)
{
    const int64_t lengths[] = {test.quick ? 150 : 420, 64, 33};
    problem *p = problem_create_ragged(lengths, test.quick ? 1 : 3, 2);
    trying("%s gate in %s, %s",
           gate == FLASH_KDA_GATE_BOUNDED    ? "bounded"
           : gate == FLASH_KDA_GATE_SOFTPLUS ? "softplus"
                                             : "activated",
           is_f32 ? "fp32" : "bf16", decays_names[how]);
    fill_case(p, find_case("random"), how);
    p->gate = gate;
    if (gate != FLASH_KDA_GATE_BOUNDED)
        fill_decays(p, how, is_f32, how);
    else if (is_f32)
        widen_gates(p, how);
    for (int64_t i = 0; gate == FLASH_KDA_GATE_ACTIVATED && i < p->heads * DIM; i++) {
        const int64_t at = 70 * p->heads * DIM + i;
        p->g[at] = bf16_from_float(-300.0f);
        if (is_f32) p->g_f32[at] = -300.0f;
    }
    const call_options options = options_of(STATE_BOTH, false);
    outputs o = run_with(p, options);
    CHECK(o.taken, "the call is not taken");
    answer truth = problem_solve(p, true);
    check_outputs(p, &truth, &o, &options, limits_of_draw());
    answer_free(&truth);
    free_outputs(&o);
    problem_free(p);
}

static void gates(void)
{
    memset(&total, 0, sizeof total);
    for (flash_kda_gate gate = FLASH_KDA_GATE_BOUNDED; gate <= FLASH_KDA_GATE_ACTIVATED; gate++)
        for (int is_f32 = 0; is_f32 < 2; is_f32++)
            for (decays how = test.quick ? DECAYS_ORDINARY : DECAYS_SLOW; how <= DECAYS_ORDINARY; how++)
                try_gate(gate, is_f32, how);
}

/* ---- Calls that must have equal bits ------------------------------------------------------------------- */

/* The bytes of a state of all heads. */
static size_t slot_bytes(const problem *p, bool is_bf16)
{
    return (size_t)(p->heads * DIM * DIM) * (is_bf16 ? 2 : 4);
}

static void check_equal_out(const problem *p, const outputs *a, const outputs *b, const char *why)
{
    const int64_t at = first_difference(a->out, b->out, sizeof *a->out, problem_rows(p) * DIM);
    CHECK(at < 0, "out[%lld] depends on %s", (long long)at, why);
}

/* The states in which the sequences of two problems end, which may be in different slots. */
static void check_equal_states(const problem *p, const outputs *a, const problem *q, const outputs *b,
                               bool is_bf16, const char *why)
{
    const size_t bytes = slot_bytes(p, is_bf16);
    for (int64_t n = 0; a->state && b->state && n < p->sequences; n++) {
        const int64_t i = problem_final_slot(p, a->slots, n), j = problem_final_slot(q, b->slots, n);
        if (i < 0 || j < 0) continue;
        CHECK(memcmp((char *)a->state + (size_t)i * bytes, (char *)b->state + (size_t)j * bytes, bytes) == 0,
              "the final state of sequence %lld depends on %s", (long long)n, why);
    }
}

static void check_equal_checkpoints(const problem *p, const outputs *a, const outputs *b, bool is_bf16,
                                    const char *why)
{
    if (!a->checkpoints || !b->checkpoints) return;
    const int64_t at =
        first_difference(a->checkpoints, b->checkpoints, slot_bytes(p, is_bf16), p->checkpoint_rows);
    CHECK(at < 0, "row %lld of checkpoint_states depends on %s", (long long)at, why);
}

/* Runs a problem in two ways, in which nothing may differ. `q` is NULL, or a problem with other slots or with
 * heads of q and k repeated, and else the same. */
static void check_equal_calls(const problem *p, call_options how, const problem *q, call_options other,
                              const char *why)
{
    outputs a = run_with(p, how), b = run_with(q ? q : p, other);
    if (a.taken && b.taken) {
        check_equal_out(p, &a, &b, why);
        check_equal_states(p, &a, q ? q : p, &b, how.bf16_state, why);
        check_equal_checkpoints(p, &a, &b, how.bf16_checkpoints, why);
    }
    free_outputs(&a);
    free_outputs(&b);
}

/* Strided equals contiguous. */
static void try_strides(uint64_t seed)
{
    rng r = rng_seed(seed);
    drawing how = what_to_draw(&r);
    how.options |= 1 << OPTION_STRIDES;
    problem *p = draw_problem(&r, how);
    const call_options options = draw_options(&r, how, p);
    call_options plain = without_layouts(options);
    plain.i32_seqlens = !options.i32_seqlens;
    plain.i32_state_indices = !options.i32_state_indices;
    plain.i32_offsets = !options.i32_offsets;
    plain.i32_checkpoint_rows = !options.i32_checkpoint_rows;
    say(seed, p, &options);
    check_equal_calls(p, options, NULL, plain, "strides and types of indices");
    problem_free(p);
}

static void strides(void)
{
    try_seeds(4, try_strides);
}

/* K-first states are the transposed ones. */
static void try_k_first(uint64_t seed)
{
    rng r = rng_seed(seed);
    const drawing how = what_to_draw(&r);
    problem *p = draw_problem(&r, how);
    call_options v_first = draw_options(&r, how, p), k_first;
    v_first.k_first = false;
    k_first = v_first;
    k_first.k_first = true;
    say(seed, p, &k_first);
    check_equal_calls(p, v_first, NULL, k_first, "the order of the states");
    problem_free(p);
}

static void k_first(void)
{
    try_seeds(8, try_k_first);
}

/* A pool in place, a pool with a final_state of its own, and dense states. A sequence without a slot has no
 * initial state in the dense call. */
static void try_pool(uint64_t seed)
{
    rng r = rng_seed(seed);
    drawing how = what_to_draw(&r);
    how.options &= ~(1 << OPTION_POOL);
    problem *pool = draw_problem(&r, how);
    draw_pool(&r, pool);
    problem *dense = problem_copy(pool);
    const size_t count = (size_t)(pool->heads * DIM * DIM), bytes = count * sizeof(float);
    free(dense->state_indices);
    free(dense->initial_state);
    dense->state_indices = NULL;
    dense->slots = dense->sequences;
    dense->first_slot = 0;
    dense->initial_state = allocate((size_t)dense->slots * count, sizeof(float));
    for (int64_t n = 0; n < pool->sequences; n++) {
        const int64_t slot = problem_initial_slot(pool, pool->slots, n);
        if (slot >= 0)
            memcpy(dense->initial_state + (size_t)n * count, pool->initial_state + (size_t)slot * count,
                   bytes);
    }
    call_options options = draw_options(&r, how, pool), of_dense = options;
    options.mode = one_in(&r, 2) ? STATE_IN_PLACE : STATE_BOTH;
    of_dense.mode = one_in(&r, 2) ? STATE_IN_PLACE : STATE_BOTH;
    say(seed, pool, &options);
    check_equal_calls(pool, options, dense, of_dense, "slots");
    problem_free(pool);
    problem_free(dense);
}

static void pool(void)
{
    try_seeds(4, try_pool);
}

/* Grouped heads equal heads of q and k that are repeated. */
static void try_grouped(uint64_t seed)
{
    rng r = rng_seed(seed);
    drawing how = what_to_draw(&r);
    how.options |= 1 << OPTION_GROUPED;
    problem *p = draw_problem(&r, how), *repeated = problem_copy(p);
    repeated->qk_heads = p->heads;
    for (int64_t row = 0; row < problem_rows(p); row++) {
        const int64_t token = row / p->heads, head = row % p->heads / (p->heads / p->qk_heads),
                      from = (token * p->qk_heads + head) * DIM;
        memcpy(repeated->q + row * DIM, p->q + from, DIM * sizeof *p->q);
        memcpy(repeated->k + row * DIM, p->k + from, DIM * sizeof *p->k);
    }
    const call_options options = draw_options(&r, how, p);
    say(seed, p, &options);
    check_equal_calls(p, options, repeated, options, "how q and k are repeated");
    problem_free(p);
    problem_free(repeated);
}

static void grouped(void)
{
    try_seeds(4, try_grouped);
}

/* The first tokens of one sequence of a problem, as a problem of its own. */
static problem *prefix_of(const problem *p, int64_t n, int64_t length)
{
    problem *one = problem_create(1, length, p->heads);
    const int64_t state = p->heads * DIM * DIM, slot = problem_initial_slot(p, p->slots, n);
    int64_t begin, end;
    problem_sequence(p, n, &begin, &end);
    one->qk_heads = p->qk_heads;
    const size_t rows = (size_t)(length * p->heads), qk_rows = (size_t)(length * p->qk_heads),
                 first = (size_t)(begin * p->heads), qk_first = (size_t)(begin * p->qk_heads);
    memcpy(one->q, p->q + qk_first * DIM, qk_rows * DIM * sizeof *p->q);
    memcpy(one->k, p->k + qk_first * DIM, qk_rows * DIM * sizeof *p->k);
    memcpy(one->v, p->v + first * DIM, rows * DIM * sizeof *p->v);
    memcpy(one->g, p->g + first * DIM, rows * DIM * sizeof *p->g);
    memcpy(one->beta, p->beta + first, rows * sizeof *p->beta);
    if (p->g_f32) {
        one->g_f32 = allocate(rows * DIM, sizeof *p->g_f32);
        memcpy(one->g_f32, p->g_f32 + first * DIM, rows * DIM * sizeof *p->g_f32);
    }
    if (p->beta_f32) {
        one->beta_f32 = allocate(rows, sizeof *p->beta_f32);
        memcpy(one->beta_f32, p->beta_f32 + first, rows * sizeof *p->beta_f32);
    }
    memcpy(one->A_log, p->A_log, (size_t)p->heads * sizeof *p->A_log);
    memcpy(one->dt_bias, p->dt_bias, (size_t)p->heads * DIM * sizeof *p->dt_bias);
    if (slot >= 0) memcpy(one->initial_state, p->initial_state + slot * state, (size_t)state * sizeof(float));
    one->scale = p->scale, one->lower_bound = p->lower_bound, one->gate = p->gate;
    one->beta_kind = p->beta_kind, one->qk_is_normalised = p->qk_is_normalised;
    one->without_A_log = p->without_A_log, one->without_dt_bias = p->without_dt_bias;
    return one;
}

/* What is known of the call whose checkpoints are compared. */
typedef struct prefix_check {
    const problem *p;
    call_options options;
    const outputs *whole;
} prefix_check;

static void check_prefix(void *context, int64_t n, int64_t offset, int64_t row)
{
    const prefix_check *c = context;
    const size_t bytes = slot_bytes(c->p, c->options.bf16_state);
    problem *one = prefix_of(c->p, n, offset);
    call_options options = without_layouts(c->options);
    if (!mode_reads(options.mode)) memset(one->initial_state, 0, (size_t)(one->heads * DIM * DIM) * 4);
    options.mode = STATE_BOTH;
    outputs o = run_with(one, options);
    if (o.taken)
        CHECK(memcmp((char *)c->whole->checkpoints + (size_t)row * bytes, o.state, bytes) == 0,
              "the checkpoint of sequence %lld after %lld tokens is not the final state of these tokens",
              (long long)n, (long long)offset);
    free_outputs(&o);
    problem_free(one);
}

/* With batch_invariant a checkpoint has the bits of the final state of a call whose sequence ends there. */
static void try_prefix(uint64_t seed)
{
    rng r = rng_seed(seed);
    drawing how = what_to_draw(&r);
    how.options &= ~(1 << OPTION_CHECKPOINTS);
    problem *p = draw_problem(&r, how);
    draw_checkpoints(&r, p);
    call_options options = draw_options(&r, how, p);
    options.batch_invariant = true;
    options.counts_nonfinite = false;
    options.bf16_checkpoints = options.bf16_state;
    say(seed, p, &options);
    outputs whole = run_with(p, options);
    prefix_check check = {p, options, &whole};
    if (whole.taken) problem_checkpoints(p, check_prefix, &check);
    free_outputs(&whole);
    problem_free(p);
}

static void prefixes(void)
{
    try_seeds(8, try_prefix);
}

/* ---- Tokens change nothing before them ----------------------------------------------------------------- */

/* Replaces all inputs of one sequence's tokens from `from` on, of all heads: by other numbers, now and then
 * by NaN or infinity. Keys that count as normalised are short enough to have a norm near 1: from longer ones
 * numbers grow, which enlarge_tokens() is for. */
static void replace_tokens(rng *r, problem *p, int64_t from, int64_t end)
{
    static const uint16_t bad[] = {0x7fc0, 0x7f80, 0xff80};
    const double most = p->qk_is_normalised ? 0.125 : 2.0;
    for (int64_t i = from * p->heads * DIM; i < end * p->heads * DIM; i++) {
        const bool is_bad = one_in(r, 200);
        p->v[i] = is_bad ? bad[below(r, 3)] : bf16_from_float((float)rng_uniform(r, -2.0, 2.0));
        p->g[i] =
            is_bad && one_in(r, 2) ? bad[below(r, 3)] : bf16_from_float(-(float)rng_uniform(r, 0.0, 90.0));
        if (p->g_f32) p->g_f32[i] = float_from_bf16(p->g[i]);
    }
    for (int64_t i = from * p->qk_heads * DIM; i < end * p->qk_heads * DIM; i++) {
        p->q[i] = one_in(r, 400) ? bad[below(r, 3)] : bf16_from_float((float)rng_uniform(r, -most, most));
        p->k[i] = one_in(r, 400) ? bad[below(r, 3)] : bf16_from_float((float)rng_uniform(r, -most, most));
    }
    for (int64_t i = from * p->heads; i < end * p->heads; i++) {
        p->beta[i] = one_in(r, 8) ? bad[below(r, 3)] : bf16_from_float((float)rng_uniform(r, 0.0, 1.0));
        if (p->beta_f32) p->beta_f32[i] = float_from_bf16(p->beta[i]);
    }
}

/* Makes some inputs of these tokens so large, though finite, that numbers may grow from them which fp32 does
 * not hold: rows of q and k that count as normalised, gates above zero, values and betas. */
static void enlarge_tokens(rng *r, problem *p, int64_t from, int64_t end)
{
    static const float sizes[] = {1e5f, 1e15f, 1e30f, 3.38e38f, -3.38e38f, -1e4f};
    for (int64_t row = from * p->heads; row < end * p->heads; row++) {
        const int64_t qk_row = row / p->heads * p->qk_heads + below(r, p->qk_heads);
        uint16_t *const rows[] = {p->q + qk_row * DIM, p->k + qk_row * DIM, p->v + row * DIM,
                                  p->g + row * DIM};
        const int64_t which = below(r, 5);
        const float size = sizes[below(r, 6)];
        if (which == 4) {
            p->beta[row] = bf16_from_float(size);
            if (p->beta_f32) p->beta_f32[row] = size;
            continue;
        }
        for (int c = 0; c < DIM; c++) rows[which][c] = bf16_from_float(size * (one_in(r, 2) ? 1.0f : 0.5f));
        for (int c = 0; c < DIM && which == 3 && p->g_f32; c++) p->g_f32[row * DIM + c] = size;
    }
}

/* What is compared after the tokens `from` to `end` - 1 of sequence n were replaced. */
typedef struct change {
    const problem *p;
    int64_t n, begin, from, end;
    const outputs *before, *after;
    size_t row_bytes; /* of checkpoint_states */
    bool huge;        /* the replacements are much larger than the tokens before them */
} change;

/* Kernel "hopper" keeps a row of a state and the row's v in one scale. A value that is much larger than the
 * row's others costs the tokens before it in its chunk accuracy (flash_kda.h). */
static bool is_hopper(void)
{
    return strcmp(test.kernel, "hopper") == 0;
}

/* Whether token t may have changed: it is a replaced one, or a neighbour that flash_kda.h excepts. */
static bool may_change(const change *c, int64_t t)
{
    enum { LONGEST_CHUNK = 32 };
    const int64_t spared = c->huge && is_hopper() ? LONGEST_CHUNK - 1 : 0;
    return t < c->end && t >= c->begin && t >= c->from - spared;
}

static void check_early_checkpoint(void *context, int64_t n, int64_t offset, int64_t row)
{
    const change *c = context;
    const size_t at = (size_t)row * c->row_bytes;
    if (n == c->n && may_change(c, c->begin + offset - 1)) return;
    CHECK(memcmp((char *)c->before->checkpoints + at, (char *)c->after->checkpoints + at, c->row_bytes) == 0,
          "the checkpoint of sequence %lld after %lld tokens depends on tokens from %lld of sequence %lld on",
          (long long)n, (long long)offset, (long long)(c->from - c->begin), (long long)c->n);
}

static void check_change(change *c, const call_options *options)
{
    const int64_t row = c->p->heads * DIM;
    const size_t bytes = slot_bytes(c->p, options->bf16_state);
    for (int64_t t = 0; t < c->p->batch * c->p->tokens; t++)
        if (!may_change(c, t))
            CHECK(memcmp(c->before->out + t * row, c->after->out + t * row, (size_t)row * 2) == 0,
                  "out of token %lld depends on tokens from %lld on", (long long)t, (long long)c->from);
    for (int64_t n = 0; c->before->state && n < c->p->sequences; n++) {
        const int64_t slot = problem_final_slot(c->p, c->before->slots, n);
        if (n == c->n || slot < 0) continue;
        CHECK(memcmp((char *)c->before->state + (size_t)slot * bytes,
                     (char *)c->after->state + (size_t)slot * bytes, bytes) == 0,
              "the state of sequence %lld depends on sequence %lld", (long long)n, (long long)c->n);
    }
    if (c->before->checkpoints) problem_checkpoints(c->p, check_early_checkpoint, c);
}

static void try_later_tokens(uint64_t seed)
{
    rng r = rng_seed(seed);
    const drawing how = what_to_draw(&r);
    problem *p = draw_problem(&r, how), *q = problem_copy(p);
    const call_options options = draw_options(&r, how, p);
    change c = {.p = p, .n = below(&r, p->sequences), .row_bytes = slot_bytes(p, options.bf16_checkpoints)};
    problem_sequence(p, c.n, &c.begin, &c.end);
    c.from = c.begin + below(&r, c.end - c.begin + 1);
    c.huge = one_in(&r, 3);
    if (c.huge)
        enlarge_tokens(&r, q, c.from, c.end);
    else
        replace_tokens(&r, q, c.from, c.end);
    say(seed, p, &options);
    outputs before = run_with(p, options), after = run_with(q, options);
    c.before = &before;
    c.after = &after;
    if (before.taken && after.taken) check_change(&c, &options);
    free_outputs(&before);
    free_outputs(&after);
    problem_free(p);
    problem_free(q);
}

static void later_tokens(void)
{
    try_seeds(4, try_later_tokens);
}

/* ---- Indices that are not allowed, on a GPU ------------------------------------------------------------ */

static int64_t draw_wild(rng *r, bool is_i32)
{
    static const int64_t wild[] = {-1, INT32_MIN, INT32_MAX, 1 << 20, INT64_MIN, INT64_MAX, 1LL << 40, 17};
    return is_i32 ? wild[below(r, 4)] : wild[below(r, 8)];
}

static void make_wild(rng *r, int64_t *values, int64_t count, bool is_i32)
{
    for (int64_t i = 0; values && i < count; i++)
        if (one_in(r, 2)) values[i] = draw_wild(r, is_i32);
}

/* The checkpoints of a problem, one after the other. */
typedef struct checkpoint_list {
    int64_t (*all)[3]; /* sequence, offset, row */
    int64_t count;
} checkpoint_list;

static void list_checkpoint(void *context, int64_t n, int64_t offset, int64_t row)
{
    checkpoint_list *l = context;
    int64_t *to = l->all ? l->all[l->count] : NULL;
    if (to) to[0] = n, to[1] = offset, to[2] = row;
    l->count++;
}

/* Gives a problem the checkpoints of the list as offsets. A row that gets several of them may hold any, so it
 * is left out. */
static void set_checkpoints(problem *p, const checkpoint_list *l)
{
    const int64_t columns = l->count ? l->count : 1, count = p->sequences * columns;
    free(p->checkpoint_offsets);
    free(p->checkpoint_indices);
    free(p->checkpoint_starts);
    p->checkpoint_every = 0;
    p->checkpoint_starts = NULL;
    p->checkpoint_columns = columns;
    p->checkpoint_offsets = allocate((size_t)count, sizeof *p->checkpoint_offsets);
    p->checkpoint_indices = allocate((size_t)count, sizeof *p->checkpoint_indices);
    for (int64_t i = 0; i < l->count; i++) {
        int64_t in_row = 0;
        for (int64_t j = 0; j < l->count; j++) in_row += l->all[j][2] == l->all[i][2];
        if (in_row > 1) continue;
        p->checkpoint_offsets[l->all[i][0] * columns + i] = l->all[i][1];
        p->checkpoint_indices[l->all[i][0] * columns + i] = l->all[i][2];
    }
}

/* Replaces what is not allowed by what means the same and is. */
static problem *allowed(const problem *p)
{
    problem *q = problem_copy(p);
    checkpoint_list l = {0};
    for (int64_t n = 0; p->state_indices && n < p->sequences; n++)
        if (problem_final_slot(p, p->slots, n) < 0) q->state_indices[n] = -1;
    problem_checkpoints(p, list_checkpoint, &l);
    l.all = allocate((size_t)l.count, sizeof *l.all);
    l.count = 0;
    problem_checkpoints(p, list_checkpoint, &l);
    if (p->checkpoint_rows) set_checkpoints(q, &l);
    free(l.all);
    return q;
}

/* Wrong numbers on a GPU are left out, and touch no other memory. */
static void try_wild(uint64_t seed)
{
    rng r = rng_seed(seed);
    drawing how = what_to_draw(&r);
    how.options &= ~(1 << OPTION_POOL | 1 << OPTION_CHECKPOINTS);
    problem *p = draw_problem(&r, how);
    const int what = 1 + (int)below(&r, 3);
    if (what & 1) draw_pool(&r, p);
    if (what & 2) draw_checkpoints(&r, p);
    call_options options = draw_options(&r, how, p);
    const int64_t columns = p->checkpoint_columns ? p->checkpoint_columns : 1;
    options.final_slots = 0; /* one allowed() for both states */
    make_wild(&r, p->state_indices, p->sequences, options.i32_state_indices);
    make_wild(&r, p->checkpoint_offsets, p->sequences * columns, options.i32_offsets);
    make_wild(&r, p->checkpoint_indices, p->sequences * columns, options.i32_checkpoint_rows);
    make_wild(&r, p->checkpoint_starts, p->sequences, options.i32_checkpoint_rows);
    if (p->checkpoint_every && !p->checkpoint_starts) p->checkpoint_rows = 1;
    say(seed, p, &options);
    outputs o = run_with(p, options);
    if (o.taken) {
        problem *q = allowed(p);
        answer truth = problem_solve(q, mode_reads(options.mode));
        check_outputs(q, &truth, &o, &options, limits_of_draw());
        answer_free(&truth);
        problem_free(q);
    }
    free_outputs(&o);
    problem_free(p);
}

static void wild(void)
{
    if (test.device.type == FLASH_KDA_CUDA) try_seeds(4, try_wild);
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"drawn", drawn},       {"long", long_draws}, {"strides", strides},   {"k-first", k_first},
        {"pool", pool},         {"grouped", grouped}, {"prefixes", prefixes}, {"later-tokens", later_tokens},
        {"wild-indices", wild}, {"gates", gates},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
