/*
 * A state that streams through shared memory in parts. A thread copies what it computes with, so it waits for
 * nobody else. A part has a few neighbouring channels of each of the thread's rows (tile.cuh).
 */
#ifndef FKDA_DECODE_PARTS_CUH
#define FKDA_DECODE_PARTS_CUH

#include "ptx.cuh"
#include "tile.cuh"

namespace fkda
{

/* `places`: of parts in shared memory. If there are fewer than parts, a part that is taken makes place for
 * another one. If there are as many, parts stay. */
template <class State, int places> struct Parts {
    static constexpr int PART = State::PART, PARTS = State::PARTS;
    static constexpr int PARTS_AT_ONCE = PARTS;                                  /* in loops over parts */
    static constexpr int LOADS = State::LOADS / PARTS, BYTES = 4 * State::WORDS; /* of a load */

    unsigned char *first; /* the thread's first load in shared memory; others are 32 * BYTES apart */
    const char *from;

    /* `memory`: of the CTA, for the places. `at`: where the state begins, in elements of the pool. */
    __device__ __forceinline__ Parts(unsigned char *memory, const State &tile, void *states, long long at)
    {
        const int warp = tile.row / 16 % (static_cast<int>(blockDim.x) / 32),
                  lane = tile.row % 16 / State::ROWS * (32 * State::ROWS / 16) + tile.lane;
        first = memory + warp * (places * LOADS * 32 * BYTES) + lane * BYTES;
        from = tile.first_address(states, at);
    }

    __device__ __forceinline__ unsigned char *place(int part, int load) const
    {
        return first + (part % places * LOADS + load) * (32 * BYTES);
    }

    __device__ __forceinline__ void copy(int part, bool valid) const
    {
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            copy_part_async<BYTES>(
                place(part, i),
                from + (State::K_FIRST ? State::offset(0, part * PART + i) : State::offset(i, part * PART)),
                valid);
    }

    /* Begins to copy as many parts as there are places. */
    __device__ __forceinline__ void begin() const
    {
#pragma unroll
        for (int part = 0; part < places; part++) copy(part, true), copy_async_commit();
    }

    /* Takes a part. Parts are taken in order; `again`: after the last one they are taken once more. */
    __device__ __forceinline__ void take(float (&x)[State::ROWS][PART], int part, bool again) const
    {
        uint32_t word[LOADS][State::WORDS];
        copy_async_wait<places - 1>();
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            if constexpr (State::WORDS == 4) {
                const uint4 y = *reinterpret_cast<const uint4 *>(place(part, i));
                word[i][0] = y.x, word[i][1] = y.y, word[i][2] = y.z, word[i][3] = y.w;
            } else if constexpr (State::WORDS == 2) {
                const uint2 y = *reinterpret_cast<const uint2 *>(place(part, i));
                word[i][0] = y.x, word[i][1] = y.y;
            } else {
                word[i][0] = *reinterpret_cast<const uint32_t *>(place(part, i));
            }
        }
#pragma unroll
        for (int r = 0; r < State::ROWS; r++)
#pragma unroll
            for (int e = 0; e < PART; e++)
                x[r][e] = State::number(word[State::K_FIRST ? e : r], State::K_FIRST ? r : e);
        if (places < PARTS) copy((part + places) % PARTS, part + places < PARTS || again);
        copy_async_commit();
    }
};

} // namespace fkda

#endif
