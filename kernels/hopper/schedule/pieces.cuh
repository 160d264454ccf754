/*
 * Checkpoints inside chunks: work items in pieces.
 *
 * A chunk of a CTA pair has 32 tokens, and a checkpoint may be behind its 16th token. The state there comes
 * from a piece of 16 tokens, a probe, before which and after which the recurrence starts from the state
 * before the chunk. The piece before the probe saves this state in the workspace (SAVES, RESTORES).
 * Checkpoints between chunks need no pieces (block/checkpoint_list.cuh).
 *
 * Algorithm. The schedule knows nothing of checkpoints. What it gives out is divided here, behind the
 * schedule and before all roles.
 *
 * Why. The borders of chunks, and with them all bits of outputs and of the final state, are the same with and
 * without checkpoints; and a checkpoint has the bits of the final state of a work item that ends there,
 * because that work item would have the same chunks and a last one that is not whole.
 *
 * All lanes of the loader go the same way, whatever the tensors of checkpoints hold and however they change.
 */
#ifndef FKDA_HOPPER_PIECES_CUH
#define FKDA_HOPPER_PIECES_CUH

#include "../block/checkpoint_list.cuh"
#include "../join/layouts.cuh"

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
        if (Block::PIECES) note([](PieceNotes &to) { to.in_pieces = false; });
    }

    __device__ CheckpointReader reader() const
    {
        return CheckpointReader{all.fwd};
    }

    /* Changes the notes, by one lane for all. */
    template <class Change> __device__ void note(Change change) const
    {
        __syncwarp();
        if (CheckpointReader::lane() == 0) change(notes);
        __syncwarp();
    }

    __device__ LoadedItem next()
    {
        if constexpr (Block::PIECES)
            if (all.fwd.checkpoints.states.data) return next_piece();
        return source.next();
    }

    __device__ LoadedItem next_piece()
    {
        if (!notes.in_pieces) {
            const LoadedItem item = source.next();
            if (item.attributes & NO_WORK) return item;
            const int before = reader().tokens_before(item);
            note([&](PieceNotes &to) {
                to.in_pieces = true, to.has_state = false;
                to.rest = item, to.of_rest = item, to.begin = to.after = before;
            });
        }
        const int offset = next_inside();
        LoadedItem piece = {notes.rest, notes.of_rest};
        if (offset == NO_CHECKPOINT) {
            note([](PieceNotes &n) { n.in_pieces = false; });
            return piece;
        }
        const int before = offset - notes.begin;
        const bool is_probe = notes.has_state && before < Block::CHUNK;
        piece.length = is_probe ? before : before / Block::CHUNK * Block::CHUNK;
        piece.final = is_probe ? nullptr : piece_state();
        piece.attributes = (piece.attributes & ~LAST_ONLY) | (is_probe ? 0 : SAVES);
        note([&](PieceNotes &n) {
            WorkItem &rest = n.rest;
            if (is_probe) { /* the piece's tokens stay in the rest */
                n.after = offset, rest.attributes |= AFTER_PROBE;
                return;
            }
            const int tokens = piece.length;
            n.has_state = true;
            n.begin += tokens, n.of_rest.before += tokens, rest.token += tokens, rest.length -= tokens;
            n.after = n.begin;
            rest.initial = piece_state();
            rest.attributes = (rest.attributes & ~(FIRST_ONLY | AFTER_PROBE | 7 << PHASE_BIT)) |
                              INITIAL_IMAGE | RESTORES | (tokens > 0 ? SCALES_CHOSEN : 0) |
                              n.of_rest.before / CHECKPOINT_UNIT % 8 << PHASE_BIT;
        });
        return piece;
    }

    __device__ void *piece_state() const
    {
        return static_cast<PieceState *>(all.piece_states) + blockIdx.x / FKDA_HOPPER_PAIR_CTAS;
    }

    /* The next checkpoint that is inside a chunk of the rest. */
    __device__ int next_inside() const
    {
        const fkda_checkpoint_args &wanted = all.fwd.checkpoints;
        const int begin = notes.begin, after = notes.after, last = begin + notes.rest.length - 1;
        const auto is_inside = [=](long long offset) { return (offset - begin) % Block::CHUNK != 0; };
        if (!wanted.every) return reader().least_offset(notes.of_rest.sequence, after, last, is_inside);
        const int every = reader().every();
        long long offset = static_cast<long long>(after / every + 1) * every;
        if (!is_inside(offset)) offset += every;
        return offset <= last && is_inside(offset) ? static_cast<int>(offset) : NO_CHECKPOINT;
    }
};

} // namespace fkda

#endif
