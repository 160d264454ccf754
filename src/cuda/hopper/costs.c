/* The estimates that the planner compares. costs.h says what each one is of. */
#include "costs.h"

#include <math.h>

enum { CHUNK = FKDA_HOPPER_CHUNK_PAIR };

/* In CTA pairs. Fewer work items than pairs have a pair each; more are divided evenly. */
static int64_t clocks_in_pairs(int64_t items, int64_t chunks, int64_t pairs)
{
    return FKDA_CLOCKS_PAIR_CHUNK * (items <= pairs ? chunks : fkda_ceil_div(items * chunks, pairs)) +
           FKDA_CLOCKS_WORK_ITEM * fkda_ceil_div(items, pairs);
}

static int64_t clocks_in_solo_ctas(int64_t items, int64_t chunks, int64_t sms)
{
    const int64_t solo_chunks = chunks * FKDA_HOPPER_CHUNK_PAIR / FKDA_HOPPER_CHUNK_SOLO;
    return FKDA_CLOCKS_SOLO_CHUNK * (items <= sms ? solo_chunks : fkda_ceil_div(items * solo_chunks, sms)) +
           FKDA_CLOCKS_WORK_ITEM * fkda_ceil_div(items, sms);
}

int64_t fkda_clocks_whole(int64_t heads, int64_t chunks, int sms)
{
    return fkda_least(clocks_in_solo_ctas(heads, chunks, sms),
                      clocks_in_pairs(heads, chunks, fkda_hopper_pairs(sms)));
}

/* Steps of the join that follow each other. In groups a state waits for the maps of a group to be composed,
 * then goes through all groups, then through the maps of its own group. */
static int64_t join_steps(int64_t maps)
{
    return maps > FKDA_MAPS_CHAINED ? 2 * FKDA_GROUP_MAPS + fkda_ceil_div(maps, FKDA_GROUP_MAPS) : maps;
}

int64_t fkda_clocks_passes(int64_t heads, int64_t chunks, int64_t segments, int sms)
{
    const int64_t pairs = fkda_hopper_pairs(sms), items = heads * (segments - 1), maps = segments - 2;
    if (segments == 1) return fkda_clocks_whole(heads, chunks, sms);
    const int64_t each = fkda_ceil_div(chunks, segments);
    const int64_t chunk = maps == 0 ? FKDA_CLOCKS_PAIR_CHUNK : FKDA_CLOCKS_MAP_CHUNK;
    const int64_t first = (chunk * each + FKDA_CLOCKS_WORK_ITEM) * fkda_ceil_div(items, pairs);
    const int64_t joining_ctas = maps > 0 ? heads * (FKDA_DIM / FKDA_JOIN_ROWS) : 0;
    const bool late = FKDA_HOPPER_PAIR_CTAS * items + joining_ctas > sms;
    return first + clocks_in_pairs(items, each, pairs) + FKDA_CLOCKS_JOIN_STEP * join_steps(maps) +
           FKDA_CLOCKS_LAUNCHES + (late ? FKDA_CLOCKS_LATE_START : 0) +
           (maps > FKDA_MAPS_CHAINED ? FKDA_CLOCKS_GROUPED_JOIN : 0);
}

enum { ROW_GROUPS = FKDA_DIM / FKDA_JOIN_ROWS }; /* of a head's state, each for one CTA at a time */

bool fkda_relay_first_pairs_join(int64_t inner)
{
    return FKDA_HOPPER_PAIR_CTAS * inner < ROW_GROUPS;
}

int64_t fkda_clocks_relay(int64_t chunks_64, int64_t maps, int64_t inner)
{
    const int64_t joining_pairs = fkda_relay_first_pairs_join(inner) ? inner + 1 : inner;
    const int64_t turns = fkda_ceil_div(ROW_GROUPS, FKDA_HOPPER_PAIR_CTAS * joining_pairs);
    return (FKDA_RELAY_CLOCKS_BEGIN +
            (FKDA_RELAY_CLOCKS_MAP_CHUNK + FKDA_RELAY_CLOCKS_CHUNK) * chunks_64 / 64 +
            FKDA_RELAY_CLOCKS_BETWEEN + FKDA_RELAY_CLOCKS_JOIN_STEP * maps * turns + FKDA_RELAY_CLOCKS_END) *
           FKDA_RELAY_PERCENT / 100;
}

fkda_known_lengths fkda_what_is_known(const fkda_shape *s)
{
    const int64_t longest = s->max_seqlen / CHUNK, rest = fkda_most(s->tokens / CHUNK - longest, 0);
    return (fkda_known_lengths){longest, rest, s->sequences > 1 ? rest / (s->sequences - 1) : 0};
}

/* The device gives CTA pairs to the heads of the longest sequence until the rest would take longer. The
 * estimate assumes that the device arrives at the best number of pairs. */
int64_t fkda_clocks_mixed(const fkda_shape *s, int sms)
{
    const fkda_known_lengths of = fkda_what_is_known(s);
    const int64_t pairs = fkda_hopper_pairs(sms), whole = FKDA_CLOCKS_PAIR_CHUNK * of.longest;
    int64_t best = INT64_MAX;
    for (int64_t each = 1; each <= FKDA_MAPS_CHAINED + 1 && each * s->heads < pairs; each++) {
        const int64_t cut =
            2 * whole / (each + 1) + FKDA_CLOCKS_MIXED_CUT + FKDA_CLOCKS_PAIR_CHUNK * (each - 1);
        const int64_t share = of.rest * s->heads / (pairs - each * s->heads);
        best = fkda_least(
            best, fkda_most(each == 1 ? whole : cut, FKDA_CLOCKS_PAIR_CHUNK * fkda_most(share, of.average)));
    }
    return best;
}

/* The sequences other than the longest add to the estimate. They are cut too, and then take the map pass
 * besides, if they are long enough for two segments. */
int64_t fkda_clocks_passes_of_longest(const fkda_shape *s, int64_t segments, int sms)
{
    const fkda_known_lengths of = fkda_what_is_known(s);
    const bool others_are_cut = of.average >= 2 * of.longest / segments;
    const int64_t chunk = FKDA_CLOCKS_PAIR_CHUNK + (others_are_cut ? FKDA_CLOCKS_MAP_CHUNK : 0);
    return fkda_clocks_passes(s->heads, of.longest, segments, sms) +
           chunk * of.rest * s->heads / fkda_hopper_pairs(sms);
}

/* The longest sequence takes its own time; all together take at least their share of all workers. */
static double clocks_of_chunks(const fkda_shape *s, int64_t workers, int chunk, int clocks)
{
    const double average = (double)(s->batch * s->tokens) / (double)s->sequences;
    const double longest = fmax((double)s->max_seqlen, average);
    const double share = average * (double)(s->sequences * s->heads) / (double)workers;
    return fmax(longest, share) / chunk * clocks;
}

double fkda_clocks_solo_ctas(const fkda_shape *s, int sms)
{
    return clocks_of_chunks(s, sms, FKDA_HOPPER_CHUNK_SOLO, FKDA_CLOCKS_SOLO_CHUNK);
}

double fkda_clocks_cta_pairs(const fkda_shape *s, int sms)
{
    return clocks_of_chunks(s, fkda_hopper_pairs(sms), FKDA_HOPPER_CHUNK_PAIR, FKDA_CLOCKS_PAIR_CHUNK);
}
