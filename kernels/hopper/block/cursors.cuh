/*
 * Cursors, with which each warp follows the work of its CTA by itself:
 *
 *   WorkCursor   from work item to work item
 *   ChunkCursor  from chunk to chunk, over the borders of work items
 *   SlotCursor   from slot to slot of the chunk ring, own and received chunks in turn
 */
#ifndef FKDA_HOPPER_CURSORS_CUH
#define FKDA_HOPPER_CURSORS_CUH

#include "../schedule/work_item.cuh"
#include "block.cuh"
#include "ring.cuh"

namespace fkda
{

/* Work items that the loader may be ahead of the recurrence. A CTA may have many short sequences; with fewer
 * slots the loader would wait for the recurrence between them. */
constexpr int ITEMS_AHEAD = 16;

/* Work items on their way from the loader to all other roles. */
struct WorkRing {
    WorkItem item[ITEMS_AHEAD];
    Ring<ITEMS_AHEAD> ring;
};

struct WorkCursor {
    WorkRing &work;
    int number; /* of the current work item, counted from the CTA's first one */

    __device__ explicit WorkCursor(WorkRing &w) : work(w), number(0)
    {
    }

    __device__ Slot<ITEMS_AHEAD> slot() const
    {
        return Slot<ITEMS_AHEAD>(number);
    }

    /* Waits for the current work item, which stays there until finish(). */
    __device__ const WorkItem &current() const
    {
        mbarrier_wait(&work.ring.full[slot().index], slot().parity);
        return work.item[slot().index];
    }

    /* The warp no longer reads the current work item. */
    __device__ void finish()
    {
        mbarrier_arrive_warp(&work.ring.empty[slot().index]);
        number++;
    }

    /* A copy of the current work item, and on to the next one. */
    __device__ WorkItem take()
    {
        const WorkItem item = current();
        finish();
        return item;
    }
};

/*
 * The order of a work item's chunks. A block that goes backwards begins with the last tokens. Its first chunk
 * is the one that may have fewer tokens than others, so that all chunks begin at multiples of CHUNK tokens
 * from the item's first one on. `left` counts the tokens of the item that are still to do, those of the
 * present chunk among them; behind the last chunk it is zero or less.
 */
template <class Block> struct ChunkOrder {
    static constexpr int CHUNK = Block::CHUNK;

    /* Backwards: tokens of the item in front of the present chunk. */
    static __device__ __forceinline__ int before(int left)
    {
        return (left - 1) / CHUNK * CHUNK;
    }
    /* Tokens from the chunk's first one on: fewer than CHUNK if the chunk is not whole. */
    static __device__ __forceinline__ int here(int left)
    {
        if constexpr (Block::BACKWARDS) return left - before(left);
        return left;
    }
    static __device__ __forceinline__ int advance(int left)
    {
        if constexpr (Block::BACKWARDS) return before(left);
        return left - CHUNK;
    }
};

template <class Block> struct ChunkCursor {
    static constexpr int CHUNK = Block::CHUNK;
    using Order = ChunkOrder<Block>;
    WorkCursor items;
    int head;
    int left;       /* as in ChunkOrder; none after the last chunk of all */
    int row, token; /* the row of the batch, and the chunk's first token, counted in this row */

    /* Starts at chunk number `chunks` of all work items. */
    __device__ ChunkCursor(WorkRing &work, int chunks) : items(work), head(0), left(0), row(0), token(0)
    {
        skip(chunks * CHUNK);
    }

    /* Where the chunk's token number `i` begins in a tensor with these strides, in elements. `group` heads of
     * the work items share a head of the tensor. */
    __device__ long long place(const fkda_token_strides &strides, int i, int group = 1) const
    {
        return token_place(strides, row, token + i, group == 1 ? head : head / group);
    }

    /* The same for beta, whose strides may be any numbers. */
    __device__ long long place_of_beta(const fkda_token_strides &strides, int i) const
    {
        return row * strides.batch + (token + i) * strides.token + head * strides.head;
    }

    __device__ bool done() const
    {
        return left <= 0;
    }

    /* Tokens from the chunk's first one on. */
    __device__ int here() const
    {
        return Order::here(left);
    }

    /* Whether the work item has the chunk that comes `chunks` chunks after this one. */
    __device__ bool has_more_than(int chunks) const
    {
        if constexpr (Block::BACKWARDS) return Order::before(left) >= chunks * CHUNK;
        return left > chunks * CHUNK;
    }

    __device__ void advance(int chunks)
    {
        if constexpr (Block::BACKWARDS) {
            left = Order::before(left) - (chunks - 1) * CHUNK;
            token -= chunks * CHUNK;
        } else {
            left -= chunks * CHUNK;
            token += chunks * CHUNK;
        }
        if (left <= 0) skip(-left / CHUNK * CHUNK);
    }

  private:
    /* From the end of a work item, skips `tokens` tokens of the work items after it. */
    __device__ void skip(int tokens)
    {
        for (left = -tokens; left <= 0;) {
            const int over = -left / CHUNK * CHUNK;
            const WorkItem item = items.take();
            if (item.attributes & NO_WORK) {
                left = 0;
                return;
            }
            head = item.head, left = item.length - over, row = item.row, token = item.token + over;
            if constexpr (Block::BACKWARDS) {
                if (over) left = (item.length + CHUNK - 1) / CHUNK * CHUNK - over;
                token = item.token + Order::before(left);
            }
        }
    }
};

/*
 * The CTAs of a pair prepare chunks in turn, so two neighbouring chunks have the same number in the chunk
 * rings of the CTAs that prepare them.
 *
 * A solo CTA follows the ring slot by slot. A CTA of a pair counts chunks and finds the slot from the number,
 * because its recurrence is short of registers.
 */
template <class Block> struct SlotCursor {
    static constexpr bool PAIR = Block::CTAS == 2;
    std::conditional_t<PAIR, unsigned, Slot<Block::OWN_SLOTS>> at;

    __device__ SlotCursor() : at(0)
    {
    }
    __device__ bool is_own() const /* this CTA prepares the chunk */
    {
        if constexpr (PAIR)
            return at % 2 == static_cast<unsigned>(cluster_rank());
        else
            return true;
    }
    /* The slot of the chunk in the CTA that prepares it. */
    __device__ Slot<Block::OWN_SLOTS> own() const
    {
        if constexpr (PAIR)
            return Slot<Block::OWN_SLOTS>(static_cast<int>(at / 2));
        else
            return at;
    }
    __device__ int index() const
    {
        if constexpr (PAIR)
            if (!is_own()) return Block::OWN_SLOTS + static_cast<int>(at / 2 % Block::RECEIVED_SLOTS);
        return own().index;
    }
    __device__ int parity() const
    {
        if constexpr (PAIR)
            if (!is_own()) return static_cast<int>(at / (2 * Block::RECEIVED_SLOTS) % 2);
        return own().parity;
    }
    __device__ void advance()
    {
        if constexpr (PAIR)
            at++;
        else
            at.advance(1);
    }

    /* In a pair: the slot of the last chunk before this one that this CTA prepared. */
    __device__ Slot<Block::OWN_SLOTS> last_own() const
    {
        return Slot<Block::OWN_SLOTS>(static_cast<int>((at + 1 - cluster_rank()) / 2 - 1));
    }
};

} // namespace fkda

#endif
