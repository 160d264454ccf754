/*
 * Carries rows of a state, or of a map, through maps: one CTA's work in the join.
 *
 * Algorithm. A step of a path multiplies the rows with one map and adds rows of a state to the product. Four
 * warps multiply. Another warp does nothing but fetch maps ahead of them, in quarters. The four warps meet
 * twice a step: when the largest number of each row is known, and when the rows are stored as an operand.
 *
 * Precision. Products are made on the tensor core in fp16, close to the precision of fp32: rows are divided
 * by a power of two above their largest number, and each number is the sum of what fp16 keeps of it and of
 * its remainder (layouts.cuh). A product of two sums has four terms, of which three are computed; the fourth
 * one would be 2^-22 of the product.
 *
 * Where maps and rows are in shared memory is a template argument, because the kernel fkda_hopper_join has
 * all of the shared memory for them (join.cuh), and the join phase of a relay has slots of chunks
 * (relay_join.cuh).
 */
#ifndef FKDA_HOPPER_CARRY_CUH
#define FKDA_HOPPER_CARRY_CUH

#include "../../common/elements.cuh"
#include "../block/block.cuh"
#include "../block/ring.cuh"
#include "../ptx/control.cuh"
#include "../ptx/copies.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/patience.cuh"
#include "../schedule/cut.cuh"
#include "layouts.cuh"

namespace fkda
{

/* A quarter of a map's rows, the unit in which maps are fetched. */
struct MapQuarter {
    static constexpr int ROW_GROUPS = 2;
    MapRowGroup row_group[ROW_GROUPS];
};

/* The rows that a CTA carries, between two products. */
struct JoinRows {
    /* HIGH and LOW of the rows, as A operands: unit u of 16 bytes of row r is at u ^ r % 8. */
    __align__(16) unsigned char rows[2][FKDA_JOIN_ROWS * DIM * 2];
    __align__(16) float largest[FKDA_JOIN_ROWS][4]; /* in each warp's columns of a row */
};

/*
 * Each of the four computing warps has all rows of the CTA and 32 of the columns; lane (g, t) = (lane / 4,
 * lane % 4) has rows g and g + 8 and, of tile c of eight columns, columns 2 t and 2 t + 1.
 */
template <class Memory, bool back = false> struct RowCarrier {
    /* Backwards, rows are those of a gradient with respect to a state. They go through the transposes of
     * maps, from the last map to the first one. */
    static constexpr int STEP = back ? -1 : 1;
    static constexpr int MATRIX = DIM * DIM;
    static constexpr int WARPS = FKDA_JOIN_THREADS / 32; /* that compute */
    static_assert(WARPS == 4 && FKDA_JOIN_ROWS == 16, "a warp has 32 columns and all rows");
    using Rows = float[4][4]; /* tile, number of the lane */
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    Memory memory;
    Slot<Memory::QUARTERS> slot; /* of the next quarter */
    int head;
    int row; /* of V or of a map: the first one of this CTA */

    __device__ RowCarrier(const fkda_fwd_args &a, const fkda_cut &c, Memory m)
        : args(a), cut(c), memory(m), slot(0), head(0), row(0)
    {
    }

    /* The matrix of this CTA's head in a slot. */
    __device__ float *place(float *matrices, int at) const
    {
        return matrices + (static_cast<long long>(at) * args.heads + head) * MATRIX;
    }

    /* What rows are carried through. After the product with map i, `add` adds the rows of the state in
     * slot(i), and `keep` stores the sum there. */
    struct Path {
        float *maps;
        int first_map, count;
        int first_slot, slot_step, last_slot;
        bool add, keep;

        __device__ int slot(int i) const
        {
            if constexpr (back) return first_slot - i;
            return min(first_slot + i * slot_step, last_slot);
        }
    };

    /* Through `count` maps, from state to state. */
    __device__ Path path_through(int first_map, int count) const
    {
        return {cut.maps, first_map, count, first_map + 1, 1, first_map + count, true, true};
    }

    static __device__ void sync() /* all warps that compute */
    {
        barrier_sync<RECURRENCE_BARRIER, FKDA_JOIN_THREADS>(0);
    }
    static __device__ int lane()
    {
        return static_cast<int>(threadIdx.x) & 31;
    }
    static __device__ int column_group() /* the warp's 32 columns */
    {
        return static_cast<int>(threadIdx.x) >> 5 & 3;
    }

    /* ---- The warp that fetches maps ---- */

    /* Fetches the maps of a path, each once await(its slot) has returned. */
    template <class Await> __device__ void fetch(const Path &path, Await await)
    {
#pragma unroll 1
        for (int i = 0; i < path.count; i++) {
            const auto *map =
                reinterpret_cast<const MapQuarter *>(place(path.maps, path.first_map + STEP * i));
            await(path.first_map + STEP * i);
#pragma unroll 1
            for (int q = 0; q < 4; q++) {
                uint64_t *full = &memory.ring().full[slot.index];
                mbarrier_wait_or_give_up(&memory.ring().empty[slot.index], slot.parity ^ 1);
                if (elect_lane()) {
                    mbarrier_arrive_expecting(full, sizeof *map);
                    Memory::fetch(&memory.quarter(slot.index), map + q, q, full);
                }
                __syncwarp();
                slot.advance(1);
            }
        }
    }

    /* ---- Rows from and to the workspace ---- */

    __device__ float4 *tiles(float *matrix) const
    {
        return &reinterpret_cast<StateImage *>(matrix)->tile[row / 16][4 * column_group()][lane()];
    }

    __device__ void store(float *matrix, const Rows &x) const
    {
#pragma unroll
        for (int c = 0; c < 4; c++) tiles(matrix)[32 * c] = make_float4(x[c][0], x[c][1], x[c][2], x[c][3]);
    }

    __device__ void load(Rows &x, float *matrix) const
    {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float4 four = tiles(matrix)[32 * c];
            x[c][0] = four.x, x[c][1] = four.y, x[c][2] = four.z, x[c][3] = four.w;
        }
    }

