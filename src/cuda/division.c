/* How sequences are cut into segments: into how many, and whether in one launch or several, by what each way should take. */
#include "division.h"

enum {
    CHUNK = FKDA_HOPPER_CHUNK_PAIRED,
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
    WORTH_PERCENT = 95,    /* of the time without cutting: estimates are off by a few percent */
    /* The same in one launch: up to the first chunk of all, a chunk's map and state, a map that a state goes through, a chunk of a walk;
     * besides, all that comes between a segment's map and the first one that a state goes through, and after the walk. */
    BEGIN = 15000,
    MAP = 2070,
    THROUGH_MAP = 2200,
    WALK = 2035,
    BETWEEN = 21500,
    END = 2500,
    NEXT_WALK = 4500, /* from a walk to the next one */
    FIRST_LATE = 8,   /* chunks by which a walk from the start is behind maps */
    INNER_WEIGHT = 64,
    AT_ONCE_PERCENT = 106, /* of these estimates, against those for several launches */
};

static int64_t rounds(int64_t pieces, int64_t places)
{
    return (pieces + places - 1) / places;
}

static int64_t most(int64_t x, int64_t y)
{
    return x > y ? x : y;
}

/* Clocks for so many pieces of so many chunks in pairs, which divide them if they are fewer. */
static int64_t paired_clocks(int64_t pieces, int64_t chunks, int64_t pairs)
{
    return FKDA_HOPPER_CLOCKS_PAIRED * (pieces <= pairs ? chunks : rounds(pieces * chunks, pairs)) +
           PIECE * rounds(pieces, pairs);
}

/* The same, or in blocks that have a piece each, whatever takes less. */
static int64_t uncut_clocks(int64_t pieces, int64_t chunks, int multiprocessors)
{
    const int64_t halves = chunks * FKDA_HOPPER_CHUNK_PAIRED / FKDA_HOPPER_CHUNK_ALONE;
    const int64_t alone =
        FKDA_HOPPER_CLOCKS_ALONE *
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
        ((segments == 2 ? FKDA_HOPPER_CLOCKS_PAIRED : CHUNK_MAP) * each + PIECE) * rounds(pieces, pairs);
    const int64_t joining = segments > 2 ? heads * (FKDA_DIM / FKDA_JOIN_ROWS) : 0;
    const bool late = FKDA_HOPPER_PAIR * pieces + joining > multiprocessors;
    return first + paired_clocks(pieces, each, pairs) + JOIN_STEP * join_steps(segments - 2) + LAUNCHES +
           (late ? LATE : 0) + (segments - 2 > FKDA_MAPS_CHAINED ? GROUPS : 0);
}

/* Clocks in one launch with inner segments of so many chunks (in 64ths). */
static int64_t at_once_clocks(int64_t chunks_64, int64_t maps)
{
    return BEGIN + (MAP + WALK) * chunks_64 / 64 + BETWEEN + THROUGH_MAP * maps + END;
}

/* In one launch every head of a segment but the last has a pair, and all have to fit on the device at the same time; else the plan has no
 * pairs. If those that are left can walk through all first segments, segments are as long as each other. If not, the pair of a first
 * segment walks through that from the start, and it is shorter. `clocks`: to be compared with chain_clocks. */
static at_once plan_at_once(int64_t heads, int64_t chunks, int64_t segments, int multiprocessors,
                            int64_t *clocks)
{
    const int64_t needed = heads * (segments - 1), maps = segments - 2;
    const int64_t spares = least(fkda_hopper_pairs(multiprocessors) - needed, heads);
    at_once plan = {0};
    if (maps < 1 || maps > FKDA_MAPS_CHAINED || spares < 0) return plan;
    plan.first_weight = plan.inner_weight = plan.last_weight = 1;
    const int64_t even = 64 * chunks / segments;
    const int64_t even_clocks = at_once_clocks(even, maps);
    const int64_t walks =
        (even_clocks - BEGIN - END + NEXT_WALK) / (WALK * even / 64 + NEXT_WALK); /* of a pair */
    if (spares * walks >= heads) {
        plan.pairs = needed + spares;
        *clocks = even_clocks * AT_ONCE_PERCENT / 100;
        return plan;
    }
    const int64_t inner = 64 * (chunks + FIRST_LATE) / segments;
    plan.pairs = needed;
    plan.inner_weight = plan.last_weight = INNER_WEIGHT;
    plan.first_weight = (int)most(INNER_WEIGHT * (inner - 64 * FIRST_LATE) / inner, 4);
    *clocks = at_once_clocks(inner, maps) * AT_ONCE_PERCENT / 100;
    return plan;
}

