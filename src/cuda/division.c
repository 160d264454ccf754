/* How sequences are cut into segments: into how many, and whether in one launch or several, by what each way should take. */
#include "division.h"

#include <stdint.h>

enum {
    CHUNK = FKDA_HOPPER_CHUNK_PAIR,
    /* Tokens that a segment has at least: shorter ones cost more in joining than they save. */
    SHORTEST_EVER = 128,
    /* Where results must not depend on the batch. Long enough for the workspace to stay under a quarter of the inputs. */
    SHORTEST_ALONE = 1024,
    /* Clocks, fitted to times on an H100 (BENCHMARK_H100.md): a chunk's map and state in the first pass, a step of the join, what more
     * launches there are than one, and what it takes longer if the join's blocks and the second pass's find no free
     * multiprocessor to start on before the pass before is over. */
    CHUNK_MAP = 2200,
    JOIN_STEP = 2000,
    LAUNCHES = 11000,
    GROUPS = 15000, /* what a join in two levels takes besides its steps */
    LATE = 29000,
    PIECE = 12000,         /* a piece's beginning and end */
    IDLE_LAUNCHES = 20000, /* where there is nothing to cut after all */
    SHORTEST_LONG =
        72, /* chunks of a sequence that is cut by such a launch: in two thirds of its time, and CUTTING */
    CUTTING = 41000,    /* what a cut takes there besides the passes */
    LANES = 32,         /* of the warp that finds long sequences (kernels/hopper/mixture.cuh) */
    WORTH_PERCENT = 95, /* of the time without cutting: estimates are off by a few percent */
};

/* Clocks for so many pieces of so many chunks in pairs, which divide them if they are fewer. */
static int64_t paired_clocks(int64_t pieces, int64_t chunks, int64_t pairs)
{
    return FKDA_CLOCKS_PAIR_CHUNK * (pieces <= pairs ? chunks : rounds(pieces * chunks, pairs)) +
           PIECE * rounds(pieces, pairs);
}

/* The same, or in blocks that have a piece each, whatever takes less. */
static int64_t uncut_clocks(int64_t pieces, int64_t chunks, int multiprocessors)
{
    const int64_t halves = chunks * FKDA_HOPPER_CHUNK_PAIR / FKDA_HOPPER_CHUNK_SOLO;
    const int64_t alone =
        FKDA_CLOCKS_SOLO_CHUNK *
            (pieces <= multiprocessors ? halves : rounds(pieces * halves, multiprocessors)) +
        PIECE * rounds(pieces, multiprocessors);
    return least(alone, paired_clocks(pieces, chunks, fkda_hopper_pairs(multiprocessors)));
}

/* Steps of the join for so many maps of a sequence: in two levels each waits for a group, for the groups, and for a group. */
static int64_t join_steps(int64_t maps)
{
    return maps > FKDA_MAPS_CHAINED ? 2 * FKDA_GROUP_MAPS + rounds(maps, FKDA_GROUP_MAPS) : maps;
}

/* Clocks for so many heads of sequences of so many chunks, cut into so many segments each, in several launches. */
static int64_t chain_clocks(int64_t heads, int64_t chunks, int64_t segments, int multiprocessors)
{
    const int64_t pairs = fkda_hopper_pairs(multiprocessors), pieces = heads * (segments - 1);
    if (segments == 1) return uncut_clocks(heads, chunks, multiprocessors);
    const int64_t each = rounds(chunks, segments);
    const int64_t first =
        ((segments == 2 ? FKDA_CLOCKS_PAIR_CHUNK : CHUNK_MAP) * each + PIECE) * rounds(pieces, pairs);
    const int64_t joining = segments > 2 ? heads * (FKDA_DIM / FKDA_JOIN_ROWS) : 0;
    const bool late = FKDA_HOPPER_PAIR_CTAS * pieces + joining > multiprocessors;
    return first + paired_clocks(pieces, each, pairs) + JOIN_STEP * join_steps(segments - 2) + LAUNCHES +
           (late ? LATE : 0) + (segments - 2 > FKDA_MAPS_CHAINED ? GROUPS : 0);
}

/* Clocks of the better way. `may_wait`: it may be one launch whose blocks wait for each other. */
static int64_t clocks_of(int64_t heads, int64_t chunks, int64_t segments, int multiprocessors, bool may_wait)
{
    const int64_t several = chain_clocks(heads, chunks, segments, multiprocessors);
    at_once one = {0};
    if (may_wait) one = fkda_plan_at_once(heads, chunks, segments, multiprocessors);
    return one.pairs ? least(several, one.clocks) : several;
}

