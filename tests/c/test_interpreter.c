/* The calls for interpreters, flash_kda_fwd_for() and others, with an interpreter that counts what is asked
 * of it. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "bwd_call.h"
#include "harness.h"

/* ---- the interpreter ---- */

static pthread_t interpreter_thread;
static bool locked = true;
static int looks, raises_at, looks_after; /* raises_at: the look that raises an exception; 0: none does */
static int token;

static void *release(void)
{
    CHECK(locked && pthread_equal(pthread_self(), interpreter_thread), "the lock was not this thread's");
    locked = false;
    return &token;
}

static void acquire(void *state)
{
    CHECK(!locked && state == &token, "the lock was taken twice, or with another state");
    locked = true;
}

static int handle_signals(void)
{
    CHECK(locked && pthread_equal(pthread_self(), interpreter_thread), "handlers ran without the lock");
    looks++;
    if (raises_at && looks > raises_at) looks_after++;
    return looks == raises_at;
}

static const flash_kda_interpreter interpreter = {release, acquire, handle_signals};

static void start_interpreter(int raise_at)
{
    interpreter_thread = pthread_self();
    locked = true;
    looks = looks_after = 0;
    raises_at = raise_at;
}

/* A call that takes longer than the interpreter's first look on an idle machine. On a busy one the calling
 * thread may get no turn before the call has ended. Such a call is made again, up to MOST_CALLS times. */
enum { MOST_CALLS = 1000 };
static bool ended_unseen(flash_kda_status status, int *calls)
{
    return status == FLASH_KDA_OK && !looks && ++*calls < MOST_CALLS;
}
#define LOOKED_AT(status, raise_at, call)                                                                    \
    do {                                                                                                     \
        int calls = 0;                                                                                       \
        do {                                                                                                 \
            start_interpreter(raise_at);                                                                     \
            (status) = (call);                                                                               \
        } while (ended_unseen(status, &calls));                                                              \
    } while (0)

/* ---- the tests ---- */

/* A problem that one thread computes for much longer than the interpreter's first look takes. */
static problem *long_problem(void)
{
    problem *p = problem_create(1, 20000, 4);
    fill_case(p, find_case("random"), 3);
    return p;
}

static call_options one_thread(void)
{
    call_options options = options_of(STATE_OUT, false);
    options.threads = 1;
    return options;
}

static void check_interrupted(flash_kda_status status)
{
    CHECK(status == FLASH_KDA_INTERRUPTED, "%s", flash_kda_status_string(status));
    CHECK(strcmp(flash_kda_last_error(),
                 "*interrupt became nonzero, so the call was given up; its results are undefined") == 0,
          "%s", flash_kda_last_error());
    CHECK(locked, "the interpreter's lock is lost");
    CHECK(looks == raises_at && !looks_after, "handlers ran %d times after an exception", looks_after);
}

#define CHECK_INTERRUPTED(call)                                                                              \
    do {                                                                                                     \
        flash_kda_status status_;                                                                            \
        LOOKED_AT(status_, 1, call);                                                                         \
        check_interrupted(status_);                                                                          \
    } while (0)
#define RUN_WITH_HANDLERS(call)                                                                              \
    do {                                                                                                     \
        flash_kda_status status_;                                                                            \
        LOOKED_AT(status_, 0, call);                                                                         \
        must(status_);                                                                                       \
        CHECK(looks > 0 && locked, "the interpreter had no chance to handle signals");                       \
    } while (0)

static void exceptions(void)
{
    call c;
    problem *p = long_problem();
    double *out = allocate((size_t)problem_rows(p) * DIM, sizeof *out);
    must(call_open(&c, p, one_thread()));

    trying("a handler raises at the first look");
    CHECK_INTERRUPTED(flash_kda_fwd_for(&interpreter, &c.params));
    const char *damaged = call_damage(&c, p);
    CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);

    trying("a handler raises during the reference");
    CHECK_INTERRUPTED(flash_kda_reference_for(&interpreter, &c.params, out, NULL, NULL));

    free(out);
    call_close(&c);
    problem_free(p);
}

