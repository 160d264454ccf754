/*
 * The loader: one warp that gets the CTA's work items from the schedule, hands them to all other roles, and
 * brings the inputs of chunk after chunk into shared memory.
 *
 * Algorithm. For each chunk that this CTA prepares, the loader waits for a free own slot and asks TMA for g,
 * k, q and v, in boxes of 64 channels. For each chunk that the other CTA of a pair prepares, it asks for v
 * alone, as soon as a received slot is free, and announces the bytes that the other CTA will send. Received
 * slots become free at other times than own ones, so the loader looks after them whenever it waits for
 * something else; in strict order one ring would hold up the other. In its waits it also finds norms, where
 * LOADER_FINDS_NORMS says so.
 *
 * The loader is also the warp that gives up if its CTA waits in vain (../ptx/patience.cuh).
 */
#ifndef FKDA_HOPPER_LOADER_CUH
#define FKDA_HOPPER_LOADER_CUH

#include "../schedule/even_shares.cuh"
#include "../schedule/mixed.cuh"
#include "../schedule/pieces.cuh"
#include "norms.cuh"
#include "shared.cuh"

namespace fkda
{

template <class Block> struct Loader {
    using Order = ChunkOrder<Block>;
    const fkda_hopper_fwd_args &args;
    Shared<Block> &shared;
    Pieces<Block> source;
    CheckpointList<Block> checkpoints; /* of the work item whose chunks are loaded */
    Slot<ITEMS_AHEAD> published;       /* where the next work item goes in the ring of work items */
    LoadedItem item;                   /* the last one that the source gave out */
    /* The slots of the next chunk that this CTA prepares, and of the next one that the other CTA does. */
    Slot<Block::OWN_SLOTS> own;
    Slot<Block::RECEIVED_SLOTS + (Block::CTAS == 1)> received;
    unsigned turn, rank;          /* the CTA with rank `turn` prepares the next chunk */
    unsigned expected, asked_for; /* chunks of the other CTA: met so far, and asked for */
    /* Norms, if the loader finds them: */
    Slot<Block::OWN_SLOTS> to_norm; /* the next chunk to find norms of */
    unsigned without_norms;         /* chunks that are loaded, or on their way, and have no norms yet */
    unsigned left_out;              /* chunks still to be loaded whose norms their teams find */

    __device__ Loader(const fkda_hopper_fwd_args &a, Shared<Block> &s, int lane)
        : args(a), shared(s), source(a, notes_of<PieceNotes>(s.pieces), pair_rank<Block>(), lane),
          checkpoints(a.fwd, notes_of<CheckpointNotes>(s.checkpoint_notes)), published(0), item{}, own(0),
          received(0), turn(0), rank(pair_rank<Block>()), expected(0), asked_for(0), to_norm(Block::TEAMS),
          without_norms(0), left_out(Block::TEAMS)
    {
    }

    /* A block without checkpoints has no notes, and uses none. */
    template <class Notes, class Member> static __device__ Notes &notes_of(Member &member)
    {
        return reinterpret_cast<Notes &>(member);
    }

    static __device__ void prefetch_descriptors(const fkda_hopper_fwd_args &args, int lane)
    {
        if (lane) return;
        if (!has_fp32_gates<Block>(args.fwd)) prefetch_descriptor(&args.g);
        prefetch_descriptor(&args.k);
        if (!lacks_values<Block>(args.fwd)) prefetch_descriptor(&args.v);
        if (Block::QUERIES) prefetch_descriptor(&args.q);
    }

    /* ---- Waiting ---- */

    /* Finds the norms of the next chunk, if its inputs have come. */
    __device__ bool find_norms()
    {
        if (!Block::LOADER_FINDS_NORMS || without_norms == 0 ||
            !mbarrier_test(&shared.chunk_ring.loaded[to_norm.index], to_norm.parity))
            return false;
        int cta, thread = static_cast<int>(threadIdx.x);
        if (Block::OPTIONS)
            read_indices(cta, thread); /* places are found anew, because registers are scarce */
        store_norms<Block, 1>(shared.inverse_norm[to_norm.index][0], shared.tokens[to_norm.index], args.fwd,
                              0, thread & 31);
        mbarrier_arrive_warp(&shared.chunk_ring.normed[to_norm.index]);
        to_norm.advance(1);
        without_norms--;
        return true;
    }

    /* Waits for a barrier, and meanwhile asks for values of received chunks and finds norms. */
    __device__ void wait(uint64_t *barrier, int parity)
    {
        if constexpr (Block::CTAS == 1)
            mbarrier_wait_or_give_up(barrier, parity);
        else
            for (unsigned polls = 0; !mbarrier_test(barrier, parity); count_poll(polls)) {
                if (asked_for != expected) ask_for_values();
                if (!find_norms()) rest_for_a_while();
            }
    }

    /* ---- Work items ---- */

    /* Hands the work item to all other roles, once they have all finished the item ITEMS_AHEAD before it. */
    __device__ void publish()
    {
        wait(&shared.work.ring.empty[published.index], published.parity ^ 1);
        if (elect_lane()) {
            shared.work.item[published.index] = item; /* without what the loader alone needs */
            mbarrier_arrive(&shared.work.ring.full[published.index]);
        }
        __syncwarp();
        published.advance(1);
    }

    /* ---- Checkpoints ---- */

    /* What CheckpointRing::number_of says of a chunk that a checkpoint is behind. */
    __device__ unsigned char next_number() const
    {
        return static_cast<unsigned char>(1 + checkpoints.notes.number);
    }

    /* Hands the places of the next checkpoint to the recurrence. */
    __device__ int publish_checkpoint()
    {
        return checkpoints.pass([&](void *to, bool more) {
            CheckpointRing<Block> &queue = shared.checkpoints;
            const int number = checkpoints.notes.number;
            const Slot<CHECKPOINTS_AHEAD> slot(number);
            wait(&queue.ring.empty[slot.index], slot.parity ^ 1);
            if (elect_lane()) {
                queue.entry[slot.index] = {to, more};
                mbarrier_arrive(&queue.ring.full[slot.index]);
                checkpoints.notes.number = (number + 1) % (2 * CHECKPOINTS_AHEAD);
            }
            __syncwarp();
        });
    }

    /* Says of the chunk that comes to a slot whether a checkpoint is behind it. */
    __device__ void note_checkpoint(int slot, const ValueBoxes &of) const
    {
        if constexpr (Block::CHECKPOINTS) shared.checkpoints.number_of[slot] = of.checkpoint;
    }

    /* ---- Chunks ---- */

    __device__ void copy_values(int slot, const ValueBoxes &of, uint64_t *barrier) const
    {
        /* The compiler would unroll a loop up to `boxes` sixteen times. */
#pragma unroll
        for (int i = 0; i < Block::ROWS / 64; i++)
            if (i < of.boxes)
                copy_box(shared.tokens[slot].v[i], &args.v, of.first_box + i, of.token, of.head, of.row,
                         barrier);
    }

    /* Loads a chunk that this CTA prepares. Past the end of the sequence a box brings tokens of the next
     * sequence, and past the end of the batch row zeros. The preparation clears g, k and q there, and the
     * recurrence clears v. */
    __device__ void load(const ValueBoxes &values, int qk_head)
    {
        Tokens<Block> &to = shared.tokens[own.index];
        uint64_t *barrier = &shared.chunk_ring.loaded[own.index];
        wait(&shared.chunk_ring.empty[own.index], own.parity ^ 1);
        /* A chunk whose norms its team finds counts as normed from the start. */
        if (Block::LOADER_FINDS_NORMS && left_out) mbarrier_arrive_warp(&shared.chunk_ring.normed[own.index]);
        if constexpr (Block::JOINS)
            if (values.after_maps) wait(&shared.join.room_for_tokens, 0);
        if (elect_lane()) {
            note_checkpoint(own.index, values);
            /* Gates in fp32 have no room in the slot: the preparation loads them from global memory. */
            const bool with_g = !has_fp32_gates<Block>(args.fwd);
            const int bytes = static_cast<int>(sizeof to.half) - (with_g ? 0 : DIM / 64 * Block::HALF_TOKENS);
            mbarrier_arrive_expecting(barrier, values.boxes * Block::HALF_TOKENS + bytes);
#pragma unroll
            for (int half = 0; half < DIM / 64; half++) {
                if (with_g)
                    copy_box(to.half[half].tile[G], &args.g, half, values.token, values.head, values.row,
                             barrier);
                copy_box(to.half[half].tile[K], &args.k, half, values.token, qk_head, values.row, barrier);
                if constexpr (Block::QUERIES)
                    copy_box(to.half[half].tile[Q], &args.q, half, values.token, qk_head, values.row,
                             barrier);
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

    /* For the first expected chunk of the other CTA: asks for its values and announces what the other CTA
     * will send, if the chunk's slot is free. */
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
            note_checkpoint(slot, values);
            mbarrier_arrive_expecting(barrier, values.boxes * Block::HALF_TOKENS +
                                                   static_cast<int>(sizeof shared.tokens[slot].half) +
                                                   static_cast<int>(sizeof(Stage<Block>)));
            copy_values(slot, values, barrier);
        }
        __syncwarp();
        asked_for++;
        received.advance(1);
    }

    /* Notes a chunk that the other CTA prepares. */
    __device__ void expect(const ValueBoxes &values)
    {
        for (unsigned polls = 0; expected - asked_for == MOST_EXPECTED; count_poll(polls)) {
            ask_for_values();
            find_norms();
        }
        if (elect_lane()) shared.expected[expected % MOST_EXPECTED] = values;
        __syncwarp();
        expected++;
    }

    /* ---- The role ---- */

    /* The loader asks the schedule for the next work item once the first chunk of the present one is on its
     * way, so that the schedule's arithmetic delays no first chunk. For the first work item of all there is
     * nothing to load yet: the loader asks for it before it waits for the barriers, in a first round of the
     * loop that loads no chunk. All this is one loop, because code that is inlined twice takes room in the
     * instruction cache twice. */
    template <class Wait> __device__ void run(Wait wait_for_barriers)
    {
        bool begun = false;
        int chunks = 0; /* so far */
        do {
            const LoadedItem now = item; /* an empty one at first */
            const bool no_values = (Block::MAPS && now.attributes & IS_MAP) || lacks_values<Block>(args.fwd);
            ValueBoxes values = {now.row,
                                 now.token,
                                 now.head,
                                 static_cast<unsigned char>(now.first_row / 64),
                                 static_cast<unsigned char>(no_values ? 0 : Block::ROWS / 64),
                                 false,
                                 0};
            bool first = true;
            int due = 0; /* what is left where the chunk begins that the next checkpoint is behind */
            if constexpr (Block::CHECKPOINTS) due = checkpoints.begin(now);
            for (int left = now.length; left > 0 || first; left = Order::advance(left), first = false) {
                if (left > 0) {
                    if constexpr (Block::BACKWARDS) values.token = now.token + Order::before(left);
                    /* The join phase leaves the slots of the CTAs' first chunks free. */
                    if constexpr (Block::JOINS) {
                        values.after_maps = now.attributes & AFTER_JOIN && chunks >= Block::CTAS;
                        chunks++;
                    }
                    if constexpr (Block::CHECKPOINTS) values.checkpoint = left == due ? next_number() : 0;
                    if (Block::CTAS == 1 || turn == rank)
                        load(values, now.qk_head);
                    else
                        expect(values);
                    values.token += Block::CHUNK, turn ^= 1;
                    if constexpr (Block::CHECKPOINTS)
                        if (left == due) due = publish_checkpoint();
                }
                if (!first) continue;
                item = source.next();
                if (!begun) wait_for_barriers();
                begun = true;
                publish();
            }
        } while (!(item.attributes & NO_WORK));
        for (unsigned polls = 0; asked_for != expected || without_norms; count_poll(polls)) {
            if (asked_for != expected) ask_for_values();
            find_norms();
        }
        if constexpr (Block::CTAS == 2) {
            /* The CTAs take turns, so chunks of the other CTA and the turn tell how many all are. */
            const unsigned all = 2 * expected + (rank == 0 ? turn : -turn);
            if (elect_lane()) {
                shared.end.chunks = static_cast<int>(all);
                store_in_other_cta(&shared.end.in_other_cta, static_cast<int>(all));
            }
            __syncwarp();
        }
    }
};

} // namespace fkda

#endif
