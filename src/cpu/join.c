/* Maps of pieces are joined on the CPU: how a call is divided among threads. */
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>

#include "../errors.h"
#include "../kernel.h"
#include "cpu.h"
#include "flush.h"
#include "variant.h"

typedef struct job {
    const fkda_join_problem *problem;
    const fkda_cpu_variant *variant;
    char *memory;
} job;

static bool run_head(void *context, int64_t h, int worker)
{
    const job *j = context;
    const unsigned before = fkda_flush_tiny_results();
    j->variant->run_join(j->problem, h, j->memory + (size_t)worker * j->variant->join_memory);
    fkda_restore_tiny_results(before);
    return true;
}

flash_kda_status fkda_cpu_join(const fkda_join_problem *p)
{
    job j = {.problem = p, .variant = fkda_cpu_find_variant(p->kernel->info.name)};
    const int threads =
        (int)fkda_clamp(p->threads, 1, p->heads < FKDA_MAX_THREADS ? p->heads : FKDA_MAX_THREADS);
    const size_t bytes = (size_t)threads * j.variant->join_memory;
    void *memory;
    if (posix_memalign(&memory, 64, bytes) != 0)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR, "the call could not allocate %zu bytes of memory", bytes);
    j.memory = memory;
    fkda_parallel_for(threads, p->heads, run_head, &j);
    free(memory);
    return FLASH_KDA_OK;
}
