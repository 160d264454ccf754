/* How a segment's map and state are kept in the workspace, and maps in shared memory: as those who use them have them. */
#ifndef FKDA_HOPPER_MAP_CUH
#define FKDA_HOPPER_MAP_CUH

#include "../../common/elements.cuh"
#include "../../common/task.cuh"

namespace fkda
{

/* Sixteen rows of a map [128][128], each element the sum of what fp16 keeps of it, and of what that keeps of the rest, which leaves out
 * 2^-25: the halves of the columns, rows of 128 bytes whose units of 16 bytes are swizzled, unit u of row r at u ^ r % 8. wgmma
 * reads it as B, and ldmatrix meets no bank conflicts. */
struct MapRowGroup {
    static constexpr int ROWS = 16, ROW_BYTES = 128;
    enum { HIGH, LOW };
    unsigned char part[2][DIM / 64][ROWS * ROW_BYTES];

    /* Columns 8 u to 8 u + 7 of a row. */
    __device__ __forceinline__ uint4 *unit(int which, int row, int u)
    {
        return reinterpret_cast<uint4 *>(&part[which][u / 8][row * ROW_BYTES + ((u ^ row) & 7) * 16]);
    }

    static __device__ __forceinline__ void split(uint32_t &high, uint32_t &low, float x, float y)
    {
        high = pack_half(x, y);
        low = pack_half(x - half_low(high), y - half_high(high));
    }
};

struct MapImage {
    MapRowGroup row_group[DIM / MapRowGroup::ROWS];

    /* Two neighbours in a row, the first column even. */
    __device__ __forceinline__ uint32_t *pair(int which, int row, int column)
    {
        return reinterpret_cast<uint32_t *>(
                   row_group[row / MapRowGroup::ROWS].unit(which, row % MapRowGroup::ROWS, column / 8)) +
               column % 8 / 2;
    }
};
static_assert(sizeof(MapImage) == DIM * DIM * sizeof(float), "in slots of matrices in fp32");

/* A state [V, K] in fp32: of 16 rows and 8 columns what each lane has in accumulators. */
struct StateImage {
    float4 tile[DIM / 16][DIM / 8][32]; /* rows, columns, lane */
};

} // namespace fkda

#endif
