/* Which pieces of work a block gets, and in which order. */
#ifndef FKDA_HOPPER_DEAL_CUH
#define FKDA_HOPPER_DEAL_CUH

#include "cut.cuh"
#include "fwd_args.h"
#include "shared.cuh"

namespace fkda
{

/* Where the next piece comes from. Pieces are numbered, by sequence and head or, where sequences are cut, by segment in a list and
 * head. Blocks draw numbers from a counter if there is one; numbers go to sequences by falling length, so that blocks end at about
 * the same time. Else, and for blocks that share preparation, numbers are dealt out forwards and backwards by turns. Blocks that
 * share meet the same numbers. */
template <int rows, bool mixed> struct Dealer {
    static constexpr int PASS = mixed ? 0 : 1;
    static constexpr bool DRAWS = SHARERS<rows, mixed> == 1;
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    const fkda_phases &phases;
    const uint16_t *order;   /* of the sequences, or null */
    int rank, place, places; /* among the blocks that share, and of those among all */
    int next, turn, end;

    __device__ Dealer(const fkda_hopper_fwd_args &a, const uint16_t *o, int rank_)
        : args(a.fwd), cut(a.cut), phases(a.phases), order(o), rank(rank_),
          place(static_cast<int>(blockIdx.x) / SHARERS<rows, mixed>),
          places(static_cast<int>(gridDim.x) / SHARERS<rows, mixed>), next(place), turn(0),
          end(cut.counts ? Cut{args, cut}.entries(PASS) * args.heads : args.tasks)
    {
        if (!phases.states) return;
        const int paired = min(phases.group_tasks, args.tasks - phases.phase * phases.group_tasks);
        end = rows == 64 ? paired : args.tasks - paired;
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

    /* In the first pass blocks that share have the halves of a first segment's rows, or a segment's map and its state. */
    __device__ Piece of_segment(const fkda_segment &s, int head) const
    {
        const bool halves = rows == 64 || (mixed && s.kind & FKDA_SEGMENT_FIRST);
        Piece piece = whole(s.sequence, head, s.begin, s.length, halves ? 64 * rank : 0);
        if (mixed && halves) piece.kind |= HALF;
        if (s.slot < 0) return piece;
        const long long matrix = (static_cast<long long>(s.slot) * args.heads + head) * (DIM * DIM);
        const long long next_slot = static_cast<long long>(args.heads) * (DIM * DIM);
        if (!(s.kind & FKDA_SEGMENT_FIRST)) {
            piece.initial = mixed ? nullptr : cut.states + matrix;
            piece.kind &= ~INITIAL_BF16;
            if (mixed) piece.kind |= rank == 0 ? STATES_ONLY | UNIT : STATES_ONLY;
        }
        if (!(s.kind & FKDA_SEGMENT_LAST)) {
            piece.final = !mixed              ? nullptr
                          : piece.kind & UNIT ? cut.maps + matrix
                                              : cut.states + matrix + next_slot;
            piece.kind &= ~FINAL_BF16;
        }
        return piece;
    }

    /* The first chunk of a task, of so many, in a phase. */
    __device__ int first_of_phase(int chunks, int group, int phase) const
    {
        const int parts = phases.paired + (phases.groups - 1) * phases.single;
        const int done = phase * phases.single + (phase > group ? phases.paired - phases.single : 0);
        return static_cast<int>(static_cast<long long>(chunks) * done / parts);
    }

    /* The part of a task that this phase does, and number n of those that it does in blocks of this kind. */
    __device__ Piece of_phase(int n) const
    {
        const int before = phases.phase * phases.group_tasks;
        const int index = rows == 64   ? before + n
                          : n < before ? n
                                       : n + min(phases.group_tasks, args.tasks - before);
        const int group = index / phases.group_tasks;
        const Task task = find_task(args, index);
        const int from = first_of_phase(task.chunks, group, phases.phase) * CHUNK,
                  to = min(first_of_phase(task.chunks, group, phases.phase + 1) * CHUNK, task.length);
        Piece piece = whole(index / args.heads, task.head, task.begin + from, max(to - from, 0),
                            rows == 64 ? 64 * rank : 0);
        float *state = phases.states + static_cast<long long>(index) * (DIM * DIM);
        if (phases.phase > 0) piece.initial = state, piece.kind &= ~INITIAL_BF16;
        if (phases.phase < phases.groups - 1) piece.final = state, piece.kind &= ~FINAL_BF16;
        return piece;
    }

    /* Called by all lanes of the warp. */
    __device__ Piece deal(int lane)
    {
        const int number = next;
        turn++;
        if (DRAWS && args.counter) {
            int drawn = 0;
            if (lane == 0) drawn = places + atomicAdd(args.counter, 1);
            next = __shfl_sync(~0u, drawn, 0);
        } else {
            next = turn * places + (turn % 2 ? places - 1 - place : place);
        }
        if (number >= end) return {0, 0, 0, 0, NO_PIECE, nullptr, nullptr};
        if (!mixed && phases.states) return of_phase(number);
        int sequence = number / args.heads;
        const int head = number % args.heads;
        if (cut.counts) return of_segment(Cut{args, cut}.entry(PASS, sequence), head);
        if (DRAWS && order) sequence = order[sequence];
        const Task task = find_task(args, sequence * args.heads + head);
        return whole(sequence, head, task.begin, task.length, rows == 64 ? 64 * rank : 0);
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
