/*
 * Decode and apply on the CPU: how a call is divided into pieces of work among threads, and what a piece is.
 *
 * A piece is all rows of V of one head of one sequence. If a call has fewer than four heads for each thread,
 * heads are divided into pieces of fewer rows, of which each prepares the tokens again. Results do not depend
 * on the division, since rows do not depend on each other.
 */
#include <stdio.h>

#include "../errors.h"
#include "../kernel.h"
#include "cpu.h"
#include "flush.h"
#include "variant.h"

/* ---- The division -------------------------------------------------------------------------------------- */

/* Estimates in nanoseconds, of a core of a server. A thread that is started must save more than it costs: a
 * larger THREAD_COST leaves small calls on one thread, a smaller one starts threads that arrive late. */
enum {
    HEAD_COST = 6000,    /* the state of a head, from memory and back */
    TOKEN_COST = 1200,   /* a token of a head */
    THREAD_COST = 50000, /* to start a thread and to wait for its end */
};

enum { MAX_SPLIT = FKDA_DIM / FKDA_DECODE_ROWS };

typedef struct division {
    int threads;
    int split; /* pieces of a head: 1, 2, 4 or 8 */
} division;

static division divide(int32_t threads, int64_t heads, int64_t tokens)
{
    division d = {.threads = threads < FKDA_MAX_THREADS ? threads : FKDA_MAX_THREADS, .split = 1};
    const double useful = ((double)heads * HEAD_COST + (double)tokens * TOKEN_COST) / THREAD_COST;
    if (useful < d.threads) d.threads = useful < 1.0 ? 1 : (int)useful;
    if (d.threads > 1)
        while (d.split < MAX_SPLIT && heads * d.split < 4 * d.threads) d.split *= 2;
    return d;
}

static division division_of_decode(const fkda_decode_problem *p)
{
    const int64_t tokens = (p->cu_seqlens.data ? p->tokens : p->sequences * p->tokens) * p->heads;
    return divide(p->threads, p->sequences * p->heads, tokens);
}

static division division_of_apply(const fkda_apply_problem *p)
{
    return divide(p->threads, p->sequences * p->heads, 0);
}

static void explain(division d, int64_t heads, const fkda_kernel *kernel, char *text, size_t size)
{
    snprintf(text, size, "%lld heads of sequences, in %lld pieces of %d rows of V, on %d %s of %s.",
             (long long)heads, (long long)heads * d.split, FKDA_DIM / d.split, d.threads,
             d.threads == 1 ? "thread" : "threads", fkda_cpu_find_variant(kernel->info.name)->arch);
}

void fkda_cpu_explain_decode(const fkda_decode_problem *p, char *text, size_t size)
{
    explain(division_of_decode(p), p->sequences * p->heads, p->kernel, text, size);
}

void fkda_cpu_explain_apply(const fkda_apply_problem *p, char *text, size_t size)
{
    explain(division_of_apply(p), p->sequences * p->heads, p->kernel, text, size);
}

typedef struct job {
    const fkda_decode_problem *decode; /* or NULL: */
    const fkda_apply_problem *apply;
    const fkda_cpu_variant *variant;
    int64_t heads;
    int split;
} job;

/* Which part of which head a piece is. */
typedef struct part {
    int64_t n, h;
    int v_begin, v_end;
} part;

static part part_at(const job *j, int64_t index)
{
    const int64_t head = index / j->split;
    const int rows = FKDA_DIM / j->split, first = (int)(index % j->split) * rows;
    return (part){head / j->heads, head % j->heads, first, first + rows};
}

typedef bool piece_function(void *context, int64_t index, int worker);

/* Runs all pieces of a call. */
static flash_kda_status run(const fkda_kernel *kernel, job j, int64_t sequences, division d,
                            piece_function *piece)
{
    j.variant = fkda_cpu_find_variant(kernel->info.name);
    j.split = d.split;
    return fkda_parallel_for(d.threads, sequences * j.heads * d.split, piece, &j) ? FLASH_KDA_OK
                                                                                  : fkda_interruption();
}

/* ---- Decode -------------------------------------------------------------------------------------------- */

/* The tokens of sequence n, which have room in the records also if another thread has made the sequence
 * longer since the check. */
static fkda_sequence sequence_at(const fkda_decode_problem *p, int64_t n)
{
    fkda_sequence sequence = fkda_decode_sequence_at(p, n);
    if (p->records && sequence.end > sequence.begin + p->record_columns)
        sequence.end = sequence.begin + p->record_columns;
    return sequence;
}