/* Into how many segments so many heads of sequences of so many chunks are cut best. */
static int64_t best_segments(int64_t heads, int64_t chunks, int multiprocessors, bool may_wait)
{
    const int64_t most_segments = chunks * CHUNK / SHORTEST_EVER;
    int64_t best = 1, least_clocks = uncut_clocks(heads, chunks, multiprocessors) * WORTH_PERCENT / 100;
    for (int64_t segments = 2; segments <= most_segments && heads * (segments - 2) <= 2 * multiprocessors;
         segments++) {
        const int64_t clocks = clocks_of(heads, chunks, segments, multiprocessors, may_wait);
        if (clocks < least_clocks) best = segments, least_clocks = clocks;
    }
    return best;
}

bool fkda_sequences_are_alike(const fkda_problem *p)
{
    return p->sequences == p->batch;
}

/* One launch that finds out which sequences are long (kernels/hopper/mixture.cuh), or none. Long is what takes half as long again as an equal
 * share of all the work, so there are pairs enough for each head of all that are. */
static division mix(const fkda_problem *p, int multiprocessors, int64_t shortest_long, int64_t cutting_takes)
{
    division d = {0};
    const int64_t chunks = p->tokens / CHUNK, pairs = fkda_hopper_pairs(multiprocessors);
    const int64_t length = most(shortest_long, rounds(3 * chunks * p->heads, 2 * pairs));
    if (fkda_sequences_are_alike(p) || p->heads > (pairs - 1) / 2 || length > chunks) return d;
    d.mixture.pairs = (int)pairs;
    d.mixture.most_long = (int)least(LANES, (pairs - 1) / p->heads);
    d.mixture.cutting_chunks = (int)(cutting_takes / FKDA_CLOCKS_PAIR_CHUNK);
    d.shortest = length * CHUNK;
    d.slots = pairs / p->heads * 3 / 2; /* a segment more than pairs, which are two or more */
    return d;
}

/* In chunks: the longest sequence, where that is known, the others in all, and the average one of these. */
typedef struct known_lengths {
    int64_t longest, rest, other;
} known_lengths;

static known_lengths what_is_known(const fkda_problem *p)
{
    const int64_t longest = p->max_seqlen / CHUNK, rest = most(p->tokens / CHUNK - longest, 0);
    return (known_lengths){longest, rest, p->sequences > 1 ? rest / (p->sequences - 1) : 0};
}

/* Clocks of it, if the others are as long as each other. As the device does it: pairs are given to each head of the longest one until the rest
 * would take longer. */
static int64_t mixture_clocks(const fkda_problem *p, int multiprocessors)
{
    const known_lengths of = what_is_known(p);
    const int64_t pairs = fkda_hopper_pairs(multiprocessors), walk = FKDA_CLOCKS_PAIR_CHUNK * of.longest;
    int64_t best = INT64_MAX;
    for (int64_t each = 1; each <= FKDA_MAPS_CHAINED + 1 && each * p->heads < pairs; each++) {
        const int64_t cut = 2 * walk / (each + 1) + CUTTING + FKDA_CLOCKS_PAIR_CHUNK * (each - 1);
        const int64_t share = of.rest * p->heads / (pairs - each * p->heads);
        best = least(best, most(each == 1 ? walk : cut, FKDA_CLOCKS_PAIR_CHUNK * most(share, of.other)));
    }
    return best;
}

/* Where it is known that there is a long sequence, and that pays. */
static division mixture_that_pays(const fkda_problem *p, int multiprocessors)
{
    const division d = mix(p, multiprocessors, SHORTEST_LONG, CUTTING);
    if (d.mixture.pairs && p->max_seqlen >= d.shortest &&
        100 * mixture_clocks(p, multiprocessors) <
            WORTH_PERCENT * fkda_hopper_whole_clocks(p, multiprocessors))
        return d;
    return (division){0};
}

/* Clocks of several launches where the longest sequence is cut into so many segments. The rest comes on top, or is cut too if the others are
 * long enough for that. */
static int64_t several_clocks(const fkda_problem *p, int64_t segments, int multiprocessors)
{
    const known_lengths of = what_is_known(p);
    const bool cut_too = of.other >= 2 * of.longest / segments;
    const int64_t each = FKDA_CLOCKS_PAIR_CHUNK + (cut_too ? CHUNK_MAP : 0);
    return chain_clocks(p->heads, of.longest, segments, multiprocessors) +
           each * of.rest * p->heads / fkda_hopper_pairs(multiprocessors);
}

/* Several launches, if they are better than the mixture, or than not cutting if there is none. Segments are as long as pays for the longest
 * sequence alone, but no shorter than those that do not depend on the batch, so that the workspace is no larger than theirs. */
