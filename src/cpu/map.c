/* Maps of pieces on the CPU: how a call is divided among threads. */
#include "../errors.h"
#include "../kernel.h"
#include "cpu.h"
#include "flush.h"
#include "variant.h"

/* Starting a thread takes some tens of microseconds, in which a thread computes a few tokens of a head. */
enum { MIN_TOKENS_PER_THREAD = 32, COLUMNS = 2 * FKDA_DIM };

typedef struct map_plan {
    const fkda_cpu_variant *variant;
    int first, last; /* the columns that are wanted, of the state and the map (variant.h) */
    int split;       /* pieces that they are divided into: 1, 2 or 4 */
    int threads;
} map_plan;

/* Depends on shapes and options alone. No column depends on another one, so results do not depend on how
 * columns are divided. */
static map_plan make_plan(const fkda_map_problem *p)
{
    const fkda_shape *s = &p->fwd.shape;
    const int64_t heads = s->sequences * s->heads,
                  useful = s->batch * s->tokens * s->heads / MIN_TOKENS_PER_THREAD;
    map_plan plan = {.variant = fkda_cpu_find_variant(s->kernel->info.name),
                     .first = p->wants_state ? 0 : FKDA_DIM,
                     .last = p->wants_map ? COLUMNS : FKDA_DIM,
                     .split = 1};
    plan.threads = (int)fkda_clamp(s->threads, 1, FKDA_MAX_THREADS);
    plan.threads = (int)fkda_clamp(plan.threads, 1, useful > 1 ? useful : 1);
    /* Every piece repeats the preparation, which is about a quarter of a head's time. So a head is divided
     * only if the thread with the most work gains. */
    double shortest = 0.0;
    for (int split = 1; split <= 4; split *= 2) {
        const int64_t rounds = (heads * split + plan.threads - 1) / plan.threads;
        const double time = (double)rounds * (1.0 / 4 + 3.0 / 4 / split);
        if (split > 1 && time >= shortest) continue;
        shortest = time;
        plan.split = split;
    }
    if (plan.threads > heads * plan.split) plan.threads = (int)(heads * plan.split);
    return plan;
}

size_t fkda_cpu_map_workspace(const fkda_map_problem *p)
{
    const map_plan plan = make_plan(p);
    return (size_t)plan.threads * plan.variant->map_memory;
}

typedef struct job {
    const fkda_map_problem *problem;
    const map_plan *plan;
} job;

static bool run_piece(void *context, int64_t index, int worker)
{
    const job *j = context;
    const map_plan *plan = j->plan;
    const fkda_problem *p = &j->problem->fwd;
    const int64_t head = index / plan->split, heads = p->shape.heads;
    const int columns = (plan->last - plan->first) / plan->split,
              first = plan->first + (int)(index % plan->split) * columns;
    if (fkda_interrupted(p)) return false; /* a sequence may have no token at which its head would ask */
    void *memory = (char *)p->workspace + (size_t)worker * plan->variant->map_memory;
    const unsigned before = fkda_flush_tiny_results();
    const bool finished =
        plan->variant->run_map(j->problem, head / heads, head % heads, first, first + columns, memory);
    fkda_restore_tiny_results(before);
    return finished;
}

flash_kda_status fkda_cpu_map(const fkda_map_problem *p)
{
    const map_plan plan = make_plan(p);
    job j = {.problem = p, .plan = &plan};
    const int64_t pieces = p->fwd.shape.sequences * p->fwd.shape.heads * plan.split;
    return fkda_parallel_for(plan.threads, pieces, run_piece, &j) ? FLASH_KDA_OK : fkda_interruption();
}
