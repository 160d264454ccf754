/* What the roles of the Hopper kernel share: the tiles in shared memory and the barriers of their rings. */
#ifndef FKDA_HOPPER_SHARED_CUH
#define FKDA_HOPPER_SHARED_CUH

#include <stddef.h>

#include "../common/elements.cuh"
#include "fwd_shape.h"
#include "sm90.cuh"
#include "walk.cuh"

namespace fkda
{

constexpr int TEAM_WARPS = 2;  /* that prepare a chunk together */
constexpr int INPUTS = 6;      /* slots of the ring of inputs */
constexpr int STAGES = 6;      /* slots of the ring of prepared chunks */
constexpr int PITCH = DIM + 8; /* of raw tokens, so that eight of them lie in different banks */

/* A chunk's inputs as they come from memory; tokens past the end are zero. */
struct Input {
    uint16_t q[CHUNK][PITCH], k[CHUNK][PITCH], g[CHUNK][PITCH];
};

/* A tile of fp16 that wgmma reads as B: `columns` of the result x `depth`, in core matrices of 8 x 8. In a core matrix the
 * eight neighbours of 16 bytes are columns (column_major) or depths. The steps in bytes between core matrices
 * keep stores free of bank conflicts. */
template <int columns, int depth, bool column_major, int column_step, int depth_step> struct Tile {
    static constexpr int BYTES = (columns / 8 - 1) * column_step + (depth / 8 - 1) * depth_step + 128;
    __align__(16) unsigned char bytes[BYTES];

    /* The 16 bytes with this column and depth, one of them a multiple of eight. */
    __device__ uint4 *at(int column, int d)
    {
        const int row = column_major ? d : column;
        return reinterpret_cast<uint4 *>(
            &bytes[column / 8 * column_step + d / 8 * depth_step + row % 8 * 16]);
    }

    /* As the operand of depths 16 i to 16 i + 15. */
    __device__ uint64_t operand(int i) const
    {
        return tile_descriptor<column_step, depth_step>(bytes) + i * (2 * depth_step / 16);
    }
};

/* A prepared chunk. With G the running sum of the log decay, rows i, j:
 *   decayed: columns 0 to 15 have k_i exp(G_i), 16 to 31 have q_i exp(G_i), depth is the channel
 *   k_rest:  column is the channel, depth the token: k_j exp(G_last - G_j)
 *   solve  = (I + L)^-1 diag(b) / strength     attend = tril(q_i k_j exp(G_i - G_j)), columns i, depths j
 *   gamma_minus_1 = exp(G_last) - 1 */
struct Stage {
    Tile<2 * CHUNK, DIM, false, 16 * 128, 128> decayed;
    Tile<DIM, CHUNK, true, 128, 16 * 128> k_rest;
    Tile<CHUNK, CHUNK, true, 128, 2 * 128> solve;
    Tile<CHUNK, CHUNK, false, 2 * 128, 128> attend;
    float gamma_minus_1[DIM]; /* channel c at gamma_place(c) */
    uint16_t v[CHUNK][PITCH]; /* as it comes from memory; zero past the end */
    float strength; /* a power of two that `solve` is divided by: 1, or above all b if those are tiny */
};

static_assert(offsetof(Stage, gamma_minus_1) % 16 == 0 && offsetof(Stage, v) % 16 == 0 &&
                  sizeof(Stage) % 16 == 0,
              "copied and read 16 bytes at a time");

/* Where a channel is in gamma_minus_1: lane t of the recurrence reads the four of its accumulators of channels 16 s + 2 t,
 * + 1, + 8, + 9 at once. */
__device__ __forceinline__ int gamma_place(int channel)
{
    return channel / 16 * 16 + channel % 8 / 2 * 4 + channel / 8 % 2 * 2 + channel % 2;
}

/* What the warps of a team leave for the solver: their parts of K~ K^^T and Q~ K^^T. */
struct Products {
    float part[TEAM_WARPS][2][CHUNK][CHUNK + 8];
};

/* For pieces of `rows` rows of V. */
template <int rows> struct Shared {
    /* Each team prepares every TEAMS-th chunk, each solver solves every SOLVERS-th; between them is a ring whose size
     * is a multiple of SOLVERS, so that a solver meets every round of its slots. */
    static constexpr int TEAMS = FKDA_HOPPER_PREPARE_WARPS(rows) / TEAM_WARPS;
    static constexpr int SOLVERS = FKDA_HOPPER_SOLVE_WARPS(rows), PRODUCTS = rows == 128 ? 5 : 4;

    Stage stage[STAGES];
    Input input[INPUTS];
    Products products[PRODUCTS];
    float l_columns[SOLVERS][CHUNK][CHUNK + 4]; /* L transposed */
    float inverse_norm[TEAMS][2][2][CHUNK];     /* in every other chunk of a team; of q, of k */
    float gate_offset[TEAMS][DIM];              /* -exp(A_log) log2(e) dt_bias of the team's head */
    uint16_t out[rows / 16][CHUNK][24];         /* to each warp of the recurrence; 16 rows of V */
    uint16_t order[FKDA_HOPPER_MOST_ORDERED];
    Pieces pieces;
    Ring<STAGES> stages;
    Ring<INPUTS> inputs;
    Ring<PRODUCTS> product_ring;
};
static_assert(Shared<128>::PRODUCTS % Shared<128>::SOLVERS == 0 &&
                  Shared<64>::PRODUCTS % Shared<64>::SOLVERS == 0 && STAGES >= Shared<64>::TEAMS &&
                  INPUTS >= Shared<64>::TEAMS && Shared<64>::PRODUCTS >= Shared<64>::TEAMS,
              "rounds of a ring must not be confused");
static_assert(sizeof(Shared<128>) <= FKDA_HOPPER_SHARED_BYTES &&
                  sizeof(Shared<64>) <= FKDA_HOPPER_SHARED_BYTES,
              "keep fwd_shape.h in step");

} // namespace fkda

#endif
