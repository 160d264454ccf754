/* Several threads call the library at the same time. Each gets the result that it gets by itself, and its own
 * error sentence. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

enum { THREADS = 6 };

typedef struct worker {
    int index;
    problem *p;
    result by_itself;
    pthread_barrier_t *start;
} worker;

static void *run_again(void *argument)
{
    const worker *w = argument;
    call c;
    must(call_open(&c, w->p, options_of(STATE_BOTH, false)));
    const int rounds = !test.quick ? 30 : test.device.type == FLASH_KDA_CPU ? 5 : 3;
    pthread_barrier_wait(w->start);
    for (int round = 0; round < rounds; round++) {
        trying("thread %d, round %d", w->index, round);
        call_poison(&c);
        flash_kda_status status = call_run(&c);
        if (!CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) break;
        result now = {call_read_out(&c), call_read_state(&c)};
        CHECK(first_difference(w->by_itself.out, now.out, 2, problem_rows(w->p) * DIM) < 0, "out differs");
        CHECK(first_difference(w->by_itself.state, now.state, 4, problem_states(w->p) * DIM * DIM) < 0,
              "final_state differs");
        result_free(&now);
    }
    call_close(&c);
    return NULL;
}

static void run_all(worker *workers, void *(*run)(void *))
{
    pthread_t threads[THREADS];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, THREADS);
    for (int i = 0; i < THREADS; i++) {
        workers[i].start = &start;
        if (pthread_create(&threads[i], NULL, run, &workers[i]) != 0) die("no thread");
    }
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&start);
}

static void problems(void)
{
    worker workers[THREADS];
    for (int i = 0; i < THREADS; i++) {
        const int64_t lengths[] = {20 * i, 7, 0, 64 + i};
        problem *p = problem_create_ragged(lengths, 4, 1 + i % 3);
        fill_case(p, &test_cases[i % 3], (uint64_t)i);
        trying("thread %d's problem by itself", i);
        workers[i] = (worker){.index = i, .p = p};
        workers[i].by_itself = run_and_check(p, NULL, (bars){0, 0}, options_of(STATE_BOTH, false));
    }
    run_all(workers, run_again);
    for (int i = 0; i < THREADS; i++) {
        result_free(&workers[i].by_itself);
        problem_free(workers[i].p);
    }
}

static void *fail_again(void *argument)
{
    const worker *w = argument;
    char sentence[128];
    flash_kda_fwd_params params = problem_params(w->p, false);
    params.device = test.device;
    params.out = params.v;
    CHECK(flash_kda_last_error()[0] == 0, "a new thread has the error: %s", flash_kda_last_error());
    for (int round = 0; round < 100; round++) {
        trying("thread %d, round %d", w->index, round);
        params.lower_bound = (float)(1 + w->index + THREADS * round);
        snprintf(sentence, sizeof sentence, "lower_bound is %g; it must be in [-5, 0]",
                 (double)params.lower_bound);
        CHECK(flash_kda_fwd(&params) == FLASH_KDA_INVALID_VALUE, "it was taken");
        pthread_barrier_wait(w->start);
        CHECK(strcmp(flash_kda_last_error(), sentence) == 0, "the sentence is: %s", flash_kda_last_error());
        pthread_barrier_wait(w->start);
    }
    return NULL;
}

static void errors(void)
{
    worker workers[THREADS];
    problem *p = problem_create(1, 4, 1);
    for (int i = 0; i < THREADS; i++) workers[i] = (worker){.index = i, .p = p};
    run_all(workers, fail_again);
    problem_free(p);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"problems", problems}, {"errors", errors}};
    harness_start(argc, argv);
    return harness_run(groups, 2);
}
