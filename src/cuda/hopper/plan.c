/*
 * Chooses how a call runs on Hopper, from its shape and the number of SMs alone. All times here are estimates
 * in clocks, by the formulas of costs.c. The numbers of clocks that the formulas start from, such as those of
 * a chunk, are in costs.h, and in kernels/hopper/costs.h if kernels need them too.
 *
 * Policy of share_out_whole(), for sequences that stay whole: CTA pairs if every head can have a pair of
 * its own, if the estimates say that pairs are faster, or if results must not depend on the batch. Solo CTAs
 * otherwise.
 *
 * Policy of choose_cut(), in the order in which its rows are tried:
 *
 *   cut never            Every sequence stays whole.
 *   batch invariant      The first segment has 2048 tokens and each later one 1024, whatever the batch is.
 *                        How a sequence is cut then depends on its own length alone, and a shorter sequence
 *                        is cut at the same places. As elsewhere, a sequence is cut only if it has room for
 *                        two segments of the least length, 1024 tokens, so the first border is at 2048.
 *   cut always           Sequences are cut whether cutting pays or not. The length of a segment is chosen so
 *                        that there are about as many segments, counted over all heads, as CTA pairs. A
 *                        sequence without room for two such segments, or for two of SHORTEST_SEGMENT tokens,
 *                        stays whole.
 *   cut mixed            The mixed schedule, wherever lengths may differ.
 *   cut auto, equal      The number of segments, from 1 up, that the estimates say is fastest, in passes or
 *                        in a relay (best_segments()). Segments have SHORTEST_SEGMENT tokens or more, and the
 *                        inner segments of all heads are at most two for each SM. relay_plan.c says how long
 *                        each segment of a relay is.
 *   cut auto, different  The host knows the number of sequences and of tokens, and maybe the length of the
 *                        longest sequence (max_seqlen). It first asks whether sequences of the average length
 *                        would be cut if all had that length.
 *     they would         All sequences are cut, in passes, into segments as long as those of the average
 *                        sequence would be. If the longest length is known and the mixed schedule is faster
 *                        by the estimates, the mixed schedule runs instead.
 *     they would not, longest known      The fastest of the mixed schedule, passes for the longest sequence,
 *                        and whole sequences.
 *     they would not, longest unknown    Passes with the segments that would be best if one sequence had all
 *                        tokens. If the passes would cost too much in a call that turns out to have no
 *                        sequence to cut: the mixed schedule, if whole sequences would run in solo CTAs, and
 *                        whole sequences in CTA pairs otherwise.
 *
 * The estimates are off by a few percent. The percentages that decide what is worth it are in costs.h:
 * FKDA_PERCENT_WORTH_CUTTING (passes must save 5% of the time of whole sequences), FKDA_RELAY_PERCENT (a
 * relay's estimate is raised by 6% wherever it is compared, so a relay must save 6% of the time of passes,
 * and about 10% of that of whole sequences) and FKDA_PERCENT_IDLE (passes that cut nothing may cost 3%).
 */
#include "plan.h"

#include "costs.h"
#include "relay_plan.h"
#include "workspace.h"

enum {
    CHUNK = FKDA_HOPPER_CHUNK_PAIR,
    /* Tokens of a segment on average, at least. Shorter segments cost more in joining than they save. */
    SHORTEST_SEGMENT = 128,
    /* Tokens of a segment, at least, for results that must not depend on the batch, and where one long
     * sequence decides how all are cut. The workspace then stays under a quarter of the bytes of q, k, v and
     * g. */
    SHORTEST_INVARIANT = 1024,
    /* The mixed schedule treats sequences of at least this many chunks as long. A shorter sequence takes
     * longer if it is cut than if it stays whole. */
    SHORTEST_LONG_CHUNKS = 72,
    /* Long sequences of a mixed launch, at most: the lanes of the warp that finds them. */
    MOST_LONG = 32,
};

/* How sequences may be cut. */
typedef struct cut {
    int64_t shortest; /* as in fkda_hopper_plan; 0: sequences stay whole */
    int64_t clocks;   /* estimate, where one was needed */
    int64_t slots;    /* of a mixed launch */
    fkda_mixed mixed; /* .pairs is 0 unless a mixed launch finds the sequences to be cut */
} cut;

