/*
 * The block of a CTA that finds the gradients of one chunk of one head, and its shared memory.
 *
 * The preparation and the solver are those of the forward pass (../../block), which are templates over a
 * block. Here all eight warps are one team, the chunk has one slot, and there are no rings.
 */
#ifndef FKDA_HOPPER_CHUNKS_BLOCK_CUH
#define FKDA_HOPPER_CHUNKS_BLOCK_CUH

#include "../../block/prepare.cuh"
#include "../../block/solve.cuh"
#include "chunk_args.h"
#include "units.cuh"

namespace fkda
{

template <Arithmetic arithmetic> struct ChunkBlock {
    static constexpr int ROWS = DIM, CHUNK = FKDA_HOPPER_BWD_CHUNK, CTAS = 1;
    static constexpr int TEAM_WARPS = FKDA_HOPPER_CHUNK_THREADS / 32, TEAMS = 1, PARTIALS = TEAM_WARPS / 2;
    static constexpr int OWN_SLOTS = 1, RECEIVED_SLOTS = 0, SLOTS = 1;
    static constexpr int RECURRENCE_WARPS = 0, PREPARE_WARPS = TEAM_WARPS;
    static constexpr int SUBCHUNKS = CHUNK / SUBCHUNK, HALF_TOKENS = CHUNK * ROW;
    static constexpr bool LOADER_FINDS_NORMS = false, QUERIES = true, RELAYS = false, STATES = false;
    static constexpr bool BACKWARDS = false, KEEPS_BITS = true;
    static constexpr Arithmetic ARITHMETIC = arithmetic;
    static constexpr bool GENERAL = arithmetic == Arithmetic::GENERAL,
                          OPTIONS = arithmetic != Arithmetic::USUAL,
                          UNBOUNDED = OPTIONS && arithmetic != Arithmetic::BOUNDED;
};
constexpr int CHUNK_WARPS = FKDA_HOPPER_CHUNK_THREADS / 32, CHUNK_TOKENS = FKDA_HOPPER_BWD_CHUNK;
constexpr int SOLVERS = 2; /* the first warps */
constexpr int SOLVER_BARRIER = TEAM_BARRIER + 1;
constexpr int TOKEN_TILES = CHUNK_TOKENS / 8, OPERANDS = 3;
enum { OF_U, OF_DR, OF_DOUT }; /* operands of the sums over V */
enum { STATE, GRADIENT, IMAGES };

/* Where the chunk is. */
template <Arithmetic arithmetic> struct ChunkCursor<ChunkBlock<arithmetic>> {
    int head, qk_head;
    int left;       /* its tokens; 0: the slot has no chunk */
    int row, token; /* the row of the batch, and the chunk's first token, counted in this row */
    long long slot;

    __device__ int here() const
    {
        return left;
    }
    __device__ long long place(const fkda_token_strides &strides, int i, int group = 1) const
    {
        return token_place(strides, row, token + i, group == 1 ? head : head / group);
    }
    __device__ long long place_of_beta(const fkda_token_strides &strides, int i) const
    {
        return row * strides.batch + (token + i) * strides.token + head * strides.head;
    }
};

/* Where the chunk's first token has its row of the head in tensors in global memory. One thread finds the
 * places once, so that others have one multiplication to make for a row. */
struct TensorPlaces {
    const unsigned char *v;
    unsigned char *dv, *dg, *dq, *dk; /* of no meaning if the tensor is not wanted */
};

/* The row of token i. `stride` is in bytes. */
template <class Byte> __device__ __forceinline__ Byte *row_of_token(Byte *first, long long stride, int i)
{
    return global_memory(first) + static_cast<unsigned>(i) * static_cast<unsigned long long>(stride);
}

/* The token of 16 of which a pair of lanes loads two neighbouring units of 16 bytes from a tile: no two of
 * eight neighbouring lanes meet in a bank. */
__device__ __forceinline__ int token_of_pair(int lane)
{
    return lane / 2 % 4 * 2 + lane / 8 % 2 + lane / 16 * 8;
}

/* A border image as it lies in memory, but for the scales. */
struct __align__(128) ImageRows
{
    static constexpr int ROW_BYTES = 2 * DIM;
    unsigned char bytes[DIM * ROW_BYTES];
};

/* Products between tokens in fp32, below the diagonal, divided by pair_unit: dO U^T, and - dR U^T. Of eight
 * columns those with even numbers come first, so that ldmatrix brings a lane columns 2 t and 2 t + 1. Rows
 * are padded so that neither fragments nor transposed fragments meet bank conflicts. */
struct TokenPairs {
    static constexpr int ROW_FLOATS = CHUNK_TOKENS + 4, ROW_BYTES = 4 * ROW_FLOATS;
    float rows[CHUNK_TOKENS][ROW_FLOATS];

