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

/* Blocks that share preparation: each prepares every SHARERS-th chunk, and sends it to the other. */
template <int rows, bool mixed> constexpr int SHARERS = FKDA_HOPPER_SHARERS(rows, mixed);

/* The first chunk that this block prepares. */
template <int rows, bool mixed> __device__ __forceinline__ int sharer_rank()
{
    return SHARERS<rows, mixed> == 2 ? cluster_rank() : 0;
}

constexpr int TEAM_WARPS = 2; /* that prepare a chunk together */
constexpr int TEAMS =
    FKDA_HOPPER_PREPARE_WARPS / TEAM_WARPS; /* each prepares every TEAMS-th of its block's chunks */
constexpr int SLOTS = 12;                   /* of the ring of chunks */
static_assert(SLOTS % (2 * TEAMS) == 0,
              "each team meets all rounds of its slots, and a slot is always of the same block");
constexpr int ROW = 128; /* bytes of a swizzled row: of 64 channels of a token, or of 64 rows of V */
constexpr int HALF_TOKENS = CHUNK * ROW; /* bytes: the chunk's tokens in 64 channels */

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

    /* As the operand, with 16 depths; `place` is its descriptor_address. */
    static __device__ uint64_t operand(uint32_t place)
    {
        static_assert(depth == 16, "of one product");
        return tile_descriptor<column_step, depth_step>(place);
    }
};

/* A chunk, prepared where its inputs arrive. Rows are of a token and 64 channels (of v: 64 rows of V), swizzled: unit
 * u of 16 bytes of token i is at i * ROW + (u ^ i % 8) * 16, which copies write, wgmma reads and ldmatrix meets without
 * bank conflicts. With G the running sum of the log decay, tokens i:
 *   k: k_i, then k_i exp(G_i)     q: q_i, then q_i exp(G_i)     g: g_i, then k_i exp(G_last - G_i)     v: v_i, then out_i
 * Inputs are bf16, prepared tiles fp16; tokens past the end are made zeros, but not of v. */
template <int rows> struct Tokens {
    struct {
        unsigned char k[HALF_TOKENS], q[HALF_TOKENS], g[HALF_TOKENS];
    } half[DIM / 64]; /* what blocks that share it send each other */
    unsigned char v[rows / 64][HALF_TOKENS];

    /* K~ and Q~ side by side as B, 32 columns, depths 16 i to 16 i + 15; `place` is the descriptor_address of it all. */
    static __device__ uint64_t decayed(uint32_t place, int i)
    {
        return swizzled_descriptor<16, 8 * ROW>(place + i / 4 * (3 * HALF_TOKENS / 16) + i % 4 * 2);
    }

    /* As B with 128 columns, the channels, and 16 depths, the tokens. */
    static __device__ uint64_t k_rest(uint32_t place)
    {
        return swizzled_descriptor<3 * HALF_TOKENS, 8 * ROW>(place + 2 * HALF_TOKENS / 16);
    }
};
static_assert(sizeof(Tokens<64>) % 1024 == 0 && sizeof(Tokens<128>) % 1024 == 0,
              "what swizzling repeats after");

/* In a half of k, q or g, this lane's row for ldmatrix and stmatrix of the matrices (tokens 0-7, units 0), (8-15, 0),
 * (0-7, 1), (8-15, 1); those of units u and u + 1, u even, are at ^ 16 u. */
__device__ __forceinline__ int matrix_row(int lane)
{
    return lane % 16 * ROW | (lane / 16 ^ lane % 8) * 16;
}

/* The same for matrices (tokens 0-7, units 0), (0-7, 1), (8-15, 0), (8-15, 1). */
__device__ __forceinline__ int matrix_row_by_token(int lane)
{
    return (lane / 16 * 8 + lane % 8) * ROW | (lane / 8 % 2 ^ lane % 8) * 16;
}

/* What else the recurrence takes of a chunk:
 *   solve  = (I + L)^-1 diag(b) / strength     attend = tril(q_i k_j exp(G_i - G_j)), columns i, depths j
 *   gamma_minus_1 = exp(G_last) - 1 */
struct Stage {
    Tile<CHUNK, CHUNK, true, 128, 2 * 128> solve;
    Tile<CHUNK, CHUNK, false, 2 * 128, 128> attend;
    float gamma_minus_1[DIM]; /* channel c at gamma_place(c) */
    float strength; /* a power of two that `solve` is divided by: 1, or above all b if those are tiny */
};

static_assert(offsetof(Stage, gamma_minus_1) % 16 == 0 && sizeof(Stage) % 16 == 0, "read 16 bytes at a time");

/* Where a channel is in gamma_minus_1: lane t of the recurrence reads the four of its accumulators of channels 16 s + 2 t,
 * + 1, + 8, + 9 at once. */
__device__ __forceinline__ int gamma_place(int channel)
{
    return channel / 16 * 16 + channel % 8 / 2 * 4 + channel / 8 % 2 * 2 + channel % 2;
}

/* What the warps of a team leave for the solver: their parts of K~ K^^T and Q~ K^^T, blocks of 8 x 8 tokens: 0-7 with
 * 0-7, 8-15 with 0-7 and 8-15 with 8-15. */
struct Products {
    float part[TEAM_WARPS][2][3][8][8];
};

/* The ring of chunks: their inputs have come, they are prepared and solved, the recurrence is done with them; also the other
 * block's, with those that are sent there. */
struct Chunks {
    uint64_t loaded[SLOTS], ready[SLOTS], empty[SLOTS];
};

/* The solver's scratch, of the blocks of 8 x 8 tokens of L: those on the diagonal transposed; the one below it, and the
 * inverse of I + the second one transposed, in fp16. */
struct Blocks {
    float diagonal[2][8][8];
    __align__(16) uint16_t lower[8][8], inverse[8][8];
};

/* For pieces of `rows` rows of V. */
template <int rows> struct Shared {
    __align__(1024) Tokens<rows> tokens[SLOTS];
    /* Room for outputs, of tokens' rows as those of v, where there is any left. */
    static constexpr int OUTPUTS = rows == 64 ? HALF_TOKENS : 0;
    __align__(1024) unsigned char outputs[1][OUTPUTS ? OUTPUTS : 16];
    Stage stage[SLOTS];
    Products products[TEAMS];
    Blocks blocks;
    float inverse_norm[TEAMS][2][2][CHUNK]; /* in every other chunk of a team; of q, of k */
    float gate_offset[TEAMS][DIM];          /* -exp(A_log) log2(e) dt_bias of the team's head */
    uint16_t order[FKDA_HOPPER_MOST_ORDERED];
    Pieces pieces;
    Chunks chunks;
    Ring<TEAMS> product_ring;
};
static_assert(sizeof(Shared<128>) <= FKDA_HOPPER_SHARED_BYTES &&
                  sizeof(Shared<64>) <= FKDA_HOPPER_SHARED_BYTES,
              "keep fwd_shape.h in step");

} // namespace fkda

#endif
