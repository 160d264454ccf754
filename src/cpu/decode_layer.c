/* decode_layer on the CPU: how a call is divided among threads. */
#include <stdio.h>

#include "../errors.h"
#include "../kernel.h"
#include "cpu.h"
#include "flush.h"
#include "variant.h"

/* Estimates in nanoseconds, of a core of a server, as decode.c has them. A head is not divided, because the
 * norm over V needs all of its rows. */
enum {
    HEAD_COST = 8000,    /* the state of a head, from memory and back, and its convolution's weights */
    TOKEN_COST = 2000,   /* a token of a head */
    THREAD_COST = 50000, /* to start a thread and to wait for its end */
};

typedef struct job {
    const fkda_decode_layer_problem *problem;
    const fkda_cpu_variant *variant;
} job;

static bool run_head(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_decode_problem *d = &j->problem->decode;
    (void)worker;
    if (fkda_is_interrupt(d->interrupt)) return false;
    const unsigned before = fkda_flush_tiny_results();
    j->variant->run_layer_head(j->problem, index / d->heads, index % d->heads);
    fkda_restore_tiny_results(before);
    return true;
}

static int threads_of(const fkda_decode_problem *d)
{
    const int64_t heads = d->sequences * d->heads,
                  tokens = (d->cu_seqlens.data ? d->tokens : d->sequences * d->tokens) * d->heads;
    const double useful = ((double)heads * HEAD_COST + (double)tokens * TOKEN_COST) / THREAD_COST;
    int threads = d->threads < FKDA_MAX_THREADS ? d->threads : FKDA_MAX_THREADS;
    if (useful < threads) threads = useful < 1.0 ? 1 : (int)useful;
    return threads;
}

flash_kda_status fkda_cpu_decode_layer(const fkda_decode_layer_problem *p)
{
    const fkda_decode_problem *d = &p->decode;
    job j = {.problem = p, .variant = fkda_cpu_find_variant(d->kernel->info.name)};
    return fkda_parallel_for(threads_of(d), d->sequences * d->heads, run_head, &j) ? FLASH_KDA_OK
                                                                                   : fkda_interruption();
}

void fkda_cpu_explain_decode_layer(const fkda_decode_layer_problem *p, char *text, size_t size)
{
    const fkda_decode_problem *d = &p->decode;
    const int threads = threads_of(d);
    snprintf(text, size, "%lld heads of sequences, none divided, on %d %s of %s.",
             (long long)d->sequences * d->heads, threads, threads == 1 ? "thread" : "threads",
             fkda_cpu_find_variant(d->kernel->info.name)->arch);
}
