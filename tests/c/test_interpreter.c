/* The calls for interpreters, flash_kda_fwd_for() and others, with an interpreter that counts what is asked
 * of it. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
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

static void exceptions(void)
{
    call c;
    problem *p = long_problem();
    double *out = allocate((size_t)problem_rows(p) * DIM, sizeof *out);
    must(call_open(&c, p, one_thread()));

    trying("a handler raises at the first look");
    start_interpreter(1);
    check_interrupted(flash_kda_fwd_for(&interpreter, &c.params));
    const char *damaged = call_damage(&c, p);
    CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);

    trying("a handler raises during the reference");
    start_interpreter(1);
    check_interrupted(flash_kda_reference_for(&interpreter, &c.params, out, NULL, NULL));

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
    start_interpreter(0);
    flash_kda_fwd_params params = c.params;
    const int32_t set = 1; /* it is the interpreter that interrupts */
    params.interrupt = &set;
    must(flash_kda_fwd_for(&interpreter, &params));
    CHECK(looks > 0 && locked, "the interpreter had no chance to handle signals");
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
    start_interpreter(1);
    check_interrupted(flash_kda_bwd_for(&interpreter, &c.params));
    const char *damaged = bwd_call_damage(&c);
    CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);

    trying("a handler raises during its reference");
    start_interpreter(1);
    check_interrupted(flash_kda_bwd_reference_for(&interpreter, &c.params, &to));

    trying("handlers that return");
    must(bwd_call_run(&c));
    uint16_t *expected = bwd_call_read(&c, GRAD_K);
    start_interpreter(0);
    must(flash_kda_bwd_for(&interpreter, &c.params));
    uint16_t *now = bwd_call_read(&c, GRAD_K);
    CHECK(looks > 0 && locked, "the interpreter had no chance to handle signals");
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
    start_interpreter(1);
    check_interrupted(flash_kda_map_for(&interpreter, &params));

    trying("handlers that return");
    must(flash_kda_map(&params));
    params.map.data = now;
    start_interpreter(0);
    must(flash_kda_map_for(&interpreter, &params));
    CHECK(looks > 0 && locked, "the interpreter had no chance to handle signals");
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
        {"exceptions", exceptions}, {"results", results}, {"backward", backward}, {"maps", maps},
        {"refusals", refusals},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
