/*
 * How the relay cuts sequences.
 *
 * All CTA pairs of a relay run at the same time, so a head can have at most pairs / heads of them. There are
 * two ways to use the pairs that this division leaves over:
 *
 *   even    All segments have the same length. The pairs that are left over ("spare" pairs) compute the
 *           outputs of first segments, one after the other, while the other pairs go through their phases.
 *   shared  The pair of a first segment computes the first segment's outputs itself. None, one or two more
 *           inner segments of each head are shared: one pair has such a segment of two, three or four heads,
 *           one head after the other. The segment is so much shorter that the pair is ready when the other
 *           pairs are.
 */
#include "relay_plan.h"

#include "costs.h"

enum {
    SHORTEST_SHARED_CHUNKS = 2, /* a shared segment that would be shorter is not worth a pair */
};

static fkda_relay_plan cut_evenly(int64_t heads, int64_t chunks, int64_t segments, int64_t pairs)
{
    const int64_t needed = heads * (segments - 1), spares = fkda_least(pairs - needed, heads),
                  chunks_64 = 64 * chunks / segments;
    fkda_relay_plan p = {.clocks = fkda_clocks_relay(chunks_64, segments - 2, segments - 2)};
    /* First segments that a spare pair gets through while the other pairs are at work. */
    const int64_t meanwhile = 100 * p.clocks / FKDA_RELAY_PERCENT - FKDA_RELAY_CLOCKS_BEGIN -
                              FKDA_RELAY_CLOCKS_END + FKDA_RELAY_CLOCKS_NEXT_ITEM;
    const int64_t first_segments =
        meanwhile / (FKDA_RELAY_CLOCKS_CHUNK * chunks_64 / 64 + FKDA_RELAY_CLOCKS_NEXT_ITEM);
    if (spares <= 0 || spares * first_segments < heads) return p;
    p.pairs = needed + spares;
    p.relay.inner = (int)segments - 2;
    p.relay.spare_pairs = (int)spares;
    p.relay.needed_pairs = (int)needed;
    for (int64_t i = 0; i <= segments; i++) p.relay.first_chunk[i] = (int)(chunks * i / segments);
    return p;
}

/*
 * `shared[i]` is the number of heads that share the i-th shared segment; 0: there is no such segment. Let x
 * be the clocks that the map phase of an inner segment takes, and let FIRST_LATE and LAST_LATE stand for the
 * clocks of FKDA_RELAY_FIRST_LATE_CHUNKS and `last_late` chunks. Then all pairs reach the join together, and
 * finish the output phase together, if the map phases of segments take these clocks:
 *
 *     first segment    x - FIRST_LATE, since its pair starts late
 *     inner segment    x
 *     shared by n      (x - (n - 1) NEXT_MAP) / n, since its pair computes n of them
 *     last segment     x - LAST_LATE, since its pair joins late
 *
 * All segments together have all chunks. The equation is solved for x in twelfths, which 2, 3 and 4 divide.
 */
static fkda_relay_plan cut_to_share(int64_t heads, int64_t chunks, int64_t segments, int64_t pairs,
                                    const int *shared)
{
    enum { TWELFTHS = 12 };
    const int64_t shared_count = (shared[0] > 0) + (shared[0] && shared[1]),
                  inner = segments - 2 - shared_count;
    const int64_t last_late =
        fkda_relay_first_pairs_join(inner) ? FKDA_RELAY_LAST_LATE_CHUNKS : 0; /* chunks */
    const int64_t map_chunk = FKDA_RELAY_CLOCKS_MAP_CHUNK;
    int64_t needed = (inner + 1) * heads, parts = TWELFTHS * (inner + 2),
            late = TWELFTHS * map_chunk * (FKDA_RELAY_FIRST_LATE_CHUNKS + last_late);
    fkda_relay_plan p = {0};
    for (int64_t i = 0; i < shared_count; i++) {
        const int64_t n = shared[i];
        p.relay.shared[i].heads = (int)n;
        p.relay.shared[i].pairs = (int)fkda_ceil_div(heads, n);
        needed += fkda_ceil_div(heads, n);
        parts += TWELFTHS / n, late += TWELFTHS / n * (n - 1) * FKDA_RELAY_CLOCKS_NEXT_MAP;
    }
    if (inner < 0 || needed > pairs) return p;
    const int64_t x = (TWELFTHS * map_chunk * chunks + late) / parts;
    int64_t end = 0, ends[FKDA_MAPS_CHAINED + 2]; /* clocks at the end of each segment */
    for (int64_t i = 0; i < segments; i++) {
        const int64_t n = i > inner && i < segments - 1 ? shared[i - inner - 1] : 1;
        const int64_t length = i == 0 ? fkda_most(x - FKDA_RELAY_FIRST_LATE_CHUNKS * map_chunk, x / 16)
                                      : (x - (i == segments - 1 ? last_late * map_chunk : 0) -
                                         (n - 1) * FKDA_RELAY_CLOCKS_NEXT_MAP) /
                                            n;
        if (n > 1 && length < SHORTEST_SHARED_CHUNKS * map_chunk) return p;
        ends[i] = end += fkda_most(length, map_chunk);
    }
    for (int64_t i = 0; i < segments; i++) { /* no segment is empty */
        /* The product of chunks and clocks passes 64 bits for sequences of 2^31 tokens. */
        const int64_t chunk = (int64_t)((__int128)chunks * ends[i] / end);
        p.relay.first_chunk[i + 1] = (int)fkda_most(i + 1, chunk);
    }
    p.relay.inner = (int)inner;
    p.relay.needed_pairs = (int)needed;
    p.clocks = fkda_clocks_relay(64 * x / map_chunk, segments - 2, inner);
    p.pairs = needed;
    return p;
}

fkda_relay_plan fkda_plan_relay(int64_t heads, int64_t chunks, int64_t segments, int sms)
{
    static const int shared[][FKDA_RELAY_SHARED] = {{0}, {2}, {3}, {4}, {2, 4}};
    const int64_t pairs = fkda_hopper_pairs(sms);
    if (segments < 3 || segments - 2 > FKDA_MAPS_CHAINED) return (fkda_relay_plan){0};
    fkda_relay_plan best = cut_evenly(heads, chunks, segments, pairs);
    for (size_t i = 0; i < sizeof shared / sizeof *shared; i++) {
        const fkda_relay_plan p = cut_to_share(heads, chunks, segments, pairs, shared[i]);
        if (p.pairs && (!best.pairs || p.clocks < best.clocks)) best = p;
    }
    best.relay.chunks = (int)chunks;
    best.relay.segments = (int)segments;
    return best.pairs ? best : (fkda_relay_plan){0};
}
