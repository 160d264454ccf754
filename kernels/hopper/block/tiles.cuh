/*
 * What a chunk is in shared memory: its tokens, the stage with the small matrices, and the scratch between
 * the preparation and the solver.
 *
 * Sizes of wgmma's operands and of ldmatrix' matrices decide all layouts here; each is chosen so that neither
 * stores nor loads of a warp meet bank conflicts.
 */
#ifndef FKDA_HOPPER_TILES_CUH
#define FKDA_HOPPER_TILES_CUH

#include "../../common/elements.cuh"
#include "../../common/task.cuh"
#include "../ptx/wgmma.cuh"
#include "block.cuh"

namespace fkda
{

/* ---- Tokens -------------------------------------------------------------------------------------------- */

constexpr int SUBCHUNK_BYTES = SUBCHUNK * ROW;

/*
 * The tokens of a chunk, which are prepared where the inputs arrive. A row has 128 bytes: 64 channels of a
 * token or, in v, 64 rows of V of a token. Rows are swizzled: unit u of 16 bytes of token i is at i * ROW +
 * (u ^ i % 8) * 16. Copies write rows in this way and wgmma reads them so. With G the running sum of the log
 * decay, the tiles hold of token i
 *
 *   G: g_i, then Kr = k_i exp(G_last - G_i)
 *   K: k_i, then K~ = k_i exp(G_i)
 *   Q: q_i, then Q~ = q_i exp(G_i)
 *
 * and v holds v_i. Inputs are bf16 and prepared tiles fp16. Tokens past the end of the sequence become zeros,
 * except in v.
 */
enum { G, K, Q };
template <class Block> struct Tokens {
    struct Half {
        unsigned char tile[!Block::QUERIES ? 2 : 3][Block::HALF_TOKENS]; /* G, K, Q */
    } half[DIM / 64];
    unsigned char v[Block::ROWS / 64][Block::HALF_TOKENS];

    /* K~ and behind it Q~ as one B operand with 2 CHUNK columns, for depths 16 i to 16 i + 15. `place` is the
     * descriptor_address of the tokens. */
    static __device__ uint64_t decayed(uint32_t place, int i)
    {
        return swizzled_descriptor<16, 8 * ROW>(place + K * Block::HALF_TOKENS / 16 +
                                                i / 4 * (sizeof(Half) / 16) + i % 4 * 2);
    }

    /* Kr as a B operand: its 128 columns are channels, its 16 depths the tokens of subchunk i. */
    static __device__ uint64_t k_rest(uint32_t place, int i)
    {
        return swizzled_descriptor<sizeof(Half), 8 * ROW>(place + i * (SUBCHUNK_BYTES / 16));
    }

    /* The same of K~ or Q~, and Kr with CHUNK columns for depths 16 i to 16 i + 15, which are channels. */
    static __device__ uint64_t by_token(uint32_t place, int which, int i)
    {
        return k_rest(place + which * (Block::HALF_TOKENS / 16), i);
    }
    static __device__ uint64_t rest_by_channel(uint32_t place, int i)
    {
        return decayed(place - K * Block::HALF_TOKENS / 16, i);
    }
};

/* The row that a lane names to ldmatrix and stmatrix, as an offset in half of k, q or g, for the four
 * matrices (tokens 0-7, unit 0), (tokens 8-15, unit 0), (tokens 0-7, unit 1), (tokens 8-15, unit 1). For
 * units u and u + 1 with an even u the row is at this offset ^ 16 u. */
__device__ __forceinline__ int matrix_row(int lane)
{
    return lane % 16 * ROW | (lane / 16 ^ lane % 8) * 16;
}

/* As matrix_row, for the four matrices (tokens 0-7, unit 0), (tokens 0-7, unit 1), (tokens 8-15, unit 0),
 * (tokens 8-15, unit 1). */
__device__ __forceinline__ int matrix_row_by_token(int lane)
{
    return (lane / 16 * 8 + lane % 8) * ROW | (lane / 8 % 2 ^ lane % 8) * 16;
}

/* ---- Stage --------------------------------------------------------------------------------------------- */

/* A matrix of fp16 that wgmma reads as its B operand, in core matrices of 8 x 8 elements. In a core matrix
 * the eight elements of a 16-byte unit are neighbouring columns (column_major) or neighbouring depths. The
 * next core matrix along the columns is column_step bytes away, and the next one along the depth depth_step
 * bytes. */
template <int columns, int depth, bool column_major, int column_step, int depth_step> struct Tile {
    static constexpr int BYTES = (columns / 8 - 1) * column_step + (depth / 8 - 1) * depth_step + 128;
    __align__(16) unsigned char bytes[BYTES];

    /* The unit that begins at this column and depth; one of the two is a multiple of eight. */
    __device__ uint4 *at(int column, int d)
    {
        const int row = column_major ? d : column;
        return reinterpret_cast<uint4 *>(
            &bytes[column / 8 * column_step + d / 8 * depth_step + row % 8 * 16]);
    }

    /* Depths 16 i to 16 i + 15 as an operand; `place` is the tile's descriptor_address. */
    static __device__ uint64_t operand(uint32_t place, int i)
    {
        return tile_descriptor<column_step, depth_step>(place + i * (2 * depth_step / 16));
    }
};

/*
 * What the recurrence needs of a chunk besides its tokens:
 *
 *   solve         = T = (I + L)^-1 diag(b) / divisor
 *   attend        = P = tril(q_i k_j exp(G_i - G_j)), with columns i and depths j
 *   gamma_minus_1 = exp(G_last) - 1
 *
 * Tiles of 8 x 8 above the diagonals of `solve` and `attend` are cleared once, when the CTA starts, and never
 * written.
 */
template <class Block> struct Stage {
    static constexpr int CHUNK = Block::CHUNK;
    Tile<CHUNK, CHUNK, true, 128, CHUNK / 8 * 128> solve; /* first, as clear_stages expects */
    Tile<CHUNK, CHUNK, false, CHUNK / 8 * 128, 128> attend;
    float gamma_minus_1[DIM]; /* channel c is at gamma_place(c) */
    /* A power of two that `solve` is divided by: 1, or if all write strengths b are tiny, a power of two
     * above them. Without it, tiny b would fall out of fp16. */
    float divisor;
    float zero; /* the recurrence reads it in place of `divisor` when it must leave its usual path */
};

/* Where channel c is in gamma_minus_1: lane t of a quad in the recurrence reads the four channels 16 s + 2 t,
 * + 1, + 8 and + 9 of its accumulators with one load. */
__device__ __forceinline__ int gamma_place(int channel)
{
    return channel / 16 * 16 + channel % 8 / 2 * 4 + channel / 8 % 2 * 2 + channel % 2;
}

/* ---- Scratch of the preparation and the solver --------------------------------------------------------- */

/* Products over channels of K~ (0) and Q~ (1) with K^ = k_j exp(-G_j), in tiles of 8 x 8 tokens. With tiles
 * numbered by rows and columns of eight tokens they are, in this order: the tiles on the diagonal; below it
 * inside a subchunk, (1, 0) and (3, 2); and of the second subchunk with the first one, (2, 0), (2, 1), (3,
 * 0), (3, 1). */
template <class Block> struct Products {
    /* The first tile of each sort. */
    static constexpr int ON_DIAGONAL = 0, BELOW_IT = 2 * Block::SUBCHUNKS, ACROSS = 3 * Block::SUBCHUNKS;
    static constexpr int TILES = Block::SUBCHUNKS == 2 ? 10 : 3;
    float partial[Block::PARTIALS][Block::QUERIES ? 2 : 1][TILES][8][8];
    /* The first bad token (bad_tokens.cuh) that the team knows of. */
    __align__(16) int first_bad;
};
constexpr int NO_TOKEN = 32;

/* The solver's scratch, in tiles of 8 x 8 tokens. All but `diagonal` are fp16. */
template <class Block> struct SolverScratch {
    float diagonal[Block::CHUNK / 8][9][8]; /* tiles of L on the diagonal, transposed; padded to nine rows */
    __align__(16) uint16_t lower[Block::SUBCHUNKS][8][8]; /* tiles of L below the diagonal of each subchunk */
    /* The inverse of I + the second diagonal tile of each subchunk, transposed. */
    __align__(16) uint16_t inverse[Block::SUBCHUNKS][8][8];
    /* The products of the second subchunk with the first one, if there are two. */
    __align__(16) uint16_t across[SUBCHUNK][SUBCHUNK + 8];
};

} // namespace fkda

#endif
