/* The backward pass on the CPU: how a call is divided among threads, and sums over all tokens. */
#include <math.h>

#include "../errors.h"
#include "../kernel.h"
#include "../saved.h"
#include "cpu.h"
#include "flush.h"
#include "variant.h"

enum {
    CHUNK = 16,
    /* Starting a thread takes some tens of microseconds, in which a thread goes back over a few tokens of a
     * head. */
    MIN_TOKENS_PER_THREAD = 16,
    /* Tokens of a stretch at least. Shorter ones need less of the cache for their chunks, and more memory
     * for the states between them. */
    MIN_STRETCH = 320,
    /* Sequences are divided into as many blocks as make this many pieces of work, which are enough for any
     * number of threads. Each piece needs room for its part of dA_log and ddt_bias. */
    MOST_PIECES = 4096,
};

typedef struct bwd_plan {
    const fkda_cpu_variant *variant;
    int64_t stretch;
    int64_t blocks; /* of sequences */
    int threads;
    size_t worker_bytes, sums_at; /* bytes of a worker's memory, and of all in front of the sums */
    size_t bytes;
} bwd_plan;

/* Depends on shapes and options alone. How sequences are divided does not depend on the number of threads. */
static bwd_plan make_plan(const fkda_bwd_problem *p)
{
    const fkda_shape *s = &p->fwd.shape;
    const int64_t group = s->heads / s->qk_heads, useful = s->batch * s->tokens * s->heads;
    bwd_plan plan = {.variant = fkda_cpu_find_variant(s->kernel->info.name)};
    /* A worker keeps the states between stretches and the chunks of one stretch. A kept chunk has about two
     * states, so this length makes both parts about equal. */
    const int64_t chunks = (int64_t)sqrt((double)(s->tokens * group) / (2.0 * CHUNK));
    plan.stretch = chunks * CHUNK > MIN_STRETCH ? chunks * CHUNK : MIN_STRETCH;
    if (p->has_saved) plan.stretch = fkda_saved_interval(s);
    plan.blocks = fkda_clamp(MOST_PIECES / s->qk_heads, 1, s->sequences);
    const int64_t pieces = plan.blocks * s->qk_heads;
    plan.threads = (int)fkda_clamp(s->threads, 1, FKDA_MAX_THREADS);
    plan.threads = (int)fkda_clamp(plan.threads, 1, fkda_clamp(useful / MIN_TOKENS_PER_THREAD, 1, pieces));
    plan.worker_bytes = plan.variant->bwd_memory(p, plan.stretch);
    plan.sums_at = (size_t)plan.threads * plan.worker_bytes;
    plan.bytes = plan.sums_at;
    if (p->wants_parameters) plan.bytes += (size_t)(plan.blocks * s->heads * FKDA_BWD_SUMS) * sizeof(double);
    return plan;
}

size_t fkda_cpu_bwd_workspace(const fkda_bwd_problem *p)
{
    return make_plan(p).bytes;
}

typedef struct job {
    const fkda_bwd_problem *problem;
    const bwd_plan *plan;
    double *sums; /* [blocks, HV, FKDA_BWD_SUMS], or NULL */
} job;

static bool run_piece(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_bwd_problem *p = j->problem;
    const fkda_shape *s = &p->fwd.shape;
    const int64_t blocks = j->plan->blocks, block = index / s->qk_heads, qk_head = index % s->qk_heads;
    const fkda_bwd_piece piece = {
        .first = s->sequences / blocks * block + s->sequences % blocks * block / blocks,
        .last = s->sequences / blocks * (block + 1) + s->sequences % blocks * (block + 1) / blocks,
        .qk_head = qk_head,
        .sums = j->sums ? j->sums + (block * s->heads + qk_head * (s->heads / s->qk_heads)) * FKDA_BWD_SUMS
                        : NULL,
    };
    if (fkda_interrupted(&p->fwd))
        return false; /* a sequence may have no token at which its head would ask */
    void *memory = (char *)p->fwd.workspace + (size_t)worker * j->plan->worker_bytes;
    const unsigned before = fkda_flush_tiny_results();
    const bool finished = j->plan->variant->run_bwd(p, &piece, j->plan->stretch, memory);
    fkda_restore_tiny_results(before);
    return finished;
}

/* Adds the parts of dA_log and ddt_bias in the order of the blocks. */
static void add_sums(const fkda_bwd_problem *p, const double *sums, int64_t blocks)
{
    const int64_t heads = p->fwd.shape.heads;
    for (int64_t h = 0; h < heads; h++) {
        for (int i = 0; i < FKDA_BWD_SUMS; i++) {
            double sum = 0.0;
            for (int64_t b = 0; b < blocks; b++) sum += sums[(b * heads + h) * FKDA_BWD_SUMS + i];
            if (i < FKDA_DIM && p->ddt_bias) p->ddt_bias[h * FKDA_DIM + i] = (float)sum;
            if (i == FKDA_DIM && p->dA_log) p->dA_log[h] = (float)sum;
        }
    }
}

flash_kda_status fkda_cpu_bwd(const fkda_bwd_problem *p)
{
    const bwd_plan plan = make_plan(p);
    job j = {.problem = p, .plan = &plan};
    if (p->wants_parameters) j.sums = (double *)((char *)p->fwd.workspace + plan.sums_at);
    if (!fkda_parallel_for(plan.threads, plan.blocks * p->fwd.shape.qk_heads, run_piece, &j))
        return fkda_interruption();
    if (j.sums) add_sums(p, j.sums, plan.blocks);
    return FLASH_KDA_OK;
}
