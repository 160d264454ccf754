/* A parallel loop on plain threads that end before the loop returns. Nothing outlives a call, so there is no
 * pool of threads to shut down, to share between callers, or to lose in a fork. */
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "cpu.h"

int fkda_cpu_count(void)
{
#if defined(__linux__)
    /* In a container a process may often use fewer CPUs than the machine has. */
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

typedef struct loop {
    void (*task)(void *context, int64_t index, int worker);
    void *context;
    int64_t count;
    atomic_llong next;
} loop;

typedef struct worker {
    loop *loop;
    int number;
    pthread_t thread;
} worker;

static void *work(void *argument)
{
    const worker *self = argument;
    loop *l = self->loop;
    for (;;) {
        int64_t index = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        if (index >= l->count) return NULL;
        l->task(l->context, index, self->number);
    }
}

void fkda_parallel_for(int threads, int64_t count, void (*task)(void *context, int64_t index, int worker),
                       void *context)
{
    if (threads > FKDA_MAX_THREADS) threads = FKDA_MAX_THREADS;
    if (threads > count) threads = (int)count;

    loop l = {.task = task, .context = context, .count = count};
    atomic_init(&l.next, 0);
    worker workers[FKDA_MAX_THREADS];
    int started = 1; /* worker 0 is the caller */
    workers[0] = (worker){.loop = &l, .number = 0};
    for (; started < threads; started++) {
        worker *w = &workers[started];
        *w = (worker){.loop = &l, .number = started};
        /* If the system gives no more threads, the threads that were started do all the work. */
        if (pthread_create(&w->thread, NULL, work, w) != 0) break;
    }
    work(&workers[0]);
    for (int i = 1; i < started; i++) pthread_join(workers[i].thread, NULL);
}