static const cut WHOLE = {0};

/* With checkpoints, the mixed kernels and the general relay would need more registers than they have, and
 * would spill. So a call with checkpoints runs neither of them. To these kernels the states that a call saves
 * are checkpoints. */
static bool can_mix(const fkda_shape *s)
{
    return !(s->features & FKDA_CHECKPOINTS);
}
static bool can_relay(const fkda_shape *s)
{
    return !(s->features & (FKDA_CHECKPOINTS | FKDA_SAVED)) || !(s->features & FKDA_HOPPER_GENERAL_FEATURES);
}

/* The fastest number of segments for heads of equal sequences. `clocks` becomes its estimate. */
static int64_t best_segments(int64_t heads, int64_t chunks, int sms, bool may_relay, int64_t *clocks)
{
    const int64_t most_segments = chunks * CHUNK / SHORTEST_SEGMENT;
    int64_t best = 1;
    *clocks = fkda_clocks_whole(heads, chunks, sms) * FKDA_PERCENT_WORTH_CUTTING / 100;
    for (int64_t segments = 2; segments <= most_segments && heads * (segments - 2) <= 2 * sms; segments++) {
        int64_t now = fkda_clocks_passes(heads, chunks, segments, sms);
        if (may_relay) {
            const fkda_relay_plan relay = fkda_plan_relay(heads, chunks, segments, sms);
            if (relay.pairs) now = fkda_least(now, relay.clocks);
        }
        if (now < *clocks) best = segments, *clocks = now;
    }
    return best;
}

/* Chooses the cut as if all sequences had the average length. */
static cut cut_as_equal(const fkda_shape *s, int sms)
{
    const int64_t heads = s->sequences * s->heads, chunks = s->batch * s->tokens / CHUNK / s->sequences;
    const bool equal = fkda_equal_lengths(s);
    int64_t clocks;
    const int64_t segments = best_segments(heads, chunks, sms, equal && can_relay(s), &clocks);
    if (segments == 1) return WHOLE;
    return (cut){.shortest = equal ? s->tokens / segments : chunks / segments * CHUNK,
                 .clocks = equal ? clocks : fkda_clocks_passes(heads, chunks, segments, sms)};
}

/* A mixed launch that cuts sequences of at least `least_chunks` chunks. A sequence counts as long only if it
 * takes at least 1.5 times an equal share of all the work, so that there are CTA pairs enough for each
 * head of all long ones. */
static cut cut_mixed(const fkda_shape *s, int sms, int64_t least_chunks, int64_t cutting_clocks)
{
    const int64_t chunks = s->tokens / CHUNK, pairs = fkda_hopper_pairs(sms);
    const int64_t length = fkda_most(least_chunks, fkda_ceil_div(3 * chunks * s->heads, 2 * pairs));
    if (fkda_equal_lengths(s) || s->heads > (pairs - 1) / 2 || length > chunks) return WHOLE;
    if (!can_mix(s)) return WHOLE;
    return (cut){
        .shortest = length * CHUNK,
        /* n pairs give n + 1 segments, which is at most 3 / 2 n for n of 2 or more. */
        .slots = pairs / s->heads * 3 / 2,
        .mixed = {.pairs = (int)pairs,
                  .most_long = (int)fkda_least(MOST_LONG, (pairs - 1) / s->heads),
                  .cutting_chunks = (int)(cutting_clocks / FKDA_CLOCKS_PAIR_CHUNK)},
    };
}

/* A mixed launch, if the longest sequence is known to be long and the launch is worth it. */
static cut cut_mixed_if_worth_it(const fkda_shape *s, int sms, const fkda_hopper_whole *whole)
{
    cut c = cut_mixed(s, sms, SHORTEST_LONG_CHUNKS, FKDA_CLOCKS_MIXED_CUT);
    if (!c.mixed.pairs || s->max_seqlen < c.shortest) return WHOLE;
    c.clocks = fkda_clocks_mixed(s, sms);
    return 100 * c.clocks < FKDA_PERCENT_WORTH_CUTTING * (int64_t)whole->clocks ? c : WHOLE;
}

