/* A parallel loop on plain threads that end before the loop returns. Nothing outlives a call, so there is no
 * pool of threads to shut down, to share between callers, or to lose in a fork. */
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#else
#define _POSIX_C_SOURCE 200809L
#endif
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#include "../guard.h"
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
    bool (*task)(void *context, int64_t index, int worker);
    void *context;
    int64_t count;
    atomic_llong next;
    atomic_bool stopped;
} loop;

typedef struct worker {
    loop *loop;
    int number;
    pthread_t thread;
} worker;

static void work(const worker *self)
{
    loop *l = self->loop;
    while (!atomic_load_explicit(&l->stopped, memory_order_relaxed)) {
        int64_t index = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        if (index >= l->count) return;
        if (!l->task(l->context, index, self->number))
            atomic_store_explicit(&l->stopped, true, memory_order_relaxed);
    }
}

/* A new thread's floating-point settings are those of its creator on some systems, and the defaults on
 * others. */
static void *start_work(void *argument)
{
    fkda_default_float_settings();
    work(argument);
    return NULL;
}

bool fkda_parallel_for(int threads, int64_t count, bool (*task)(void *context, int64_t index, int worker),
                       void *context)
{
    if (threads > FKDA_MAX_THREADS) threads = FKDA_MAX_THREADS;
    if (threads > count) threads = (int)count;

    loop l = {.task = task, .context = context, .count = count};
    atomic_init(&l.next, 0);
    atomic_init(&l.stopped, false);
    const worker caller = {.loop = &l, .number = 0};
    if (threads <= 1) {
        work(&caller);
        return !atomic_load(&l.stopped);
    }
    worker workers[FKDA_MAX_THREADS];
    int started = 1; /* worker 0 is the caller */
    /* New threads block the signals that their creator blocks. The application's handlers then run on its own
     * threads, as if the workers were not there. */
    const sigset_t before = fkda_block_signals();
    for (; started < threads; started++) {
        worker *w = &workers[started];
        *w = (worker){.loop = &l, .number = started};
        /* If the system gives no more threads, the threads that were started do all the work. */
        if (pthread_create(&w->thread, NULL, start_work, w) != 0) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    work(&caller);
    for (int i = 1; i < started; i++) pthread_join(workers[i].thread, NULL);
    return !atomic_load(&l.stopped);
}
