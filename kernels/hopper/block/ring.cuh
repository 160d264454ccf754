/*
 * Rings: a fixed number of slots in shared memory that one role fills and another one empties, in turn.
 *
 * The table in barriers.cuh says which role fills and empties which ring, and what may be overwritten when.
 */
#ifndef FKDA_HOPPER_RING_CUH
#define FKDA_HOPPER_RING_CUH

#include "../ptx/mbarrier.cuh"

namespace fkda
{

/* The mbarriers of a ring, two for each slot: full when the slot may be read, empty when it may be
 * overwritten. */
template <int slots> struct Ring {
    uint64_t full[slots], empty[slots];
};

/* A position in a ring: the slot, and the parity of the round. The filling role waits for
 * empty[index] with parity ^ 1, and the emptying role waits for full[index] with parity. */
template <int size> struct Slot {
    int index, parity;

    __device__ explicit Slot(int first) : index(first % size), parity(first / size % 2)
    {
    }

    /* Advances by at most `size` slots. */
    __device__ void advance(int steps)
    {
        index += steps;
        if (index >= size) index -= size, parity ^= 1;
    }
};

} // namespace fkda

#endif
