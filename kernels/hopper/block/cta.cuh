/*
 * The CTA shapes: how the 16 warps of a CTA are split among the roles, how much of a head's state the
 * CTA carries, and how many slots its rings have.
 *
 *   SoloCta  carries all 128 rows of a head's state by itself, in chunks of 16 tokens. It suits many heads:
 *            two warpgroups carry the state, and while one of them waits for its products the other one
 *            works. Warps: 8 of the recurrence, 6 of the preparation, the loader, the solver.
 *   PairCta  carries 64 of the 128 rows, in chunks of 32 tokens; the other CTA of the pair carries the other
 *            64 rows. It suits few heads: the chunks of one head follow each other fastest. Warps: 4 of the
 *            recurrence, 8 of the preparation, the loader, the solver, and 2 without a role. In a relay one
 *            of the 2 warps is the map fetcher of the join phase.
 *   MapCta   carries all 128 rows of a segment's M (the first CTA of a pair) or of its B (the second one), in
 *            chunks of 32 tokens. There are no queries and no outputs. Warps: as in a solo CTA.
 *
 * The CTAs of a pair work on the same work items. Each prepares and solves every second chunk and sends it to
 * the other.
 *
 * The walks of the backward pass (../bwd/walk.cu) have shapes of their own, which differ from these in what
 * they compute.
 */
#ifndef FKDA_HOPPER_CTA_CUH
#define FKDA_HOPPER_CTA_CUH

#include "../fwd_shape.h"

namespace fkda
{

/* Registers of a thread, by warpgroup. The four warps in a quarter of an SM have 512 for each lane between
 * them. */
struct Registers {
    int recurrence, preparation;
    /* The loader, the solver, and the warps that share a warpgroup with them. setmaxnreg takes one number for
     * a warpgroup, so this equals `preparation` where preparing warps are in the last warpgroup (solo,
     * map). */
    int last_warpgroup;
};

/* What a CTA computes. */
struct ComputesOutputs {
    static constexpr bool MAPS = false;      /* work items are maps of segments and states made of zeros */
    static constexpr bool QUERIES = true;    /* there are queries: Q~ and P are prepared */
    static constexpr bool OUTPUTS = true;    /* false: only states are computed */
    static constexpr bool IMAGES = false;    /* what is carried is stored at every chunk */
    static constexpr bool BACKWARDS = false; /* the gradient with respect to the state is carried back */
};

struct SoloCta : ComputesOutputs {
    static constexpr int ROWS = 128;                     /* of the state; each warpgroup carries 64 of them */
    static constexpr int CHUNK = FKDA_HOPPER_CHUNK_SOLO; /* tokens */
    static constexpr int CTAS = 1;                       /* that work on the same work items */
    /* A team of TEAM_WARPS warps prepares one chunk together. The teams take the CTA's own chunks in turn. */
    static constexpr int TEAM_WARPS = 2, TEAMS = 3;
    /* A team leaves its products over channels as this many partial sums, which the solver adds up. Each
     * partial sum is one warp's or the sum of two warps'. */
    static constexpr int PARTIALS = 2;
    /* Slots of the chunk ring: for chunks that this CTA prepares itself and, behind them, for chunks that the
     * other CTA of the pair sends. Received chunks need fewer slots because they arrive prepared and are held
     * for a shorter time. More slots let the preparation run further ahead of the recurrence. An SM's shared
     * memory is the limit (FITS in shared.cuh). */
    static constexpr int OWN_SLOTS = 12, RECEIVED_SLOTS = 0;
    /* False: the teams find the norms of keys and queries. True: the loader finds them, except for each
     * team's first chunk: when a CTA starts, all SMs would fetch the loader's code for norms at the same
     * time, and the first chunk would wait for it. */
    static constexpr bool LOADER_FINDS_NORMS = false;
    static constexpr Registers REGISTERS = {152, 104, 104};
};

struct PairCta : ComputesOutputs {
    static constexpr int ROWS = 64, CHUNK = FKDA_HOPPER_CHUNK_PAIR, CTAS = FKDA_HOPPER_PAIR_CTAS;
    static constexpr int TEAM_WARPS = 4, TEAMS = 2, PARTIALS = 2;
    static constexpr int OWN_SLOTS = 4, RECEIVED_SLOTS = 2;
    static constexpr bool LOADER_FINDS_NORMS = false;
    static constexpr Registers REGISTERS = {176, 112, 112};
};

/* In a map CTA the preparation is the slowest role, so the loader finds the norms in its place. The
 * preparation has no queries to prepare, so 96 registers suffice for it. Therefore a map CTA can have 8 warps
 * of the recurrence with 160 registers in chunks of 32 tokens, for which a solo CTA has too few registers. */
struct MapCta : ComputesOutputs {
    static constexpr bool MAPS = true, QUERIES = false, OUTPUTS = false;
    static constexpr int ROWS = 128, CHUNK = FKDA_HOPPER_CHUNK_PAIR, CTAS = FKDA_HOPPER_PAIR_CTAS;
    static constexpr int TEAM_WARPS = 2, TEAMS = 3, PARTIALS = 1;
    static constexpr int OWN_SLOTS = 5, RECEIVED_SLOTS = 2;
    static constexpr bool LOADER_FINDS_NORMS = true;
    static constexpr Registers REGISTERS = {160, 96, 96};
};

/* ---- The walks of the backward pass -------------------------------------------------------------------- */

/* Carries the state forwards and stores it before every chunk, without outputs. */
template <class Cta> struct StateWalk : Cta {
    static constexpr bool QUERIES = false, OUTPUTS = false, IMAGES = true;
};

/* Carries the gradient with respect to the state back and stores it behind every chunk. The gradients of
 * outputs are in the place of values. */
template <class Cta> struct GradientWalk : Cta {
    static constexpr bool OUTPUTS = false, IMAGES = true, BACKWARDS = true;
};

} // namespace fkda

#endif
