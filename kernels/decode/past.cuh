/*
 * The accepted tokens of earlier records, which `chunk` applies to a state that streams through it: what the
 * next tokens of the sequence start from. The state is stored, too.
 *
 * A CTA keeps their decays, their keys and u of its rows behind the places of the state's parts. They are
 * copied before the state is. Once they have come, join() multiplies each key by the decays behind it, and
 * leaves the decay of all of them in Small::total.
 */
#ifndef FKDA_DECODE_PAST_CUH
#define FKDA_DECODE_PAST_CUH

#include "accepted.cuh"
#include "prepare.cuh"
#include "update.cuh"

namespace fkda
{

/* There is room for a multiple of eight tokens. Nothing is kept in registers: they are scarce where a state
 * is brought up to date. */
template <bool is_bf16> struct PastTokens {
    static constexpr bool FILLED = true;
    const fkda_decode_args &args;
    const Small &small;

    __device__ __forceinline__ float *token(unsigned j) const
    {
        float *first = reinterpret_cast<float *>(
            cta_memory() + FKDA_DECODE_CHUNK_BYTES(args.room, false, is_bf16, args.split));
        return first + j * (2u * DIM + (DIM >> args.split));
    }
    /* As last_key() in chunk.cuh: lanes that read several tokens find them in different banks. */
    __device__ __forceinline__ float *key(unsigned j, unsigned place) const
    {
        return token(j) + (place ^ j / 2 % 4 * 8);
    }
    __device__ __forceinline__ float *decay(unsigned j) const
    {
        return token(j) + DIM;
    }
    __device__ __forceinline__ float *us(unsigned j) const
    {
        return token(j) + 2 * DIM;
    }

    /* What update.cuh asks for. */
    __device__ __forceinline__ int count() const
    {
        return small.past;
    }
    __device__ __forceinline__ float u(int j, int row) const
    {
        return us(j)[row - small.work.first_row];
    }

    /* Begins to copy `some` records. Lane i has the number of record i. */
    template <class Tile> __device__ __forceinline__ void copy(const Work &work, int some, int record) const
    {
        constexpr int FOURS = DIM / 4; /* of a vector */
        const int rows = DIM >> args.split;
        const long long step = args.heads * (3LL * DIM);
        const float *from = args.past.records +
                            static_cast<long long>(work.sequence) * args.past.columns * step +
                            work.head * (3 * DIM);
#pragma unroll 1
        for (int j = 0; j < some; j++) {
            const float *of_token = from + __shfl_sync(~0u, record, j) * step;
#pragma unroll 1
            for (int i = static_cast<int>(threadIdx.x); i < 2 * FOURS + rows / 4;
                 i += static_cast<int>(blockDim.x)) {
                const int channel = i % FOURS * 4, place = Tile::place_of_four(channel);
                if (i < 2 * FOURS)
                    copy_async(i < FOURS ? decay(j) + place : key(j, place), of_token + 4 * i, true);
                else
                    copy_async(us(j) + channel, of_token + 4 * i + work.first_row, true);
            }
        }
    }

    __device__ __forceinline__ void join(float *total) const
    {
#pragma unroll 1
        for (int place = static_cast<int>(threadIdx.x); place < DIM; place += static_cast<int>(blockDim.x)) {
            float product = 1.0f;
            for (int j = small.past; j % TILE_TOKENS; j++) *key(j, place) = 0.0f;
#pragma unroll 4
            for (int j = small.past - 1; j >= 0; j--) {
                *key(j, place) *= product;
                product *= decay(j)[place];
            }
            total[place] = product;
        }
    }
};

} // namespace fkda

#endif
