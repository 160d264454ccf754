/* What the roles of the Hopper kernel share: the tiles in shared memory and the barriers of their rings. */
#ifndef FKDA_HOPPER_SHARED_CUH
#define FKDA_HOPPER_SHARED_CUH

#include <stddef.h>

#include "../../common/elements.cuh"
#include "../ptx/sm90.cuh"
#include "cursor.cuh"

namespace fkda
{

/* The block's, among those that share. */
template <class Block> __device__ __forceinline__ int pair_rank()
{
    return Block::CTAS == 2 ? cluster_rank() : 0;
}

/* Where chunk after chunk is in the block's rings. SolverScratch take turns, so that two neighbours have the same number in the rings of
 * those that prepare them. */
template <class Block> struct SlotCursor {
    Slot<Block::OWN_SLOTS> own;
    unsigned chunk, rank;

    __device__ explicit SlotCursor(unsigned rank_in_pair) : own(0), chunk(0), rank(rank_in_pair)
    {
    }
    __device__ bool is_own() const /* this block prepares it */
    {
        return Block::CTAS == 1 || chunk % 2 == rank;
    }
    __device__ int index() const
    {
        if constexpr (Block::CTAS == 2)
            if (!is_own()) return Block::OWN_SLOTS + static_cast<int>(chunk / 2 % Block::RECEIVED_SLOTS);
        return own.index;
    }
    __device__ int parity() const
    {
        if constexpr (Block::CTAS == 2)
            if (!is_own()) return static_cast<int>(chunk / (2 * Block::RECEIVED_SLOTS) % 2);
        return own.parity;
    }
    __device__ void advance()
    {
        if (++chunk % Block::CTAS == 0) own.advance(1);
    }

    /* Of the chunks before this one, the last that the block prepared, where two share. */
    __device__ Slot<Block::OWN_SLOTS> last_own() const
    {
        return Slot<Block::OWN_SLOTS>(static_cast<int>((chunk + 1 - rank) / 2 - 1));
    }
};

constexpr int SUBCHUNK_BYTES = SUBCHUNK * ROW;

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

    /* As the operand, with depths 16 i to 16 i + 15; `place` is its descriptor_address. */
    static __device__ uint64_t operand(uint32_t place, int i)
    {
        return tile_descriptor<column_step, depth_step>(place + i * (2 * depth_step / 16));
    }
};

/* A chunk, prepared where its inputs arrive. Rows are of a token and 64 channels (of v: 64 rows of V), swizzled: unit
 * u of 16 bytes of token i is at i * ROW + (u ^ i % 8) * 16, which copies write, wgmma reads and ldmatrix meets without
 * bank conflicts. With G the running sum of the log decay, tokens i:
 *   g: g_i, then k_i exp(G_last - G_i)     k: k_i, then k_i exp(G_i)     q: q_i, then q_i exp(G_i)     v: v_i
 * Inputs are bf16, prepared tiles fp16; tokens past the end are made zeros, but not of v. */
enum { G, K, Q };
template <class Block> struct Tokens {
    struct Half {
        unsigned char tile[!Block::OUTPUTS ? 2 : 3][Block::HALF_TOKENS]; /* G, K, Q */
    } half[DIM / 64];
    unsigned char v[Block::ROWS / 64][Block::HALF_TOKENS];

    /* K~ and Q~ side by side as B, 2 Block::CHUNK columns, depths 16 i to 16 i + 15; `place` is the descriptor_address of it all. */
    static __device__ uint64_t decayed(uint32_t place, int i)
    {
        return swizzled_descriptor<16, 8 * ROW>(place + K * Block::HALF_TOKENS / 16 +
                                                i / 4 * (sizeof(Half) / 16) + i % 4 * 2);
    }

    /* As B with 128 columns, the channels, and 16 depths, the tokens of block i. */
    static __device__ uint64_t k_rest(uint32_t place, int i)
    {
        return swizzled_descriptor<sizeof(Half), 8 * ROW>(place + i * (SUBCHUNK_BYTES / 16));
    }
};

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
 *   gamma_minus_1 = exp(G_last) - 1
 * Above their diagonals `solve` and `attend` are zeros from the start, in tiles of 8 x 8. */
