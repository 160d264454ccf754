/* Which checkpoints a sequence has, for all kernels. src/checkpoints.h says the same for the CPU.
 *
 * The tensors may hold anything: offsets and rows that are not allowed are left out. They may change while
 * the kernel runs, so roles that must agree on a checkpoint take it from one call. */
#ifndef FKDA_CHECKPOINTS_CUH
#define FKDA_CHECKPOINTS_CUH

#include "slots.cuh"
#include "task.cuh"

namespace fkda
{

constexpr int NO_CHECKPOINT = -1;
constexpr int CHECKPOINT_UNIT = 16; /* tokens, of which offsets are multiples */

/* The row of the first checkpoint of a sequence, with `every`. Without `starts` the caller's thread counts
 * the checkpoints of all sequences before it. */
__device__ inline long long first_checkpoint_row(const fkda_fwd_args &args, int sequence)
{
    const fkda_checkpoint_args &c = args.checkpoints;
    if (c.starts) return read_index(c.starts, c.starts_are_i32, sequence);
    if (!args.cu_seqlens) return sequence * (args.tokens / c.every);
    long long rows = 0, begin = sequence_border(args, 0);
    for (int n = 0; n < sequence; n++) {
        const long long end = sequence_border(args, n + 1LL);
        if (end > begin) rows += (end - begin) / c.every;
        begin = end;
    }
    return rows;
}

/* The first checkpoint of a sequence of `length` tokens after more than `after` tokens, or NO_CHECKPOINT. */
__device__ inline int next_checkpoint(const fkda_fwd_args &args, int sequence, int length, int after)
{
    const fkda_checkpoint_args &c = args.checkpoints;
    if (!c.states.data) return NO_CHECKPOINT;
    if (c.every) {
        const long long offset = (after / c.every + 1) * c.every;
        return offset <= length ? static_cast<int>(offset) : NO_CHECKPOINT;
    }
    int next = NO_CHECKPOINT;
    for (int i = 0; i < c.columns; i++) {
        const long long offset =
            read_index(c.offsets, c.offsets_are_i32, static_cast<long long>(sequence) * c.columns + i);
        if (offset <= after || offset > length || offset % CHECKPOINT_UNIT) continue;
        if (next == NO_CHECKPOINT || offset < next) next = static_cast<int>(offset);
    }
    return next;
}

/* The rows that get the state of a sequence after `offset` tokens, one a call: `column` is 0 at first.
 * Returns NO_SLOT after the last one. `first_row` is from first_checkpoint_row(), with `every`. */
__device__ inline long long next_checkpoint_row(const fkda_fwd_args &args, int sequence, int offset,
                                                long long first_row, int &column)
{
    const fkda_checkpoint_args &c = args.checkpoints;
    while (column < (c.every ? 1 : c.columns)) {
        const long long i = static_cast<long long>(sequence) * c.columns + column++;
        long long row = i;
        if (c.every)
            row = first_row + offset / c.every - 1;
        else if (read_index(c.offsets, c.offsets_are_i32, i) != offset)
            continue;
        else if (c.indices)
            row = read_index(c.indices, c.indices_are_i32, i);
        if (row >= 0 && row < c.states.slots) return row;
    }
    return NO_SLOT;
}

} // namespace fkda

#endif
