/* The kinds of blocks that there are: what all roles are made from. */
#ifndef FKDA_HOPPER_KINDS_CUH
#define FKDA_HOPPER_KINDS_CUH

#include "fwd_shape.h"

namespace fkda
{

constexpr int BLOCK = 16; /* tokens that are prepared together: the rows of a product on the tensor core */
constexpr int ROW = 128;  /* bytes of a swizzled row: of 64 channels of a token, or of 64 rows of V */

/* What a kind is given, and what follows. */
template <int rows, int chunk, int sharers, int team_warps, int teams, int parts, int own, int received,
          bool outputs>
struct Shape {
    static constexpr int ROWS = rows;   /* of V that a block carries, a warpgroup for 64 */
    static constexpr int CHUNK = chunk; /* tokens */
    static constexpr int SHARERS =
        sharers; /* blocks that work on the same pieces: each prepares every SHARERS-th chunk, from the
                                               one with its rank on, and sends it to the other */
    static constexpr int TEAM_WARPS = team_warps; /* warps that prepare a chunk together, and */
    static constexpr int TEAMS =
        teams; /* the teams of them: each prepares every TEAMS-th of its block's chunks */
    static constexpr int PARTS =
        parts; /* of products over channels, that a team leaves: of one warp each, or two */
    /* Slots of the rings of chunks: for those that the block prepares, and after them for those that the other block sends, which
     * come prepared and are held for a shorter time. */
    static constexpr int OWN = own, RECEIVED = received, SLOTS = own + received;
    static constexpr bool OUTPUTS = outputs; /* else neither queries nor outputs: states only */

    static constexpr int BLOCKS = chunk / BLOCK;
    static constexpr int RECURRENCE_WARPS = rows / 16;
    static constexpr int PREPARE_WARPS = team_warps * teams;
    static constexpr int AHEAD_WARPS = PREPARE_WARPS + 2; /* and those that load and solve */
    static constexpr int HALF_TOKENS = chunk * ROW;       /* bytes: a chunk's tokens in 64 channels */
    /* Outputs have room of their own where there is some left; else they go where v was. */
    static constexpr bool ROOM_FOR_OUTPUTS = outputs && rows == 64;
    static_assert(RECURRENCE_WARPS + AHEAD_WARPS <= FKDA_HOPPER_THREADS / 32, "there are so many warps");
};

/* A head of a sequence to each block. */
using Alone = Shape<128, FKDA_HOPPER_CHUNK_ALONE, 1, 2, 3, 2, 12, 0, true>;
/* A head to two blocks, of its rows half to each. */
using Paired = Shape<64, FKDA_HOPPER_CHUNK_PAIRED, FKDA_HOPPER_PAIR, 4, 2, 2, 4, 2, true>;
/* Of a head of a segment the map in one block and the state in the other. */
using Maps = Shape<128, FKDA_HOPPER_CHUNK_PAIRED, FKDA_HOPPER_PAIR, 2, 3, 1, 5, 2, false>;

} // namespace fkda

#endif