template <class Block> struct Stage {
    static constexpr int CHUNK = Block::CHUNK;
    Tile<CHUNK, CHUNK, true, 128, CHUNK / 8 * 128> solve; /* first, as clear_stages has it */
    Tile<CHUNK, CHUNK, false, CHUNK / 8 * 128, 128> attend;
    float gamma_minus_1[DIM]; /* channel c at gamma_place(c) */
    float strength; /* a power of two that `solve` is divided by: 1, or above all b if those are tiny */
    float zero;
};

/* Where a channel is in gamma_minus_1: lane t of the recurrence reads the four of its accumulators of channels 16 s + 2 t,
 * + 1, + 8, + 9 at once. */
__device__ __forceinline__ int gamma_place(int channel)
{
    return channel / 16 * 16 + channel % 8 / 2 * 4 + channel / 8 % 2 * 2 + channel % 2;
}

/* Products over channels, of K~ (0) and Q~ (1) with K^, in tiles of 8 x 8 tokens: those on the diagonal; below it in a block of
 * 16, (1, 0) and (3, 2); and of the second block with the first, (2, 0), (2, 1), (3, 0), (3, 1). A team leaves
 * parts, for the solver to add up. */
template <class Block> struct Products {
    static constexpr int ON_DIAGONAL = 0, BELOW_IT = 2 * Block::SUBCHUNKS,
                         ACROSS = 3 * Block::SUBCHUNKS; /* the first tile */
    static constexpr int TILES = Block::SUBCHUNKS == 2 ? 10 : 3;
    float partial[Block::PARTIALS][Block::OUTPUTS ? 2 : 1][TILES][8][8];
};

/* What gates of a head are made with: decays are powers of two here. */
struct __align__(16) Gate
{
    float factor;        /* -exp(A_log) log2(e), never zero */
    float inverse_bound; /* 1 / (lower_bound log2(e)) */
    int head;            /* whose they are */
};

/* Of slots: inputs have come (of own ones), their norms are there (where the loader finds them), the chunk is prepared and solved, the
 * recurrence is done with it; for own ones also the other block's with what was sent there. */
template <class Block> struct ChunkRing {
    uint64_t loaded[Block::OWN_SLOTS], ready[Block::SLOTS], empty[Block::SLOTS];
    uint64_t normed[Block::LOADER_FINDS_NORMS ? Block::OWN_SLOTS : 1];
};

/* Of a chunk: where its values are to come from, of which boxes of 64 rows. And how many of the other block's chunks the loader can know
 * of that there is no slot for yet. */
struct ValueBoxes {
    int token, head, first_box, boxes;
    bool after_maps; /* where maps are brought in its slot's place before */
};
constexpr int MOST_EXPECTED = 8;

/* The solver's scratch, of tiles of 8 x 8 tokens: of L those on the diagonal transposed, and those below it in a block of 16; the
 * inverses of I + the second one of a block's on the diagonal, transposed; and the products of the second block with the
 * first. All but the first in fp16. */
template <class Block> struct SolverScratch {
    float diagonal[Block::CHUNK / 8][9][8];
    __align__(16) uint16_t lower[Block::SUBCHUNKS][8][8], inverse[Block::SUBCHUNKS][8][8],
        across[SUBCHUNK][SUBCHUNK + 8]; /* the last if there are two blocks */
};

