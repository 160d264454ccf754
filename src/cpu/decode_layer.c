/* decode_layer on the CPU: how a call is divided among threads. */
#include "../errors.h"
#include "../kernel.h"
#include "cpu.h"
#include "flush.h"
#include "variant.h"

/* Starting a thread takes some tens of microseconds. A head takes about ten for its state of 64 KiB. */
enum { MIN_HEADS_PER_THREAD = 4 };

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

flash_kda_status fkda_cpu_decode_layer(const fkda_decode_layer_problem *p)
{
    const fkda_decode_problem *d = &p->decode;
    const job j = {.problem = p, .variant = fkda_cpu_find_variant(d->kernel->info.name)};
    const int64_t heads = d->sequences * d->heads, useful = heads / MIN_HEADS_PER_THREAD;
    int threads = d->threads;
    if (threads > useful) threads = useful > 1 ? (int)useful : 1;
    return fkda_parallel_for(threads, heads, run_head, (void *)&j) ? FLASH_KDA_OK : fkda_interruption();
}