/* Gives each token's state a place. The last token that continues from a state takes its place; tokens before
 * take free places. */
static void find_steps(const fkda_decode_problem *p, fkda_decode_piece *x)
{
    enum { TOKENS = FLASH_KDA_MAX_DECODE_TOKENS };
    /* States are numbered: the starting state is 0, and that after token i is i + 1. */
    int parent[TOKENS], last_child[TOKENS + 1] = {0}, place[TOKENS + 1] = {0};
    const int count = (int)(x->sequence.end - x->sequence.begin);
    unsigned taken = 1; /* bits of places; the starting state has place 0 */
    for (int i = 0; i < count; i++) {
        parent[i] = (int)fkda_decode_parent(p, x->n, i) + 1;
        last_child[parent[i]] = i;
    }
    x->places = 1;
    for (int i = 0; i < count; i++) {
        fkda_decode_step *step = &x->steps[i];
        *step = (fkda_decode_step){place[parent[i]], FKDA_NO_PLACE, FKDA_NO_SLOT};
        step->slot = fkda_decode_slot_to_write(p, x->n, &x->sequence, x->slot, i);
        if (last_child[parent[i]] == i) taken &= ~(1u << step->from);
        const bool has_child = last_child[i + 1] > i;
        if (!has_child && step->slot == FKDA_NO_SLOT) continue;
        step->to = __builtin_ctz(~taken);
        if (x->places <= step->to) x->places = step->to + 1;
        place[i + 1] = step->to;
        if (has_child) taken |= 1u << step->to;
    }
}

static bool decode_piece(void *context, int64_t index, int worker)
{
    (void)worker;
    const job *j = context;
    const fkda_decode_problem *p = j->decode;
    if (fkda_is_interrupt(p->interrupt)) return false;
    const part rows = part_at(j, index);
    fkda_decode_piece x = {.n = rows.n, .h = rows.h, .v_begin = rows.v_begin, .v_end = rows.v_end};
    x.sequence = sequence_at(p, x.n);
    if (x.sequence.begin == x.sequence.end) return true;
    x.slot = fkda_decode_first_slot(p, x.n);
    find_steps(p, &x);
    const unsigned before = fkda_flush_tiny_results();
    j->variant->decode(p, &x);
    fkda_restore_tiny_results(before);
    return true;
}

/* ---- Apply --------------------------------------------------------------------------------------------- */

/* The tokens that are applied. */
static void find_accepted(const fkda_apply_problem *p, fkda_apply_piece *x)
{
    const int64_t count = fkda_apply_count(p, x->n);
    for (x->count = 0; x->count < count; x->count++) {
        const int64_t token = fkda_apply_token(p, x->n, x->count);
        if (token < 0) return;
        x->tokens[x->count] = token;
    }
}

static bool apply_piece(void *context, int64_t index, int worker)
{
    (void)worker;
    const job *j = context;
    const fkda_apply_problem *p = j->apply;
    if (fkda_is_interrupt(p->interrupt)) return false;
    const part rows = part_at(j, index);
    fkda_apply_piece x = {.n = rows.n, .h = rows.h, .v_begin = rows.v_begin, .v_end = rows.v_end};
    x.slot = fkda_slot_at(&p->state_indices, x.n, p->first_slot, &p->state);
    find_accepted(p, &x);
    if (x.slot == FKDA_NO_SLOT || x.count == 0) return true;
    const unsigned before = fkda_flush_tiny_results();
    j->variant->apply(p, &x);
    fkda_restore_tiny_results(before);
    return true;
}

flash_kda_status fkda_cpu_apply(const fkda_apply_problem *p)
{
    const job j = {.apply = p, .heads = p->heads};
    return run(p->kernel, j, p->sequences, division_of_apply(p), apply_piece);
}

/* ---- The call ------------------------------------------------------------------------------------------ */

flash_kda_status fkda_cpu_decode(const fkda_decode_problem *p)
{
    if (p->past_records) {
        const fkda_apply_problem past = fkda_past_of(p);
        const flash_kda_status status = fkda_cpu_apply(&past);
        if (status != FLASH_KDA_OK) return status;
    }
    const job j = {.decode = p, .heads = p->heads};
    return run(p->kernel, j, p->sequences, division_of_decode(p), decode_piece);
}
