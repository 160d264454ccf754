/*
 * Matrices of fp16 in shared memory, the power of two that they are divided by, and the operands that warps
 * load of them for m16n8k16 products.
 *
 * A row has 128 elements, 16 units of 16 bytes. Unit u of row r lies at u ^ r % 8, so that one unit of eight
 * rows, which is what ldmatrix and stmatrix access at a time, covers all banks.
 */
#ifndef FKDA_HOPPER_BWD_HALF_TILES_CUH
#define FKDA_HOPPER_BWD_HALF_TILES_CUH

#include "../../backward/tiles.cuh"
#include "../ptx/memory.cuh"

namespace fkda
{

template <int rows> struct __align__(128) HalfTile
{
    uint16_t x[rows][DIM];

    static __device__ __forceinline__ int place(int row, int channel)
    {
        return channel ^ (row & 7) << 3;
    }
    __device__ __forceinline__ void put(int row, int channel, float value)
    {
        x[row][place(row, channel)] = static_cast<uint16_t>(pack_half(value, 0.0f));
    }

    /* Matrices of 8 x 8 elements, in the order in which ldmatrix numbers them: two rows of matrices first if
     * `down`, else two columns first. `row`, a multiple of 8, and `channel`, one of 16, are of the first
     * element: a lane's place is then one number, of which a constant channel changes bits. */
    template <bool down> __device__ __forceinline__ const void *address(int row, int channel, int lane) const
    {
        const int m = lane / 8, below = down ? m % 2 : m / 2, beside = down ? m / 2 : m % 2;
        return &x[row + 8 * below + lane % 8][place(lane % 8, 8 * beside) ^ channel];
    }

    /* B operands of two tiles of eight columns. The tile has the columns of the product as rows, and 16
     * depths from `depth` on: two registers for each tile. */
    __device__ __forceinline__ void load_columns(uint32_t(&b)[4], int column, int depth, int lane) const
    {
        load_matrices(b, address<false>(column, depth, lane));
    }
    /* The same where the tile has the depths as rows. */
    __device__ __forceinline__ void load_depths(uint32_t(&b)[4], int depth, int column, int lane) const
    {
        load_matrices_transposed(b, address<true>(depth, column, lane));
    }
    /* An A operand. The tile has its rows as rows. */
    __device__ __forceinline__ void load_rows(uint32_t(&a)[4], int row, int depth, int lane) const
    {
        load_matrices(a, address<true>(row, depth, lane));
    }
    /* An A operand. The tile has its depths as rows. */
    __device__ __forceinline__ void load_rows_transposed(uint32_t(&a)[4], int depth, int row, int lane) const
    {
        load_matrices_transposed(a, address<false>(depth, row, lane));
    }
    /* Stores an A operand, with its rows as rows of the tile. */
    __device__ __forceinline__ void store_rows(const uint32_t(&a)[4], int row, int depth, int lane)
    {
        store_matrices(shared_address(address<true>(row, depth, lane)), a);
    }
    /* The same with its depths as rows. */
    __device__ __forceinline__ void store_transposed(const uint32_t(&a)[4], int depth, int row, int lane)
    {
        store_matrices_transposed(shared_address(address<false>(depth, row, lane)), a);
    }
};

/* What x as fp16 lacks of x. */
__device__ __forceinline__ float lack_of_half(float x)
{
    return x - half_low(pack_half(x, 0.0f));
}

typedef HalfTile<CHUNK> TokenTile;
typedef HalfTile<DIM> StateImage; /* [V, K] */

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    mma_half(d, a[0], a[1], a[2], a[3], b0, b1);
}

/* Two tiles of columns. */
__device__ __forceinline__ void multiply(float (&d)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4])
{
    multiply(d[0], a, b[0], b[1]);
    multiply(d[1], a, b[2], b[3]);
}

/* Two tiles of an accumulator as an A operand, multiplied by `factor`. */
__device__ __forceinline__ void pack(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4],
                                     float factor)
{
    a[0] = pack_half(low[0] * factor, low[1] * factor);
    a[1] = pack_half(low[2] * factor, low[3] * factor);
    a[2] = pack_half(high[0] * factor, high[1] * factor);
    a[3] = pack_half(high[2] * factor, high[3] * factor);
}

/* The same of what the operand that pack() made lacks. */
__device__ __forceinline__ void pack_lack(uint32_t (&lack)[4], const uint32_t (&a)[4], const float (&low)[4],
                                          const float (&high)[4], float factor)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *const x = i / 2 ? high : low;
        lack[i] = pack_half(__fmaf_rn(x[i % 2 * 2], factor, -half_low(a[i])),
                            __fmaf_rn(x[i % 2 * 2 + 1], factor, -half_high(a[i])));
    }
}

/* A power of two that numbers are divided by before they become fp16. The largest of them becomes 2^13 to
 * 2^14, so that numbers 2^27 times smaller still have all bits of fp16. If one of them is infinite, all of
 * them become NaN: divided by a huge unit the others would be 0, and what depends on them would look
 * right. */
struct Unit {
    float size, inverse;

    /* `largest`: the bits of the largest magnitude. */
    __device__ __forceinline__ explicit Unit(uint32_t largest)
    {
        const bool finite = largest < 0x7f800000u;
        const float above = power_above(__uint_as_float(largest)), power = above < 0x1p-100f  ? 0x1p-100f
                                                                           : above > 0x1p126f ? 0x1p126f
                                                                                              : above;
        size = finite ? power * 0x1p-14f : NAN;
        inverse = finite ? inverse_power(power * 0x1p-14f) : NAN;
    }
};

/* The bits of the largest magnitude, without NaN: a NaN stays one as an operand, whatever its unit is. */
template <int tiles> __device__ __forceinline__ uint32_t largest_of(const float (&x)[tiles][4])
{
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * tiles; i++) most = fmaxf(most, fabsf(x[i / 4][i % 4]));
    return __float_as_uint(most);
}

} // namespace fkda

#endif
