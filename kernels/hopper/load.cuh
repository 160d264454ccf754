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

/* A copy of 16 bytes of every second token by each lane; `from` is in bytes. */
template <bool whole>
__device__ __forceinline__ void copy_rows(uint16_t (&to)[CHUNK][PITCH], const void *tensor, long long from,
                                          long long two_tokens, int left, int lane)
{
#pragma unroll
    for (int i = 0; i < CHUNK; i += 2, from += two_tokens) {
        const bool valid = whole || i + lane / 16 < left;
        copy_async_16(&to[i + lane / 16][lane % 16 * 8],
                      static_cast<const char *>(tensor) + (valid ? from : 0), valid);
    }
}

template <int rows> struct Loader {
    static constexpr int VALUES_BEHIND =
        INPUTS - 2; /* chunks: values wait for a stage, and are needed later */
    const fkda_fwd_args &args;
    Shared<rows> &shared;
    int lane;
    Dealer<rows> dealer;
    Slot<PIECES_AHEAD> dealt;
    Slot<INPUTS> input;
    Slot<STAGES> stage;
    Piece piece;   /* the last one dealt */
    Walk walk;     /* through the pieces again, for the values */
    Piece values;  /* where they are */
    int done;      /* tokens of it that have theirs */
    int behind;    /* pieces dealt that `walk` has not met */
    int valueless; /* chunks that have inputs but no values yet */

    __device__ Loader(const fkda_fwd_args &a, Shared<rows> &s, const uint16_t *order, int lane_id)
        : args(a), shared(s), lane(lane_id), dealer(a, order), dealt(0), input(0), stage(0), piece{},
          walk(s.pieces), values{}, done(0), behind(0), valueless(0)
    {
    }

    /* Deals out a piece, for which all must have met the one PIECES_AHEAD before: this warp too, and the recurrence, which
     * may wait for values. So these are loaded before the ring can be full, also where pieces have no tokens. */
    __device__ void deal()
    {
        pass_pieces();
        while (behind >= PIECES_AHEAD - 1 && valueless > 0) load_values();
        piece = dealer.deal(lane);
        mbarrier_wait(&shared.pieces.ring.empty[dealt.index], dealt.parity ^ 1);
        if (lane == 0) {
            shared.pieces.piece[dealt.index] = piece;
            mbarrier_arrive(&shared.pieces.ring.full[dealt.index]);
        }
        dealt.advance(1);
        behind++;
    }

    /* Past pieces whose values are all asked for. */
    __device__ void pass_pieces()
    {
        for (; done >= values.length && behind > 0; behind--) values = walk.take(), done = 0;
    }

    __device__ long long first_byte(long long token, int head) const
    {
        return 2 * (((token + lane / 16) * args.heads + head) * DIM + lane % 16 * 8);
    }

    __device__ void load_input(long long token, int head, int left)
    {
        Input &to = shared.input[input.index];
        const long long from = first_byte(token, head), step = args.half_chunk_bytes / 4;
        mbarrier_wait(&shared.inputs.empty[input.index], input.parity ^ 1);
        if (left >= CHUNK) {
            copy_rows<true>(to.g, args.g, from, step, left, lane);
            copy_rows<true>(to.k, args.k, from, step, left, lane);
            copy_rows<true>(to.q, args.q, from, step, left, lane);
        } else {
            copy_rows<false>(to.g, args.g, from, step, left, lane);
            copy_rows<false>(to.k, args.k, from, step, left, lane);
            copy_rows<false>(to.q, args.q, from, step, left, lane);
        }
        mbarrier_arrive_after_copies(&shared.inputs.full[input.index]);
        input.advance(1);
    }

    /* Of the next chunk that has none yet. */
    __device__ void load_values()
    {
        pass_pieces();
        const int left = values.length - done;
        const long long begin = first_byte(values.begin + done, values.head),
                        step = args.half_chunk_bytes / 4;
        mbarrier_wait(&shared.stages.empty[stage.index], stage.parity ^ 1);
        if (left >= CHUNK)
            copy_rows<true>(shared.stage[stage.index].v, args.v, begin, step, left, lane);
        else
            copy_rows<false>(shared.stage[stage.index].v, args.v, begin, step, left, lane);
        mbarrier_arrive_after_copies(&shared.stages.full[stage.index]);
        stage.advance(1);
        done += CHUNK;
        valueless--;
        pass_pieces();
    }

    __device__ void run()
    {
        deal();
        while (piece.index >= 0) {
            const Piece now = piece;
            deal();
            for (int first = 0; first < now.length; first += CHUNK) {
                load_input(now.begin + first, now.head, now.length - first);
                if (++valueless > VALUES_BEHIND) load_values();
            }
        }
        while (valueless > 0) load_values();
        copy_async_wait_all();
    }
};

} // namespace fkda

#endif
