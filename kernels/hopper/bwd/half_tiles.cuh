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
#include "units.cuh"

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

} // namespace fkda

#endif