/* Passes for the longest sequence, if they are faster than the mixed launch or, without one, than whole
 * sequences. */
static cut cut_longest_or(cut mixed, const fkda_shape *s, int sms, const fkda_hopper_whole *whole)
{
    int64_t ignored;
    const fkda_known_lengths of = fkda_what_is_known(s);
    const int64_t segments = best_segments(s->heads, of.longest, sms, false, &ignored);
    const cut passes = {.shortest = of.longest / segments * CHUNK};
    if (segments == 1 || passes.shortest < SHORTEST_INVARIANT) return mixed;
    const int64_t to_beat =
        mixed.mixed.pairs ? mixed.clocks : FKDA_PERCENT_WORTH_CUTTING * (int64_t)whole->clocks / 100;
    return fkda_clocks_passes_of_longest(s, segments, sms) < to_beat ? passes : mixed;
}

/* Passes with the segments that would be best if one sequence had all tokens. Segments are longer than half
 * of the average sequence, so that nothing is cut if all lengths turn out to be equal. If passes that cut
 * nothing would cost too much, and sequences would stay whole in solo CTAs, which are half as fast on a long
 * sequence as CTA pairs are, a mixed launch looks for long sequences. */
static cut cut_unknown(const fkda_shape *s, int sms, const fkda_hopper_whole *whole)
{
    int64_t ignored;
    const int64_t chunks = s->batch * s->tokens / CHUNK, equal = chunks / s->sequences;
    const int64_t clocks = fkda_clocks_whole(s->sequences * s->heads, equal, sms);
    if (100 * FKDA_CLOCKS_IDLE_LAUNCHES > FKDA_PERCENT_IDLE * clocks)
        return whole->chunk == FKDA_HOPPER_CHUNK_SOLO
                   ? cut_mixed(s, sms, SHORTEST_LONG_CHUNKS, FKDA_CLOCKS_MIXED_CUT)
                   : WHOLE;
    const int64_t segments = best_segments(s->heads, chunks, sms, false, &ignored);
    if (segments == 1) return WHOLE;
    const int64_t shortest = chunks / segments;
    return (cut){.shortest = (2 * shortest > equal ? shortest : equal / 2 + 1) * CHUNK};
}

/* Chooses segments so long that each CTA pair has about one segment of one head: if all tokens are of one
 * sequence, (segments - 1) * heads is at most the number of pairs. Segments are shorter if pairs can share
 * them in a relay. */
static cut cut_to_fill(const fkda_shape *s, int sms)
{
    const int64_t chunks = s->batch * s->tokens * s->heads / CHUNK, heads = s->sequences * s->heads;
    const int64_t shortest = fkda_ceil_div(chunks, fkda_hopper_pairs(sms) + s->heads) * CHUNK;
    if (!fkda_equal_lengths(s) || shortest == 0) return (cut){.shortest = shortest};
    for (int64_t more = FKDA_RELAY_SHARED; more > 0; more--) {
        const int64_t segments = s->tokens / shortest + more;
        const fkda_relay_plan relay = fkda_plan_relay(heads, s->tokens / CHUNK, segments, sms);
        if (relay.pairs && relay.relay.shared[0].heads && s->tokens / segments >= SHORTEST_SEGMENT)
            return (cut){.shortest = s->tokens / segments};
    }
    return (cut){.shortest = shortest};
}

static cut choose_cut(const fkda_shape *s, int sms, const fkda_hopper_whole *whole)
{
    if (s->cut == FLASH_KDA_CUT_NEVER) return WHOLE;
    if (s->batch_invariant) return (cut){.shortest = SHORTEST_INVARIANT};
    if (s->cut == FLASH_KDA_CUT_ALWAYS) return cut_to_fill(s, sms);
    if (s->cut == FLASH_KDA_CUT_MIXED) return cut_mixed(s, sms, 2 * SHORTEST_SEGMENT / CHUNK, 0);

    const cut equal = cut_as_equal(s, sms);
    if (fkda_equal_lengths(s)) return equal;
    const cut mixed = cut_mixed_if_worth_it(s, sms, whole);
    if (equal.shortest) return mixed.mixed.pairs && mixed.clocks < equal.clocks ? mixed : equal;
    if (s->max_seqlen) return cut_longest_or(mixed, s, sms, whole);
    return cut_unknown(s, sms, whole);
}

