/* Which pieces of work a block, or a pair of blocks that share, gets, and in which order. */
#ifndef FKDA_HOPPER_DEAL_CUH
#define FKDA_HOPPER_DEAL_CUH

#include "costs.h"
#include "cut.cuh"
#include "fwd_args.h"
#include "shared.cuh"

namespace fkda
{

/* What pieces are, whoever deals them. */
template <class Kind> struct Dealing {
    const fkda_fwd_args &args;
    Cut cut;
    int rank; /* of the block among those that share */

    __device__ Dealing(const fkda_hopper_fwd_args &all, int block_rank)
        : args(all.fwd), cut{all.fwd, all.cut}, rank(block_rank)
    {
    }

    static __device__ Piece none()
    {
        return {0, 0, 0, 0, NO_PIECE, nullptr, nullptr, nullptr};
    }

    /* A head of a sequence or of a segment: from the caller's state, or what the workspace has for the segment, to the caller's or the
     * next segment's. Blocks have the halves of its rows or, for maps, a segment's map and its state. */
    __device__ Piece piece_of(const fkda_segment &s, int h) const
    {
        const long long task = static_cast<long long>(s.sequence) * args.heads + h;
        const long long slot = (static_cast<long long>(s.slot) * args.heads + h) * (DIM * DIM);
        const long long next_slot = slot + static_cast<long long>(args.heads) * (DIM * DIM);
        if (!Kind::OUTPUTS) {
            float *to = rank == 0 ? cut.cut.maps + slot : cut.cut.states + next_slot;
            Piece piece = {s.begin, h, s.length, 0, rank == 0 ? UNIT : 0, nullptr, to, nullptr};
            if (Kind::AT_ONCE && rank == 1 && s.position & FKDA_SEGMENT_FIRST) take_initial(piece, task);
            return piece;
        }
        Piece piece = {s.begin, h, s.length, Kind::ROWS * rank, 0, nullptr, nullptr, nullptr};
        if (s.position & FKDA_SEGMENT_FIRST)
            take_initial(piece, task);
        else
            piece.initial = cut.cut.states + slot, piece.kind |= INITIAL_KEPT;
        if (!(s.position & FKDA_SEGMENT_LAST)) { /* the states after later ones have come from the join */
            if (s.position & FKDA_SEGMENT_FIRST)
                piece.final = cut.cut.states + next_slot, piece.kind |= FINAL_KEPT;
        } else if (args.final_state) {
            piece.final = user_state(args.final_state, task);
            if (args.state_is_bf16) piece.kind |= FINAL_BF16;
        }
        return piece;
    }

    __device__ void take_initial(Piece &piece, long long task) const
    {
        if (!args.initial_state) return;
        piece.initial = user_state(const_cast<void *>(args.initial_state), task);
        if (args.state_is_bf16) piece.kind |= INITIAL_BF16;
    }

    __device__ void *user_state(void *states, long long task) const
    {
        return static_cast<char *>(states) + task * (DIM * DIM) * (args.state_is_bf16 ? 2 : 4);
    }
};

/* Among whom a dealer deals out what there is: here all of it, among all workers of the grid. */
template <class Kind> struct WholeGrid {
    __device__ explicit WholeGrid(const fkda_hopper_fwd_args &)
    {
    }
    static __device__ int workers()
    {
        return static_cast<int>(gridDim.x) / Kind::SHARERS;
    }
    static __device__ int worker()
    {
        return static_cast<int>(blockIdx.x) / Kind::SHARERS;
    }
    static __device__ bool leaves_out(const fkda_segment &)
    {
        return false;
    }
    static __device__ bool one_each(int pieces)
    {
        return pieces <= workers();
    }
};

/*
 * All pieces, of each sequence or segment every head, are laid end to end, and each worker (a block, or a pair of them) gets an equal
 * share of the line. Where a border falls within a piece, the worker that ends there leaves the piece's first chunks to the one that
 * begins there, takes the state from it when all else is done, and goes on to the piece's end. A share is no shorter than the longest
 * piece, so the first chunks are over before the others are due (McNaughton's rule for jobs that can be interrupted). Workers get
 * shares from the line's end on, so that each waits for one that was started before it.
 *
 * Without room for states at the borders pieces are not divided: who has more than half of one gets all of it. As many workers as
 * pieces have one each, and segments' maps, which are as long as each other, are dealt out in turn.
 *
 * Called by all lanes of the loading warps; blocks that share meet the same pieces.
 */
template <class Kind, class Among = WholeGrid<Kind>> struct Dealer : Dealing<Kind> {
    using Dealing<Kind>::args, Dealing<Kind>::cut, Dealing<Kind>::rank;
    static constexpr int CHUNK = Kind::CHUNK;
    const fkda_handoff &handoff;
    const Among among;
    int work, entries;
    int share_number; /* from the line's beginning on */
    int entry, head;  /* the next piece */
    int at;           /* where it begins on the line, in chunks */
    int begin, end;   /* of the share */
    int most;         /* of the line that a piece takes */
    bool one_each;

    __device__ Dealer(const fkda_hopper_fwd_args &a, int block_rank, int lane)
        : Dealing<Kind>(a, block_rank), handoff(a.handoff), among(a), work(a.work),
          entries(cut.entries(a.work)), entry(0), head(0), at(0), begin(0), end(0), most(0)
    {
        share_number = among.workers() - 1 - among.worker();
        one_each = among.one_each(entries * args.heads);
        if (in_turn())
            entry = among.worker() / args.heads, head = among.worker() % args.heads;
        else
            find_share(lane);
    }

    __device__ bool in_turn() const
    {
        return !Kind::OUTPUTS || one_each;
    }

    static __device__ int chunks_of(const fkda_segment &s)
    {
        return (s.length + CHUNK - 1) / CHUNK;
    }

    /* Part of the line that a piece takes. Sequences that overlap, which they should not, could make it longer than an int can tell; then
     * they count for less. */
    __device__ int weight_of(const fkda_segment &s) const
    {
        if (among.leaves_out(s)) return 0;
        return min(chunks_of(s) + FKDA_CHUNKS_PER_SWITCH, most);
    }

    __device__ int weight(int e) const
    {
        return e < entries ? weight_of(cut.entry(work, e)) : 0;
    }

    __device__ void find_share(int lane)
    {
        most = 0x7fff0000 / max(entries * args.heads, 1);
        const int each = (entries + 31) / 32; /* entries of a lane, one after the other */
        int own = 0;                          /* their part of the line */
        int longest = 0;
#pragma unroll 1
        for (int i = 0; i < each; i++) {
            const int one = weight(lane * each + i);
            own += one, longest = max(longest, one);
        }
        own *= args.heads;
        const int up_to = sum_up_to(own, lane);
        longest = static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(longest)));
        const int all = __shfl_sync(~0u, up_to, 31);
        const int share = max((all + among.workers() - 1) / among.workers(), longest);
        begin = share_number * share, end = begin + share;
        entry = entries; /* nothing, if the line ends before */
        unsigned beyond = __ballot_sync(~0u, up_to > begin);
        if (!beyond) return;
        const int lane_there =
            __ffs(static_cast<int>(beyond)) - 1; /* who has the entry in which the share begins */
        at = __shfl_sync(~0u, up_to - own, lane_there);
#pragma unroll 1
        for (int e = lane_there * each;; e += 32) {
            const int one = weight(e + lane);
            const int here = sum_up_to(one * args.heads, lane);
            beyond = __ballot_sync(~0u, at + here > begin);
            if (beyond) {
                const int first = __ffs(static_cast<int>(beyond)) - 1;
                const int head_weight = __shfl_sync(~0u, one, first);
                at += __shfl_sync(~0u, here, first) - head_weight * args.heads;
                entry = e + first, head = (begin - at) / head_weight;
                at += head * head_weight;
                return;
            }
            at += __shfl_sync(~0u, here, 31);
        }
    }

    /* The sum of x of all lanes up to this one. */
    static __device__ int sum_up_to(int x, int lane)
    {
        for (int by = 1; by < 32; by *= 2) {
            const int other = __shfl_up_sync(~0u, x, by);
            if (lane >= by) x += other;
        }
        return x;
    }

    /* How many chunks of a piece are done by the worker in whose share it ends, which has so much of its weight. */
    __device__ int first_part(int chunks, int beyond) const
    {
        if (!handoff.states) return 2 * beyond > chunks + FKDA_CHUNKS_PER_SWITCH ? chunks : 0;
        return beyond < FKDA_LEAST_CHUNKS_DIVIDED            ? 0
               : beyond > chunks - FKDA_LEAST_CHUNKS_DIVIDED ? chunks
                                                             : beyond;
    }

    __device__ Piece deal()
    {
        while (entry < entries && (in_turn() || at < end)) {
            const fkda_segment s = cut.entry(work, entry);
            if (among.leaves_out(s)) {
                entry++, head = 0;
                continue;
            }
            const int chunks = chunks_of(s);
            const int from = at, to = at + weight_of(s);
            Piece piece = this->piece_of(s, head);
            at = to;
            head += in_turn() ? among.workers() : 1;
            if (head >= args.heads) entry += head / args.heads, head %= args.heads;
            if (in_turn()) return piece;
            if (from < begin) {
                const int part = first_part(chunks, to - begin);
                if (!part) continue;
                if (part < chunks) hand_on(piece, part * CHUNK);
            } else if (to > end) {
                const int part = first_part(chunks, to - end);
                if (part && part == chunks) continue;
                if (part) go_on(piece, part * CHUNK);
            }
            return piece;
        }
        return Dealing<Kind>::none();
    }

    /* Only the first so many tokens; the state goes to the border where the share begins. */
    __device__ void hand_on(Piece &piece, int tokens) const
    {
        piece.length = tokens;
        piece.final = state_at_border(share_number);
        piece.flags = flags_at_border(share_number);
        piece.kind = (piece.kind & ~FINAL_BF16) | FINAL_KEPT | SIGNAL;
    }

    /* Without so many tokens; the state comes from the border where the share ends. */
    __device__ void go_on(Piece &piece, int tokens) const
    {
        piece.begin += tokens, piece.length -= tokens;
        piece.initial = state_at_border(share_number + 1);
        piece.flags = flags_at_border(share_number + 1);
        piece.kind = (piece.kind & ~INITIAL_BF16) | INITIAL_KEPT | AWAIT;
    }

    __device__ float *state_at_border(int border) const
    {
        return handoff.states + static_cast<long long>(border) * (DIM * DIM);
    }

    __device__ int *flags_at_border(int border) const
    {
        return handoff.flags + FKDA_HANDOFF_FLAGS * border + Kind::RECURRENCE_WARPS * rank;
    }
};

} // namespace fkda

#endif