static division several_or(division mixture, const fkda_problem *p, int multiprocessors)
{
    const known_lengths of = what_is_known(p);
    const int64_t segments = best_segments(p->heads, of.longest, multiprocessors, false);
    const division d = {.shortest = of.longest / segments * CHUNK};
    const int64_t least_clocks = mixture.mixture.pairs
                                     ? mixture_clocks(p, multiprocessors)
                                     : WORTH_PERCENT * fkda_hopper_whole_clocks(p, multiprocessors) / 100;
    const bool better = segments > 1 && d.shortest >= SHORTEST_ALONE &&
                        several_clocks(p, segments, multiprocessors) < least_clocks;
    return better ? d : mixture;
}

/* Lengths are not known here but, if the caller says so, the longest. So if sequences of equal length are best cut, segments are as long as those
 * are then. If not, such ones stay whole; and longer ones are cut if it is known that there is one, or else, as if all tokens were of one sequence,
 * if launches that do nothing for equal ones take less than 3%. */
static division cut_where_it_pays(const fkda_problem *p, int multiprocessors)
{
    const int64_t chunks = p->batch * p->tokens / CHUNK, heads = p->sequences * p->heads;
    const int64_t equal = chunks / p->sequences; /* chunks of each, if all are as long */
    const bool alike = fkda_sequences_are_alike(p);
    const int64_t of_equal = best_segments(heads, equal, multiprocessors, alike);
    const division mixture = mixture_that_pays(p, multiprocessors);
    if (of_equal > 1 && !(mixture.mixture.pairs && mixture_clocks(p, multiprocessors) <
                                                       chain_clocks(heads, equal, of_equal, multiprocessors)))
        return (division){.shortest = alike ? p->tokens / of_equal : equal / of_equal * CHUNK};
    if (alike || of_equal > 1) return mixture;
    if (p->max_seqlen) return several_or(mixture, p, multiprocessors);
    if (100 * IDLE_LAUNCHES > 3 * uncut_clocks(heads, equal, multiprocessors)) return (division){0};
    const int64_t of_one = best_segments(p->heads, chunks, multiprocessors, false),
                  shortest = chunks / of_one;
    if (of_one == 1) return (division){0};
    return (division){.shortest = (2 * shortest > equal ? shortest : equal / 2 + 1) * CHUNK};
}

/* As long as gives every place of a pass one head of a segment, where the tokens are of one sequence; or shorter, if pairs can share
 * some in one launch. */
static int64_t shortest_that_fills(const fkda_problem *p, int multiprocessors)
{
    const int64_t chunks = p->batch * p->tokens * p->heads / CHUNK,
                  parts = fkda_hopper_pairs(multiprocessors) + p->heads;
    const int64_t shortest = rounds(chunks, parts) * CHUNK, heads = p->sequences * p->heads;
    if (!fkda_sequences_are_alike(p) || shortest == 0) return shortest;
    for (int64_t more = FKDA_RELAY_SHARED; more > 0; more--) {
        const int64_t segments = p->tokens / shortest + more;
        const at_once plan = fkda_plan_at_once(heads, p->tokens / CHUNK, segments, multiprocessors);
        if (plan.pairs && plan.plan.shared[0].heads && p->tokens / segments >= SHORTEST_EVER)
            return p->tokens / segments;
    }
    return shortest;
}

division fkda_divide(const fkda_problem *p, int multiprocessors, cutting where)
{
    division d = {0};
    if (p->sequences == 0 || p->heads == 0) return d;
    if (p->batch_invariant)
        d.shortest = SHORTEST_ALONE;
    else if (where == WHERE_IT_PAYS)
        d = cut_where_it_pays(p, multiprocessors);
    else if (where == WHEREVER_POSSIBLE)
        d.shortest = shortest_that_fills(p, multiprocessors);
    else
        d = mix(p, multiprocessors, 2 * SHORTEST_EVER / CHUNK, 0);
    if (d.shortest == 0 || d.mixture.pairs) return d;
    if (d.shortest < SHORTEST_EVER) d.shortest = SHORTEST_EVER;
    d.slots = p->batch * p->tokens / d.shortest;
    if (fkda_sequences_are_alike(p)) { /* then it is known into how many each is cut */
        const int64_t segments = p->tokens / d.shortest, heads = p->sequences * p->heads;
        const int64_t chunks = rounds(p->tokens, CHUNK);
        d.slots = segments >= 2 ? p->sequences * segments : 0;
        if (!p->batch_invariant) d.at_once = fkda_plan_at_once(heads, chunks, segments, multiprocessors);
        if (where != WHEREVER_POSSIBLE && d.at_once.pairs &&
            chain_clocks(heads, chunks, segments, multiprocessors) <= d.at_once.clocks)
            d.at_once = (at_once){0};
    }
    /* A sequence of n > FKDA_MAPS_CHAINED + 2 segments has ceil((n - 2) / FKDA_GROUP_MAPS) groups: at most n / 6. */
    d.groups = d.slots / 6;
    return d;
}
