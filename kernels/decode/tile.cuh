/*
 * The part of a state that a thread has: a few neighbouring rows of V and some channels of K. This part is in
 * registers, or in shared memory (parts.cuh).
 *
 * A warp has 16 rows. Eight neighbouring lanes share four of them, or four lanes two of them (in chunk.cuh,
 * for tensor cores): L lanes share L / 2. Lane l of the L has
 *
 *     of an fp32 state  channels 4 l + 4 L j to 4 l + 4 L j + 3, for j from 0 to 32 / L - 1
 *     of a bf16 state   channels 8 l + 8 L j to 8 l + 8 L j + 7, for j from 0 to 16 / L - 1
 *
 * so that a load of 16 bytes takes neighbours, eight lanes take 128 bytes, and a thread has all eight
 * channels of a block of random numbers (rounding.h). With K first a load takes the rows of one channel.
 *
 * Vectors over the channels lie in shared memory in the order in which the lanes have them: the j-th four
 * channels of lane l are at 4 L j + 4 l. Neighbouring lanes then read neighbours.
 */
#ifndef FKDA_DECODE_TILE_CUH
#define FKDA_DECODE_TILE_CUH

#include "rounding.h"
#include "sequence.cuh"

namespace fkda
{

constexpr int ROWS = 4, CHANNELS = 16; /* of a thread, where eight lanes share rows */

/* How bf16 states are rounded. */
struct Rounding {
    bool at_random; /* else to nearest */
    uint64_t seed, offset;
    int sequence, heads, head;
};

__device__ __forceinline__ Rounding find_rounding(const long long *numbers, const Work &work, int heads)
{
    Rounding rounding = {numbers != nullptr, 0, 0, work.sequence, heads, work.head};
    if (numbers) {
        rounding.seed = static_cast<uint64_t>(numbers[0]);
        rounding.offset = static_cast<uint64_t>(numbers[1]);
    }
    return rounding;
}

template <bool is_bf16, bool k_first, int lanes = 8> struct Tile {
    static constexpr int ROWS = lanes / 2, CHANNELS = 128 / lanes; /* of a thread */
    static constexpr bool IS_BF16 = is_bf16, K_FIRST = k_first;
    /* Channels that are stored together. */
    static constexpr int PART = is_bf16 ? 8 : 4, PARTS = CHANNELS / PART;
    /* Loads as they come from memory. */
    static constexpr int WORDS = !k_first ? 4 : is_bf16 ? ROWS / 2 : ROWS;
    static constexpr int LOADS = ROWS * CHANNELS * (is_bf16 ? 2 : 4) / (4 * WORDS);
    struct Loaded {
        uint32_t word[LOADS][WORDS];
    };

    int lane;                /* of those that share rows */
    int row;                 /* of V: the first */
    float x[ROWS][CHANNELS]; /* the state */

    /* `first_row`: of the CTA. */
    __device__ __forceinline__ Tile(int first_row)
    {
        lane = static_cast<int>(threadIdx.x) % lanes;
        set_row(first_row);
    }

    __device__ __forceinline__ void set_row(int first_row)
    {
        row = first_row + static_cast<int>(threadIdx.x) / lanes * ROWS;
    }

    /* Finds lane and row again, so that the compiler need not keep them in registers meanwhile. */
    __device__ __forceinline__ void find_place_again(int first_row)
    {
        int cta, thread;
        read_indices(cta, thread);
        lane = static_cast<int>(static_cast<unsigned>(thread) % lanes);
        row = first_row + static_cast<int>(static_cast<unsigned>(thread) / lanes) * ROWS;
    }

    /* The channel of element e. */
    __device__ __forceinline__ int channel(int e) const
    {
        return e / PART * (lanes * PART) + PART * lane + e % PART;
    }

    /* Where four neighbouring channels are in a vector in shared memory. */
    static __device__ __forceinline__ int place_of_four(int first_channel)
    {
        if (!is_bf16) return first_channel;
        return (first_channel / (8 * lanes) * 2 + first_channel / 4 % 2) * (4 * lanes) +
               first_channel / 8 % lanes * 4;
    }

    /* The elements 4 j to 4 j + 3 of a vector in shared memory. */
    __device__ __forceinline__ float4 read(const float *vector, int j) const
    {
        return *reinterpret_cast<const float4 *>(vector + 4 * lanes * j + 4 * lane);
    }

    /* The address of element 0 of the thread's first row, in a state that begins at element `at` of the
     * pool. */
    __device__ __forceinline__ char *first_address(void *states, long long at) const
    {
        const int v = row, c = PART * lane;
        return static_cast<char *>(states) + (at + (k_first ? c * DIM + v : v * DIM + c)) * (is_bf16 ? 2 : 4);
    }

    /* The bytes from there to element e of row r: a constant. */
    static __device__ __forceinline__ constexpr int offset(int r, int e)
    {
        return (r * (k_first ? 1 : DIM) + (e / PART * (lanes * PART) + e % PART) * (k_first ? DIM : 1)) *
               (is_bf16 ? 2 : 4);
    }

    /* Begins to load a state. */
    __device__ __forceinline__ void load(Loaded &to, void *states, long long at) const
    {
        const char *first = first_address(states, at);
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const char *from = first + (k_first ? offset(0, i) : offset(i / PARTS, i % PARTS * PART));
            if constexpr (WORDS == 4) {
                const uint4 y = __ldcs(reinterpret_cast<const uint4 *>(from));
                to.word[i][0] = y.x, to.word[i][1] = y.y, to.word[i][2] = y.z, to.word[i][3] = y.w;
            } else if constexpr (WORDS == 2) {
                const uint2 y = __ldcs(reinterpret_cast<const uint2 *>(from));
                to.word[i][0] = y.x, to.word[i][1] = y.y;
            } else {
                to.word[i][0] = __ldcs(reinterpret_cast<const uint32_t *>(from));
            }
        }
    }

