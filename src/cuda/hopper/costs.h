/*
 * What the planner reckons with: costs in clocks of the GPU. The costs that kernels share are in
 * kernels/hopper/costs.h.
 *
 * Every cost was fitted to times on an H100 (docs/measurements.md). The planner only compares costs with each
 * other, so it depends on the ratios of costs and not on the clock. On a GPU whose memory is faster or slower
 * beside its clock the ratios differ a little, and the choice may be a little worse.
 */
#ifndef FKDA_HOPPER_HOST_COSTS_H
#define FKDA_HOPPER_HOST_COSTS_H

#include <stdint.h>

#include "../../../kernels/hopper/costs.h"
#include "plan.h"

enum {
    /* Strategy passes. */
    FKDA_CLOCKS_WORK_ITEM = 12000,    /* the beginning and the end of a work item */
    FKDA_CLOCKS_MAP_CHUNK = 2200,     /* a chunk's part of a segment's map and state, in the map pass */
    FKDA_CLOCKS_JOIN_STEP = 2000,     /* carrying a state through one map */
    FKDA_CLOCKS_LAUNCHES = 11000,     /* all launches after the first */
    FKDA_CLOCKS_GROUPED_JOIN = 15000, /* a join in groups, besides its steps */
    /* The later pass starts late if the CTAs of the join and of the later pass find no free SM before the
     * pass before is over. */
    FKDA_CLOCKS_LATE_START = 29000,
    FKDA_CLOCKS_IDLE_LAUNCHES =
        20000, /* all passes together, where no sequence turns out long enough to be cut */

    /* Strategy relay. */
    FKDA_RELAY_CLOCKS_BEGIN = 15000,    /* until the first chunk of a CTA is ready */
    FKDA_RELAY_CLOCKS_MAP_CHUNK = 2070, /* a chunk in the map phase */
    FKDA_RELAY_CLOCKS_JOIN_STEP = 2200, /* carrying a state through one map in the join phase */
    FKDA_RELAY_CLOCKS_CHUNK = 2035,     /* a chunk in the output phase */
    FKDA_RELAY_CLOCKS_BETWEEN = 21500,  /* between the phases, all together */
    FKDA_RELAY_CLOCKS_END = 2500,       /* after the output phase */
    FKDA_RELAY_CLOCKS_NEXT_ITEM = 4500, /* from one work item of the output phase to the next */
    FKDA_RELAY_CLOCKS_NEXT_MAP = 9000,  /* from one map to the next one of the same CTA pair */
    /* Every estimate of a relay is raised to this percentage of itself. Unless cut is `always`, a relay is
     * therefore taken only if it is faster than passes by 6%, and faster than whole sequences by about 10%
     * (FKDA_PERCENT_WORTH_CUTTING is needed besides). */
    FKDA_RELAY_PERCENT = 106,

    /* Strategy mixed. */
    FKDA_CLOCKS_MIXED_CUT = 41000, /* cutting a sequence, besides its map phase and output phase */

    /* Estimates are off by a few percent, so a sequence is cut only if that takes at most this share of the
     * time of the whole sequence. */
    FKDA_PERCENT_WORTH_CUTTING = 95,
    /* Where no length is known, passes that cut nothing may cost this share of the time. */
    FKDA_PERCENT_IDLE = 3,
};

/* dividend / divisor, rounded up. */
static inline int64_t fkda_ceil_div(int64_t dividend, int64_t divisor)
{
    return (dividend + divisor - 1) / divisor;
}

static inline int64_t fkda_least(int64_t x, int64_t y)
{
    return x < y ? x : y;
}

static inline int64_t fkda_most(int64_t x, int64_t y)
{
    return x > y ? x : y;
}

/* Heads of equal sequences of `chunks` chunks (of 32 tokens), whole: in solo CTAs or CTA pairs, whichever is
 * faster. */
int64_t fkda_clocks_whole(int64_t heads, int64_t chunks, int sms);

/* Heads of equal sequences cut into `segments` segments each, in passes; whole, for one segment. */
int64_t fkda_clocks_passes(int64_t heads, int64_t chunks, int64_t segments, int sms);

/* A relay. Its longest segment has chunks_64 / 64 chunks: the argument counts 64ths of a chunk, because
 * lengths of segments are averages while a relay is planned. States go through `maps` maps. Each head has
 * `inner` CTA pairs besides the pair of its first segment. */
int64_t fkda_clocks_relay(int64_t chunks_64, int64_t maps, int64_t inner);

/* Whether the CTA pair of a first segment takes part in the join phase. It does where the pairs of `inner`
 * inner segments are too few for all rows of the state (assign_join_rows() in
 * kernels/hopper/join/relay_join.cuh decides the same way). */
bool fkda_relay_first_pairs_join(int64_t inner);

/* In chunks: the longest sequence, all others together, and the average of the others. The length of the
 * longest is known from max_seqlen; the others count as equally long. */
typedef struct fkda_known_lengths {
    int64_t longest, rest, average;
} fkda_known_lengths;
fkda_known_lengths fkda_what_is_known(const fkda_shape *shape);

/* A mixed launch, for the known lengths. */
int64_t fkda_clocks_mixed(const fkda_shape *shape, int sms);

/* Passes in which the longest sequence is cut into `segments` segments, for the known lengths. */
int64_t fkda_clocks_passes_of_longest(const fkda_shape *shape, int64_t segments, int sms);

/* Whole sequences in solo CTAs and in CTA pairs, for the known lengths; without the cost of beginning and
 * ending work items, which is about the same for both. */
double fkda_clocks_solo_ctas(const fkda_shape *shape, int sms);
double fkda_clocks_cta_pairs(const fkda_shape *shape, int sms);

#endif
