/*
 * Work items, and how one is made of a segment and a head.
 *
 * A work item is some rows of the state of one head, through one sequence, segment or part of a segment. The
 * loader of a CTA takes work items from the schedule and hands them to all other roles, which therefore meet
 * them in one order. Both CTAs of a pair meet the same heads and tokens in the same order, without talking
 * about it.
 */
#ifndef FKDA_HOPPER_WORK_ITEM_CUH
#define FKDA_HOPPER_WORK_ITEM_CUH

#include "../../common/slots.cuh"
#include "../bwd/chunks/chunk_args.h"
#include "cut.cuh"

namespace fkda
{

/* Where a walk of the backward pass stores what it carries (StateWalk and GradientWalk in block/cta.cuh). */
struct ItemImages {
    int before; /* tokens of the sequence before the work item */
    int first;  /* the slot of the sequence's first chunk, or NO_IMAGES: nothing is stored */
};
constexpr int NO_IMAGES = -0x40000000;

struct WorkItem {
    int row, token;      /* the row of the batch, and the first token, counted in this row */
    int head, length;    /* length: tokens */
    int first_row;       /* of the state's 128 */
    int attributes;      /* bits, see below */
    const void *initial; /* the head's state before the item; null: zeros, or for IS_MAP the identity */
    void *final;         /* where the head's state after the item goes; null: nowhere */
    int *flags;          /* one for each recurrence warp, for AWAITS_INITIAL or SIGNALS_FINAL */
    union {
        int *read_flags;   /* one for each recurrence warp, for SIGNALS_READ or AWAITS_READ */
        ItemImages images; /* of blocks with IMAGES */
    };
};

/* A work item with what the loader alone needs of it. */
struct LoadersNotes {
    int qk_head; /* the head of q and k */
    int sequence;
    int before; /* tokens between the start of what the schedule gave out and this piece of it (pieces.cuh) */
};
struct LoadedItem : WorkItem, LoadersNotes {
};

/* Bits of WorkItem::attributes. */
enum {
    NO_WORK = 1,         /* there are no more work items */
    INITIAL_BF16 = 2,    /* `initial` is bf16; otherwise it is fp32 */
    FINAL_BF16 = 4,      /* `final` is bf16; otherwise it is fp32 */
    IS_MAP = 8,          /* computes M: the state starts as the identity, and all values are zeros */
    AWAITS_INITIAL = 16, /* `initial` is there once the warp's flag is set */
    SIGNALS_FINAL = 32,  /* another CTA waits for `final`: the warp sets its flag */
    INITIAL_IMAGE = 64,  /* `initial` is in the workspace, as a StateImage (join/layouts.cuh) */
    FINAL_IMAGE = 128,   /* `final` is in the workspace, as a StateImage */
    AFTER_JOIN = 256,    /* the CTA has taken part in the join phase before this item */
    NOT_LAST = 512,      /* another work item follows in this phase */
    SIGNALS_READ = 1024, /* another CTA overwrites `initial`: once it is read, the warp sets its read flag */
    AWAITS_READ = 2048,  /* `final` may be overwritten once the warp's read flag is set */
    JOINS_BEFORE =
        4096, /* the CTA takes part in the join phase right before this item, even if it is NO_WORK */
    /* Pieces of a work item with checkpoints inside chunks (pieces.cuh): */
    AFTER_PROBE = 8192,    /* the checkpoint behind the first 16 tokens is a probe's */
    SCALES_CHOSEN = 16384, /* a piece before it has chosen scales for the rows */
    SAVES = 32768,         /* `final` is a PieceState, to which the state goes as it is */
    RESTORES = 65536,      /* `initial` is a PieceState, from which the state comes as it was */
    /* From this bit on: LoadedItem::before modulo 128, in units of 16 tokens. */
    PHASE_BIT = 20,
};

/* Where a token of a head begins in a tensor of rows of 128, in elements. Steps from token to token and from
 * head to head have 31 bits there, which takes fewer instructions and registers than 64. */
__device__ __forceinline__ long long token_place(const fkda_token_strides &strides, int row, int token,
                                                 int head)
{
    return row * strides.batch + static_cast<long long>(token) * static_cast<int>(strides.token) +
           static_cast<long long>(head) * static_cast<int>(strides.head);
}

/* Makes work items of segments; the base of every schedule's source. */
template <class Block> struct WorkItemMaker {
    const fkda_fwd_args &args;
    const int &launch_work; /* FKDA_SEQUENCES, ... */
    CutFor<Block::BACKWARDS> cut;
    int rank; /* of the CTA in its pair */

    __device__ WorkItemMaker(const fkda_hopper_fwd_args &all, int rank_in_pair)
        : args(all.fwd), launch_work(all.work), cut{all.fwd, all.cut}, rank(rank_in_pair)
    {
    }

    static __device__ LoadedItem none()
    {
        LoadedItem item = {};
        item.attributes = NO_WORK;
        return item;
    }

    /* Head h of a segment or of a whole sequence. With outputs the CTAs of a pair have half of the rows each.
     * Without outputs the pair's first CTA computes M and the second one B or, of a first segment, the state
     * after it. */
    __device__ LoadedItem item_of(const fkda_segment &s, int h) const
    {
        LoadedItem item = {};
        item.row = args.cu_seqlens ? 0 : s.sequence;
        item.token = static_cast<int>(s.begin - item.row * args.tokens);
        item.head = h, item.qk_head = args.group == 1 ? h : h / args.group;
        item.length = s.length, item.sequence = s.sequence;
        const long long slot = (static_cast<long long>(s.slot) * args.heads + h) * (DIM * DIM);
        const long long next_slot = /* the last slot has none, and only a damaged list asks for it */
            s.slot + 1 < cut.cut.slots ? slot + static_cast<long long>(args.heads) * (DIM * DIM) : slot;
        if (Block::MAPS) {
            item.final = rank == 0 ? cut.cut.maps + slot : cut.cut.states + next_slot;
            if (rank == 0) item.attributes = IS_MAP;
            if (Block::RELAYS && rank == 1 && s.position & FKDA_SEGMENT_FIRST) take_initial(item, s.sequence);
            return item;
        }
        item.first_row = Block::ROWS * rank;
        if constexpr (Block::IMAGES) {
            take_states_of_walk(item, s, slot);
            return item;
        }
        if (s.position & FKDA_SEGMENT_FIRST)
            take_initial(item, s.sequence);
        else
            item.initial = cut.cut.states + slot, item.attributes |= INITIAL_IMAGE;
        if (!(s.position & FKDA_SEGMENT_LAST)) { /* states after later segments have come from the join */
            if (s.position & FKDA_SEGMENT_FIRST)
                item.final = cut.cut.states + next_slot, item.attributes |= FINAL_IMAGE;
        } else {
            item.final = caller_state(args.final_state, find_final_state(args, s.sequence, h));
            if (args.state_is_bf16) item.attributes |= FINAL_BF16;
        }
        return item;
    }

    /* The states before and after an item of a walk, and where its images go; `slot` is where the segment's
     * slot begins in `cut.states`. A walk back begins with the last segment, and the slot of segment i has
     * what is behind segment i. Of inner segments what they make of zeros is wanted alone, for the join. */
    __device__ void take_states_of_walk(LoadedItem &item, const fkda_segment &s, long long slot) const
    {
        constexpr int BEGIN = Block::BACKWARDS ? FKDA_SEGMENT_LAST : FKDA_SEGMENT_FIRST,
                      END = Block::BACKWARDS ? FKDA_SEGMENT_FIRST : FKDA_SEGMENT_LAST;
        constexpr int CHUNK = FKDA_HOPPER_BWD_CHUNK;
        const int next = s.slot + (Block::BACKWARDS ? -1 : 1);
        const long long step = static_cast<long long>(args.heads) * (DIM * DIM);
        const long long begin =
            args.cu_seqlens ? sequence_border(args, s.sequence) : s.sequence * args.tokens;
        const bool is_inner = launch_work == FKDA_INNER_SEGMENTS;
        item.images.before = static_cast<int>(s.begin - begin);
        item.images.first = is_inner ? NO_IMAGES
                            : args.cu_seqlens
                                ? static_cast<int>(begin / CHUNK) + s.sequence
                                : static_cast<int>((args.tokens + CHUNK - 1) / CHUNK) * s.sequence;
        if (s.position & BEGIN)
            take_initial(item, s.sequence);
        else if (!is_inner)
            item.initial = cut.cut.states + slot, item.attributes |= INITIAL_IMAGE;
        if (s.position & END)
            item.final = caller_state(args.final_state, find_final_state(args, s.sequence, item.head), false);
        else if ((is_inner || s.position & BEGIN) && next >= 0 && next < cut.cut.slots)
            item.final = cut.cut.states + slot + (Block::BACKWARDS ? -step : step),
            item.attributes |= FINAL_IMAGE;
    }

    /* The caller's initial state, if the sequence has one. */
    __device__ void take_initial(LoadedItem &item, int sequence) const
    {
        item.initial = caller_state(args.initial_state, find_initial_state(args, sequence, item.head));
        if (args.state_is_bf16) item.attributes |= INITIAL_BF16;
    }

    /* `at` is from find_initial_state() or find_final_state(). Null if there is no such state. */
    __device__ void *caller_state(const fkda_state_args &states, long long at) const
    {
        return caller_state(states, at, args.state_is_bf16);
    }
    static __device__ void *caller_state(const fkda_state_args &states, long long at, bool is_bf16)
    {
        return at == NO_SLOT ? nullptr : static_cast<char *>(states.data) + at * (is_bf16 ? 2 : 4);
    }
};

} // namespace fkda

#endif
