/* The forward pass on the CPU: how a call is divided among threads. */
#include <stdio.h>

#include "../checkpoints.h"
#include "../errors.h"
#include "../kernel.h"
#include "../plan.h"
#include "cpu.h"
#include "flush.h"
#include "variant.h"

/* Starting a thread takes some tens of microseconds, in which a thread computes about ten tokens of a
 * head. */
enum { MIN_TOKENS_PER_THREAD = 64 };

flash_kda_status fkda_cpu_make_plan(fkda_plan *plan)
{
    const fkda_shape *s = &plan->shape;
    fkda_cpu_plan *best = &plan->cpu;
    const int64_t heads = s->sequences * s->heads,
                  useful = s->batch * s->tokens * s->heads / MIN_TOKENS_PER_THREAD;
    int threads = s->threads < FKDA_MAX_THREADS ? s->threads : FKDA_MAX_THREADS;
    if (threads > useful) threads = useful > 0 ? (int)useful : 1;

    /* Every piece of a head repeats the preparation, which is about a third of the head's time. So a head is
     * divided only if the thread with the most work gains. */
    double shortest = 0.0;
    for (int split = 1; split <= 4; split *= 2) {
        const int64_t rounds = (heads * split + threads - 1) / threads;
        const double time = (double)rounds * (1.0 / 3 + 2.0 / 3 / split);
        if (split > 1 && time >= shortest) continue;
        shortest = time;
        best->split = split;
    }
    best->variant = fkda_cpu_find_variant(s->kernel->info.name);
    best->threads = heads * best->split < threads ? (int)(heads * best->split) : threads;
    if (best->threads < 1) best->threads = 1;
    best->first_rows_at = (size_t)best->threads * best->variant->scratch_size;
    plan->workspace_bytes = best->first_rows_at;
    if (s->features & FKDA_CHECKPOINTS) plan->workspace_bytes += (size_t)s->sequences * sizeof(int64_t);
    return FLASH_KDA_OK;
}

typedef struct job {
    const fkda_problem *problem;
    const fkda_cpu_plan *plan;
    const int64_t *first_rows; /* of the sequences' checkpoints (checkpoints.h) */
} job;

static bool run_piece(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_problem *p = j->problem;
    const int64_t head = index / j->plan->split, heads = p->shape.heads;
    const int channels = FKDA_DIM / j->plan->split, first = (int)(index % j->plan->split) * channels;
    if (fkda_interrupted(p)) return false; /* a sequence may have no token at which its head would ask */
    void *scratch = (char *)p->workspace + (size_t)worker * j->plan->variant->scratch_size;
    unsigned before = fkda_flush_tiny_results();
    const bool finished = j->plan->variant->run_head(p, j->first_rows, head / heads, head % heads, first,
                                                     first + channels, scratch);
    fkda_restore_tiny_results(before);
    return finished;
}

flash_kda_status fkda_cpu_run(const fkda_problem *p, const fkda_plan *plan)
{
    int64_t *first_rows = (int64_t *)((char *)p->workspace + plan->cpu.first_rows_at);
    job j = {.problem = p, .plan = &plan->cpu, .first_rows = first_rows};
    if (fkda_needs_checkpoint_rows(p)) fkda_checkpoint_rows(p, first_rows);
    const int64_t pieces = p->shape.sequences * p->shape.heads * plan->cpu.split;
    return fkda_parallel_for(plan->cpu.threads, pieces, run_piece, &j) ? FLASH_KDA_OK : fkda_interruption();
}

void fkda_cpu_explain(const fkda_plan *plan, char *text, size_t size)
{
    const fkda_cpu_plan *p = &plan->cpu;
    const long long pieces = plan->shape.sequences * plan->shape.heads * p->split;
    char divided[32] = "not divided";
    if (p->split > 1) snprintf(divided, sizeof divided, "divided into %d pieces", p->split);
    snprintf(text, size, "%lld pieces of work on %d %s of %s. A head is %s, of %d rows of V each.", pieces,
             p->threads, p->threads == 1 ? "thread" : "threads", p->variant->arch, divided,
             FKDA_DIM / p->split);
}
