/*
 * Joins segments: from what the first pass left in the workspace to the states that they start from. With S_i^T the state that
 * segment i of a sequence starts from, as rows of V, M_i its map and B_i what it makes of zeros,
 *
 *     S_(i+1)^T = S_i^T M_i + B_i
 *
 * S_1 is there, the state after the first segment, and B_i is where S_(i+1) goes. Rows are independent: a row_group carries
 * FKDA_JOIN_ROWS of them through all maps, close to fp32's precision. Of many maps, groups are composed first, in parallel,
 * to one map and one state each; then states are carried from group to group, then through each group, in parallel again.
 */
#ifndef FKDA_HOPPER_JOIN_CUH
#define FKDA_HOPPER_JOIN_CUH

#include "../../common/elements.cuh"
#include "../fwd_shape.h"
#include "../ptx/sm90.cuh"
#include "../schedule/cut.cuh"
#include "map.cuh"

namespace fkda
{

enum JoinStep { COMPOSE, CHAIN, EXPAND };

/* A quarter of a map's rows. */
struct MapQuarter {
    static constexpr int ROW_GROUPS = 2;
    MapRowGroup row_group[ROW_GROUPS];
};

/* The rows that a row_group carries, in shared memory. */
struct JoinRows {
    /* As operands: high, low; unit u of 16 bytes of row r at u ^ r % 8. */
    __align__(16) unsigned char rows[2][FKDA_JOIN_ROWS * DIM * 2];
    __align__(16) float largest[FKDA_JOIN_ROWS][4]; /* in a warp's columns of a row */
};

/* Where a row_group has maps on their path, and its rows; here all of its memory, elsewhere what others leave (at_once.cuh). */
struct JoinMemory {
    static constexpr int QUARTERS = 8;
    struct Shared {
        __align__(1024) MapQuarter quarter[QUARTERS];
        JoinRows rows;
        Ring<QUARTERS> ring;
    };
    static_assert(sizeof(Shared) <= FKDA_HOPPER_SHARED_BYTES, "what a row_group can have");
    Shared &shared;

    __device__ MapQuarter &quarter(int i) const
    {
        return shared.quarter[i];
    }
    __device__ JoinRows &rows() const
    {
        return shared.rows;
    }
    __device__ Ring<QUARTERS> &ring() const
    {
        return shared.ring;
    }

