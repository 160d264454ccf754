/*
 * Checkpoints of the work item that the loader loads: which chunks they are behind, and where they go.
 *
 * Algorithm. The schedule and all roles but two know nothing of checkpoints. With each chunk the loader says
 * whether the state after the chunk is a checkpoint. If so, it hands the places of the checkpoint to the
 * recurrence through a ring (CheckpointRing), behind the chunk, so that no chunk waits for them. The
 * recurrence stores the state there and goes on with the next chunk.
 *
 * All lanes of the loader go the same way, whatever the tensors of checkpoints hold and however they change.
 */
#ifndef FKDA_HOPPER_CHECKPOINT_LIST_CUH
#define FKDA_HOPPER_CHECKPOINT_LIST_CUH

#include "../../common/checkpoints.cuh"
#include "shared.cuh"

namespace fkda
{

/* Reads where checkpoints are. All lanes of a warp call its functions together. */
struct CheckpointReader {
    const fkda_fwd_args &args;

    __device__ const fkda_checkpoint_args &wanted() const
    {
        return args.checkpoints;
    }

    static __device__ int lane()
    {
        return static_cast<int>(threadIdx.x) & 31;
    }

    /* Tokens of the sequence before a work item. */
    __device__ int tokens_before(const LoadedItem &item) const
    {
        return args.cu_seqlens
                   ? item.token - Cut::of_first_lane(static_cast<int>(sequence_border(args, item.sequence)))
                   : item.token;
    }

    /* Tokens from one checkpoint to the next, in 32 bits, of which divisions take little code. No sequence is
     * as long as the greatest number. */
    __device__ int every() const
    {
        return static_cast<int>(min(wanted().every, 0x7ffffff0LL));
    }

    __device__ long long read_offset(int sequence, int column) const
    {
        const long long at = static_cast<long long>(sequence) * wanted().columns + column;
        return read_index(wanted().offsets, wanted().offsets_are_i32, at);
    }

    __device__ long long row_of_column(int sequence, int column) const
    {
        const long long at = static_cast<long long>(sequence) * wanted().columns + column;
        return wanted().indices ? read_index(wanted().indices, wanted().indices_are_i32, at) : at;
    }

    /* The first offset of a sequence that is in a column, above `after`, at most `end` and taken. */
    template <class Takes> __device__ int least_offset(int sequence, int after, int end, Takes takes) const
    {
        constexpr unsigned NONE = ~0u;
        unsigned least = NONE;
#pragma unroll 1
        for (int i = lane(); i < wanted().columns; i += 32) {
            const long long x = read_offset(sequence, i);
            if (x > after && x <= end && x % CHECKPOINT_UNIT == 0 && takes(static_cast<int>(x)))
                least = min(least, static_cast<unsigned>(x));
        }
        least = __reduce_min_sync(~0u, least);
        return least == NONE ? NO_CHECKPOINT : static_cast<int>(least);
    }

    /* As first_checkpoint_row(), by all lanes together. */
    __device__ long long find_first_row(int sequence) const
    {
        long long rows = 0;
        if (wanted().starts)
            rows = read_index(wanted().starts, wanted().starts_are_i32, sequence);
        else if (!args.cu_seqlens)
            rows = static_cast<long long>(static_cast<int>(args.tokens) / every()) * sequence;
        else {
#pragma unroll 1
            for (int n = lane(); n < sequence; n += 32) {
                const long long length = sequence_border(args, n + 1LL) - sequence_border(args, n);
                if (length > 0) rows += static_cast<int>(length) / every();
            }
            for (int by = 16; by > 0; by /= 2) rows += __shfl_xor_sync(~0u, rows, by);
        }
        return __shfl_sync(~0u, rows, 0);
    }
};

/* The loader's cursor over the checkpoints of a work item. Its notes are in shared memory, because the loader
 * has few registers; lane 0 writes there. */
template <class Block> struct CheckpointList : CheckpointReader {
    CheckpointNotes &notes;

    __device__ CheckpointList(const fkda_fwd_args &a, CheckpointNotes &n) : CheckpointReader{a}, notes(n)
    {
        if (Block::CHECKPOINTS) note([](CheckpointNotes &to) { to.first_row_is_of = -1, to.number = 0; });
    }

    /* Changes the notes, by one lane for all. */
    template <class Change> __device__ void note(Change change) const
    {
        __syncwarp();
        if (lane() == 0) change(notes);
        __syncwarp();
    }

    /* Begins with a work item. Returns what go_to() does. */
    __device__ int begin(const LoadedItem &item) const
    {
        if (!wanted().states.data || item.length <= 0) return 0;
        const int n = item.sequence, first = tokens_before(item), end = first + item.length;
        const int after = first + (item.attributes & AFTER_PROBE ? CHECKPOINT_UNIT : 0);
        long long next, row = 0, first_row = 0;
        if (wanted().every) {
            first_row = notes.first_row_is_of == n ? notes.first_row : find_first_row(n);
            const int before = after / every();
            next = static_cast<long long>(before + 1) * every(), row = first_row + before;
        } else {
            next = least_offset(n, after, end, [](int) { return true; });
        }
        note([=](CheckpointNotes &to) {
            to.sequence = n, to.head = item.head, to.begin = first, to.end = end;
            to.first_row = first_row, to.first_row_is_of = n, to.row = row;
        });
        return go_to(next);
    }

    /* Makes `offset` the next checkpoint, or none if it is NO_CHECKPOINT or behind the work item. Returns how
     * many tokens of the work item are left where the checkpoint's chunk begins, or 0 without a
     * checkpoint. */
    __device__ int go_to(long long offset) const
    {
        if (offset < 0 || offset > notes.end) return 0;
        const int here = static_cast<int>(offset);
        note([=](CheckpointNotes &to) { to.offset = here; });
        return notes.end - notes.begin - (here - notes.begin - 1) / Block::CHUNK * Block::CHUNK;
    }

    /* Calls put(to, more) for each place where the next checkpoint goes, and at least once. Goes on to the
     * checkpoint behind it, and returns what go_to() does. */
    template <class Put> __device__ int pass(Put put) const
    {
        const int n = notes.sequence, offset = notes.offset;
        const int columns = wanted().every ? 1 : wanted().columns;
        long long row = NO_SLOT; /* of this lane's column */
        unsigned there = 0;      /* lanes whose rows are still to be put */
        int first = 0;           /* column to look at */
        void *to = nullptr;
        for (bool more = true; more;) { /* one loop, so that put() is inlined once */
            while (!there && first < columns) {
                const int i = first + lane();
                row = NO_SLOT, first += 32;
                if (wanted().every)
                    row = i == 0 ? notes.row : NO_SLOT;
                else if (i < columns && read_offset(n, i) == offset)
                    row = row_of_column(n, i);
                there = __ballot_sync(~0u, row >= 0 && row < wanted().states.slots);
            }
            more = there != 0;
            void *next = nullptr;
            if (more) next = place_of(__shfl_sync(~0u, row, __ffs(static_cast<int>(there)) - 1));
            there &= there - 1;
            if (to || !more) put(to, more);
            to = next;
        }
        if (!wanted().every) return go_to(least_offset(n, offset, notes.end, [](int) { return true; }));
        note([](CheckpointNotes &next) { next.row++; });
        return go_to(static_cast<long long>(offset) + every());
    }

    __device__ void *place_of(long long row) const
    {
        const fkda_state_args &states = wanted().states;
        const long long at = row * states.slot_stride + notes.head * (128LL * 128);
        return static_cast<char *>(states.data) + at * (wanted().is_bf16 ? 2 : 4);
    }
};

} // namespace fkda

#endif