    /* Calls act(HIGH, LOW, a, b) for each pair of neighbouring numbers of x and its words in a map. */
    template <class Act> __device__ void for_each_pair(float *matrix, Rows &x, Act act) const
    {
        MapImage &map = *reinterpret_cast<MapImage *>(matrix);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at = row + lane() / 4 + i % 2 * 8,
                      column = 32 * column_group() + i / 2 * 8 + lane() % 4 * 2;
            act(*map.pair(MapRowGroup::HIGH, at, column), *map.pair(MapRowGroup::LOW, at, column),
                x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
        }
    }

    __device__ void store_map(float *matrix, Rows &x) const
    {
        for_each_pair(matrix, x, [](uint32_t &high, uint32_t &low, float a, float b) {
            MapRowGroup::split(high, low, a, b);
        });
    }

    __device__ void load_map(Rows &x, float *matrix) const
    {
        for_each_pair(matrix, x, [](uint32_t high, uint32_t low, float &a, float &b) {
            a = half_low(high) + half_low(low), b = half_high(high) + half_high(low);
        });
    }

    /* ---- Rows through maps ---- */

    /* Carries x along the path. */
    __device__ void carry(Rows &x, const Path &path)
    {
#pragma unroll 1
        for (int i = 0; i < path.count; i++) {
            float *state = place(cut.states, path.slot(i));
            Rows sum = {};
            float scale[2];
            if (path.add) load(sum, state);
            store_largest(x);
            sync(); /* the product before is over too, so its rows may be overwritten */
            store_rows(x, scale);
            sync();
            if constexpr (back)
                multiply_by_transpose(x);
            else
                multiply(x);
#pragma unroll
            for (int c = 0; c < 4; c++)
#pragma unroll
                for (int n = 0; n < 4; n++) x[c][n] = __fmaf_rn(x[c][n], scale[n / 2], sum[c][n]);
            if (path.keep) store(state, x);
        }
    }

    /* Carries the rows of the state in a slot along the path. */
    __device__ void carry_from(int first_slot, const Path &path)
    {
        Rows x;
        load(x, place(cut.states, first_slot));
        carry(x, path);
    }

    /* Leaves the largest number of each row in the warp's columns. */
    __device__ void store_largest(const Rows &x) const
    {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = 0.0f;
#pragma unroll
            for (int c = 0; c < 4; c++)
                largest = fmaxf(largest, fmaxf(fabsf(x[c][2 * r]), fabsf(x[c][2 * r + 1])));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            if (lane() % 4 == 0) memory.rows().largest[lane() / 4 + 8 * r][column_group()] = largest;
        }
    }

    /* The row that this lane names to ldmatrix for 16 rows x 16 columns from `column` on. */
    __device__ uint4 *row_unit(int which, int column) const
    {
        const int r = lane() & 15, u = column / 8 + (lane() >> 4);
        return reinterpret_cast<uint4 *>(&memory.rows().rows[which][r * DIM * 2 + (u ^ (r & 7)) * 16]);
    }

    /* Leaves the rows as an operand, divided by their scales. */
    __device__ void store_rows(const Rows &x, float (&scale)[2]) const
    {
        uint32_t high[4][2], low[4][2]; /* tile, row */
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float4 all = *reinterpret_cast<const float4 *>(memory.rows().largest[lane() / 4 + 8 * r]);
            const float largest = fminf(fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w)), 0x1p126f);
            scale[r] = fmaxf(power_above(largest), 0x1p-100f);
            const float factor = inverse_power(scale[r]);