    /* Brings a map's quarter, for which `barrier` already expects as many bytes. All have it read, as far as this warp goes. */
    static __device__ void bring(MapQuarter *to, const MapQuarter *from, int, uint64_t *barrier)
    {
        copy_bulk(to, from, sizeof *to, barrier);
    }
    static __device__ void release(uint64_t *barrier)
    {
        mbarrier_arrive_warp(barrier);
    }
};

/*
 * The work of a row_group, by four warps that compute, and one that brings the maps.
 *
 * Products on the tensor core in fp16: rows are divided by a power of two above them, and a number is the sum of what fp16 keeps of it and
 * of the rest (map.cuh); of the four products of such sums three are taken, which leaves 2^-22 of a product out. A warp has the
 * row_group's rows and 32 columns; lane (g, t) = (lane / 4, lane % 4) of that rows g and g + 8 and, of tile c of eight
 * columns, columns 2 t and 2 t + 1. The code is kept small: each launch has to fetch it.
 */
template <class Memory> struct Join {
    static constexpr int MATRIX = DIM * DIM;
    static constexpr int WARPS = FKDA_JOIN_THREADS / 32; /* that compute */
    static_assert(WARPS == 4 && FKDA_JOIN_ROWS == 16, "32 columns and all rows to a warp");
    using Rows = float[4][4]; /* by tile */
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    Memory memory;
    Slot<Memory::QUARTERS> slot; /* of the next quarter */
    int head, row;               /* of V or of a map: the first of the row_group's */

    __device__ Join(const fkda_fwd_args &a, const fkda_cut &c, Memory m)
        : args(a), cut(c), memory(m), slot(0), head(0), row(0)
    {
    }

    /* A head's matrix in a slot. */
    __device__ float *place(float *matrices, int at) const
    {
        return matrices + (static_cast<long long>(at) * args.heads + head) * MATRIX;
    }

    /* What a row_group carries its rows through: maps first_map, first_map + 1, ... and, with `add`, to the product with the i-th
     * the rows in a slot; which then get the sum, if it is to be kept. */
    struct Path {
        float *maps;
        int first_map, count;
        int first_slot, slot_step,
            last_slot; /* of what is added: after i steps first_slot + i slot_step, at largest last_slot */
        bool add, keep;

        __device__ int slot(int i) const
        {
            return min(first_slot + i * slot_step, last_slot);
        }
    };

    /* All threads that compute. */
    static __device__ void sync()
    {
        barrier_sync<8, FKDA_JOIN_THREADS>(0);
    }

    /* The maps, by the warp that brings them; each once `await(its slot)` is over. */
    template <class Await> __device__ void bring(const Path &path, Await await)
    {
#pragma unroll 1
        for (int i = 0; i < path.count; i++) {
            const auto *map = reinterpret_cast<const MapQuarter *>(place(path.maps, path.first_map + i));
            await(path.first_map + i);
#pragma unroll 1
            for (int q = 0; q < 4; q++) {
                uint64_t *full = &memory.ring().full[slot.index];
                mbarrier_wait(&memory.ring().empty[slot.index], slot.parity ^ 1);
                if (elect_lane()) {
                    mbarrier_arrive_expecting(full, sizeof *map);
                    Memory::bring(&memory.quarter(slot.index), map + q, q, full);
                }
                __syncwarp();
                slot.advance(1);
            }
        }
    }

    static __device__ int lane()
    {
        return static_cast<int>(threadIdx.x) & 31;
    }
    static __device__ int column_group() /* the warp's, of columns */
    {
        return static_cast<int>(threadIdx.x) >> 5 & 3;
    }

    /* To and from a state. */
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

    /* act(words of a map: high, low; two numbers of x that are there) */
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

    /* To and from rows of a map. */
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

    /* Rows x through the maps; without `add` they are of a map themselves. */
    __device__ void carry(Rows &x, const Path &path)
    {
#pragma unroll 1
        for (int i = 0; i < path.count; i++) {
            float *state = place(cut.states, path.slot(i));
            Rows sum = {};
            float scale[2];
            if (path.add) load(sum, state);
            store_largest(x);
            sync(); /* the product before is over too */
            store_rows(x, scale);
            sync();
            multiply(x);
#pragma unroll
            for (int c = 0; c < 4; c++)
#pragma unroll
                for (int n = 0; n < 4; n++) x[c][n] = __fmaf_rn(x[c][n], scale[n / 2], sum[c][n]);
            if (path.keep) store(state, x);
        }
    }

    /* The largest number of each row in the warp's columns. */
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

    /* This lane's row for ldmatrix of the 16 rows x 16 columns from this one on. */
    __device__ uint4 *row_unit(int which, int column) const
    {
        const int r = lane() & 15, u = column / 8 + (lane() >> 4);
        return reinterpret_cast<uint4 *>(&memory.rows().rows[which][r * DIM * 2 + (u ^ (r & 7)) * 16]);
    }

    /* The rows as an operand, divided by their scales. */
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

    /* With the next map. */
    __device__ void multiply(Rows &product)
    {
        Rows high_low = {}, low_high = {}, high_high = {}; /* sums that need not wait for each other */
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

    /* The maps of a group, from the first to the last. */
    __device__ void find_map_group(const fkda_cut_sequence &c, int map_group, int &first, int &last) const
    {
        first = c.first_slot + 1 + map_group * FKDA_GROUP_MAPS;
        last = min(first + FKDA_GROUP_MAPS, c.first_slot + c.segments - 1) - 1;
    }

    /* A group's maps one after the other, from rows of the first map; and its states, from those after the first map. */
    __device__ Path path_of_composing(const fkda_cut_sequence &c, int map_group, bool state) const
    {
        int first, last;
        find_map_group(c, map_group, first, last);
        return {cut.maps, first + 1, last - first, first + 2, 1, last + 1, state, false};
    }

    __device__ void compose(const fkda_cut_sequence &c, int map_group, bool state, const Path &path)
    {
        Rows x;
        if (state)
            load(x, place(cut.states, path.first_map));
        else
            load_map(x, place(cut.maps, path.first_map - 1));
        carry(x, path);
        if (state)
            store(place(cut.states, path.last_slot), x);
        else
            store_map(place(cut.composed, c.first_group + map_group), x);
    }

    /* Through so many maps, from state to state. */
    __device__ Path path_through(int first_map, int count) const
    {
        return {cut.maps, first_map, count, first_map + 1, 1, first_map + count, true, true};
    }

    /* From state to state of all segments, or where the maps are many of all groups. */
    __device__ Path path_of_chain(const fkda_cut_sequence &c, int groups) const
    {
        const int maps = c.segments - 2, last = c.first_slot + c.segments - 1;
        return groups ? Path{cut.composed,    c.first_group, groups, c.first_slot + 1 + FKDA_GROUP_MAPS,
                             FKDA_GROUP_MAPS, last,          true,   true}
                      : Path{cut.maps, c.first_slot + 1, maps, c.first_slot + 2, 1, last, true, true};
    }

    /* Through a group, up to the segment whose state is there already. */
    __device__ Path path_of_expanding(const fkda_cut_sequence &c, int map_group) const
    {
        int first, last;
        find_map_group(c, map_group, first, last);
        return path_through(first, last - first);
    }

    /* From the state in a slot on. */
    __device__ void carry_from(int first_slot, const Path &path)
    {
        Rows x;
        load(x, place(cut.states, first_slot));
        carry(x, path);
    }
};

/* A step for all cut sequences: every gridDim.x-th item of work. */
template <JoinStep step> static __device__ void join(const fkda_fwd_args &args, const fkda_cut &cut)
{
    constexpr unsigned ROW_GROUPS =
        DIM / FKDA_JOIN_ROWS * (step == COMPOSE ? 2 : 1); /* of rows, to a matrix or to two */
    JoinMemory::Shared &shared = *reinterpret_cast<JoinMemory::Shared *>(cta_memory());
    Join<JoinMemory> work(args, cut, JoinMemory{shared});
    const Cut rules = {args, cut};
    const bool brings = threadIdx.x >= FKDA_JOIN_THREADS;
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (uint64_t &barrier : shared.ring.full) mbarrier_init(&barrier, 1);
        for (uint64_t &barrier : shared.ring.empty) mbarrier_init_for_warps(&barrier, work.WARPS);
        fence_mbarrier_init();
    }
    __syncthreads();
    wait_for_previous_kernel();
    const int count = rules.cut_sequences();
    const unsigned heads = static_cast<unsigned>(args.heads);
    unsigned before = 0; /* items of the sequences before c */
    for (unsigned c = 0, item = blockIdx.x; c < static_cast<unsigned>(count); c++) {
        const fkda_cut_sequence sequence = rules.cut_sequence(static_cast<int>(c));
        const int groups = Cut::groups_of(sequence.segments);
        const unsigned items = static_cast<unsigned>(step == CHAIN ? 1 : groups) * heads * ROW_GROUPS;
        for (; item < before + items; item += gridDim.x) {
            const unsigned within = item - before, row_group = within % ROW_GROUPS;
            const int map_group = static_cast<int>(within / ROW_GROUPS / heads);
            const bool state = row_group >= DIM / FKDA_JOIN_ROWS; /* of COMPOSE */
            work.head = static_cast<int>(within / ROW_GROUPS) - map_group * args.heads;
            work.row = static_cast<int>(row_group % (DIM / FKDA_JOIN_ROWS)) * FKDA_JOIN_ROWS;
            const auto path = step == COMPOSE ? work.path_of_composing(sequence, map_group, state)
                              : step == CHAIN ? work.path_of_chain(sequence, groups)
                                              : work.path_of_expanding(sequence, map_group);
            if (brings)
                work.bring(path, [](int) {});
            else if (step == COMPOSE)
                work.compose(sequence, map_group, state, path);
            else
                work.carry_from(step == CHAIN ? sequence.first_slot + 1 : path.first_map, path);
        }
        before += items;
    }
}

} // namespace fkda

#endif
