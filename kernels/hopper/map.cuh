/* How a segment's map is kept, in the workspace and in shared memory: as operands of the join. */
#ifndef FKDA_HOPPER_MAP_CUH
#define FKDA_HOPPER_MAP_CUH

#include "../common/elements.cuh"

namespace fkda
{

/* A matrix [128][128], each element the sum of what fp16 keeps of it, and of what that keeps of the rest, which leaves out 2^-25. Rows have 16
 * units of 16 bytes, unit u of row r at u ^ r % 8, where ldmatrix meets no bank conflicts: a map is copied as it is. Rows and columns are
 * at their images, so that four neighbouring accumulator tiles of a lane are a unit: eight channels. Takes as many bytes as in fp32. */
struct MapImage {
    static constexpr int ROW_BYTES = DIM * 2;
    unsigned char high[DIM * ROW_BYTES], low[DIM * ROW_BYTES];

    /* The place of channel 32 j + 8 i + 2 t + e, and the channel of that place: 32 j + 8 t + 2 i + e. */
    static __device__ __forceinline__ int image(int channel)
    {
        return (channel & ~0x1e) | (channel >> 3 & 3) << 1 | (channel >> 1 & 3) << 3;
    }

    static __device__ __forceinline__ uint4 *unit(unsigned char *rows, int row, int u)
    {
        return reinterpret_cast<uint4 *>(&rows[row * ROW_BYTES + (u ^ (row & 7)) * 16]);
    }

    /* What is at two places of a row, the first even. */
    static __device__ __forceinline__ uint32_t *pair(unsigned char *rows, int row, int place)
    {
        return reinterpret_cast<uint32_t *>(unit(rows, row, place / 8)) + place % 8 / 2;
    }

    static __device__ __forceinline__ void split(uint32_t &high, uint32_t &low, float x, float y)
    {
        high = pack_half(x, y);
        low = pack_half(x - half_low(high), y - half_high(high));
    }

    /* What lane t of four has of a row in tiles 4 j to 4 j + 3 of accumulators, in their elements i and i + 1, times a factor. */
    static __device__ __forceinline__ void store(MapImage &to, int row, int j, int t, const float (*tiles)[4],
                                                 int i, float factor)
    {
        uint32_t high[4], low[4];
#pragma unroll
        for (int n = 0; n < 4; n++) split(high[n], low[n], tiles[n][i] * factor, tiles[n][i + 1] * factor);
        *unit(to.high, row, 4 * j + t) = make_uint4(high[0], high[1], high[2], high[3]);
        *unit(to.low, row, 4 * j + t) = make_uint4(low[0], low[1], low[2], low[3]);
    }
};
static_assert(sizeof(MapImage) == DIM * DIM * sizeof(float), "in slots of matrices in fp32");

} // namespace fkda

#endif
