/* The order in which a block meets its work, the same for every role. */
#ifndef FKDA_HOPPER_WALK_CUH
#define FKDA_HOPPER_WALK_CUH

#include "../common/task.cuh"
#include "sm90.cuh"

namespace fkda
{

/* A place in a ring of `size` slots: in steps of at most size, with the parity of the round. */
template <int size> struct Slot {
    int index, parity;

    __device__ explicit Slot(int first) : index(first % size), parity(first / size % 2) {}
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
    Piece piece;

    __device__ explicit Walk(Pieces &p) : pieces(p), slot(0)
    {
        take();
    }
    __device__ bool done() const
    {
        return piece.index < 0;
    }
    __device__ void advance()
    {
        slot.advance(1);
        take();
    }

  private:
    __device__ void take()
    {
        mbarrier_wait(&pieces.ring.full[slot.index], slot.parity);
        piece = pieces.piece[slot.index];
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(&pieces.ring.empty[slot.index]);
    }
};

/* One chunk of a walk. */
struct Position {
    Walk walk;
    int head;
    int left;        /* tokens of the sequence from the chunk's first on */
    long long token; /* the chunk's first, counted over the whole tensor */

    /* The chunk `chunks` after the first. */
    __device__ Position(Pieces &pieces, int chunks) : walk(pieces), head(0), left(0), token(0)
    {
        if (done()) return;
        enter();
        advance(chunks);
    }

    __device__ bool done() const
    {
        return walk.done();
    }

    /* Goes on by `chunks`, into later pieces where this one ends. */
    __device__ void advance(int chunks)
    {
        left -= chunks * CHUNK;
        token += chunks * CHUNK;
        while (left <= 0) {
            const int over = -left / CHUNK * CHUNK;
            walk.advance();
            if (done()) return;
            enter();
            left -= over, token += over;
        }
    }

  private:
    __device__ void enter()
    {
        head = walk.piece.head, left = walk.piece.length, token = walk.piece.begin;
    }
};

} // namespace fkda

#endif
