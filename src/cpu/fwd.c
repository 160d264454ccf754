/* The forward pass on the CPU: how the work is cut into pieces for the threads. */
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#include <stdio.h>

#include "cpu.h"
#include "variant.h"

/* A thread costs some tens of microseconds to start; a head does about ten tokens in that time. */
enum { MIN_TOKENS_PER_THREAD = 64 };

typedef struct work_plan {
    const fkda_problem *problem;
    const fkda_cpu_variant *variant;
    int64_t heads; /* of all sequences together */
    int split;     /* pieces of a head's value channels: 1, 2 or 4 */
    int threads;
} work_plan;

/* Depends on shapes and the number of threads only, so that the workspace can be sized without pointers. */
static work_plan make_plan(const fkda_problem *p)
{
    work_plan best = {.problem = p, .variant = fkda_cpu_find_variant(p->kernel->info.name)};
    best.heads = p->sequences * p->heads;
    int64_t useful = p->batch * p->tokens * p->heads / MIN_TOKENS_PER_THREAD;
    int threads = p->threads < FKDA_MAX_THREADS ? p->threads : FKDA_MAX_THREADS;
    if (threads > useful) threads = useful > 0 ? (int)useful : 1;

    /* Every piece of a head repeats the preparation, about a third of its time. Cut only if the busiest
     * thread gains. */
    double shortest = 0.0;
    for (int split = 1; split <= 4; split *= 2) {
        int64_t rounds = (best.heads * split + threads - 1) / threads;
        double time = (double)rounds * (1.0 / 3 + 2.0 / 3 / split);
        if (split > 1 && time >= shortest) continue;
        shortest = time;
        best.split = split;
    }
    best.threads = best.heads * best.split < threads ? (int)(best.heads * best.split) : threads;
    if (best.threads < 1) best.threads = 1;
    return best;
}

/* A state that fades, or a decay at the bound, passes through numbers below 2^-126, on which x86 CPUs are
 * some hundred times slower. There they become 0 while a head is computed; the caller's setting returns. */
static unsigned flush_tiny_results(void)
{
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | _MM_FLUSH_ZERO_ON);
    return before;
#else
    return 0;
#endif
}

static void restore_tiny_results(unsigned before)
{
#if defined(__SSE2__)
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

static void run_piece(void *context, int64_t index, int worker)
{
    const work_plan *plan = context;
    const fkda_problem *p = plan->problem;
    int64_t head = index / plan->split;
    int channels = FKDA_DIM / plan->split, first = (int)(index % plan->split) * channels;
    void *scratch = (char *)p->workspace + (size_t)worker * plan->variant->scratch_size;
    unsigned before = flush_tiny_results();
    plan->variant->run_head(p, head / p->heads, head % p->heads, first, first + channels, scratch);
    restore_tiny_results(before);
}

size_t fkda_cpu_workspace_size(const fkda_problem *p)
{
    work_plan plan = make_plan(p);
    return (size_t)plan.threads * plan.variant->scratch_size;
}

flash_kda_status fkda_cpu_fwd(const fkda_problem *p)
{
    work_plan plan = make_plan(p);
    fkda_parallel_for(plan.threads, plan.heads * plan.split, run_piece, &plan);
    return FLASH_KDA_OK;
}

void fkda_cpu_explain(const fkda_problem *p, char *text, size_t size)
{
    work_plan plan = make_plan(p);
    const long long pieces = plan.heads * plan.split;
    char split[32] = "not split";
    if (plan.split > 1) snprintf(split, sizeof split, "split into %d pieces", plan.split);
    snprintf(text, size, "%lld pieces of work on %d %s of %s: a head is %s, %d rows of V a piece.", pieces,
             plan.threads, plan.threads == 1 ? "thread" : "threads", plan.variant->arch, split,
             FKDA_DIM / plan.split);
}
