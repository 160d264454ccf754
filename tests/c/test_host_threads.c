/* Several threads plan and launch on the pretended GPU at the same time, from the first call of the process
 * on: each plan, explanation and launch is what a single thread gets afterwards. Under ThreadSanitizer this
 * covers the driver's opening, contexts, modules, what is known of devices, and the caches of plans. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "pretended.h"

enum { THREADS = 6, SHAPES = 12, WORDS = 1200 };

/* More shapes than a cache of plans has entries, of every strategy. */
static const pretended_shape shapes[SHAPES] = {
    {1, 8192, 96, 0, 0},      {1, 8192, 16, 0, 0},     {1, 2048, 12, 0, 0}, {1, 2048, 6, 0, 0},
    {1, 35000, 8, 51, 30000}, {1, 305000, 8, 51, 0},   {8, 1024, 96, 0, 0}, {1, 0, 4, 0, 0},
    {1, 262144, 1, 0, 0},     {1, 12288, 14, 3, 4096}, {1, 8192, 24, 0, 0}, {16, 256, 12, 0, 0},
};

typedef struct answers {
    size_t bytes[SHAPES];
    unsigned long launches[SHAPES];
    char words[SHAPES][WORDS];
} answers;

typedef struct worker {
    int number;
    pthread_barrier_t *start;
    answers got;
} worker;

static void ask(answers *a, int first)
{
    const pretended_counts *counts = pretended_counts_find();
    for (int i = 0; i < SHAPES; i++) {
        const int shape = (first + i) % SHAPES;
        const flash_kda_fwd_params params = pretended_params(shapes[shape]);
        trying("shape %d", shape);
        CHECK(flash_kda_fwd_workspace_size(&params, &a->bytes[shape]) == FLASH_KDA_OK, "%s",
              flash_kda_last_error());
        CHECK(flash_kda_explain(&params, a->words[shape], WORDS) == FLASH_KDA_OK, "%s",
              flash_kda_last_error());
        const unsigned long before = counts->launches;
        CHECK(flash_kda_fwd(&params) == FLASH_KDA_OK, "%s", flash_kda_last_error());
        a->launches[shape] = counts->launches - before;
    }
}

static void *ask_again(void *argument)
{
    worker *w = argument;
    flash_kda_device_info infos[2] = {{.struct_size = sizeof *infos}, {.struct_size = sizeof *infos}};
    int32_t count;
    pthread_barrier_wait(w->start);
    CHECK(flash_kda_list_devices(infos, 2, &count, NULL) == FLASH_KDA_OK && count == 2, "%s",
          flash_kda_last_error());
    for (int round = 0; round < (test.quick ? 10 : 50); round++) ask(&w->got, w->number + round);
    return NULL;
}

static void threads(void)
{
    static worker workers[THREADS];
    pthread_t running[THREADS];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, THREADS);
    for (int i = 0; i < THREADS; i++) {
        workers[i] = (worker){.number = i, .start = &start};
        if (pthread_create(&running[i], NULL, ask_again, &workers[i]) != 0) die("no thread");
    }
    for (int i = 0; i < THREADS; i++) pthread_join(running[i], NULL);
    pthread_barrier_destroy(&start);
    answers *alone = allocate(1, sizeof *alone);
    ask(alone, 0);
    for (int i = 0; i < THREADS; i++)
        for (int shape = 0; shape < SHAPES; shape++) {
            trying("thread %d, shape %d", i, shape);
            CHECK(workers[i].got.bytes[shape] == alone->bytes[shape], "%zu bytes, alone %zu",
                  workers[i].got.bytes[shape], alone->bytes[shape]);
            CHECK(workers[i].got.launches[shape] == alone->launches[shape], "%lu launches, alone %lu",
                  workers[i].got.launches[shape], alone->launches[shape]);
            CHECK(strcmp(workers[i].got.words[shape], alone->words[shape]) == 0, "it says: %s",
                  workers[i].got.words[shape]);
        }
    free(alone);
}

/* The harness must not open the driver before the threads do, so it is given the CPU. The kernel is the
 * default of the pretended GPU. */
int main(void)
{
    static const group groups[] = {{"threads", threads}};
    char *arguments[] = {"test_host_threads", "--device", "cpu", "--kernel", "cpu", NULL};
    harness_start(5, arguments);
    return harness_run(groups, 1);
}
