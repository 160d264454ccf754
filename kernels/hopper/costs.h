/*
 * Costs that the kernels reckon with. The host's planner uses some of these costs too. Costs that only the
 * planner needs are in src/cuda/hopper/costs.h.
 *
 * All costs were fitted to times on an H100 (docs/measurements.md). A wrong cost makes a call slower, never
 * wrong: the costs decide which CTA computes what, not what is computed.
 */
#ifndef FKDA_HOPPER_COSTS_H
#define FKDA_HOPPER_COSTS_H

enum {
    /* Clocks that one head takes for one chunk: 16 tokens in a solo CTA, 32 tokens in a CTA pair. */
    FKDA_CLOCKS_SOLO_CHUNK = 1990,
    FKDA_CLOCKS_PAIR_CHUNK = 2100,

    /* Chunks, of either size, that beginning and ending a work item takes as long as. The even-share schedule
     * counts them into each work item's length; a larger value gives shorter shares to CTAs that have many
     * short sequences. */
    FKDA_CHUNKS_PER_SWITCH = 2,

    /* Chunks on either side of a share border that are worth dividing a work item for. Handing over a state
     * costs about as much as this many chunks, so closer to an end the border moves to that end. */
    FKDA_LEAST_CHUNKS_DIVIDED = 4,

    /* Relay without spare pairs: chunks by which first segments are shorter than inner segments. The pair of
     * a first segment begins with the output phase, and its first chunk is ready late, because all other SMs
     * fetch the map phase's code at that time. */
    FKDA_RELAY_FIRST_LATE_CHUNKS = 7,
    /* Relay: chunks by which last segments are shorter than inner segments, if the pair of the first segment,
     * which computes the last segment too, takes part in the join. */
    FKDA_RELAY_LAST_LATE_CHUNKS = 2,
};

#endif
