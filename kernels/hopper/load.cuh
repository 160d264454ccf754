/*
 * The loading role, a warp: deals out the pieces of work to the block's other warps, and brings the inputs of chunk after
 * chunk into shared memory.
 */
#ifndef FKDA_HOPPER_LOAD_CUH
#define FKDA_HOPPER_LOAD_CUH

#include "deal.cuh"
#include "shared.cuh"

namespace fkda
{

template <int rows, bool mixed> struct Loader {
    const fkda_hopper_fwd_args &args;
    Shared<rows> &shared;
    int lane, rank;
    Dealer<rows, mixed> dealer;
    Slot<PIECES_AHEAD> dealt;
    Slot<SLOTS> slot;
    Piece piece; /* the last one dealt */

    __device__ Loader(const fkda_hopper_fwd_args &a, Shared<rows> &s, const uint16_t *order, int lane_id)
        : args(a), shared(s), lane(lane_id), rank(sharer_rank<rows, mixed>()), dealer(a, order, rank),
          dealt(0), slot(0), piece{}
    {
    }

    /* Deals out a piece, for which all must have met the one PIECES_AHEAD before. Nobody waits there for more than chunks of
     * earlier pieces, which are all asked for. */
    __device__ void deal()
    {
        piece = dealer.deal(lane);
        mbarrier_wait(&shared.pieces.ring.empty[dealt.index], dealt.parity ^ 1);
        if (lane == 0) {
            shared.pieces.piece[dealt.index] = piece;
            mbarrier_arrive(&shared.pieces.ring.full[dealt.index]);
        }
        dealt.advance(1);
    }

    /* The chunk of a piece from its token `first` on: all of it if this block prepares it, else the values, and room for what the
     * other block will send. Past the end of the sequence this brings the next one's tokens, past the end of the tensor zeros. */
    __device__ void load(const Piece &now, int first)
    {
        Tokens<rows> &to = shared.tokens[slot.index];
        const bool own = SHARERS<rows, mixed> == 1 || slot.index % 2 == rank;
        uint64_t *barrier = own ? &shared.chunks.loaded[slot.index] : &shared.chunks.ready[slot.index];
        mbarrier_wait(&shared.chunks.empty[slot.index], slot.parity ^ 1);
        if (elect_lane()) {
            const int token = static_cast<int>(now.begin) + first;
            const bool queries = wants_outputs<mixed>(now.kind);
            const int value_boxes = !mixed            ? rows / 64
                                    : now.kind & UNIT ? 0
                                    : now.kind & HALF ? 1
                                                      : rows / 64;
            const int inputs = DIM / 64 * HALF_TOKENS * (queries ? 3 : 2);
            mbarrier_arrive_expecting(barrier,
                                      value_boxes * HALF_TOKENS +
                                          (own ? inputs : static_cast<int>(sizeof to.half + sizeof(Stage))));
            if (own) {
#pragma unroll
                for (int half = 0; half < DIM / 64; half++) {
                    copy_box(to.half[half].k, &args.k, token, half, now.head, barrier);
                    if (queries) copy_box(to.half[half].q, &args.q, token, half, now.head, barrier);
                    copy_box(to.half[half].g, &args.g, token, half, now.head, barrier);
                }
            }
            for (int half = 0; half < value_boxes; half++)
                copy_box(to.v[half], &args.v, token, now.first_row / 64 + half, now.head, barrier);
        }
        __syncwarp();
        slot.advance(1);
    }

    __device__ void run()
    {
        deal();
        while (!(piece.kind & NO_PIECE)) {
            const Piece now = piece;
            deal();
            for (int first = 0; first < now.length; first += CHUNK) load(now, first);
        }
    }
};

} // namespace fkda

#endif
