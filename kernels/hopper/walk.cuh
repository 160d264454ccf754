/* The order in which a block meets its work, the same for every role. */
#ifndef FKDA_HOPPER_WALK_CUH
#define FKDA_HOPPER_WALK_CUH

#include "../common/task.cuh"

namespace fkda
{

/* The tasks of this block: every gridDim.x-th piece of `rows` rows of V of a head. */
template <int rows> struct Walk {
    static constexpr int PIECES = DIM / rows;
    int piece;

    __device__ Walk() : piece(static_cast<int>(blockIdx.x)) {}
    __device__ bool done(const fkda_fwd_args &args) const
    {
        return piece >= args.tasks * PIECES;
    }
    __device__ int index() const
    {
        return piece / PIECES;
    }
    __device__ int first_row() const
    {
        return piece % PIECES * rows;
    }
    __device__ void advance()
    {
        piece += static_cast<int>(gridDim.x);
    }
};

/* One chunk of the walk. */
template <int rows> struct Position {
    Walk<rows> walk;
    int head;
    int left;        /* tokens of the sequence from the chunk's first on */
    long long token; /* the chunk's first, counted over the whole tensor */

    /* The chunk `chunks` after the first. */
    __device__ Position(const fkda_fwd_args &args, int chunks) : head(0), left(0), token(0)
    {
        if (walk.done(args)) return;
        enter(args);
        advance(args, chunks);
    }

    __device__ bool done(const fkda_fwd_args &args) const
    {
        return walk.done(args);
    }

    /* Goes on by `chunks`, into later tasks where this one ends. */
    __device__ void advance(const fkda_fwd_args &args, int chunks)
    {
        left -= chunks * CHUNK;
        token += chunks * CHUNK;
        while (left <= 0) {
            const int over = -left / CHUNK * CHUNK;
            walk.advance();
            if (walk.done(args)) return;
            enter(args);
            left -= over, token += over;
        }
    }

  private:
    __device__ void enter(const fkda_fwd_args &args)
    {
        const Task task = find_task(args, walk.index());
        head = task.head, left = task.length, token = task.begin;
    }
};

/* A place in a ring of `size` slots: chunk after chunk in steps, with the parity of the round. */
template <int size> struct Slot {
    int index, parity;

    __device__ explicit Slot(int first) : index(first % size), parity(first / size % 2) {}
    __device__ void advance(int chunks)
    {
        index += chunks;
        if (index >= size) index -= size, parity ^= 1;
    }
};

} // namespace fkda

#endif
