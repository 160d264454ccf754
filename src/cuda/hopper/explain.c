/* Puts a plan into words, for `flash-kda info` and flash_kda_explain(). */
#include <stdio.h>

#include "../cuda.h"
#include "plan.h"

static void explain_whole(const fkda_hopper_whole *w, char *text, size_t size)
{
    const bool paired = w->chunk == FKDA_HOPPER_CHUNK_PAIR;
    const char *const what = paired            ? w->workers == 1 ? "CTA pair" : "CTA pairs"
                             : w->workers == 1 ? "solo CTA"
                                               : "solo CTAs";
    const char *const shares = w->heads <= w->workers ? "Each head has one of them."
                               : w->divides ? "They share out all tokens evenly, and a head that two of them "
                                              "share is handed over with its state."
                                            : "They share out whole heads as evenly as that goes.";
    snprintf(text, size,
             "No sequence is cut. %lld heads of sequences on %lld %s with chunks of %d tokens. %s",
             (long long)w->heads, (long long)w->workers, what, w->chunk, shares);
}

/* The chunks of each segment: "46, 53 and 51". */
static void list_segments(const fkda_relay *r, int segments, char *words, size_t size)
{
    size_t used = 0;
    for (int i = 0; i < segments && used < size; i++) {
        const char *const before = i == 0 ? "" : i == segments - 1 ? " and " : ", ";
        used += (size_t)snprintf(words + used, size - used, "%s%d", before,
                                 r->first_chunk[i + 1] - r->first_chunk[i]);
    }
}

static void explain_relay(const fkda_shape *s, const fkda_hopper_plan *plan, char *text, size_t size)
{
    const fkda_relay *r = &plan->relay;
    const int segments = (int)(plan->slots / s->sequences);
    char chunks[256];
    list_segments(r, segments, chunks, sizeof chunks);
    const int used = snprintf(
        text, size,
        "Relay: each sequence is cut into %d segments, and one launch on %d CTA pairs computes their maps, "
        "joins them, and computes the outputs. The segments have %s chunks of %d tokens.",
        segments, plan->relay_pairs, chunks, FKDA_HOPPER_CHUNK_PAIR);
    text += used, size -= (size_t)used;
    if (r->spare_pairs)
        snprintf(text, size, " %d of the pairs do nothing but compute the outputs of first segments.",
                 r->spare_pairs);
    else if (r->shared[1].heads)
        snprintf(text, size,
                 " The last two inner segments of a head are shorter: a pair has such a segment of up to %d "
                 "and of up to %d heads.",
                 r->shared[0].heads, r->shared[1].heads);
    else if (r->shared[0].heads)
        snprintf(text, size,
                 " The last inner segment of a head is shorter: a pair has such a segment of up to %d heads.",
                 r->shared[0].heads);
}

static void explain_passes(const fkda_shape *s, const fkda_hopper_plan *plan, char *text, size_t size)
{
    const long long shortest = plan->shortest;
    snprintf(text, size,
             "Passes: sequences of %lld tokens or more are cut into segments of about %lld%s, %lld segments "
             "at most. The first pass computes the outputs of first segments, and beside it the map pass "
             "computes the maps of inner segments, on %lld CTA pairs. The join computes the states that "
             "segments start from%s. The later pass computes all other outputs.",
             2 * shortest + (s->batch_invariant ? 1 : 0), shortest,
             s->batch_invariant ? " whatever the batch" : "", (long long)plan->slots,
             (long long)fkda_hopper_pairs(plan->sms),
             plan->groups && plan->slots > FKDA_MAPS_CHAINED + 2
                 ? ", in groups of maps where a sequence has many"
                 : "");
}

static void explain_mixed(const fkda_hopper_plan *plan, char *text, size_t size)
{
    snprintf(
        text, size,
        "Mixed: one launch on %d CTA pairs finds out which sequences have %lld tokens or more. Each head "
        "of such a sequence has one CTA pair or several; with several, the sequence is cut into one "
        "segment more than it has pairs. The other pairs share out all other sequences evenly.",
        plan->mixed.pairs, (long long)plan->shortest);
}

void fkda_hopper_explain(const fkda_plan *plan, char *text, size_t size)
{
    const fkda_hopper_plan *p = &plan->hopper;
    switch (p->strategy) {
    case FKDA_HOPPER_WHOLE: explain_whole(&p->whole, text, size); break;
    case FKDA_HOPPER_PASSES: explain_passes(&plan->shape, p, text, size); break;
    case FKDA_HOPPER_RELAY: explain_relay(&plan->shape, p, text, size); break;
    case FKDA_HOPPER_MIXED: explain_mixed(p, text, size); break;
    }
}