/* Clocks of the better way. `may_wait`: it may be one launch whose blocks wait for each other. */
static int64_t clocks_of(int64_t heads, int64_t chunks, int64_t segments, int multiprocessors, bool may_wait)
{
    const int64_t several = chain_clocks(heads, chunks, segments, multiprocessors);
    int64_t one = several;
    if (may_wait) plan_at_once(heads, chunks, segments, multiprocessors, &one);
    return least(several, one);
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

/* Tokens of a segment where that pays, or 0. Lengths are not known here, and not cutting must not be better for any: so if
 * sequences of equal length are best cut, segments are as long as those are then. If not, such ones stay whole, and longer
 * ones are cut as if all tokens were of one sequence, if the launches that do nothing for equal ones take less than 3%. */
static int64_t shortest_that_pays(const fkda_problem *p, int multiprocessors)
{
    const int64_t chunks = p->batch * p->tokens / CHUNK, heads = p->sequences * p->heads;
    const int64_t equal = chunks / p->sequences; /* chunks of each, if all are as long */
    const bool alike = fkda_sequences_are_alike(p);
    const int64_t of_equal = best_segments(heads, equal, multiprocessors, alike);
    if (of_equal > 1) return alike ? p->tokens / of_equal : equal / of_equal * CHUNK;
    if (alike || 100 * IDLE_LAUNCHES > 3 * uncut_clocks(heads, equal, multiprocessors)) return 0;
    const int64_t of_one = best_segments(p->heads, chunks, multiprocessors, false);
    if (of_one == 1) return 0;
    const int64_t shortest = chunks / of_one;
    return (2 * shortest > equal ? shortest : equal / 2 + 1) * CHUNK;
}

/* As long as gives every place of a pass one head of a segment, where the tokens are of one sequence. */
static int64_t shortest_that_fills(const fkda_problem *p, int multiprocessors)
{
    const int64_t chunks = p->batch * p->tokens * p->heads / CHUNK,
                  parts = fkda_hopper_pairs(multiprocessors) + p->heads;
    return rounds(chunks, parts) * CHUNK;
}

division fkda_divide(const fkda_problem *p, int multiprocessors, bool wherever_possible)
{
    division d = {0};
    if (p->sequences == 0 || p->heads == 0) return d;
    d.shortest = p->batch_invariant  ? SHORTEST_ALONE
                 : wherever_possible ? shortest_that_fills(p, multiprocessors)
                                     : shortest_that_pays(p, multiprocessors);
    if (d.shortest == 0) return d;
    if (d.shortest < SHORTEST_EVER) d.shortest = SHORTEST_EVER;
    d.slots = p->batch * p->tokens / d.shortest;
    if (fkda_sequences_are_alike(p)) { /* then it is known into how many each is cut */
        const int64_t segments = p->tokens / d.shortest, heads = p->sequences * p->heads;
        const int64_t chunks = p->tokens / CHUNK;
        int64_t clocks;
        d.slots = segments >= 2 ? p->sequences * segments : 0;
        if (!p->batch_invariant) d.at_once = plan_at_once(heads, chunks, segments, multiprocessors, &clocks);
        if (!wherever_possible && d.at_once.pairs &&
            chain_clocks(heads, chunks, segments, multiprocessors) <= clocks)
            d.at_once = (at_once){0};
    }
    /* A sequence of n > FKDA_MAPS_CHAINED + 2 segments has ceil((n - 2) / FKDA_GROUP_MAPS) groups: at most n / 6. */
    d.groups = d.slots / 6;
    return d;
}
