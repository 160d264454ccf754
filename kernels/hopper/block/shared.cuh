/*
 * The shared memory of a CTA: chunks, the scratch of roles, and the mbarriers that barriers.cuh explains.
 */
#ifndef FKDA_HOPPER_SHARED_CUH
#define FKDA_HOPPER_SHARED_CUH

#include <stddef.h>
#include <type_traits>

#include "../../common/gate.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/control.cuh"
#include "../ptx/copies.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/patience.cuh"
#include "cursors.cuh"
#include "tiles.cuh"

namespace fkda
{

/* The rank of this CTA among the CTAs that work on the same work items. */
template <class Block> __device__ __forceinline__ int pair_rank()
{
    return Block::CTAS == 2 ? cluster_rank() : 0;
}

/* The gate of a call, at which only a general block and one for gates in fp32 look. */
template <class Block> __device__ __forceinline__ GateOfCall gate_of_call(const fkda_fwd_args &args)
{
    switch (Block::ARITHMETIC) {
    case Arithmetic::SOFTPLUS: return {GateOfCall::SOFTPLUS};
    case Arithmetic::ACTIVATED: return {GateOfCall::ACTIVATED};
    case Arithmetic::FP32_GATES:
    case Arithmetic::GENERAL: return {args.gate};
    default: return {GateOfCall::BOUNDED};
    }
}

template <class Block> __device__ __forceinline__ bool has_fp32_gates(const fkda_fwd_args &args)
{
    return Block::GENERAL ? args.g_is_f32 : Block::ARITHMETIC == Arithmetic::FP32_GATES;
}

/* What the operands and the sums of products in tf32 are multiplied by, to make up for what the tensor core
 * drops (UNTRUNCATE). Where operands become tiles as they are, only the sums are multiplied. */
template <class Block> constexpr float OPERAND_UNIT = Block::KEEPS_BITS ? UNTRUNCATE_OPERAND : 1.0f;
template <class Block> constexpr float PRODUCT_UNIT = Block::KEEPS_BITS ? 1.0f : UNTRUNCATE;

/* Whether the tensor of values is absent: gradients of outputs, in a block that goes backwards, may be all
 * zeros. */
template <class Block> __device__ __forceinline__ bool lacks_values(const fkda_fwd_args &args)
{
    return Block::BACKWARDS && !args.v;
}

/* The barriers of the slots of chunks. */
template <class Block> struct ChunkRing {
    uint64_t loaded[Block::OWN_SLOTS], ready[Block::SLOTS], empty[Block::SLOTS];
    uint64_t normed[Block::LOADER_FINDS_NORMS ? Block::OWN_SLOTS : 1];
};

/* Where the values of a chunk come from, in boxes of 64 rows. */
struct ValueBoxes {
    int row, token, head;
    unsigned char first_box, boxes;
    bool after_maps;          /* the slot holds maps of the join phase before it may hold the chunk */
    unsigned char checkpoint; /* what CheckpointRing::number_of says of the chunk */
};

/* The most chunks of the other CTA that may wait for a received slot. */
constexpr int MOST_EXPECTED = 8;

/* Quarters of maps that are in shared memory during the join phase. */
constexpr int MAP_QUARTERS_AHEAD = 6;

/* Takes the place of a member that a block does not have. */
struct Nothing {
};

/* The join phase of a relay (join/relay_join.cuh): its barriers, and which rows this CTA carries through the
 * maps. */
struct JoinPhase {
    Ring<MAP_QUARTERS_AHEAD> ring;
    uint64_t room_for_maps, room_for_tokens;
    bool has_rows;                       /* false: the CTA takes no part in the join phase */
    int head, first_slot, maps;          /* first_slot: of the segments with maps; maps: how many */
    int first_row_group, row_group_step; /* the CTA carries every row_group_step-th group of 16 rows */
};

/* What the loader knows of a work item in pieces (schedule/pieces.cuh). */
struct PieceNotes {
    bool in_pieces; /* `rest` is what is left of a work item */
    bool has_state; /* the state before `rest` is in the workspace */
    WorkItem rest;
    LoadersNotes of_rest;
    int begin; /* tokens of the sequence before `rest` */
    int after; /* checkpoints up to this token of the sequence are in pieces that were given out */
};

/* What the loader knows of the checkpoints of the work item that it loads (block/checkpoint_list.cuh). */
struct CheckpointNotes {
    int sequence, head;
    int begin, end;      /* of the work item, in tokens of the sequence */
    int offset;          /* the next checkpoint */
    int number;          /* of the next entry of the ring */
    int first_row_is_of; /* this sequence */
    long long first_row; /* with `every`: of the sequence */
    long long row;       /* with `every`: of the next checkpoint */
};

/* Checkpoints on their way from the loader to the recurrence. */
constexpr int CHECKPOINTS_AHEAD = 4;
template <class Block> struct CheckpointRing {
    struct __align__(16) Entry
    {
        void *to; /* where the head's state goes; null: nowhere */
        int more; /* the state after the same chunk goes to the next entry's place too */
    };
    Entry entry[CHECKPOINTS_AHEAD];
    Ring<CHECKPOINTS_AHEAD> ring;
    /* For each slot of the chunk ring: 0, or if the state after the chunk is a checkpoint, one more than the
     * number of its first entry. Entries are numbered modulo two rounds of the ring. */
    unsigned char number_of[Block::SLOTS];
};

/* The end of a phase (end_phase in barriers.cuh). */
struct PhaseEnd {
    uint64_t others_done;     /* all warps but the loader's have ended their roles */
    int chunks, in_other_cta; /* that the loaders of a pair's CTAs have met in this phase */
};

/* The mixed schedule: what the CTA's pair is there for. */
struct MixedAssignment {
    /* LONG: one segment of one head of a long sequence. REST: a share of all other sequences; REST_SOLO: as
     * REST, and the CTAs of the pair work as solo CTAs. */
    enum { LONG, REST, REST_SOLO } is;
    int sequence, head, segment, pairs, first_slot; /* LONG; pairs: CTA pairs of each head of the sequence */
    int rest_pairs, rest_number; /* REST: all pairs that have a share, and this one's number */
    int last_long; /* all long sequences are among the sequences up to this one; negative: none is long */
};

template <class Block> struct Shared {
    static_assert(sizeof(Tokens<Block>) % 1024 == 0, "the swizzling of rows repeats after 1024 bytes");
    static_assert(sizeof(Stage<Block>) % 16 == 0, "stages are copied in units of 16 bytes");

    /* Chunks. */
    __align__(1024) Tokens<Block> tokens[Block::SLOTS];
    __align__(
        1024) unsigned char outputs[Block::ROOM_FOR_OUTPUTS ? Block::HALF_TOKENS : 16]; /* rows as in v */
    Stage<Block> stage[Block::SLOTS];

    /* The preparation and the solver. */
    Products<Block> products[Block::TEAMS];
    SolverScratch<Block> scratch;
    /* 1 / |k| and 1 / |q| of each token: for each own slot if the loader finds them, otherwise for each team.
     * A team has two places in turn if its warps do not meet at the end of a chunk. */
    float inverse_norm[Block::LOADER_FINDS_NORMS ? Block::OWN_SLOTS : Block::TEAMS]
                      [Block::PARTIALS == Block::TEAM_WARPS ? 2 : 1][Block::QUERIES ? 2 : 1][Block::CHUNK];
    HeadGate gate[Block::TEAMS][Block::TEAM_WARPS]; /* each warp has its own */
    float gate_offset[Block::TEAMS][DIM];

    /* The loader's own notes. */
    ValueBoxes expected[MOST_EXPECTED];

    /* Barriers, behind the bytes that the other phase of a relay needs. */
    unsigned char apart[Block::BYTES_APART];
    WorkRing work;
    ChunkRing<Block> chunk_ring;
    Ring<Block::TEAMS> product_ring;
    std::conditional_t<Block::JOINS, JoinPhase, Nothing> join;
    PhaseEnd end;
    uint64_t meeting[FOR_RACECHECK ? Block::TEAMS : 1]; /* for racecheck alone, see prepare.cuh */
    std::conditional_t<Block::MIXED, MixedAssignment, Nothing> assignment;
    std::conditional_t<Block::CHECKPOINTS, CheckpointRing<Block>, Nothing> checkpoints;
    std::conditional_t<Block::CHECKPOINTS, CheckpointNotes, Nothing> checkpoint_notes; /* the loader's */
    std::conditional_t<Block::PIECES, PieceNotes, Nothing> pieces;                     /* the loader's */
};
template <class Block> constexpr bool FITS = sizeof(Shared<Block>) <= FKDA_HOPPER_SHARED_BYTES;
static_assert(FITS<Block<SoloCta, EvenShares>> && FITS<Block<PairCta, EvenShares>> &&
                  FITS<Block<MapCta, EvenShares>> && FITS<Block<PairCta, Relay>> &&
                  FITS<Block<MapCta, Relay>> && FITS<Block<SoloCta, Mixed>> && FITS<Block<PairCta, Mixed>> &&
                  FITS<Block<MapCta, Mixed>>,
              "an SM has no more shared memory");

} // namespace fkda

#endif