static void check_same(const call *c, const problem *p, const result *expected)
{
    result now = {call_read_out(c), call_read_state(c)};
    CHECK(first_difference(expected->out, now.out, 2, problem_rows(p) * DIM) < 0, "out differs");
    CHECK(first_difference(expected->state, now.state, 4, problem_states(p) * DIM * DIM) < 0,
          "state differs");
    result_free(&now);
}

static void results(void)
{
    call c;
    problem *p = long_problem();
    must(call_open(&c, p, one_thread()));
    must(call_run(&c));
    result expected = {call_read_out(&c), call_read_state(&c)};
    call_poison(&c);

    trying("handlers that return");
    flash_kda_fwd_params params = c.params;
    const int32_t set = 1; /* it is the interpreter that interrupts */
    params.interrupt = &set;
    RUN_WITH_HANDLERS(flash_kda_fwd_for(&interpreter, &params));
    check_same(&c, p, &expected);

    trying("no file descriptor, so the calling thread computes");
    struct rlimit before, none;
    if (getrlimit(RLIMIT_NOFILE, &before) != 0) die("no limit of file descriptors");
    none = before;
    none.rlim_cur = 0;
    call_poison(&c);
    start_interpreter(1);
    setrlimit(RLIMIT_NOFILE, &none);
    const flash_kda_status status = flash_kda_fwd_for(&interpreter, &c.params);
    setrlimit(RLIMIT_NOFILE, &before);
    CHECK(status == FLASH_KDA_OK && looks == 0 && locked, "%s", flash_kda_last_error());
    check_same(&c, p, &expected);

    result_free(&expected);
    call_close(&c);
    problem_free(p);
}

