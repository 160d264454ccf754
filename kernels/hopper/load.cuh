/*
 * The loading role, a warp: deals out the pieces of work to the block's other warps, and brings the inputs of chunk after
 * chunk into shared memory.
 */
#ifndef FKDA_HOPPER_LOAD_CUH
#define FKDA_HOPPER_LOAD_CUH

#include "shared.cuh"

namespace fkda
{

/* Where the next piece comes from. Sequences of equal length: every gridDim.x-th piece. Else blocks draw numbers from a
 * counter, and numbers go to sequences by falling length, so that blocks end at about the same time. */
template <int rows> struct Dealer {
    static constexpr int PIECES = DIM / rows; /* of a task */
    const fkda_fwd_args &args;
    const uint16_t *order; /* of the sequences, or null */
    int next;

    __device__ Dealer(const fkda_fwd_args &a, const uint16_t *o)
        : args(a), order(o), next(static_cast<int>(blockIdx.x))
    {
    }

    /* Called by all lanes of the warp. */
    __device__ Piece deal(int lane)
    {
        const int number = next;
        if (args.counter) {
            int drawn = 0;
            if (lane == 0) drawn = static_cast<int>(gridDim.x) + atomicAdd(args.counter, 1);
            next = __shfl_sync(~0u, drawn, 0);
        } else {
            next += static_cast<int>(gridDim.x);
        }
        if (number >= args.tasks * PIECES) return {0, 0, 0, -1, 0};
        int sequence = number / PIECES / args.heads;
        const int head = number / PIECES % args.heads;
        if (order) sequence = order[sequence];
        const Task task = find_task(args, sequence * args.heads + head);
        return {task.begin, head, task.length, sequence * args.heads + head, number % PIECES * rows};
    }
};

/* Numbers the sequences by falling length, all threads of the block together. `length` is scratch. */
__device__ inline void order_sequences(const fkda_fwd_args &args, int *length, uint16_t *order)
{
    const int count = args.tasks / args.heads;
    for (int n = threadIdx.x; n < count; n += blockDim.x) length[n] = find_task(args, n * args.heads).length;
    __syncthreads();
    for (int n = threadIdx.x; n < count; n += blockDim.x) {
        int rank = 0;
        for (int m = 0; m < count; m++) rank += length[m] > length[n] || (length[m] == length[n] && m < n);
        order[rank] = static_cast<uint16_t>(n);
    }
}

template <int rows> struct Loader {
    const fkda_hopper_fwd_args &args;
    Shared<rows> &shared;
    int lane;
    Dealer<rows> dealer;
    Slot<PIECES_AHEAD> dealt;
    Slot<SLOTS> slot;
    Piece piece; /* the last one dealt */

    __device__ Loader(const fkda_hopper_fwd_args &a, Shared<rows> &s, const uint16_t *order, int lane_id)
        : args(a), shared(s), lane(lane_id), dealer(a.fwd, order), dealt(0), slot(0), piece{}
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

    /* The chunk of a piece from its token `first` on. Past the end of the sequence this brings the next one's tokens, past the end
     * of the tensor zeros. */
    __device__ void load(const Piece &now, int first)
    {
        Tokens<rows> &to = shared.tokens[slot.index];
        uint64_t *loaded = &shared.chunks.loaded[slot.index];
        mbarrier_wait(&shared.chunks.empty[slot.index], slot.parity ^ 1);
        if (elect_lane()) {
            const int token = static_cast<int>(now.begin) + first;
            mbarrier_arrive_expecting(loaded, static_cast<int>(sizeof to));
#pragma unroll
            for (int half = 0; half < DIM / 64; half++) {
                copy_box(to.half[half].k, &args.k, token, half, now.head, loaded);
                copy_box(to.half[half].q, &args.q, token, half, now.head, loaded);
                copy_box(to.half[half].g, &args.g, token, half, now.head, loaded);
            }
#pragma unroll
            for (int half = 0; half < rows / 64; half++)
                copy_box(to.v[half], &args.v, token, now.first_row / 64 + half, now.head, loaded);
        }
        __syncwarp();
        slot.advance(1);
    }

    __device__ void run()
    {
        deal();
        while (piece.index >= 0) {
            const Piece now = piece;
            deal();
            for (int first = 0; first < now.length; first += CHUNK) load(now, first);
        }
    }
};

} // namespace fkda

#endif
