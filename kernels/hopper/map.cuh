/* How a segment's map is kept, in the workspace and in shared memory: as operands of the join. */
#ifndef FKDA_HOPPER_MAP_CUH
#define FKDA_HOPPER_MAP_CUH

#include "../common/elements.cuh"

namespace fkda
{

/* A matrix [128][128] whose elements are sums of a fp16 and of 2^-11 times another one. Rows have 16 units of 16 bytes, unit u of row
 * r at u ^ r % 8, where ldmatrix meets no bank conflicts; so a map is copied as it is. Rows and columns are at their images, so that a
 * lane that has pairs of columns 8 apart, as in accumulators, has a whole unit in four of them. Takes as many bytes as in fp32. */
struct MapImage {
    static constexpr int ROW_BYTES = DIM * 2;
    static constexpr float REST = 0x1p-11f;
    unsigned char high[DIM * ROW_BYTES], low[DIM * ROW_BYTES];

    /* Where channel 32 j + 8 i + 2 t + e is, and which one is there: 32 j + 8 t + 2 i + e. */
    static __device__ __forceinline__ int image(int channel)
    {
        return (channel & ~0x1e) | (channel >> 3 & 3) << 1 | (channel >> 1 & 3) << 3;
    }

    static __device__ __forceinline__ int place(int row, int unit)
    {
        return row * ROW_BYTES + (unit ^ row % 8) * 16;
    }

    static __device__ __forceinline__ void split(uint32_t &high, uint32_t &low, float x, float y)
    {
        high = pack_half(x, y);
        low = pack_half((x - half_low(high)) * (1.0f / REST), (y - half_high(high)) * (1.0f / REST));
    }

    static __device__ __forceinline__ void join(float &x, float &y, uint32_t high, uint32_t low)
    {
        x = __fmaf_rn(half_low(low), REST, half_low(high));
        y = __fmaf_rn(half_high(low), REST, half_high(high));
    }
};
static_assert(sizeof(MapImage) == DIM * DIM * sizeof(float), "in slots of matrices in fp32");

} // namespace fkda

#endif
