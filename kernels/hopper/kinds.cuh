/* The kinds of blocks that there are: what all roles are made from. */
#ifndef FKDA_HOPPER_KINDS_CUH
#define FKDA_HOPPER_KINDS_CUH

#include "fwd_shape.h"

namespace fkda
{

constexpr int BLOCK = 16; /* tokens that are prepared together: the rows of a product on the tensor core */
constexpr int ROW = 128;  /* bytes of a swizzled row: of 64 channels of a token, or of 64 rows of V */

/* A head of a sequence to each block. */
struct AloneGiven {
    static constexpr int ROWS = 128;                      /* of V that a block carries, a warpgroup for 64 */
    static constexpr int CHUNK = FKDA_HOPPER_CHUNK_SOLO; /* tokens */
    /* Blocks that work on the same pieces: each prepares every SHARERS-th chunk, from the one with its rank on, and sends it to the
     * other. */
    static constexpr int SHARERS = 1;
    /* Warps that prepare a chunk together; the teams of them, each of which prepares every TEAMS-th of its block's chunks; and the parts of
     * products over channels that a team leaves, of one warp each, or two. */
    static constexpr int TEAM_WARPS = 2, TEAMS = 3, PARTS = 2;
    /* Slots of the rings of chunks: for those that the block prepares, and after them for those that the other block sends, which
     * come prepared and are held for a shorter time. */
    static constexpr int OWN = 12, RECEIVED = 0;
    static constexpr int APART = 16; /* bytes of shared memory that are left before barriers */
    /* The loading warp finds norms, but those of each team's first chunk: at a block's start that code would come to all multiprocessors at
     * the same time. Else teams find all. */
    static constexpr bool LOADER_NORMS = false;
    static constexpr bool OUTPUTS = true;  /* else neither queries nor outputs: states only */
    static constexpr bool AT_ONCE = false; /* a part of what blocks do that do it all (at_once.cuh), */
    static constexpr bool MIXTURE = false; /* for sequences of different lengths (mixture.cuh) */
    /* Registers of a thread in the recurrence and elsewhere; of the four warps in a quarter of a multiprocessor 512. */
    static constexpr int RECURRENCE_REGISTERS = 152, OTHER_REGISTERS = 104;
    static constexpr int LAST_REGISTERS = OTHER_REGISTERS; /* of the last four warps */
};

/* A head to two blocks, of its rows half to each. */
struct PairedGiven {
    static constexpr int ROWS = 64, CHUNK = FKDA_HOPPER_CHUNK_PAIR, SHARERS = FKDA_HOPPER_PAIR_CTAS;
    static constexpr int TEAM_WARPS = 4, TEAMS = 2, PARTS = 2;
    static constexpr int OWN = 4, RECEIVED = 2;
    static constexpr int APART = 16;
    static constexpr bool LOADER_NORMS = false, OUTPUTS = true, AT_ONCE = false, MIXTURE = false;
    static constexpr int RECURRENCE_REGISTERS = 176, OTHER_REGISTERS = 112, LAST_REGISTERS = 112;
};

/* Of a head of a segment the map in one block and the state in the other. */
struct MapsGiven {
    static constexpr int ROWS = 128, CHUNK = FKDA_HOPPER_CHUNK_PAIR, SHARERS = FKDA_HOPPER_PAIR_CTAS;
    static constexpr int TEAM_WARPS = 2, TEAMS = 3, PARTS = 1;
    static constexpr int OWN = 5, RECEIVED = 2;
    static constexpr int APART = 16;
    static constexpr bool LOADER_NORMS = true, OUTPUTS = false, AT_ONCE = false, MIXTURE = false;
    static constexpr int RECURRENCE_REGISTERS = 160, OTHER_REGISTERS = 96, LAST_REGISTERS = 96;
};

/* The two parts of what a block does where there is one launch for all segments: first MapsAtOnce, whose barriers are in memory that the other
 * part leaves alone, then PairedAtOnce. */
struct PairedAtOnceGiven : PairedGiven {
    static constexpr bool AT_ONCE = true;
    static constexpr int RECURRENCE_REGISTERS = 200, OTHER_REGISTERS = 104, LAST_REGISTERS = 96;
};
struct MapsAtOnceGiven : MapsGiven {
    static constexpr bool AT_ONCE = true;
    static constexpr int APART = 13728;
};

/* The same where sequences have different lengths. */
struct AloneOfMixtureGiven : AloneGiven {
    static constexpr bool MIXTURE = true;
};
struct PairedOfMixtureGiven : PairedAtOnceGiven {
    static constexpr bool MIXTURE = true;
};
struct MapsOfMixtureGiven : MapsAtOnceGiven {
    static constexpr bool MIXTURE = true;
};

/* And what follows. */
template <class Given> struct Shape : Given {
    static constexpr int SLOTS = Given::OWN + Given::RECEIVED;
    static constexpr int BLOCKS = Given::CHUNK / BLOCK;
    static constexpr int RECURRENCE_WARPS = Given::ROWS / 16;
    static constexpr int PREPARE_WARPS = Given::TEAM_WARPS * Given::TEAMS;
    static constexpr int AHEAD_WARPS = PREPARE_WARPS + 2;  /* and those that load and solve */
    static constexpr int HALF_TOKENS = Given::CHUNK * ROW; /* bytes: a chunk's tokens in 64 channels */
    static constexpr bool JOINS =
        Given::AT_ONCE && Given::OUTPUTS; /* carries rows through maps before it walks */
    /* Outputs have room of their own where there is some left; else they go where v was. */
    static constexpr bool ROOM_FOR_OUTPUTS = Given::OUTPUTS && Given::ROWS == 64;
    static_assert(RECURRENCE_WARPS + AHEAD_WARPS <= FKDA_HOPPER_THREADS / 32, "there are so many warps");
    static_assert(RECURRENCE_WARPS / 4 * Given::RECURRENCE_REGISTERS +
                          (3 - RECURRENCE_WARPS / 4) * Given::OTHER_REGISTERS + Given::LAST_REGISTERS <=
                      512,
                  "in a quarter of a multiprocessor");
};
using Alone = Shape<AloneGiven>;
using Paired = Shape<PairedGiven>;
using Maps = Shape<MapsGiven>;
using PairedAtOnce = Shape<PairedAtOnceGiven>;
using MapsAtOnce = Shape<MapsAtOnceGiven>;
using AloneOfMixture = Shape<AloneOfMixtureGiven>;
using PairedOfMixture = Shape<PairedOfMixtureGiven>;
using MapsOfMixture = Shape<MapsOfMixtureGiven>;

} // namespace fkda

#endif
