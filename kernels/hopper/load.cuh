/*
 * The loading role, a warp: deals out the pieces of work to the block's other warps, and brings the inputs of chunk after
 * chunk into shared memory.
 */
#ifndef FKDA_HOPPER_LOAD_CUH
#define FKDA_HOPPER_LOAD_CUH

#include <type_traits>

#include "at_once.cuh"
#include "deal.cuh"
#include "mixture.cuh"
#include "norms.cuh"
#include "shared.cuh"

namespace fkda
{

template <class Kind> struct Loader {
    const fkda_hopper_fwd_args &args;
    Shared<Kind> &shared;
    std::conditional_t<Kind::MIXTURE, MixtureDealer<Kind>,
                       std::conditional_t<Kind::AT_ONCE, AtOnceDealer<Kind>, Dealer<Kind>>>
        dealer;
    Slot<PIECES_AHEAD> dealt;
    Piece piece; /* the last one dealt */
    /* The next chunk's slot, of those that this block prepares, and of those that the other block does. */
    Slot<Kind::OWN> own;
    Slot<Kind::RECEIVED + (Kind::SHARERS == 1)> received;
    unsigned turn, rank, expected,
        asked_for; /* chunks of the other block: met so far, and values asked for */
    /* The next chunk to find norms of; how many are on their way, or there, without norms; and how many are still to be loaded of those that
     * teams find norms of. */
    Slot<Kind::OWN> to_norm;
    unsigned without_norms, left_out;

    __device__ Loader(const fkda_hopper_fwd_args &a, Shared<Kind> &s, int lane)
        : args(a), shared(s), dealer(a, sharer_rank<Kind>(), lane), dealt(0), piece{}, own(0), received(0),
          turn(0), rank(sharer_rank<Kind>()), expected(0), asked_for(0), to_norm(Kind::TEAMS),
          without_norms(0), left_out(Kind::TEAMS)
    {
    }

    static __device__ void prefetch_maps(const fkda_hopper_fwd_args &args, int lane)
    {
        if (lane) return;
        prefetch_map(&args.g);
        prefetch_map(&args.k);
        prefetch_map(&args.v);
        if (Kind::OUTPUTS) prefetch_map(&args.q);
    }

    /* Of the next chunk, if its inputs have come. */
    __device__ bool find_norms()
    {
        if (!Kind::LOADER_NORMS || without_norms == 0 ||
            !mbarrier_test(&shared.chunks.loaded[to_norm.index], to_norm.parity))
            return false;
        store_norms<Kind, 1>(shared.inverse_norm[to_norm.index][0], shared.tokens[to_norm.index], 0,
                             threadIdx.x & 31);
        mbarrier_arrive_warp(&shared.chunks.normed[to_norm.index]);
        to_norm.advance(1);
        without_norms--;
        return true;
    }

    /* While waiting, asks for what there is room for of the other block's chunks, whose slots come free on their own, and finds norms. */
    __device__ void wait(uint64_t *barrier, int parity)
    {
        if constexpr (Kind::SHARERS == 1)
            mbarrier_wait(barrier, parity);
        else
            while (!mbarrier_test(barrier, parity)) {
                if (asked_for != expected) ask_for_values();
                if (!find_norms()) rest_for_a_while();
            }
    }

    /* Hands the piece out, for which all must have met the one PIECES_AHEAD before. */
    __device__ void hand_out()
    {
        wait(&shared.pieces.ring.empty[dealt.index], dealt.parity ^ 1);
        if (elect_lane()) {
            shared.pieces.piece[dealt.index] = piece;
            mbarrier_arrive(&shared.pieces.ring.full[dealt.index]);
        }
        __syncwarp();
        dealt.advance(1);
    }

    /* Copies of 64 rows of V of a chunk. */
    __device__ void copy_values(int slot, const Values &of, uint64_t *barrier) const
    {
        /* A loop up to `boxes` the compiler would unroll sixteen times. */
#pragma unroll
        for (int i = 0; i < Kind::ROWS / 64; i++)
            if (i < of.boxes)
                copy_box(shared.tokens[slot].v[i], &args.v, of.token, of.first_box + i, of.head, barrier);
    }

    /* A chunk that this block prepares. Past the end of the sequence this brings the next one's tokens, past the end of the tensor
     * zeros. */
    __device__ void load(const Values &values)
    {
        Tokens<Kind> &to = shared.tokens[own.index];
        uint64_t *barrier = &shared.chunks.loaded[own.index];
        wait(&shared.chunks.empty[own.index], own.parity ^ 1);
        /* At once, since teams find these. */
        if (Kind::LOADER_NORMS && left_out) mbarrier_arrive_warp(&shared.chunks.normed[own.index]);
        if constexpr (Kind::JOINS)
            if (values.after_maps) wait(&shared.join.over, 0);
        if (elect_lane()) {
            mbarrier_arrive_expecting(barrier,
                                      values.boxes * Kind::HALF_TOKENS + static_cast<int>(sizeof to.half));
#pragma unroll
            for (int half = 0; half < DIM / 64; half++) {
                copy_box(to.half[half].tile[G], &args.g, values.token, half, values.head, barrier);
                copy_box(to.half[half].tile[K], &args.k, values.token, half, values.head, barrier);
                if constexpr (Kind::OUTPUTS)
                    copy_box(to.half[half].tile[Q], &args.q, values.token, half, values.head, barrier);
            }
            copy_values(own.index, values, barrier);
        }
        __syncwarp();
        own.advance(1);
        if constexpr (!Kind::LOADER_NORMS) return;
        if (left_out)
            left_out--;
        else
            without_norms++;
    }

    /* The first of the other block's chunks that wait for it: its values, and room for what will be sent, once its slot is free. */
    __device__ void ask_for_values()
    {
        const int slot = Kind::OWN + received.index;
        if (!mbarrier_test(&shared.chunks.empty[slot], received.parity ^ 1)) return;
        if constexpr (Kind::JOINS)
            if (shared.expected[asked_for % MOST_EXPECTED].after_maps && !mbarrier_test(&shared.join.over, 0))
                return;
        if (elect_lane()) {
            const Values values = shared.expected[asked_for % MOST_EXPECTED];
            uint64_t *barrier = &shared.chunks.ready[slot];
            mbarrier_arrive_expecting(barrier, values.boxes * Kind::HALF_TOKENS +
                                                   static_cast<int>(sizeof shared.tokens[slot].half) +
                                                   static_cast<int>(sizeof(Stage<Kind>)));
            copy_values(slot, values, barrier);
        }
        __syncwarp();
        asked_for++;
        received.advance(1);
    }

    __device__ void expect(const Values &values)
    {
        while (expected - asked_for == MOST_EXPECTED) {
            ask_for_values();
            find_norms();
        }
        if (elect_lane()) shared.expected[expected % MOST_EXPECTED] = values;
        __syncwarp();
        expected++;
    }

    /* The next piece is dealt once a piece's first chunk is on its way; the first one before wait_for_barriers(). In one loop, since what is
     * inlined twice takes its place in the instruction cache twice. */
    template <class Wait> __device__ void run(Wait wait_for_barriers)
    {
        bool begun = false;
        int chunks = 0; /* so far */
        do {
            const Piece now = piece; /* at first an empty one */
            Values values = {static_cast<int>(now.begin), now.head, now.first_row / 64,
                             !Kind::OUTPUTS && now.kind & UNIT ? 0 : Kind::ROWS / 64, false};
            bool first = true;
            for (int left = now.length; left > 0 || first; left -= Kind::CHUNK, first = false) {
                if (left > 0) {
                    /* The first chunk of each block goes where maps do not. */
                    if constexpr (Kind::JOINS) {
                        values.after_maps = now.kind & JOIN && chunks >= Kind::SHARERS;
                        chunks++;
                    }
                    if (Kind::SHARERS == 1 || turn == rank)
                        load(values);
                    else
                        expect(values);
                    values.token += Kind::CHUNK, turn ^= 1;
                }
                if (!first) continue;
                piece = dealer.deal();
                if (!begun) wait_for_barriers();
                begun = true;
                hand_out();
            }
        } while (!(piece.kind & NO_PIECE));
        while (asked_for != expected || without_norms) {
            if (asked_for != expected) ask_for_values();
            find_norms();
        }
    }
};

} // namespace fkda

#endif
