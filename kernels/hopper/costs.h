/*
 * Costs that the host's planner and the kernels both reckon with. Costs that only the planner needs are in
 * src/cuda/hopper/costs.c.
 *
 * All of them were fitted to times on an H100 (BENCHMARK_H100.md). A wrong cost makes a call slower, never
 * wrong: the costs decide which CTA computes what, not what is computed.
 */
#ifndef FKDA_HOPPER_COSTS_H
#define FKDA_HOPPER_COSTS_H

enum {
    /* Clocks that one head takes for one chunk: 16 tokens in a solo CTA, 32 tokens in a CTA pair. */
    FKDA_CLOCKS_SOLO_CHUNK = 1990,
    FKDA_CLOCKS_PAIR_CHUNK = 2100,

    /* Chunks of a CTA pair that beginning and ending a work item takes as long as. The even-share schedule
     * counts them into each work item's length; a larger value gives shorter shares to CTAs that have many
     * short sequences. */
    FKDA_CHUNKS_PER_SWITCH = 2,

    /* Chunks on either side of a share border that are worth dividing a work item for. Handing over a state
     * costs about as much as this many chunks, so closer to an end the border moves to that end. */
    FKDA_LEAST_CHUNKS_DIVIDED = 4,

    /* Relay: chunks by which the CTA pair of a head's first segment starts its output phase later than the
     * other pairs. Its first chunk arrives while all other SMs fetch the map phase's code. First segments are
     * shorter by this much. */
    FKDA_RELAY_FIRST_LATE_CHUNKS = 7,
    /* Relay: the same for the last segment, which the pair of the first segment computes after it, if that
     * pair also takes part in the join. */
    FKDA_RELAY_LAST_LATE_CHUNKS = 2,
};

#endif
