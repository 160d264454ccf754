/*
 * Even shares: the schedule that gives each worker (a solo CTA or a CTA pair) an equal share of all work
 * items.
 *
 * Algorithm. All work items, of each sequence or segment every head, are laid end to end on a line, measured
 * in chunks, and the line is divided into equal shares. Where a border falls inside a work item, the item is
 * divided: the worker whose share begins at the border computes the item's first chunks, before anything
 * else, and hands the state over in the workspace. The worker whose share ends at the border computes the
 * item's other chunks, after everything else, once the state is there: each warp waits at a flag for its 16
 * rows.
 *
 * Why. A share is at least as long as the longest work item, so the first chunks are over before the other
 * chunks are due (McNaughton's rule for jobs that may be interrupted). Workers have shares from the line's
 * end on: each waits only for a worker with a lower index, which was started before it; otherwise a worker
 * could wait for one that never starts.
 *
 * Exceptions. Without handoffs work items are not divided, and a worker has all items of which more than half
 * lies in its share. If there are no more work items than workers, each worker has one item at most. Items
 * without outputs (segments' maps) all have about one length and are given out in turn.
 */
#ifndef FKDA_HOPPER_EVEN_SHARES_CUH
#define FKDA_HOPPER_EVEN_SHARES_CUH

#include "../block/block.cuh"
#include "../costs.h"
#include "work_item.cuh"

namespace fkda
{

/* The workers that have shares: here all workers of the grid. */
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
    /* Whether the segment is no work of these workers. */
    static __device__ bool skips(const fkda_segment &)
    {
        return false;
    }
    /* Whether each worker has one of `items` work items, or none. */
    static __device__ bool one_each(int items)
    {
        return items <= count();
    }
};

/* Gives out the work items of one worker. All lanes of the loader call it; the loaders of a pair's CTAs get
 * the same heads and tokens. */
