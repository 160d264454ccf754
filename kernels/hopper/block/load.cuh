/*
 * The loading role, a warp: deals out the pieces of work to the block's other warps, and brings the inputs of chunk after
 * chunk into shared memory.
 */
#ifndef FKDA_HOPPER_LOAD_CUH
#define FKDA_HOPPER_LOAD_CUH

#include "../schedule/even_shares.cuh"
#include "../schedule/mixed.cuh"
#include "norms.cuh"
#include "shared.cuh"

namespace fkda
{

template <class Block> struct Loader {
    const fkda_hopper_fwd_args &args;
    Shared<Block> &shared;
    typename Block::Schedule::template Source<Block> source;
    Slot<ITEMS_AHEAD> published;
    WorkItem item; /* the last one published */
    /* The next chunk's slot, of those that this block prepares, and of those that the other block does. */
    Slot<Block::OWN_SLOTS> own;
    Slot<Block::RECEIVED_SLOTS + (Block::CTAS == 1)> received;
    unsigned turn, rank, expected,
        asked_for; /* chunks of the other block: met so far, and values asked for */
    /* The next chunk to find norms of; how many are on their way, or there, without norms; and how many are still to be loaded of those that
     * teams find norms of. */
    Slot<Block::OWN_SLOTS> to_norm;
    unsigned without_norms, left_out;

    __device__ Loader(const fkda_hopper_fwd_args &a, Shared<Block> &s, int lane)
        : args(a), shared(s), source(a, pair_rank<Block>(), lane), published(0), item{}, own(0), received(0),
          turn(0), rank(pair_rank<Block>()), expected(0), asked_for(0), to_norm(Block::TEAMS),
          without_norms(0), left_out(Block::TEAMS)
    {
    }

    static __device__ void prefetch_descriptors(const fkda_hopper_fwd_args &args, int lane)
    {
        if (lane) return;
        prefetch_descriptor(&args.g);
        prefetch_descriptor(&args.k);
        prefetch_descriptor(&args.v);
        if (Block::OUTPUTS) prefetch_descriptor(&args.q);
    }

    /* Of the next chunk, if its inputs have come. */
    __device__ bool find_norms()
    {
        if (!Block::LOADER_FINDS_NORMS || without_norms == 0 ||
            !mbarrier_test(&shared.chunk_ring.loaded[to_norm.index], to_norm.parity))
            return false;
        store_norms<Block, 1>(shared.inverse_norm[to_norm.index][0], shared.tokens[to_norm.index], 0,
                              threadIdx.x & 31);
        mbarrier_arrive_warp(&shared.chunk_ring.normed[to_norm.index]);
        to_norm.advance(1);
        without_norms--;
        return true;
    }

    /* While waiting, asks for what there is room for of the other block's chunks, whose slots come free on their own, and finds norms. */
    __device__ void wait(uint64_t *barrier, int parity)
    {
        if constexpr (Block::CTAS == 1)
            mbarrier_wait(barrier, parity);
        else
            while (!mbarrier_test(barrier, parity)) {
                if (asked_for != expected) ask_for_values();
                if (!find_norms()) rest_for_a_while();
            }
    }

    /* Hands the item out, for which all must have met the one ITEMS_AHEAD before. */
    __device__ void publish()
    {
        wait(&shared.work.ring.empty[published.index], published.parity ^ 1);
        if (elect_lane()) {
            shared.work.item[published.index] = item;
            mbarrier_arrive(&shared.work.ring.full[published.index]);
        }
        __syncwarp();
        published.advance(1);
    }

    /* Copies of 64 rows of V of a chunk. */
    __device__ void copy_values(int slot, const ValueBoxes &of, uint64_t *barrier) const
    {
        /* A loop up to `boxes` the compiler would unroll sixteen times. */
#pragma unroll
        for (int i = 0; i < Block::ROWS / 64; i++)
            if (i < of.boxes)
                copy_box(shared.tokens[slot].v[i], &args.v, of.token, of.first_box + i, of.head, barrier);
    }

    /* A chunk that this block prepares. Past the end of the sequence this brings the next one's tokens, past the end of the tensor
     * zeros. */
    __device__ void load(const ValueBoxes &values)
    {
        Tokens<Block> &to = shared.tokens[own.index];
        uint64_t *barrier = &shared.chunk_ring.loaded[own.index];
        wait(&shared.chunk_ring.empty[own.index], own.parity ^ 1);
        /* At once, since teams find these. */
        if (Block::LOADER_FINDS_NORMS && left_out) mbarrier_arrive_warp(&shared.chunk_ring.normed[own.index]);
        if constexpr (Block::JOINS)
            if (values.after_maps) wait(&shared.join.room_for_tokens, 0);
        if (elect_lane()) {
            mbarrier_arrive_expecting(barrier,
                                      values.boxes * Block::HALF_TOKENS + static_cast<int>(sizeof to.half));
#pragma unroll
            for (int half = 0; half < DIM / 64; half++) {
                copy_box(to.half[half].tile[G], &args.g, values.token, half, values.head, barrier);
                copy_box(to.half[half].tile[K], &args.k, values.token, half, values.head, barrier);
                if constexpr (Block::OUTPUTS)
                    copy_box(to.half[half].tile[Q], &args.q, values.token, half, values.head, barrier);
            }
            copy_values(own.index, values, barrier);
        }
        __syncwarp();
        own.advance(1);
        if constexpr (!Block::LOADER_FINDS_NORMS) return;
        if (left_out)
            left_out--;
        else
            without_norms++;
    }

    /* The first of the other block's chunks that wait for it: its values, and room for what will be sent, once its slot is free. */
    __device__ void ask_for_values()
    {
        const int slot = Block::OWN_SLOTS + received.index;
        if (!mbarrier_test(&shared.chunk_ring.empty[slot], received.parity ^ 1)) return;
        if constexpr (Block::JOINS)
            if (shared.expected[asked_for % MOST_EXPECTED].after_maps &&
                !mbarrier_test(&shared.join.room_for_tokens, 0))
                return;
        if (elect_lane()) {
            const ValueBoxes values = shared.expected[asked_for % MOST_EXPECTED];
            uint64_t *barrier = &shared.chunk_ring.ready[slot];
            mbarrier_arrive_expecting(barrier, values.boxes * Block::HALF_TOKENS +
                                                   static_cast<int>(sizeof shared.tokens[slot].half) +
                                                   static_cast<int>(sizeof(Stage<Block>)));
            copy_values(slot, values, barrier);
        }
        __syncwarp();
        asked_for++;
        received.advance(1);
    }

    __device__ void expect(const ValueBoxes &values)
    {
        while (expected - asked_for == MOST_EXPECTED) {
            ask_for_values();
            find_norms();
        }
        if (elect_lane()) shared.expected[expected % MOST_EXPECTED] = values;
        __syncwarp();
        expected++;
    }

    /* The next item is published once a item's first chunk is on its way; the first one before wait_for_barriers(). In one loop, since what is
     * inlined twice takes its place in the instruction cache twice. */
    template <class Wait> __device__ void run(Wait wait_for_barriers)
    {
        bool begun = false;
        int chunks = 0; /* so far */
        do {
            const WorkItem now = item; /* at first an empty one */
            ValueBoxes values = {static_cast<int>(now.begin), now.head, now.first_row / 64,
                                 !Block::OUTPUTS && now.attributes & IS_MAP ? 0 : Block::ROWS / 64, false};
            bool first = true;
            for (int left = now.length; left > 0 || first; left -= Block::CHUNK, first = false) {
                if (left > 0) {
                    /* The first chunk of each block goes where maps do not. */
                    if constexpr (Block::JOINS) {
                        values.after_maps = now.attributes & AFTER_JOIN && chunks >= Block::CTAS;
                        chunks++;
                    }
                    if (Block::CTAS == 1 || turn == rank)
                        load(values);
                    else
                        expect(values);
                    values.token += Block::CHUNK, turn ^= 1;
                }
                if (!first) continue;
                item = source.next();
                if (!begun) wait_for_barriers();
                begun = true;
                publish();
            }
        } while (!(item.attributes & NO_WORK));
        while (asked_for != expected || without_norms) {
            if (asked_for != expected) ask_for_values();
            find_norms();
        }
    }
};

} // namespace fkda

#endif
