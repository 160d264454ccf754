/* The order in which a block meets its work, the same for every role. */
#ifndef FKDA_HOPPER_CURSOR_CUH
#define FKDA_HOPPER_CURSOR_CUH

#include "../../common/task.cuh"
#include "../ptx/sm90.cuh"
#include "block.cuh"

namespace fkda
{

/* A place in a ring of `size` slots: in steps of at most size, with the parity of the round. A parity tells two rounds
 * apart, no more: who waits for a round must know that the one before the last is over. */
template <int size> struct Slot {
    int index, parity;

    __device__ explicit Slot(int first) : index(first % size), parity(first / size % 2)
    {
    }
    __device__ void advance(int steps)
    {
        index += steps;
        if (index >= size) index -= size, parity ^= 1;
    }
};

/* A ring's barriers. */
template <int slots> struct Ring {
    uint64_t full[slots], empty[slots];
};

/* A item of work: some rows of V of a head, through a sequence, a segment of one, or a part of these. */
struct WorkItem {
    long long begin;  /* first token, counted over the whole tensor */
    int head, length; /* length: in tokens */
    int first_row;    /* of V */
    int attributes;
    const void *initial; /* the state [V, K] of the head to start from; null: zeros */
    void *final;         /* where the state goes; null: nowhere */
    int *flags;          /* of each warp of the recurrence, for: */
};
enum {
    NO_WORK = 1,      /* there is no more work */
    INITIAL_BF16 = 2, /* the type of `initial`, else fp32 */
    FINAL_BF16 = 4,
    IS_MAP = 8,          /* starts from the identity, and all values are zeros */
    AWAITS_INITIAL = 16, /* `initial` is there once the warp's flag is set; */
    SIGNALS_FINAL = 32,  /* `final` is awaited in this way */
    INITIAL_IMAGE = 64,  /* in the workspace, as StateImage */
    FINAL_IMAGE = 128,
    AFTER_JOIN = 256, /* the block has a part in the join first (at_once.cuh) */
    NOT_LAST = 512,   /* there is another item in this part of what the block does (at_once.cuh) */
};

constexpr int ITEMS_AHEAD = 16; /* that the loading warp may be ahead of the recurrence: it deals them out */

struct WorkRing {
    WorkItem item[ITEMS_AHEAD];
    Ring<ITEMS_AHEAD> ring;
};

/* A warp's way through the pieces of its block. */
struct WorkCursor {
    WorkRing &work;
    Slot<ITEMS_AHEAD> slot;

    __device__ explicit WorkCursor(WorkRing &w) : work(w), slot(0)
    {
    }

    /* The item there is to do, until it is left. */
    __device__ const WorkItem &current() const
    {
        mbarrier_wait(&work.ring.full[slot.index], slot.parity);
        return work.item[slot.index];
    }

    __device__ void finish()
    {
        mbarrier_arrive_warp(&work.ring.empty[slot.index]);
        slot.advance(1);
    }

    __device__ WorkItem take()
    {
        const WorkItem item = current();
        finish();
        return item;
    }
};

/* One chunk of a walk. */
template <class Block> struct ChunkCursor {
    static constexpr int CHUNK = Block::CHUNK;
    WorkCursor walk;
    int head;        /* of the item */
    int left;        /* tokens of the sequence from the chunk's first on; none after the last chunk of all */
    long long token; /* the chunk's first, counted over the whole tensor */

    /* The chunk `chunks` after the first. */
    __device__ ChunkCursor(WorkRing &work, int chunks) : walk(work), head(0), left(0), token(0)
    {
        skip(chunks * CHUNK);
    }

    __device__ bool done() const
    {
        return left <= 0;
    }

    __device__ void advance(int chunks)
    {
        left -= chunks * CHUNK;
        token += chunks * CHUNK;
        if (left <= 0) skip(-left / CHUNK * CHUNK);
    }

  private:
    /* From the end of a item, over as many tokens of the next ones. */
    __device__ void skip(int tokens)
    {
        for (left = -tokens; left <= 0;) {
            const int over = -left / CHUNK * CHUNK;
            const WorkItem item = walk.take();
            if (item.attributes & NO_WORK) {
                left = 0;
                return;
            }
            head = item.head, left = item.length - over, token = item.begin + over;
        }
    }
};

} // namespace fkda

#endif
