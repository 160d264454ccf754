/*
 * Tiles of a chunk in shared memory, [16 tokens, 128 channels] in fp32, and products with them on the tensor
 * cores in tf32.
 *
 * An accumulator tile serves unchanged as an A operand: lane t of a quad holds columns 2 t and 2 t + 1, which
 * the product takes as its depths t and t + 4. The B operand then has to come in the same order.
 */
#ifndef FKDA_BACKWARD_TILES_CUH
#define FKDA_BACKWARD_TILES_CUH

#include "../common/elements.cuh"
#include "../common/task.cuh"

namespace fkda
{

constexpr int CHUNK = 16; /* tokens */

/* The tensor core drops the 13 low bits of an operand. Half of the last bit that it keeps is added before, so
 * that operands are rounded and not too small on average. Bf16 stays what it is. */
__device__ __forceinline__ float to_tf32(float x)
{
    return __uint_as_float(__float_as_uint(x) + 0x1000u);
}

/* What the tensor core takes of an operand. */
__device__ __forceinline__ float taken_as_tf32(float x)
{
    return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

/* What the tensor core does not take of a number whose to_tf32 is the operand. to_tf32 loses no bit, so the
 * operand in memory tells this. */
__device__ __forceinline__ float rest_of_tf32(float operand)
{
    return __uint_as_float(__float_as_uint(operand) - 0x1000u) - taken_as_tf32(operand);
}

struct Tile {
    /* 136 is 8 more than a multiple of 32 banks, and every second four tokens have their channels swapped in
     * groups of 8. So eight tokens by pairs of channels (fragments of a product over channels) and four
     * tokens, each second one or one after the other, by eight channels (of a product over tokens) lie in
     * different banks. */
    float x[CHUNK][DIM + 8];

    static __device__ __forceinline__ int column(int token, int channel)
    {
        return channel ^ (token & 4) << 1;
    }
    __device__ __forceinline__ float &at(int token, int channel)
    {
        return x[token][column(token, channel)];
    }
    __device__ __forceinline__ float at(int token, int channel) const
    {
        return x[token][column(token, channel)];
    }
    /* Two neighbouring channels, of which the first is even. */
    __device__ __forceinline__ float2 two(int token, int channel) const
    {
        return *reinterpret_cast<const float2 *>(&x[token][column(token, channel)]);
    }
    /* Four neighbouring channels, of which the first is a multiple of four. */
    __device__ __forceinline__ float4 four(int token, int channel) const
    {
        return *reinterpret_cast<const float4 *>(&x[token][column(token, channel)]);
    }
};

/* A matrix between tokens. Rows are padded so that fragments have no bank conflicts. */
typedef float Square[CHUNK][CHUNK + 8];

/* d += tile b, with an accumulator tile as the A operand. */
__device__ __forceinline__ void multiply(float (&d)[4], const float (&tile)[4], float b0, float b1)
{
    mma_tf32(d, to_tf32(tile[0]), to_tf32(tile[2]), to_tf32(tile[1]), to_tf32(tile[3]), b0, b1);
}

__device__ __forceinline__ void multiply(float (&d)[4], const float (&tile)[4], float2 b)
{
    multiply(d, tile, b.x, b.y);
}

/* The same with about as many bits of the tile as fp32 has. */
__device__ __forceinline__ void multiply_all_bits(float (&d)[4], const float (&tile)[4], float2 b)
{
    float rest[4];
#pragma unroll
    for (int r = 0; r < 4; r++) rest[r] = rest_of_tf32(to_tf32(tile[r]));
    multiply(d, tile, b);
    mma_tf32(d, rest[0], rest[2], rest[1], rest[3], b.x, b.y);
}

/* d += x m^T for m[row][column] that is 0 where column > row; x has tokens as columns. With keys that are
 * nearly alike, x has large parts that m, an inverse, takes away, so all bits of x count. */
__device__ __forceinline__ void multiply_by_inverse(float (&d)[2][4], const float (&x)[2][4], const Square &m,
                                                    int g, int t)
{
    multiply_all_bits(d[0], x[0], *reinterpret_cast<const float2 *>(&m[g][2 * t]));
    multiply_all_bits(d[1], x[0], *reinterpret_cast<const float2 *>(&m[g + 8][2 * t]));
    multiply_all_bits(d[1], x[1], *reinterpret_cast<const float2 *>(&m[g + 8][2 * t + 8]));
}

/* The same for the transpose of an inverse, m[row][column] that is 0 where column < row. */
__device__ __forceinline__ void multiply_by_inverse_t(float (&d)[2][4], const float (&x)[2][4],
                                                      const Square &m, int g, int t)
{
    multiply_all_bits(d[0], x[0], *reinterpret_cast<const float2 *>(&m[g][2 * t]));
    multiply_all_bits(d[0], x[1], *reinterpret_cast<const float2 *>(&m[g][2 * t + 8]));
    multiply_all_bits(d[1], x[1], *reinterpret_cast<const float2 *>(&m[g + 8][2 * t + 8]));
}

/* d += x m^T for m[row][column] that is 0 where column < row. */
__device__ __forceinline__ void multiply_upper(float (&d)[2][4], const float (&x)[2][4], const Square &m,
                                               int g, int t)
{
    multiply(d[0], x[0], *reinterpret_cast<const float2 *>(&m[g][2 * t]));
    multiply(d[0], x[1], *reinterpret_cast<const float2 *>(&m[g][2 * t + 8]));
    multiply(d[1], x[1], *reinterpret_cast<const float2 *>(&m[g + 8][2 * t + 8]));
}

/* Stores accumulators [channels g, g + 8, tokens] of a warp's 16 channels from `channel` on as tokens of a
 * tile, rounded to tf32 if they are operands. */
template <bool operand>
__device__ __forceinline__ void store_columns(Tile &to, const float (&x)[2][4], int channel, int g, int t)
{
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float value = x[i / 4][i % 4];
        to.at(8 * (i / 4) + 2 * t + i % 2, channel + g + i % 4 / 2 * 8) = operand ? to_tf32(value) : value;
    }
}

} // namespace fkda

#endif
