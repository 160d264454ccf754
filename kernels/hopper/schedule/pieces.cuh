/*
 * Checkpoints: work items in pieces, so that each piece ends where a checkpoint is.
 *
 * Algorithm. The schedule knows nothing of checkpoints. What it gives out is divided here, behind the
 * schedule and before all roles. A piece goes on with the state that the recurrence has in registers
 * (KEEPS_STATE), and a checkpoint is what the piece stores as its final state. A checkpoint that is wanted in
 * several rows is stored by pieces without tokens.
 *
 * A chunk of a CTA pair has 32 tokens, and a checkpoint may be behind its 16th token. The state there comes
 * from a piece of 16 tokens, a probe, after which the recurrence goes back to the state before the chunk,
 * which it has saved in the workspace (SAVES, RESTORES), and computes the whole chunk.
 *
 * Why. The borders of chunks, and with them all bits of outputs and of the final state, are the same with and
 * without checkpoints; and a checkpoint has the bits of the final state of a work item that ends there,
 * because that work item would have the same chunks and a last one that is not whole.
 *
 * All lanes of the loader go the same way, whatever the tensors of checkpoints hold and however they change.
 */
#ifndef FKDA_HOPPER_PIECES_CUH
#define FKDA_HOPPER_PIECES_CUH

#include "../../common/checkpoints.cuh"
#include "../block/shared.cuh"
#include "../join/layouts.cuh"
#include "work_item.cuh"

