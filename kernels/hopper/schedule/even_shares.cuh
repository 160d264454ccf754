/* Which items of work a block, or a pair of blocks that share, gets, and in which order. */
#ifndef FKDA_HOPPER_EVEN_SHARES_CUH
#define FKDA_HOPPER_EVEN_SHARES_CUH

#include "../block/shared.cuh"
#include "../costs.h"
#include "../fwd_args.h"
#include "cut.cuh"

namespace fkda
{

/* What items are, whoever deals them. */
template <class Block> struct WorkItemMaker {
    const fkda_fwd_args &args;
    Cut cut;
    int rank; /* of the block workers those that share */

    __device__ WorkItemMaker(const fkda_hopper_fwd_args &all, int rank_in_pair)
        : args(all.fwd), cut{all.fwd, all.cut}, rank(rank_in_pair)
    {
    }

    static __device__ WorkItem none()
    {
        return {0, 0, 0, 0, NO_WORK, nullptr, nullptr, nullptr};
    }

    /* A head of a sequence or of a segment: from the caller's state, or what the workspace has for the segment, to the caller's or the
     * next segment's. SolverScratch have the halves of its rows or, for maps, a segment's map and its state. */
    __device__ WorkItem item_of(const fkda_segment &s, int h) const
    {
        const long long task = static_cast<long long>(s.sequence) * args.heads + h;
        const long long slot = (static_cast<long long>(s.slot) * args.heads + h) * (DIM * DIM);
        const long long next_slot = slot + static_cast<long long>(args.heads) * (DIM * DIM);
        if (!Block::OUTPUTS) {
            float *to = rank == 0 ? cut.cut.maps + slot : cut.cut.states + next_slot;
            WorkItem item = {s.begin, h, s.length, 0, rank == 0 ? IS_MAP : 0, nullptr, to, nullptr};
            if (Block::RELAYS && rank == 1 && s.position & FKDA_SEGMENT_FIRST) take_initial(item, task);
            return item;
        }
        WorkItem item = {s.begin, h, s.length, Block::ROWS * rank, 0, nullptr, nullptr, nullptr};
        if (s.position & FKDA_SEGMENT_FIRST)
            take_initial(item, task);
        else
            item.initial = cut.cut.states + slot, item.attributes |= INITIAL_IMAGE;
        if (!(s.position & FKDA_SEGMENT_LAST)) { /* the states after later ones have come from the join */
            if (s.position & FKDA_SEGMENT_FIRST)
                item.final = cut.cut.states + next_slot, item.attributes |= FINAL_IMAGE;
        } else if (args.final_state) {
            item.final = user_state(args.final_state, task);
            if (args.state_is_bf16) item.attributes |= FINAL_BF16;
        }
        return item;
    }

    __device__ void take_initial(WorkItem &item, long long task) const
    {
        if (!args.initial_state) return;
        item.initial = user_state(const_cast<void *>(args.initial_state), task);
        if (args.state_is_bf16) item.attributes |= INITIAL_BF16;
    }

    __device__ void *user_state(void *states, long long task) const
    {
        return static_cast<char *>(states) + task * (DIM * DIM) * (args.state_is_bf16 ? 2 : 4);
    }
};

/* Workers whom a source deals out what there is: here all of it, workers all workers of the grid. */
template <class Block> struct AllWorkers {
    __device__ explicit AllWorkers(const fkda_hopper_fwd_args &)
    {
    }
    static __device__ int count()
    {
        return static_cast<int>(gridDim.x) / Block::CTAS;
    }
    static __device__ int index()
    {
        return static_cast<int>(blockIdx.x) / Block::CTAS;
    }
    static __device__ bool skips(const fkda_segment &)
    {
        return false;
    }
    static __device__ bool one_each(int items)
    {
        return items <= count();
    }
};

/*
 * All items, of each sequence or segment every head, are laid end to end, and each worker (a block, or a pair of them) gets an equal
 * share of the line. Where a border falls within a item, the worker that ends there leaves the item's first chunks to the one that
 * begins there, takes the state from it when all else is done, and goes on to the item's end. A share is no shorter than the longest
 * item, so the first chunks are over before the others are due (McNaughton's rule for jobs that can be interrupted). Workers get
 * shares from the line's end on, so that each waits for one that was started before it.
 *
 * Without room for states at the borders items are not divided: who has more than half of one gets all of it. As many workers as
 * items have one each, and segments' maps, which are as long as each other, are published out in turn.
 *
 * Called by all lanes of the loading warps; blocks that share meet the same items.
 */
template <class Block, class Workers> struct EvenSharesSource : WorkItemMaker<Block> {
    using WorkItemMaker<Block>::args, WorkItemMaker<Block>::cut, WorkItemMaker<Block>::rank;
    static constexpr int CHUNK = Block::CHUNK;
    const fkda_handoff &handoff;
    const Workers workers;
    int work, entries;
    int share_number; /* from the line's beginning on */
    int entry, head;  /* the next item */
    int at;           /* where it begins on the line, in chunks */
    int begin, end;   /* of the share */
    int most;         /* of the line that a item takes */
    bool one_each;

    __device__ EvenSharesSource(const fkda_hopper_fwd_args &a, int rank_in_pair, int lane)
        : WorkItemMaker<Block>(a, rank_in_pair), handoff(a.handoff), workers(a), work(a.work),
          entries(cut.entries(a.work)), entry(0), head(0), at(0), begin(0), end(0), most(0)
    {
        share_number = workers.count() - 1 - workers.index();
        one_each = workers.one_each(entries * args.heads);
        if (in_turn())
            entry = workers.index() / args.heads, head = workers.index() % args.heads;
        else
            find_share(lane);
    }

    __device__ bool in_turn() const
    {
        return !Block::OUTPUTS || one_each;
    }

    static __device__ int chunks_of(const fkda_segment &s)
    {
        return (s.length + CHUNK - 1) / CHUNK;
    }

    /* Part of the line that a item takes. Sequences that overlap, which they should not, could make it longer than an int can tell; then
     * they count for less. */
    __device__ int weight_of(const fkda_segment &s) const
    {
        if (workers.skips(s)) return 0;
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
        int own = 0;                          /* their first of the line */
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
        const int share = max((all + workers.count() - 1) / workers.count(), longest);
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

    /* How many chunks of a item are done by the worker in whose share it ends, which has so much of its weight. */
    __device__ int first_chunks(int chunks, int beyond) const
    {
        if (!handoff.states) return 2 * beyond > chunks + FKDA_CHUNKS_PER_SWITCH ? chunks : 0;
        return beyond < FKDA_LEAST_CHUNKS_DIVIDED            ? 0
               : beyond > chunks - FKDA_LEAST_CHUNKS_DIVIDED ? chunks
                                                             : beyond;
    }

    __device__ WorkItem next()
    {
        while (entry < entries && (in_turn() || at < end)) {
            const fkda_segment s = cut.entry(work, entry);
            if (workers.skips(s)) {
                entry++, head = 0;
                continue;
            }
            const int chunks = chunks_of(s);
            const int from = at, to = at + weight_of(s);
            WorkItem item = this->item_of(s, head);
            at = to;
            head += in_turn() ? workers.count() : 1;
            if (head >= args.heads) entry += head / args.heads, head %= args.heads;
            if (in_turn()) return item;
            if (from < begin) {
                const int first = first_chunks(chunks, to - begin);
                if (!first) continue;
                if (first < chunks) end_at_border(item, first * CHUNK);
            } else if (to > end) {
                const int first = first_chunks(chunks, to - end);
                if (first && first == chunks) continue;
                if (first) begin_at_border(item, first * CHUNK);
            }
            return item;
        }
        return WorkItemMaker<Block>::none();
    }

    /* Only the first so many tokens; the state goes to the border where the share begins. */
    __device__ void end_at_border(WorkItem &item, int tokens) const
    {
        item.length = tokens;
        item.final = border_state(share_number);
        item.flags = border_flags(share_number);
        item.attributes = (item.attributes & ~FINAL_BF16) | FINAL_IMAGE | SIGNALS_FINAL;
    }

    /* Without so many tokens; the state comes from the border where the share ends. */
    __device__ void begin_at_border(WorkItem &item, int tokens) const
    {
        item.begin += tokens, item.length -= tokens;
        item.initial = border_state(share_number + 1);
        item.flags = border_flags(share_number + 1);
        item.attributes = (item.attributes & ~INITIAL_BF16) | INITIAL_IMAGE | AWAITS_INITIAL;
    }

    __device__ float *border_state(int border) const
    {
        return handoff.states + static_cast<long long>(border) * (DIM * DIM);
    }

    __device__ int *border_flags(int border) const
    {
        return handoff.flags + FKDA_HANDOFF_FLAGS * border + Block::RECURRENCE_WARPS * rank;
    }
};

} // namespace fkda

#endif