template <class Block, class Workers> struct EvenSharesSource : WorkItemMaker<Block> {
    using WorkItemMaker<Block>::args, WorkItemMaker<Block>::cut, WorkItemMaker<Block>::rank;
    static constexpr int CHUNK = Block::CHUNK;
    const fkda_handoff &handoff;
    const Workers workers;
    int work, entries; /* the list that the launch works through, and its length */
    int share_number;  /* from the line's beginning on */
    int entry, head;   /* the next work item */
    int at;            /* where the next work item begins on the line, in chunks */
    int begin, end;    /* of the share */
    int most;          /* chunks of the line that a work item takes, at most */
    bool one_each;

    __device__ EvenSharesSource(const fkda_hopper_fwd_args &a, int rank_in_pair, int lane)
        : WorkItemMaker<Block>(a, rank_in_pair), handoff(a.handoff), workers(a), work(a.work),
          entries(Cut::of_first_lane(cut.entries(a.work))), entry(0), head(0), at(0), begin(0), end(0),
          most(0)
    {
        share_number = workers.count() - 1 - workers.index();
        one_each = workers.one_each(entries * args.heads);
        if (in_turn())
            entry = workers.index() / args.heads, head = workers.index() % args.heads;
        else
            find_share(lane);
    }

    /* Work items are given out in turn, and there are no shares. */
    __device__ bool in_turn() const
    {
        return Block::MAPS || one_each;
    }

    /* ---- The share ---- */

    static __device__ int chunks_of(const fkda_segment &s)
    {
        return (s.length + CHUNK - 1) / CHUNK;
    }

    /* Chunks of the line that a work item takes. Sequences that overlap, by a wrong cu_seqlens, could make
     * the line longer than an int holds; `most` then makes items count for less. */
    __device__ int weight_of(const fkda_segment &s) const
    {
        if (workers.skips(s)) return 0;
        return min(chunks_of(s) + FKDA_CHUNKS_PER_SWITCH, most);
    }

    __device__ int weight(int e) const
    {
        return e < entries ? weight_of(cut.entry(work, e)) : 0;
    }

    /* Finds the share and its first work item. Each lane adds up some neighbouring entries; the lane in whose
     * entries the share begins is known from the sums, and its entries are then looked through 32 at a
     * time. */
    __device__ void find_share(int lane)
    {
        most = 0x7fff0000 / max(entries * args.heads, 1);
        const int each = (entries + 31) / 32; /* entries of a lane */
        int own = 0;                          /* the weight of the lane's entries */
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
        entry = entries; /* the share has no work item if the line ends before it */
        unsigned beyond = __ballot_sync(~0u, up_to > begin);
        if (!beyond) return;
        const int lane_there =
            __ffs(static_cast<int>(beyond)) - 1; /* the share begins in this lane's entries */
        at = __shfl_sync(~0u, up_to - own, lane_there);
        /* Lengths are read again, and the loop ends at the last entry if they have become smaller. */
#pragma unroll 1
        for (int e = lane_there * each; e < entries; e += 32) {
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

    /* The sum of x over all lanes up to this one. */
    static __device__ int sum_up_to(int x, int lane)
    {
        for (int by = 1; by < 32; by *= 2) {
            const int other = __shfl_up_sync(~0u, x, by);
            if (lane >= by) x += other;
        }
        return x;
    }

    /* ---- Its work items ---- */

    __device__ LoadedItem next()
    {
        while (entry < entries && (in_turn() || at < end)) {
            const fkda_segment s = Cut::of_first_lane(cut.entry(work, entry));
            if (workers.skips(s)) {
                entry++, head = 0;
                continue;
            }
            const int chunks = chunks_of(s);
            const int from = at, to = at + weight_of(s);
            LoadedItem item = this->item_of(s, head);
            at = to;
            head += in_turn() ? workers.count() : 1;
            if (head >= args.heads) entry += head / args.heads, head %= args.heads;
            if (in_turn()) return item;
            if (from < begin) {
                const int first = first_chunks(chunks, to - begin);
                if (!first) continue;
                if (first < chunks) end_at_border(item, first_tokens(item, first));
            } else if (to > end &&
                       share_number + 1 < workers.count()) { /* no border follows the last share */
                const int first = first_chunks(chunks, to - end);
                if (first && first == chunks) continue;
                if (first) begin_at_border(item, first_tokens(item, first));
            }
            return item;
        }
        return WorkItemMaker<Block>::none();
    }

    /* A border divides the item, and `beyond` chunks of the item's weight lie to the right of the border, in
     * the share that begins there. Returns how many of the item's first chunks the worker of that share
     * computes: 0 is none of them, and `chunks` is all of them. */
    __device__ int first_chunks(int chunks, int beyond) const
    {
        if (!handoff.states) return 2 * beyond > chunks + FKDA_CHUNKS_PER_SWITCH ? chunks : 0;
        return beyond < FKDA_LEAST_CHUNKS_DIVIDED            ? 0
               : beyond > chunks - FKDA_LEAST_CHUNKS_DIVIDED ? chunks
                                                             : beyond;
    }

    /* Tokens of the item's first chunks, of which there are fewer than the item has. */
    static __device__ int first_tokens(const WorkItem &item, int chunks)
    {
        if constexpr (Block::BACKWARDS) return (item.length - 1) % CHUNK + 1 + (chunks - 1) * CHUNK;
        return chunks * CHUNK;
    }

    /* Takes the item's first `tokens` tokens in memory from it. */
    static __device__ void take_from_begin(WorkItem &item, int tokens)
    {
        item.token += tokens, item.length -= tokens;
        if constexpr (Block::IMAGES) item.images.before += tokens;
    }

    /* Leaves the item its first `tokens` tokens; the state goes to the border where the share begins. */
    __device__ void end_at_border(WorkItem &item, int tokens) const
    {
        if constexpr (Block::BACKWARDS)
            take_from_begin(item, item.length - tokens);
        else
            item.length = tokens;
        item.final = border_state(share_number);
        item.flags = border_flags(share_number);
        item.attributes = (item.attributes & ~FINAL_BF16) | FINAL_IMAGE | SIGNALS_FINAL;
    }

    /* Takes the first `tokens` tokens from the item; the state comes from the border where the share ends. */
    __device__ void begin_at_border(WorkItem &item, int tokens) const
    {
        if constexpr (Block::BACKWARDS)
            item.length -= tokens;
        else
            take_from_begin(item, tokens);
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