namespace fkda
{

template <class Block> struct Pieces {
    /* What only the last piece of a work item does, and what only the first one does. */
    static constexpr int LAST_ONLY = FINAL_BF16 | FINAL_IMAGE | SIGNALS_FINAL | AWAITS_READ,
                         FIRST_ONLY = INITIAL_BF16 | INITIAL_IMAGE | AWAITS_INITIAL | SIGNALS_READ |
                                      JOINS_BEFORE | RESTORES;
    const fkda_hopper_fwd_args &all;
    typename Block::Schedule::template Source<Block> source;
    PieceNotes &notes; /* in shared memory, because the loader has few registers; lane 0 writes there */

    __device__ Pieces(const fkda_hopper_fwd_args &a, PieceNotes &n, int rank_in_pair, int lane)
        : all(a), source(a, rank_in_pair, lane), notes(n)
    {
        if (Block::PIECES && lane == 0) notes.in_pieces = false, notes.first_row_is_of = -1;
    }

    __device__ const fkda_checkpoint_args &wanted() const
    {
        return all.fwd.checkpoints;
    }

    static __device__ int lane()
    {
        return static_cast<int>(threadIdx.x) & 31;
    }

    /* Changes the notes, by one lane for all. */
    template <class Change> __device__ void note(Change change) const
    {
        __syncwarp();
        if (lane() == 0) change(notes);
        __syncwarp();
    }

    /* ---- Pieces ---- */

    __device__ LoadedItem next()
    {
        if constexpr (Block::PIECES)
            if (wanted().states.data) return next_piece();
        return source.next();
    }

    __device__ LoadedItem next_piece()
    {
        __syncwarp();
        for (;;) {
            if (!notes.in_pieces) {
                const LoadedItem item = source.next();
                if (item.attributes & NO_WORK) return item;
                begin_item(item);
            }
            if (notes.row == NO_SLOT) find_row();
            if (notes.row != NO_SLOT) return cut_off_piece();
            note([](PieceNotes &n) { n.in_pieces = false; });
            const LoadedItem rest = {notes.rest, notes.of_rest};
            if (rest.length > 0 || rest.final || !(rest.attributes & KEEPS_STATE) ||
                rest.attributes & SIGNALS_FINAL)
                return rest;
        }
    }

    __device__ LoadedItem cut_off_piece() const
    {
        const int before = notes.offset - notes.begin, over = before % Block::CHUNK;
        const bool inside = Block::CTAS == 2 && over > 0 && before < notes.rest.length;
        const bool saves = inside && !(notes.saved && before < Block::CHUNK);
        LoadedItem piece = {notes.rest, notes.of_rest};
        piece.length = saves ? before - over : before;
        piece.attributes &= ~LAST_ONLY;
        if (saves) {
            piece.final = saved_state();
            piece.attributes |= SAVES;
        } else {
            const long long at = notes.row * wanted().states.slot_stride + piece.head * (128LL * 128);
            piece.final = static_cast<char *>(wanted().states.data) + at * (wanted().is_bf16 ? 2 : 4);
            if (wanted().is_bf16) piece.attributes |= FINAL_BF16;
        }
        note([&](PieceNotes &n) {
            WorkItem &rest = n.rest;
            if (!saves) n.row = NO_SLOT;
            if (inside && !saves) { /* the piece's tokens stay in the rest */
                rest.initial = saved_state();
                rest.attributes = (rest.attributes & ~KEEPS_STATE) | INITIAL_IMAGE | RESTORES;
                return;
            }
            const int tokens = piece.length;
            n.saved = saves;
            n.begin += tokens, n.of_rest.before += tokens, rest.token += tokens, rest.length -= tokens;
            rest.initial = nullptr;
            rest.attributes = (rest.attributes & ~(FIRST_ONLY | 7 << PHASE_BIT)) | KEEPS_STATE |
                              (tokens > 0 ? SCALES_CHOSEN : 0) |
                              n.of_rest.before / CHECKPOINT_UNIT % 8 << PHASE_BIT;
        });
        return piece;
    }

    __device__ void *saved_state() const
    {
        return static_cast<SavedState *>(all.saved) + blockIdx.x / FKDA_HOPPER_PAIR_CTAS;
    }

    /* ---- Where checkpoints are ---- */

    __device__ void begin_item(const LoadedItem &item) const
    {
        const int n = item.sequence;
        const int first_token =
            all.fwd.cu_seqlens ? Cut::of_first_lane(static_cast<int>(sequence_border(all.fwd, n))) : 0;
        const bool new_row = wanted().every && notes.first_row_is_of != n;
        const long long row = new_row ? find_first_row(n) : notes.first_row;
        note([&](PieceNotes &to) {
            to.in_pieces = true, to.saved = false;
            to.rest = item, to.of_rest = item, to.begin = item.token - first_token;
            to.first_row = row, to.first_row_is_of = n;
            to.row = NO_SLOT, to.column = 0;
        });
        const int offset = next_offset(notes.begin);
        note([=](PieceNotes &to) { to.offset = offset; });
    }

    __device__ long long read_offset(int i) const
    {
        const long long at = static_cast<long long>(notes.of_rest.sequence) * wanted().columns + i;
        return read_index(wanted().offsets, wanted().offsets_are_i32, at);
    }

    /* The first checkpoint of the rest after more than `after` tokens of the sequence. */
    __device__ int next_offset(int after) const
    {
        const int end = notes.begin + notes.rest.length;
        if (wanted().every) {
            const long long next = static_cast<long long>(after / every() + 1) * every();
            return next <= end ? static_cast<int>(next) : NO_CHECKPOINT;
        }
        constexpr unsigned NONE = ~0u;
        unsigned least = NONE;
#pragma unroll 1
        for (int i = lane(); i < wanted().columns; i += 32) {
            const long long x = read_offset(i);
            if (x > after && x <= end && x % CHECKPOINT_UNIT == 0)
                least = min(least, static_cast<unsigned>(x));
        }
        least = __reduce_min_sync(~0u, least);
        return least == NONE ? NO_CHECKPOINT : static_cast<int>(least);
    }

    /* Notes the next row for the state at `offset`, or at the next checkpoint that has one. */
    __device__ void find_row() const
    {
        int offset = notes.offset, column = notes.column;
        long long row = NO_SLOT;
        while (offset != NO_CHECKPOINT && row == NO_SLOT) {
            const bool is_every = wanted().every != 0;
            if (column >= (is_every ? 1 : wanted().columns)) {
                offset = next_offset(offset), column = 0;
                continue;
            }
            const int i = column + lane();
            long long x = NO_SLOT;
            if (is_every && i == 0)
                x = notes.first_row + offset / every() - 1;
            else if (!is_every && i < wanted().columns && read_offset(i) == offset)
                x = row_of_column(i);
            const unsigned there = __ballot_sync(~0u, x >= 0 && x < wanted().states.slots);
            const int from = there ? __ffs(static_cast<int>(there)) - 1 : 31;
            column += from + 1;
            if (there) row = __shfl_sync(~0u, x, from);
        }
        note([=](PieceNotes &n) { n.offset = offset, n.column = column, n.row = row; });
    }

    __device__ long long row_of_column(int i) const
    {
        const long long at = static_cast<long long>(notes.of_rest.sequence) * wanted().columns + i;
        return wanted().indices ? read_index(wanted().indices, wanted().indices_are_i32, at) : at;
    }

    /* Tokens from one checkpoint to the next, in 32 bits, of which divisions take little code. No sequence is
     * as long as the greatest number. */
    __device__ int every() const
    {
        return static_cast<int>(min(wanted().every, 0x7ffffff0LL));
    }

    /* As first_checkpoint_row(), by all lanes together. */
    __device__ long long find_first_row(int sequence) const
    {
        long long rows = 0;
        if (wanted().starts)
            rows = read_index(wanted().starts, wanted().starts_are_i32, sequence);
        else if (!all.fwd.cu_seqlens)
            rows = static_cast<long long>(static_cast<int>(all.fwd.tokens) / every()) * sequence;
        else {
#pragma unroll 1
            for (int n = lane(); n < sequence; n += 32) {
                const long long length = sequence_border(all.fwd, n + 1LL) - sequence_border(all.fwd, n);
                if (length > 0) rows += static_cast<int>(length) / every();
            }
            for (int by = 16; by > 0; by /= 2) rows += __shfl_xor_sync(~0u, rows, by);
        }
        return __shfl_sync(~0u, rows, 0);
    }
};

} // namespace fkda

#endif
