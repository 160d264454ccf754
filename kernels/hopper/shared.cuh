/* What the two roles of the Hopper kernel share: the walk over tasks, the tiles in shared memory, the barriers. */
#ifndef FKDA_HOPPER_SHARED_CUH
#define FKDA_HOPPER_SHARED_CUH

#include "../common/elements.cuh"
#include "../common/task.cuh"
#include "fwd_shape.h"
#include "sm90.cuh"

namespace fkda
{

constexpr int GROUP_WARPS = 4;
constexpr int GROUP_THREADS = 32 * GROUP_WARPS;
constexpr int GROUPS = FKDA_HOPPER_PREPARE_THREADS / GROUP_THREADS; /* each prepares every GROUPS-th chunk */
constexpr int STAGES = 4;                                           /* chunks that can be prepared ahead */

/* Row r of a 16-row tile of tokens or rows of V stands for element permuted(r): rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9
 * for the neighbours 4 t to 4 t + 3. A lane's two rows g and g + 8 are then two apart, and what a lane holds after a
 * transposition are four neighbours. */
__device__ __forceinline__ int permuted(int row)
{
    return row % 8 / 2 * 4 + row % 2 + row / 8 * 2;
}

/* A tile of fp16 that wgmma reads as B: `columns` of the result x `depth`, in core matrices of 8 x 8. In a core matrix the
 * eight neighbours of 16 bytes are columns (column_major) or depths. The steps in bytes between core matrices
 * keep stores free of bank conflicts. */
template <int columns, int depth, bool column_major, int column_step, int depth_step> struct Tile {
    static constexpr bool COLUMN_MAJOR = column_major;
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
 *   decayed: columns 0 to 15 have -k_i exp(G_i), 16 to 31 have q_i exp(G_i), depth is the channel
 *   k_rest:  column is the channel, depth the token: k_j exp(G_last - G_j)
 *   solve  = (I + L)^-1 diag(b)                attend = tril(q_i k_j exp(G_i - G_j)), columns i, depths j
 *   gamma_minus_1 = exp(G_last) - 1 */
struct Stage {
    Tile<2 * CHUNK, DIM, false, 16 * 160, 160> decayed;
    Tile<DIM, CHUNK, true, 160, 16 * 160> k_rest;
    Tile<CHUNK, CHUNK, true, 160, 2 * 160> solve;
    Tile<CHUNK, CHUNK, false, 2 * 160, 160> attend;
    float gamma_minus_1[DIM];
};

/* Scratch of a group of preparing warps. */
struct Scratch {
    float products[GROUP_WARPS][2][CHUNK][CHUNK]; /* -K~ K^^T and Q~ K^^T over one warp's channels */
    float squares[2][CHUNK][GROUP_WARPS];         /* of q, of k: sums over one warp's channels */
    float l_columns[CHUNK][CHUNK + 4];            /* L transposed */
};

struct Shared {
    Stage stage[STAGES];
    Scratch scratch[GROUPS];
    uint64_t full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) == FKDA_HOPPER_SHARED_BYTES, "keep fwd_shape.h in step");

/* The stage of chunk number n, counted over all tasks of a block, and the parity of the stage's phase. */
__device__ __forceinline__ int stage_of(int n)
{
    return n % STAGES;
}
__device__ __forceinline__ int parity_of(int n)
{
    return n / STAGES % 2;
}

/* The tasks of this block, in order: every gridDim.x-th piece of `rows` rows of V of a head. */
template <int rows> struct Walk {
    static constexpr int PIECES = DIM / rows;
    int piece;

    __device__ Walk() : piece(static_cast<int>(blockIdx.x)) {}
    __device__ bool done(const fkda_fwd_args &args) const
    {
        return piece >= args.tasks * PIECES;
    }
    __device__ int index() const
    {
        return piece / PIECES;
    }
    __device__ int first_row() const
    {
        return piece % PIECES * rows;
    }
    __device__ void advance()
    {
        piece += static_cast<int>(gridDim.x);
    }
};

} // namespace fkda

#endif
