/* The order in which a block meets its work, the same for every role. */
#ifndef FKDA_HOPPER_WALK_CUH
#define FKDA_HOPPER_WALK_CUH

#include "../common/task.cuh"
#include "kinds.cuh"
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

/* A piece of work: some rows of V of a head, through a sequence, a segment of one, or a part of these. */
struct Piece {
    long long begin;     /* first token, counted over the whole tensor */
    int head, length;    /* length: in tokens */
    int first_row;       /* of V */
    int kind;            /* of these: */
    const void *initial; /* the state [V, K] of the head to start from; null: zeros */
    void *final;         /* where the state goes; null: nowhere */
    int *flags;          /* of each warp of the recurrence, for: */
};
enum {
    NO_PIECE = 1,     /* there is no more work */
    INITIAL_BF16 = 2, /* the type of `initial`, else fp32 */
    FINAL_BF16 = 4,
    UNIT = 8,          /* starts from the identity, and all values are zeros */
    AWAIT = 16,        /* `initial` is there once the warp's flag is set; */
    SIGNAL = 32,       /* `final` is awaited in this way */
    INITIAL_KEPT = 64, /* in the workspace, as StateImage */
    FINAL_KEPT = 128,
    JOIN = 256, /* the block has a part in the join first (at_once.cuh) */
    MORE = 512, /* there is another piece in this part of what the block does (at_once.cuh) */
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
template <class Kind> struct Position {
    static constexpr int CHUNK = Kind::CHUNK;
    Walk walk;
    int head;        /* of the piece */
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
            if (piece.kind & NO_PIECE) {
                left = 0;
                return;
            }
            head = piece.head, left = piece.length - over, token = piece.begin + over;
        }
    }
};

} // namespace fkda

#endif
