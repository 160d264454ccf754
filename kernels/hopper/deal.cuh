/* Which pieces of work a block gets, and in which order. */
#ifndef FKDA_HOPPER_DEAL_CUH
#define FKDA_HOPPER_DEAL_CUH

#include "fwd_args.h"
#include "fwd_shape.h"
#include "walk.cuh"

namespace fkda
{

/* Where the next piece comes from. Sequences of equal length: every gridDim.x-th piece. Else blocks draw numbers from a
 * counter, and numbers go to sequences by falling length, so that blocks end at about the same time. Where sequences are cut the
 * numbers are of segments in a list. */
template <int rows, bool mixed> struct Dealer {
    static constexpr int PIECES = DIM / rows; /* of a head */
    static constexpr int PASS = mixed ? 0 : 1;
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    const uint16_t *order; /* of the sequences, or null */
    int next, end;

    __device__ Dealer(const fkda_hopper_fwd_args &a, const uint16_t *o)
        : args(a.fwd), cut(a.cut), order(o), next(static_cast<int>(blockIdx.x)),
          end((cut.counts ? cut.counts->segments[PASS] * args.heads : args.tasks) * PIECES)
    {
    }

    __device__ const void *initial_state(long long task) const
    {
        return args.initial_state ? static_cast<const char *>(args.initial_state) +
                                        task * (DIM * DIM) * (args.state_is_bf16 ? 2 : 4)
                                  : nullptr;
    }

    __device__ void *final_state(long long task) const
    {
        return args.final_state
                   ? static_cast<char *>(args.final_state) + task * (DIM * DIM) * (args.state_is_bf16 ? 2 : 4)
                   : nullptr;
    }

    /* All of a sequence, from the caller's state to the caller's. */
    __device__ Piece whole(int sequence, int head, long long begin, int length, int first_row) const
    {
        const long long task = static_cast<long long>(sequence) * args.heads + head;
        return {begin,
                head,
                length,
                first_row,
                args.state_is_bf16 ? INITIAL_BF16 | FINAL_BF16 : 0,
                initial_state(task),
                final_state(task)};
    }

    __device__ Piece of_segment(const fkda_segment &s, int head, int first_row) const
    {
        Piece piece = whole(s.sequence, head, s.begin, s.length, first_row);
        if (s.slot < 0) return piece;
        const long long matrix = (static_cast<long long>(s.slot) * args.heads + head) * (DIM * DIM);
        const long long next_slot = static_cast<long long>(args.heads) * (DIM * DIM);
        if (!(s.kind & FKDA_SEGMENT_FIRST)) {
            piece.initial = mixed ? nullptr : cut.states + matrix;
            piece.kind &= ~INITIAL_BF16;
            if (mixed) piece.kind |= s.kind & FKDA_SEGMENT_MAP ? STATES_ONLY | UNIT : STATES_ONLY;
        }
        if (!(s.kind & FKDA_SEGMENT_LAST)) {
            piece.final = !mixed                      ? nullptr
                          : s.kind & FKDA_SEGMENT_MAP ? cut.maps + matrix
                                                      : cut.states + matrix + next_slot;
            piece.kind &= ~FINAL_BF16;
        }
        return piece;
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
        if (number >= end) return {0, 0, 0, 0, NO_PIECE, nullptr, nullptr};
        int sequence = number / PIECES / args.heads;
        const int head = number / PIECES % args.heads, first_row = number % PIECES * rows;
        if (cut.counts) return of_segment(cut.lists[PASS][sequence], head, first_row);
        if (order) sequence = order[sequence];
        const Task task = find_task(args, sequence * args.heads + head);
        return whole(sequence, head, task.begin, task.length, first_row);
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

} // namespace fkda

#endif