#pragma unroll
            for (int c = 0; c < 4; c++)
                MapRowGroup::split(high[c][r], low[c][r], x[c][2 * r] * factor, x[c][2 * r + 1] * factor);
        }
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
            const int column = 32 * column_group() + 8 * c;
            store_matrices(shared_address(row_unit(MapRowGroup::HIGH, column)),
                           {high[c][0], high[c][1], high[c + 1][0], high[c + 1][1]});
            store_matrices(shared_address(row_unit(MapRowGroup::LOW, column)),
                           {low[c][0], low[c][1], low[c + 1][0], low[c + 1][1]});
        }
    }

    /* Adds 16 depths of the three products of operands in two parts for two tiles of columns. */
    static __device__ void multiply_parts(float (*high_low)[4], float (*low_high)[4], float (*high_high)[4],
                                          const uint32_t (&a)[4], const uint32_t (&rest)[4],
                                          const uint32_t (&high)[4], const uint32_t (&low)[4])
    {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            mma_half(high_low[n], a[0], a[1], a[2], a[3], low[2 * n], low[2 * n + 1]);
            mma_half(low_high[n], rest[0], rest[1], rest[2], rest[3], high[2 * n], high[2 * n + 1]);
            mma_half(high_high[n], a[0], a[1], a[2], a[3], high[2 * n], high[2 * n + 1]);
        }
    }

    /* The product of the stored rows with the transpose of the next map, whose rows are the product's
     * columns: a warp needs one quarter of the map alone. */
    __device__ void multiply_by_transpose(Rows &product)
    {
        Rows high_low = {}, low_high = {}, high_high = {};
#pragma unroll 1
        for (int q = 0; q < 4; q++) {
            MapQuarter &map = memory.quarter(slot.index);
            mbarrier_wait(&memory.ring().full[slot.index], slot.parity);
            if (q == column_group()) {
#pragma unroll 1
                for (int depth = 0; depth < DIM; depth += 16) {
                    uint32_t a[4], rest[4];
                    load_matrices(a, row_unit(MapRowGroup::HIGH, depth));
                    load_matrices(rest, row_unit(MapRowGroup::LOW, depth));
                    const int r = lane() / 16 * 8 + lane() % 8, u = depth / 8 + lane() / 8 % 2;
#pragma unroll
                    for (int c = 0; c < 4; c += 2) {
                        uint32_t high[4], low[4]; /* depth / 8, tile */
                        load_matrices(high, map.row_group[c / 2].unit(MapRowGroup::HIGH, r, u));
                        load_matrices(low, map.row_group[c / 2].unit(MapRowGroup::LOW, r, u));
                        multiply_parts(&high_low[c], &low_high[c], &high_high[c], a, rest, high, low);
                    }
                }
            }
            Memory::release(&memory.ring().empty[slot.index]);
            slot.advance(1);
        }
#pragma unroll
        for (int i = 0; i < 16; i++)
            product[i / 4][i % 4] = high_low[i / 4][i % 4] + low_high[i / 4][i % 4] + high_high[i / 4][i % 4];
    }

    /* The product of the stored rows with the next map. */
    __device__ void multiply(Rows &product)
    {
        Rows high_low = {}, low_high = {},
             high_high = {}; /* three sums, which need not wait for each other */
#pragma unroll 1
        for (int q = 0; q < 4; q++) {
            MapQuarter &map = memory.quarter(slot.index);
            mbarrier_wait(&memory.ring().full[slot.index], slot.parity);
#pragma unroll
            for (int k = 0; k < MapQuarter::ROW_GROUPS; k++) {
                const int depth = 16 * (MapQuarter::ROW_GROUPS * q + k);
                uint32_t a[4], rest[4];
                load_matrices(a, row_unit(MapRowGroup::HIGH, depth));
                load_matrices(rest, row_unit(MapRowGroup::LOW, depth));
#pragma unroll
                for (int c = 0; c < 4; c += 2) {
                    const int u = 4 * column_group() + c + (lane() >> 4);
                    uint32_t high[4], low[4]; /* tile, depth / 8 */
                    load_matrices_transposed(high, map.row_group[k].unit(MapRowGroup::HIGH, lane() & 15, u));
                    load_matrices_transposed(low, map.row_group[k].unit(MapRowGroup::LOW, lane() & 15, u));
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        mma_half(high_low[c + n], a[0], a[1], a[2], a[3], low[2 * n], low[2 * n + 1]);
                        mma_half(low_high[c + n], rest[0], rest[1], rest[2], rest[3], high[2 * n],
                                 high[2 * n + 1]);
                        mma_half(high_high[c + n], a[0], a[1], a[2], a[3], high[2 * n], high[2 * n + 1]);
                    }
                }
            }
            Memory::release(&memory.ring().empty[slot.index]);
            slot.advance(1);
        }
#pragma unroll
        for (int i = 0; i < 16; i++)
            product[i / 4][i % 4] = high_low[i / 4][i % 4] + low_high[i / 4][i % 4] + high_high[i / 4][i % 4];
    }
};

} // namespace fkda

#endif