    /* Where column j is in a row. */
    static __device__ int column(int j)
    {
        return j / 8 * 8 + j % 2 * 4 + j % 8 / 2;
    }
    /* The place of a tile of two subchunks, in bytes. */
    static __device__ int tile(int to, int from)
    {
        return SUBCHUNK * (to * ROW_BYTES + from * 4);
    }
    __device__ float &at(int i, int j)
    {
        return rows[i][column(j)];
    }
    __device__ float at(int i, int j) const
    {
        return rows[i][column(j)];
    }
};

/* Sums over a warp's channels, which all warps' together are what a norm needs: of queries and of keys. */
struct NormSums {
    float of_warp[2][CHUNK_WARPS][CHUNK_TOKENS];
    float along[2][CHUNK_TOKENS], scale[2][CHUNK_TOKENS]; /* channels.cuh: store_through_norms() */
};

/* Of each channel, in the last step. */
struct ChannelNotes {
    float kept[DIM], second_x[DIM];     /* channels.cuh */
    float before[2][DIM], rest[2][DIM]; /* decays of each subchunk: to its eighth token, and on to its end */
};

/* Their logarithms, where gates have no bound. */
struct LogNotes {
    float before[2][DIM], rest[2][DIM];
};

template <Arithmetic arithmetic> struct Shared<ChunkBlock<arithmetic>> {
    using Block = ChunkBlock<arithmetic>;

    /* The images, and what lies in their place before they come and after they have been read. */
    union {
        ImageRows state;
        struct {                                        /* in the last step */
            typename Tokens<Block>::Half raw[DIM / 64]; /* g, k and q as they are in memory */
            float4 late_stash[2 * FKDA_HOPPER_CHUNK_THREADS];
        };
    };
    union {
        ImageRows gradient;
        struct {
            Products<Block> products[1];
            SolverScratch<Block> scratch;
        };
        struct {
            float4 stash[6 * FKDA_HOPPER_CHUNK_THREADS]; /* the last step's: of each thread 24 numbers */
            NormSums norm_sums;
            float4 parameter_sums[FKDA_HOPPER_CHUNK_THREADS]; /* of the second subchunk, for each thread */
        };
    };
    /* Kr, K~, and over q and v what K~ and Kr lack. Then the operands of sums over V: U lies over v, - dR
     * over q, dO over `dout`; and over Kr and K~ lie the products between tokens. */
    __align__(1024) Tokens<Block> tokens[1];
    unsigned char dout[DIM / 64][Block::HALF_TOKENS];
    union {
        Stage<Block> stage[1];
        struct {
            float dbeta[CHUNK_WARPS][CHUNK_TOKENS]; /* of each warp's rows of V */
            ChannelNotes notes;
        };
    };
    /* K~ K^^T below the diagonal: columns i, depths j. */
    Tile<CHUNK_TOKENS, CHUNK_TOKENS, false, CHUNK_TOKENS / 8 * 128, 128> keys;
    float image_scale[DIM]; /* of the image of S, then of that of D */
    float gate_offset[1][DIM];
    float inverse_norm[1][1][2][CHUNK_TOKENS]; /* of keys, then of queries */
    HeadGate gate[1][CHUNK_WARPS];
    float strength[CHUNK_TOKENS], slope[CHUNK_TOKENS]; /* b, and its derivative */
    float solve_lack[CHUNK_TOKENS];                    /* what T / divisor lacks on its diagonal in fp16 */
    union {
        float attend_lack[CHUNK_TOKENS]; /* what P lacks there */
        float on_diagonal[CHUNK_TOKENS]; /* in the last steps: of dO U^T */
    };
    int has_faint_write;
    int is_wide;     /* the preparation has to be careful */
    float pair_unit; /* brings products with decays into the range of fp32 */
    /* Of the operands U, - dR and dO, for each tile of eight tokens: the largest magnitudes in each warp's
     * rows of V, and what all are divided by. */
    __align__(16) uint32_t largest[OPERANDS][TOKEN_TILES][CHUNK_WARPS];
    float unit[OPERANDS][TOKEN_TILES];
    uint64_t meeting[1]; /* for racecheck alone, see ../../block/prepare.cuh */
    uint64_t inputs_there, dout_there, state_there, gradient_there;
    ChunkCursor<Block> at;
    TensorPlaces places;

    /* For the sums over V: the scale of row v of an image over the largest scale, in fp16, at gamma_place(v).
     * It lies over gamma - 1, which is not needed here. */
    __device__ uint16_t *row_factors(int image)
    {
        return reinterpret_cast<uint16_t *>(stage[0].gamma_minus_1) + DIM * image;
    }
    /* 16 numbers of each thread, over v and dout. */
    __device__ float4 *result_stash()
    {
        return reinterpret_cast<float4 *>(tokens[0].v);
    }
    __device__ TokenPairs &queries_with_writes()
    {
        return reinterpret_cast<TokenPairs &>(tokens[0].half[0]);
    }
    __device__ LogNotes &log_notes()
    {
        return *reinterpret_cast<LogNotes *>(&queries_with_writes() + 1);
    }
    __device__ TokenPairs &keys_with_writes()
    {
        return reinterpret_cast<TokenPairs &>(tokens[0].half[1]);
    }
};
static_assert(offsetof(Shared<ChunkBlock<Arithmetic::USUAL>>, dout) ==
                  offsetof(Shared<ChunkBlock<Arithmetic::USUAL>>, tokens) +
                      sizeof(Tokens<ChunkBlock<Arithmetic::USUAL>>),
              "dout lies right behind v");
static_assert(sizeof(TokenPairs) + sizeof(LogNotes) <= 2 * CHUNK_TOKENS * ROW, "they leave - dR alone");
static_assert(sizeof(Shared<ChunkBlock<Arithmetic::USUAL>>) <= FKDA_HOPPER_CHUNK_SHARED_BYTES,
              "two CTAs run on an SM");

/* Whether T, which is b / divisor on its diagonal, has too few bits of b in fp16. */
__device__ __forceinline__ bool is_faint(float b, float divisor)
{
    return !(fabsf(b) >= 0x1p-12f * divisor);
}

/* ---- Operands ------------------------------------------------------------------------------------------ */

/* Where a lane's row of four 8 x 8 matrices is in an image, from row `row` and channel 0 on: an A operand
 * with the image's rows as rows. A channel that is a multiple of 16 is added by ^ 2 channel. */
__device__ __forceinline__ int image_rows(int row, int lane)
{
    return (row + lane / 8 % 2 * 8 + lane % 8) * ImageRows::ROW_BYTES + (lane / 16 ^ lane % 8) * 16;
}

/* The same for a transposed load: an A operand with 16 channels as rows, and the image's rows from `depth` on
 * as depths. */
__device__ __forceinline__ int image_columns(int depth, int lane)
{
    return (depth + lane / 16 * 8 + lane % 8) * ImageRows::ROW_BYTES + (lane / 8 % 2 ^ lane % 8) * 16;
}

/* Half of the depths of a tile [tokens, 128 depths] as wgmma's B operand, whose columns are tokens: depths
 * 16 d to 16 d + 15 of all 128. */
__device__ __forceinline__ uint64_t token_operand(const unsigned char *half, int d)
{
    return swizzled_descriptor<16, 8 * ROW>(descriptor_address(half) + d % 4 * 2);
}

/* What the tensor core takes of a tf32 operand. */
__device__ __forceinline__ float cut_to_tf32(float x)
{
    return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

__device__ __forceinline__ void multiply_by(float (&x)[4][4], float factor)
{
#pragma unroll
    for (int i = 0; i < 16; i++) x[i / 4][i % 4] *= factor;
}

/* The place of this thread: the index is read again, so that no register keeps it. */
struct ThreadPlace {
    int warp, lane, g, t;
};
__device__ __forceinline__ ThreadPlace thread_place()
{
    int cta, thread;
    read_indices(cta, thread);
    const unsigned id = static_cast<unsigned>(thread);
    return {static_cast<int>(id / 32), static_cast<int>(id % 32), static_cast<int>(id % 32 / 4),
            static_cast<int>(id % 4)};
}

/* Eight sums over the lanes with one t: lane (g, t) gets the one with number g. */
__device__ __forceinline__ float sum_over_g(float (&x)[8], int lane)
{
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
        const bool upper = lane & 4 * half;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float other = upper ? x[i] : x[i + half];
            x[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(~0u, other, 4 * half);
        }
    }
    return x[0];
}

} // namespace fkda

#endif
