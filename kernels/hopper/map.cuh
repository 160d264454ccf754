/* How a segment's map is kept, in the workspace and in shared memory: as operands of the join. */
#ifndef FKDA_HOPPER_MAP_CUH
#define FKDA_HOPPER_MAP_CUH

#include "../common/elements.cuh"

namespace fkda
{

/* A matrix [128][128] whose elements are sums of a fp16 and of 2^-11 times another one. Rows have 16 units of 16 bytes, unit u of row
 * r at u ^ r % 8, where ldmatrix meets no bank conflicts; so a map is copied as it is. Takes as many bytes as in fp32. */
struct MapImage {
    static constexpr int ROW_BYTES = DIM * 2;
    static constexpr float REST = 0x1p-11f;
    unsigned char high[DIM * ROW_BYTES], low[DIM * ROW_BYTES];

    static __device__ __forceinline__ int place(int row, int unit)
    {
        return row * ROW_BYTES + (unit ^ row % 8) * 16;
    }

    static __device__ __forceinline__ void split(uint32_t &high, uint32_t &low, float x, float y)
    {
        high = pack_half(x, y);
        low = pack_half((x - half_low(high)) * (1.0f / REST), (y - half_high(high)) * (1.0f / REST));
    }

    /* Columns column, column + 1 of a row; column is even. */
    static __device__ __forceinline__ void store_pair(void *image, int row, int column, float x, float y)
    {
        MapImage &map = *static_cast<MapImage *>(image);
        const int at = place(row, column / 8) + column % 8 * 2;
        split(*reinterpret_cast<uint32_t *>(&map.high[at]), *reinterpret_cast<uint32_t *>(&map.low[at]), x,
              y);
    }

    static __device__ __forceinline__ void load_pair(float &x, float &y, const void *image, int row,
                                                     int column)
    {
        const MapImage &map = *static_cast<const MapImage *>(image);
        const int at = place(row, column / 8) + column % 8 * 2;
        const uint32_t high = *reinterpret_cast<const uint32_t *>(&map.high[at]),
                       low = *reinterpret_cast<const uint32_t *>(&map.low[at]);
        x = __fmaf_rn(half_low(low), REST, half_low(high));
        y = __fmaf_rn(half_high(low), REST, half_high(high));
    }
};
static_assert(sizeof(MapImage) == DIM * DIM * sizeof(float), "in slots of matrices in fp32");

} // namespace fkda

#endif