/* Solo CTAs or CTA pairs. As many heads as pairs, or fewer, have a pair each. Results that must not depend on
 * the batch always come from pairs, and no head is divided. `clocks` is then still that of the faster of the
 * two; it is only read for calls without batch_invariant. */
static fkda_hopper_whole share_out_whole(const fkda_shape *s, int sms)
{
    const int64_t pairs = fkda_hopper_pairs(sms);
    const double in_solo_ctas = fkda_clocks_solo_ctas(s, sms), in_pairs = fkda_clocks_cta_pairs(s, sms);
    fkda_hopper_whole w = {.heads = s->sequences * s->heads};
    const bool pairs_are_faster = w.heads <= pairs || in_pairs < in_solo_ctas;
    w.chunk = s->batch_invariant || pairs_are_faster ? FKDA_HOPPER_CHUNK_PAIR : FKDA_HOPPER_CHUNK_SOLO;
    w.clocks = pairs_are_faster ? in_pairs : in_solo_ctas;
    w.workers = fkda_hopper_workers(w.chunk, w.heads, sms);
    w.divides = !s->batch_invariant && w.heads > w.workers;
    return w;
}

/* The relay for equal sequences in segments of this many tokens, if it is faster than passes. */
static fkda_relay_plan relay_if_faster(const fkda_shape *s, int sms, int64_t shortest)
{
    const int64_t heads = s->sequences * s->heads, chunks = fkda_ceil_div(s->tokens, CHUNK),
                  segments = s->tokens / shortest;
    if (!fkda_equal_lengths(s) || s->batch_invariant || !can_relay(s)) return (fkda_relay_plan){0};
    const fkda_relay_plan relay = fkda_plan_relay(heads, chunks, segments, sms);
    if (s->cut == FLASH_KDA_CUT_ALWAYS || !relay.pairs) return relay;
    return fkda_clocks_passes(heads, chunks, segments, sms) <= relay.clocks ? (fkda_relay_plan){0} : relay;
}

/* Segments of all cut sequences, at most. */
static int64_t count_slots(const fkda_shape *s, int64_t shortest)
{
    if (!fkda_equal_lengths(s)) return s->batch * s->tokens / shortest;
    const int64_t segments = (s->tokens - (s->batch_invariant ? 1 : 0)) / shortest; /* of each sequence */
    return segments >= 2 ? s->sequences * segments : 0;
}

fkda_hopper_plan fkda_hopper_plan_for(const fkda_shape *s, int sms)
{
    fkda_hopper_plan plan = {.sms = sms, .strategy = FKDA_HOPPER_WHOLE, .whole = share_out_whole(s, sms)};
    const cut c = choose_cut(s, sms, &plan.whole);
    fkda_relay_plan relay = {0};
    if (c.mixed.pairs) {
        plan.strategy = FKDA_HOPPER_MIXED;
        plan.shortest = c.shortest, plan.slots = c.slots, plan.mixed = c.mixed;
    } else if (c.shortest) {
        const int64_t shortest = fkda_most(c.shortest, SHORTEST_SEGMENT), slots = count_slots(s, shortest);
        if (slots >= 2) {
            relay = relay_if_faster(s, sms, shortest);
            plan.strategy = relay.pairs ? FKDA_HOPPER_RELAY : FKDA_HOPPER_PASSES;
            plan.shortest = shortest, plan.slots = slots;
            plan.relay_pairs = (int)relay.pairs, plan.relay = relay.relay;
            /* A sequence of n segments has (n - 2) / FKDA_GROUP_MAPS groups, rounded up, if n is above
             * FKDA_MAPS_CHAINED + 2: at most n / 6. */
            plan.groups = s->batch_invariant ? 0 : slots / 6;
        }
    }
    if (plan.strategy == FKDA_HOPPER_WHOLE)
        plan.memory = fkda_hopper_lay_out_whole(s, &plan);
    else
        plan.memory = fkda_hopper_lay_out(s, &plan);
    return plan;
}