    /* Element `at` of a load. */
    static __device__ __forceinline__ float number(const uint32_t (&word)[WORDS], int at)
    {
        const uint32_t bits = word[is_bf16 ? at / 2 : at];
        return !is_bf16 ? __uint_as_float(bits) : at % 2 ? bf16_high(bits) : bf16_low(bits);
    }

    /* Makes numbers of what was loaded. */
    __device__ __forceinline__ void unpack(const Loaded &from)
    {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int e = 0; e < CHANNELS; e++)
                x[r][e] = number(from.word[k_first ? e : r * PARTS + e / PART], k_first ? r : e % PART);
    }

    /* The bits of row r of a part, rounded to bf16, two channels to a word. */
    __device__ __forceinline__ void round(uint32_t (&word)[PART / 2], const float (&y)[PART], int r, int part,
                                          int token, const Rounding &rounding) const
    {
        if (!rounding.at_random) {
#pragma unroll
            for (int e = 0; e < PART; e += 2) word[e / 2] = pack_bf16(y[e], y[e + 1]);
            return;
        }
        const fkda_random_block block =
            fkda_random(rounding.seed, rounding.offset,
                        fkda_random_place(rounding.sequence, token, rounding.heads, rounding.head, row + r,
                                          channel(part * PART) / FKDA_CHANNELS_OF_A_RANDOM_BLOCK));
#pragma unroll
        for (int e = 0; e < PART; e += 2) {
            const uint32_t low = fkda_round_at_random(__float_as_uint(y[e]), fkda_random_bits(&block, e)),
                           high = fkda_round_at_random(__float_as_uint(y[e + 1]),
                                                       fkda_random_bits(&block, e + 1));
            word[e / 2] = low | high << 16;
        }
    }

    /* Stores a part of a state, whose first element is e = part * PART. `token` is that of the random
     * numbers. */
    __device__ __forceinline__ void store_part(void *states, long long at, int part,
                                               const float (&y)[ROWS][PART], int token,
                                               const Rounding &rounding) const
    {
        char *first = first_address(states, at);
        if constexpr (!is_bf16 && !k_first) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                __stcs(reinterpret_cast<float4 *>(first + offset(r, part * PART)),
                       make_float4(y[r][0], y[r][1], y[r][2], y[r][3]));
        } else if constexpr (!is_bf16) {
#pragma unroll
            for (int e = 0; e < PART; e++) {
                char *to = first + offset(0, part * PART + e);
                if constexpr (ROWS == 4)
                    __stcs(reinterpret_cast<float4 *>(to), make_float4(y[0][e], y[1][e], y[2][e], y[3][e]));
                else
                    __stcs(reinterpret_cast<float2 *>(to), make_float2(y[0][e], y[1][e]));
            }
        } else {
            uint32_t word[ROWS][PART / 2];
#pragma unroll
            for (int r = 0; r < ROWS; r++) round(word[r], y[r], r, part, token, rounding);
            if constexpr (!k_first) {
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    __stcs(reinterpret_cast<uint4 *>(first + offset(r, part * PART)),
                           make_uint4(word[r][0], word[r][1], word[r][2], word[r][3]));
            } else {
#pragma unroll
                for (int e = 0; e < PART; e++) {
                    uint32_t half[ROWS];
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
                        half[r] = e % 2 ? word[r][e / 2] >> 16 : word[r][e / 2] & 0xffffu;
                    char *to = first + offset(0, part * PART + e);
                    if constexpr (ROWS == 4)
                        __stcs(reinterpret_cast<uint2 *>(to),
                               make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16));
                    else
                        __stcs(reinterpret_cast<uint32_t *>(to), half[0] | half[1] << 16);
                }
            }
        }
    }

    __device__ __forceinline__ void store(void *states, long long at, int token,
                                          const Rounding &rounding) const
    {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            float y[ROWS][PART];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int e = 0; e < PART; e++) y[r][e] = x[r][part * PART + e];
            store_part(states, at, part, y, token, rounding);
        }
    }

    /* x = decay x, with a decay for each channel. */
    __device__ __forceinline__ void decay(const float *vector)
    {
#pragma unroll
        for (int j = 0; j < CHANNELS / 4; j++) {
            const float4 d = read(vector, j);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                x[r][4 * j] *= d.x, x[r][4 * j + 1] *= d.y, x[r][4 * j + 2] *= d.z, x[r][4 * j + 3] *= d.w;
        }
    }

    /* x = x + key u, with one u for each row. */
    __device__ __forceinline__ void add(const float *key, const float (&u)[ROWS])
    {
#pragma unroll
        for (int j = 0; j < CHANNELS / 4; j++) {
            const float4 k = read(key, j);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float *y = &x[r][4 * j];
                y[0] = __fmaf_rn(k.x, u[r], y[0]), y[1] = __fmaf_rn(k.y, u[r], y[1]);
                y[2] = __fmaf_rn(k.z, u[r], y[2]), y[3] = __fmaf_rn(k.w, u[r], y[3]);
            }
        }
    }
};

/* One step of the function below. The compiler does not unroll a loop of such steps, and it would then select
 * every number at every step. */
template <int by, int half, int count> __device__ __forceinline__ void sum_and_scatter_by(float (&x)[count])
{
    if constexpr (half == 0) {
        x[0] += __shfl_xor_sync(~0u, x[0], by);
    } else {
        const bool upper = (threadIdx.x & static_cast<unsigned>(by)) != 0;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + half], by);
            x[i] = (upper ? x[i + half] : x[i]) + other;
        }
    }
    if constexpr (by > 1) sum_and_scatter_by<by / 2, half / 2>(x);
}

/* Sums each of `count` numbers over neighbouring lanes, `lanes` of them. Lane l of the lanes gets the sums of
 * numbers l * count / lanes and following in the first places of x. If there are more lanes than numbers,
 * lanes / count neighbours get the same sum. */
template <int lanes, int count> __device__ __forceinline__ void sum_and_scatter(float (&x)[count])
{
    sum_and_scatter_by<lanes / 2, count / 2>(x);
}

} // namespace fkda

#endif
