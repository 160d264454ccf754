/* The order in which a block meets its work, the same for every role. */
#ifndef FKDA_HOPPER_WALK_CUH
#define FKDA_HOPPER_WALK_CUH

#include "../common/task.cuh"
#include "sm90.cuh"

namespace fkda
{

/* A place in a ring of `size` slots: in steps of at most size, with the parity of the round. A parity tells two rounds
 * apart, no more: who waits for a round must know that the one before the last is over. */
template <int size> struct Slot {
    int index, parity;

    __device__ explicit Slot(int first) : index(first % size), parity(first / size % 2)
    {
    }
    __device__ void advance(int steps)
    {
        index += steps;
        if (index >= size) index -= size, parity ^= 1;
    }
};

/* A ring's barriers. */
template <int slots> struct Ring {
    uint64_t full[slots], empty[slots];
};

/* A piece of a task: some rows of V of a head of a sequence. */
struct Piece {
    long long begin;  /* first token, counted over the whole tensor */
    int head, length; /* length: in tokens */
    int index;        /* of the task, sequence * heads + head; negative: there is no more work */
    int first_row;    /* of V */
};

constexpr int PIECES_AHEAD = 16; /* that the loading warp may be ahead of the recurrence: it deals them out */

struct Pieces {
    Piece piece[PIECES_AHEAD];
    Ring<PIECES_AHEAD> ring;
};

/* A warp's way through the pieces of its block. */
struct Walk {
    Pieces &pieces;
    Slot<PIECES_AHEAD> slot;

    __device__ explicit Walk(Pieces &p) : pieces(p), slot(0)
    {
    }

    /* The piece there is to do, until it is left. */
    __device__ const Piece &look() const
    {
        mbarrier_wait(&pieces.ring.full[slot.index], slot.parity);
        return pieces.piece[slot.index];
    }

    __device__ void leave()
    {
        mbarrier_arrive_warp(&pieces.ring.empty[slot.index]);
        slot.advance(1);
    }

    __device__ Piece take()
    {
        const Piece piece = look();
        leave();
        return piece;
    }
};

/* One chunk of a walk. */
struct Position {
    Walk walk;
    int head;
    int left;        /* tokens of the sequence from the chunk's first on; none after the last chunk of all */
    long long token; /* the chunk's first, counted over the whole tensor */

    /* The chunk `chunks` after the first. */
    __device__ Position(Pieces &pieces, int chunks) : walk(pieces), head(0), left(0), token(0)
    {
        skip(chunks * CHUNK);
    }

    __device__ bool done() const
    {
        return left <= 0;
    }

    __device__ void advance(int chunks)
    {
        left -= chunks * CHUNK;
        token += chunks * CHUNK;
        if (left <= 0) skip(-left / CHUNK * CHUNK);
    }

  private:
    /* From the end of a piece, over as many tokens of the next ones. */
    __device__ void skip(int tokens)
    {
        for (left = -tokens; left <= 0;) {
            const int over = -left / CHUNK * CHUNK;
            const Piece piece = walk.take();
            if (piece.index < 0) {
                left = 0;
                return;
            }
            head = piece.head, left = piece.length - over, token = piece.begin + over;
        }
    }
};

} // namespace fkda

#endif