/* Of blocks that join before they walk (at_once.cuh). */
constexpr int MAP_QUARTERS_AHEAD = 6;
template <bool joins> struct JoinPhase {
};
template <> struct JoinPhase<true> {
    Ring<MAP_QUARTERS_AHEAD> ring;
    uint64_t room_for_maps,
        room_for_tokens; /* slots are free for maps, and for tokens again, in both blocks */
    /* The block's part in it: whether it has one from the start on, or only after its first item of work; of which head, the first slot with
     * a map, so many maps, the first part of the rows, and how far to the next one. */
    enum { NEVER, BEFORE_FIRST_ITEM, AFTER_FIRST_ITEM } begins;
    int head, first_slot, maps, part, step;
};

/* What the block's pair is there for, of sequences of different lengths (mixture.cuh): a segment of a head of a long sequence, which has so
 * many pairs; or a part of the rest, which has so many and this one's number among them. */
template <bool mixed> struct Assignment {
};
template <> struct Assignment<true> {
    enum { LONG, REST, REST_SOLO } is; /* REST_SOLO: in blocks of their own */
    int sequence, head, segment, pairs, first_slot;
    int rest_pairs, rest_number;
    int last_long; /* of the sequences that are not part of the rest; or none: negative */
};

template <class Block> struct Shared {
    static_assert(sizeof(Tokens<Block>) % 1024 == 0, "what swizzling repeats after");
    static_assert(sizeof(Stage<Block>) % 16 == 0, "read 16 bytes at a time");
    __align__(1024) Tokens<Block> tokens[Block::SLOTS];
    /* Outputs on their way, in tokens' rows as those of v. */
    __align__(1024) unsigned char outputs[Block::ROOM_FOR_OUTPUTS ? Block::HALF_TOKENS : 16];
    Stage<Block> stage[Block::SLOTS];
    Products<Block> products[Block::TEAMS];
    SolverScratch<Block> scratch;
    /* 1 / |k| and 1 / |q|: of an own slot if the loader finds them, else of a team's chunk, or of every other one if its warps don't wait for
     * each other at a chunk's end. */
    float inverse_norm[Block::LOADER_FINDS_NORMS ? Block::OWN_SLOTS : Block::TEAMS]
                      [Block::PARTIALS == Block::TEAM_WARPS ? 2 : 1][Block::OUTPUTS ? 2 : 1][Block::CHUNK];
    Gate gate[Block::TEAMS][Block::TEAM_WARPS]; /* of the team's head, for each warp */
    float gate_offset[Block::TEAMS][DIM];       /* the gate's factor times dt_bias */
    ValueBoxes expected[MOST_EXPECTED];
    unsigned char apart[Block::BYTES_APART];
    WorkRing work;
    ChunkRing<Block> chunk_ring;
    Ring<Block::TEAMS> product_ring;
    JoinPhase<Block::JOINS> join;
    /* Of a team's warps, for racecheck; as many as racecheck believes are set up, since it ignores that most of them are not. */
    uint64_t meeting[FOR_RACECHECK ? ITEMS_AHEAD : 1];
    Assignment<Block::MIXED> assignment;
};
static_assert(sizeof(Shared<Block<SoloCta, EvenShares>>) <= FKDA_HOPPER_SHARED_BYTES &&
                  sizeof(Shared<Block<PairCta, EvenShares>>) <= FKDA_HOPPER_SHARED_BYTES &&
                  sizeof(Shared<Block<PairCta, Relay>>) <= FKDA_HOPPER_SHARED_BYTES &&
                  sizeof(Shared<Block<MapCta, EvenShares>>) <= FKDA_HOPPER_SHARED_BYTES &&
                  sizeof(Shared<Block<MapCta, Relay>>) <= FKDA_HOPPER_SHARED_BYTES &&
                  sizeof(Shared<Block<SoloCta, Mixed>>) <= FKDA_HOPPER_SHARED_BYTES &&
                  sizeof(Shared<Block<PairCta, Mixed>>) <= FKDA_HOPPER_SHARED_BYTES &&
                  sizeof(Shared<Block<MapCta, Mixed>>) <= FKDA_HOPPER_SHARED_BYTES,
              "keep fwd_shape.h in step");

} // namespace fkda

#endif
