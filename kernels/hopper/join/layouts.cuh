/* The layouts of segments' maps and states in the workspace, which are the layouts that their users need. */
#ifndef FKDA_HOPPER_LAYOUTS_CUH
#define FKDA_HOPPER_LAYOUTS_CUH

#include "../../common/elements.cuh"
#include "../../common/task.cuh"
#include "../fwd_args.h"

namespace fkda
{

/*
 * 16 rows of a map [128][128]. Each element is split in two: HIGH is what fp16 keeps of it, and LOW what fp16
 * keeps of the remainder. The split leaves out 2^-25 of one, and takes as many bytes as fp32.
 *
 * A row is kept in two halves of 128 bytes, whose units of 16 bytes are swizzled: unit u of row r is at u ^ r
 * % 8. Bulk copies bring it to shared memory as it is, and ldmatrix meets no bank conflicts there.
 */
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

/* A whole map. */
struct MapImage {
    MapRowGroup row_group[DIM / MapRowGroup::ROWS];

    /* Two neighbouring elements of a row; the first column is even. */
    __device__ __forceinline__ uint32_t *pair(int which, int row, int column)
    {
        return reinterpret_cast<uint32_t *>(
                   row_group[row / MapRowGroup::ROWS].unit(which, row % MapRowGroup::ROWS, column / 8)) +
               column % 8 / 2;
    }
};
static_assert(sizeof(MapImage) == DIM * DIM * sizeof(float), "a slot has room for a matrix of fp32");

/* A state [V, K] in fp32: for each 16 rows and 8 columns the four numbers that each lane has in accumulators,
 * so that a lane loads or stores them with one access. */
struct StateImage {
    float4 tile[DIM / 16][DIM / 8][32]; /* rows, columns, lane */
};

/* A state as the recurrence has it between two chunks, which one piece leaves for the next ones
 * (schedule/pieces.cuh). */
struct PieceState {
    StateImage rows;            /* divided by their scales */
    float4 notes[DIM / 16][32]; /* of each lane: its two scales, and least_again and the bits of faint */
};
static_assert(sizeof(PieceState) == FKDA_PIECE_STATE_FLOATS * sizeof(float), "the workspace has room for it");

} // namespace fkda

#endif
