/* How sequences are cut where one launch does all segments (kernels/hopper/at_once.cuh). */
#include "division.h"

enum {
    /* Clocks, fitted to times on an H100 (BENCHMARK_H100.md): up to the first chunk of all, a chunk's map and state, a map that a state goes
     * through, a chunk of a walk; besides, all that comes between a segment's map and the first one that a state goes through, and after the
     * walk. */
    BEGIN = 15000,
    MAP = 2070,
    THROUGH_MAP = 2200,
    WALK = 2035,
    BETWEEN = 21500,
    END = 2500,
    NEXT_WALK = 4500, /* from a walk to the next one */
    NEXT_MAP = 9000,  /* from a map to the pair's next one */
    /* Chunks by which the pair of a first segment begins later than others: walking through that, which takes another part of the kernel
     * than maps, and walking through the last one, if it carries states through maps before. */
    SHORTEST_SHARED = 2,                    /* chunks */
    JOIN_PARTS = FKDA_DIM / FKDA_JOIN_ROWS, /* of a head's rows, each for one block at a time */
    PERCENT = 106,                          /* of these estimates, against those for several launches */
};

/* Whether the pair of a first segment carries states through maps too: where those of so many inner segments are too few for all rows. As
 * AtOnce::share_out has it. */
static bool first_pairs_join(int64_t inner)
{
    return FKDA_HOPPER_PAIR_CTAS * inner < JOIN_PARTS;
}

/* With inner segments of so many chunks (in 64ths), of which so many have a pair for each head. */
static int64_t clocks_for(int64_t chunks_64, int64_t maps, int64_t inner)
{
    const int64_t turns =
        rounds(JOIN_PARTS, FKDA_HOPPER_PAIR_CTAS * (first_pairs_join(inner) ? inner + 1 : inner));
    return (BEGIN + (MAP + WALK) * chunks_64 / 64 + BETWEEN + THROUGH_MAP * maps * turns + END) * PERCENT /
           100;
}

/* All segments are as long as each other. The pairs that are left walk through first segments; no plan, if they can't walk through all of
 * them meanwhile. */
static at_once cut_evenly(int64_t heads, int64_t chunks, int64_t segments, int64_t pairs)
{
    const int64_t needed = heads * (segments - 1), spares = least(pairs - needed, heads),
                  each = 64 * chunks / segments;
    at_once way = {.clocks = clocks_for(each, segments - 2, segments - 2)};
    const int64_t meanwhile = 100 * way.clocks / PERCENT - BEGIN - END + NEXT_WALK;
    const int64_t walks = meanwhile / (WALK * each / 64 + NEXT_WALK); /* of a pair */
    if (spares <= 0 || spares * walks < heads) return way;
    way.pairs = needed + spares;
    way.plan.inner = (int)segments - 2;
    way.plan.spare_pairs = (int)spares;
    way.plan.needed_pairs = (int)needed;
    for (int64_t i = 0; i <= segments; i++) way.plan.first_chunk[i] = (int)(chunks * i / segments);
    return way;
}

/* The pair of a first segment walks through that from the start, and it is shorter. Of the inner segments the last ones are shared: so many
 * heads of such a segment have a pair, one after the other, and it is shorter still. With x the clocks of an inner segment,
 *
 *     chunks = (x - FKDA_RELAY_FIRST_LATE_CHUNKS) + (inner ones that are not shared) x + (sum over those that are) (x - (n - 1) NEXT_MAP) / n + x - FKDA_RELAY_LAST_LATE_CHUNKS. */
static at_once cut_to_share(int64_t heads, int64_t chunks, int64_t segments, int64_t pairs, const int *shared)
{
    enum { UNITS = 12 }; /* to one, which all n divide */
    const int64_t count = (shared[0] > 0) + (shared[0] && shared[1]), inner = segments - 2 - count;
    const int64_t last_late = first_pairs_join(inner) ? FKDA_RELAY_LAST_LATE_CHUNKS : 0;
    int64_t needed = (inner + 1) * heads, parts = UNITS * (inner + 2),
            less = UNITS * MAP * (FKDA_RELAY_FIRST_LATE_CHUNKS + last_late);
    at_once way = {0};
    for (int64_t i = 0; i < count; i++) {
        const int64_t n = shared[i];
        way.plan.shared[i].heads = (int)n;
        way.plan.shared[i].pairs = (int)rounds(heads, n);
        needed += rounds(heads, n);
        parts += UNITS / n, less += UNITS / n * (n - 1) * NEXT_MAP;
    }
    if (inner < 0 || needed > pairs) return way;
    const int64_t x = (UNITS * MAP * chunks + less) / parts;
    int64_t end = 0, ends[FKDA_MAPS_CHAINED + 2]; /* of segments */
    for (int64_t i = 0; i < segments; i++) {
        const int64_t n = i > inner && i < segments - 1 ? shared[i - inner - 1] : 1;
        const int64_t late = i == 0 ? FKDA_RELAY_FIRST_LATE_CHUNKS : i == segments - 1 ? last_late : 0;
        const int64_t length = i == 0 ? most(x - FKDA_RELAY_FIRST_LATE_CHUNKS * MAP, x / 16)
                                      : (x - late * MAP - (n - 1) * NEXT_MAP) / n;
        if (n > 1 && length < SHORTEST_SHARED * MAP) return way;
        ends[i] = end += most(length, MAP);
    }
    for (int64_t i = 0; i < segments; i++)
        way.plan.first_chunk[i + 1] = (int)most(i + 1, chunks * ends[i] / end); /* no segment is empty */
    way.plan.inner = (int)inner;
    way.plan.needed_pairs = (int)needed;
    way.clocks = clocks_for(64 * x / MAP, segments - 2, inner);
    way.pairs = needed;
    return way;
}

at_once fkda_plan_at_once(int64_t heads, int64_t chunks, int64_t segments, int multiprocessors)
{
    static const int shared[][FKDA_RELAY_SHARED] = {{0}, {2}, {3}, {4}, {2, 4}};
    const int64_t pairs = fkda_hopper_pairs(multiprocessors);
    at_once best = {0};
    if (segments < 3 || segments - 2 > FKDA_MAPS_CHAINED) return best;
    best = cut_evenly(heads, chunks, segments, pairs);
    for (size_t i = 0; i < sizeof shared / sizeof *shared; i++) {
        const at_once way = cut_to_share(heads, chunks, segments, pairs, shared[i]);
        if (way.pairs && (!best.pairs || way.clocks < best.clocks)) best = way;
    }
    best.plan.chunks = (int)chunks;
    best.plan.segments = (int)segments;
    return best.pairs ? best : (at_once){0};
}