static void refusals(void)
{
    call c;
    problem *p = problem_create(1, 20, 1);
    fill_case(p, find_case("random"), 3);
    must(call_open(&c, p, one_thread()));
    start_interpreter(0);

    trying("an argument is wrong");
    c.params.lower_bound = 1;
    CHECK(flash_kda_fwd_for(&interpreter, &c.params) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strstr(flash_kda_last_error(), "lower_bound is 1"), "%s", flash_kda_last_error());

    trying("the struct is wrong");
    c.params.struct_size = 5;
    CHECK(flash_kda_fwd_for(&interpreter, &c.params) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strstr(flash_kda_last_error(), "struct_size is 5"), "%s", flash_kda_last_error());
    CHECK(flash_kda_fwd_for(&interpreter, NULL) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(flash_kda_fwd_for(NULL, &c.params) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strstr(flash_kda_last_error(), "interpreter is null"), "%s", flash_kda_last_error());
    CHECK(locked, "the interpreter's lock is lost");

    call_close(&c);
    problem_free(p);
}

static void backward(void)
{
    problem *p = problem_create(1, 20000, 1);
    fill_case(p, find_case("random"), 3);
    bwd_problem *b = bwd_problem_create(p, 5);
    bwd_call c;
    double *dv = allocate((size_t)problem_rows(p) * DIM, sizeof *dv);
    const flash_kda_gradients64 to = {.struct_size = sizeof to, .dv = dv};
    must(bwd_call_open(&c, b, (bwd_options){.forward = one_thread()}));

    trying("a handler raises during the backward pass");
    CHECK_INTERRUPTED(flash_kda_bwd_for(&interpreter, &c.params));
    const char *damaged = bwd_call_damage(&c);
    CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);

    trying("a handler raises during its reference");
    CHECK_INTERRUPTED(flash_kda_bwd_reference_for(&interpreter, &c.params, &to));

    trying("handlers that return");
    must(bwd_call_run(&c));
    uint16_t *expected = bwd_call_read(&c, GRAD_K);
    RUN_WITH_HANDLERS(flash_kda_bwd_for(&interpreter, &c.params));
    uint16_t *now = bwd_call_read(&c, GRAD_K);
    CHECK(first_difference(expected, now, 2, problem_qk_rows(p) * DIM) < 0, "dk differs");

    trying("wrong arguments");
    c.params.scale = INFINITY;
    CHECK(flash_kda_bwd_for(&interpreter, &c.params) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strstr(flash_kda_last_error(), "scale is inf"), "%s", flash_kda_last_error());
    CHECK(flash_kda_bwd_for(&interpreter, NULL) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(flash_kda_bwd_for(NULL, &c.params) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(locked, "the interpreter's lock is lost");
    free(expected);
    free(now);
    free(dv);
    bwd_call_close(&c);
    bwd_problem_free(b);
}

/* Arguments of decode, decode_layer and apply whose inputs are zeros: `zeros` has room for all of them. All
 * sequences start from slot 0, which decode and decode_layer do not write. */
enum { SEQUENCES = 1500, TOKENS = FLASH_KDA_MAX_DECODE_TOKENS, HEADS = 4 };

static flash_kda_decode_params decode_of(void *zeros, void *out, void *state)
{
    const int64_t rows[] = {SEQUENCES, TOKENS, HEADS, DIM}, states[] = {1, HEADS, DIM, DIM};
    const flash_kda_tensor tokens = tensor_of(zeros, FLASH_KDA_BF16, 4, rows);
    return (flash_kda_decode_params){
        .struct_size = sizeof(flash_kda_decode_params),
        .q = tokens,
        .k = tokens,
        .v = tokens,
        .g = tokens,
        .beta = tensor_of(zeros, FLASH_KDA_BF16, 3, rows),
        .out = tensor_of(out, FLASH_KDA_BF16, 4, rows),
        .state = tensor_of(state, FLASH_KDA_F32, 4, states),
        .state_indices = tensor_of(zeros, FLASH_KDA_I32, 1, rows),
        .scale = 1.0F,
        .lower_bound = -5.0F,
        .write_states = FLASH_KDA_WRITE_NONE,
        .cpu_threads = 1,
    };
}

static flash_kda_decode_layer_params layer_of(void *zeros, void *out, void *state)
{
    const int64_t channels = (int64_t)FLASH_KDA_RECORD_ROWS * HEADS * DIM,
                  x[] = {SEQUENCES, TOKENS, channels}, weight[] = {channels, 4}, window[] = {1, channels, 3};
    const flash_kda_decode_params d = decode_of(zeros, out, state);
    return (flash_kda_decode_layer_params){
        .struct_size = sizeof(flash_kda_decode_layer_params),
        .x = tensor_of(zeros, FLASH_KDA_BF16, 3, x),
        .weight = tensor_of(zeros, FLASH_KDA_F32, 2, weight),
        .conv_state = tensor_of(zeros, FLASH_KDA_BF16, 3, window),
        .g = d.g,
        .beta = d.beta,
        .out = d.out,
        .state = d.state,
        .state_indices = d.state_indices,
        .scale = 1.0F,
        .lower_bound = -5.0F,
        .write_states = FLASH_KDA_WRITE_NONE,
        .cpu_threads = 1,
    };
}

static flash_kda_apply_params apply_of(void *zeros, const int64_t *counts, void *states)
{
    const int64_t records[] = {SEQUENCES, TOKENS, 1, (int64_t)FLASH_KDA_RECORD_ROWS * DIM},
                  pool[] = {SEQUENCES, 1, DIM, DIM};
    return (flash_kda_apply_params){
        .struct_size = sizeof(flash_kda_apply_params),
        .records = tensor_of(zeros, FLASH_KDA_F32, 4, records),
        .num_accepted_tokens = tensor_of((void *)counts, FLASH_KDA_I64, 1, records),
        .state = tensor_of(states, FLASH_KDA_F32, 4, pool),
        .cpu_threads = 1,
    };
}

static void decode(void)
{
    const size_t rows = (size_t)SEQUENCES * TOKENS * HEADS;
    void *zeros = allocate(rows * FLASH_KDA_RECORD_ROWS, DIM * sizeof(uint16_t));
    uint16_t *out = allocate(rows * DIM, sizeof *out);
    float *states = allocate((size_t)SEQUENCES * DIM * DIM, sizeof *states);
    double *out64 = allocate(rows * DIM, sizeof *out64);
    int64_t *counts = allocate(SEQUENCES, sizeof *counts);
    for (int n = 0; n < SEQUENCES; n++) counts[n] = TOKENS;
    flash_kda_decode_params d = decode_of(zeros, out, states);
    flash_kda_decode_layer_params layer = layer_of(zeros, out, states);
    flash_kda_apply_params apply = apply_of(zeros, counts, states);

    trying("a handler raises during decode");
    CHECK_INTERRUPTED(flash_kda_decode_for(&interpreter, &d));
    trying("a handler raises during the reference of decode");
    CHECK_INTERRUPTED(flash_kda_decode_reference_for(&interpreter, &d, out64, NULL));
    trying("a handler raises during decode_layer");
    CHECK_INTERRUPTED(flash_kda_decode_layer_for(&interpreter, &layer));
    trying("a handler raises during the reference of decode_layer");
    CHECK_INTERRUPTED(flash_kda_decode_layer_reference_for(&interpreter, &layer, out64, NULL));
    trying("a handler raises during apply");
    CHECK_INTERRUPTED(flash_kda_apply_for(&interpreter, &apply));

    trying("handlers that return, and a struct of an older version");
    memset(out, 1, rows * DIM * sizeof *out);
    d.struct_size = offsetof(flash_kda_decode_params, written_states);
    RUN_WITH_HANDLERS(flash_kda_decode_for(&interpreter, &d));
    bool all_zeros = true;
    for (size_t i = 0; i < rows * DIM; i++) all_zeros = all_zeros && !out[i];
    CHECK(all_zeros, "out is not zeros");

    trying("wrong arguments");
    d.scale = INFINITY;
    CHECK(flash_kda_decode_for(&interpreter, &d) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strstr(flash_kda_last_error(), "scale is inf"), "%s", flash_kda_last_error());
    layer.struct_size = 5;
    CHECK(flash_kda_decode_layer_for(&interpreter, &layer) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strstr(flash_kda_last_error(), "struct_size is 5"), "%s", flash_kda_last_error());
    CHECK(flash_kda_apply_for(&interpreter, NULL) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(flash_kda_apply_for(NULL, &apply) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(locked, "the interpreter's lock is lost");
    free(zeros);
    free(out);
    free(states);
    free(out64);
    free(counts);
}

static void maps(void)
{
    problem *p = problem_create(1, 20000, 4);
    fill_case(p, find_case("slow gates"), 3);
    const flash_kda_fwd_params fwd = problem_params(p, false);
    const int64_t shape[] = {1, 4, DIM, DIM}, count = 4 * DIM * DIM;
    float *expected = allocate((size_t)count, sizeof *expected), *now = allocate((size_t)count, sizeof *now);
    flash_kda_map_params params = {.struct_size = sizeof params,
                                   .k = fwd.k,
                                   .v = fwd.v,
                                   .g = fwd.g,
                                   .beta = fwd.beta,
                                   .A_log = fwd.A_log,
                                   .dt_bias = fwd.dt_bias,
                                   .map = tensor_of(expected, FLASH_KDA_F32, 4, shape),
                                   .lower_bound = fwd.lower_bound,
                                   .cpu_threads = 1};
    must(flash_kda_map_workspace_size(&params, &params.workspace_size));
    params.workspace = aligned_alloc(64, params.workspace_size);

    trying("a handler raises while maps are computed");
    CHECK_INTERRUPTED(flash_kda_map_for(&interpreter, &params));

    trying("handlers that return");
    must(flash_kda_map(&params));
    params.map.data = now;
    RUN_WITH_HANDLERS(flash_kda_map_for(&interpreter, &params));
    CHECK(first_difference(expected, now, 4, count) < 0, "map differs");

    trying("wrong arguments");
    params.lower_bound = 1.0f;
    CHECK(flash_kda_map_for(&interpreter, &params) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strstr(flash_kda_last_error(), "lower_bound is 1"), "%s", flash_kda_last_error());
    CHECK(flash_kda_map_for(&interpreter, NULL) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(flash_kda_map_for(NULL, &params) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(locked, "the interpreter's lock is lost");
    free(params.workspace);
    free(expected);
    free(now);
    problem_free(p);
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"exceptions", exceptions}, {"results", results}, {"backward", backward},
        {"decode", decode},         {"maps", maps},       {"refusals", refusals},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
