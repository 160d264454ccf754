/*
 * Joins segments: from what the first pass left in the workspace to the states that they start from. With S_i^T the state that
 * segment i of a sequence starts from, as rows of V, M_i its map and B_i what it makes of zeros,
 *
 *     S_(i+1)^T = S_i^T M_i + B_i
 *
 * S_1 is there, the state after the first segment, and B_i is where S_(i+1) goes. Rows are independent: a block carries
 * FKDA_JOIN_ROWS of them through all maps, close to fp32's precision. Of many maps, groups are composed first, in parallel,
 * to one map and one state each; then states are carried from group to group, then through each group, in parallel again.
 */
#ifndef FKDA_HOPPER_JOIN_CUH
#define FKDA_HOPPER_JOIN_CUH

#include "../common/elements.cuh"
#include "cut.cuh"
#include "fwd_shape.h"
#include "map.cuh"
#include "sm90.cuh"

namespace fkda
{

enum JoinStep { COMPOSE, CHAIN, EXPAND };

/* A quarter of a map's rows. */
struct MapQuarter {
    static constexpr int BLOCKS = 2;
    MapBlock block[BLOCKS];
};

/* The rows that a block carries, in shared memory. */
struct JoinRows {
    /* As operands: high, low; unit u of 16 bytes of row r at u ^ r % 8. */
    __align__(16) unsigned char rows[2][FKDA_JOIN_ROWS * DIM * 2];
    __align__(16) float most[FKDA_JOIN_ROWS][4]; /* in a warp's columns of a row */
};

/* Where a block has maps on their way, and its rows; here all of its memory, elsewhere what others leave (at_once.cuh). */
struct JoinMemory {
    static constexpr int QUARTERS = 8;
    struct Shared {
        __align__(1024) MapQuarter quarter[QUARTERS];
        JoinRows rows;
        Ring<QUARTERS> ring;
    };
    static_assert(sizeof(Shared) <= FKDA_HOPPER_SHARED_BYTES, "what a block can have");
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
 * The work of a block, by four warps that compute, and one that brings the maps.
 *
 * Products on the tensor core in fp16: rows are divided by a power of two above them, and a number is the sum of what fp16 keeps of it and
 * of the rest (map.cuh); of the four products of such sums three are taken, which leaves 2^-22 of a product out. A warp has the
 * block's rows and 32 columns; lane (g, t) = (lane / 4, lane % 4) of that rows g and g + 8 and, of tile c of eight
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
    int head, row;               /* of V or of a map: the first of the block's */

    __device__ Join(const fkda_fwd_args &a, const fkda_cut &c, Memory m)
        : args(a), cut(c), memory(m), slot(0), head(0), row(0)
    {
    }

    /* A head's matrix in a slot. */
    __device__ float *place(float *matrices, int at) const
    {
        return matrices + (static_cast<long long>(at) * args.heads + head) * MATRIX;
    }

    /* What a block carries its rows through: maps first_map, first_map + 1, ... and, with `add`, to the product with the i-th
     * the rows in a slot; which then get the sum, if it is to be kept. */
    struct Way {
        float *maps;
        int first_map, count;
        int first_slot, slot_step,
            last_slot; /* of what is added: after i steps first_slot + i slot_step, at most last_slot */
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
    template <class Await> __device__ void bring(const Way &way, Await await)
    {
#pragma unroll 1
        for (int i = 0; i < way.count; i++) {
            const auto *map = reinterpret_cast<const MapQuarter *>(place(way.maps, way.first_map + i));
            await(way.first_map + i);
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
    static __device__ int group() /* the warp's, of columns */
    {
        return static_cast<int>(threadIdx.x) >> 5 & 3;
    }

    /* To and from a state. */
    __device__ float4 *tiles(float *matrix) const
    {
        return &reinterpret_cast<StateImage *>(matrix)->tile[row / 16][4 * group()][lane()];
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
            const int at = row + lane() / 4 + i % 2 * 8, column = 32 * group() + i / 2 * 8 + lane() % 4 * 2;
            act(*map.pair(MapBlock::HIGH, at, column), *map.pair(MapBlock::LOW, at, column),
                x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
        }
    }

    /* To and from rows of a map. */
    __device__ void store_map(float *matrix, Rows &x) const
    {
        for_each_pair(matrix, x, [](uint32_t &high, uint32_t &low, float a, float b) {
            MapBlock::split(high, low, a, b);
        });
    }

    __device__ void load_map(Rows &x, float *matrix) const
    {
        for_each_pair(matrix, x, [](uint32_t high, uint32_t low, float &a, float &b) {
            a = half_low(high) + half_low(low), b = half_high(high) + half_high(low);
        });
    }

    /* Rows x through the maps; without `add` they are of a map themselves. */
    __device__ void carry(Rows &x, const Way &way)
    {
#pragma unroll 1
        for (int i = 0; i < way.count; i++) {
            float *state = place(cut.states, way.slot(i));
            Rows sum = {};
            float scale[2];
            if (way.add) load(sum, state);
            leave_most(x);
            sync(); /* the product before is over too */
            leave_rows(x, scale);
            sync();
            multiply(x);
#pragma unroll
            for (int c = 0; c < 4; c++)
#pragma unroll
                for (int n = 0; n < 4; n++) x[c][n] = __fmaf_rn(x[c][n], scale[n / 2], sum[c][n]);
            if (way.keep) store(state, x);
        }
    }

    /* The largest number of each row in the warp's columns. */
    __device__ void leave_most(const Rows &x) const
    {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = 0.0f;
#pragma unroll
            for (int c = 0; c < 4; c++) most = fmaxf(most, fmaxf(fabsf(x[c][2 * r]), fabsf(x[c][2 * r + 1])));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            if (lane() % 4 == 0) memory.rows().most[lane() / 4 + 8 * r][group()] = most;
        }
    }

    /* This lane's row for ldmatrix of the 16 rows x 16 columns from this one on. */
    __device__ uint4 *row_unit(int which, int column) const
    {
        const int r = lane() & 15, u = column / 8 + (lane() >> 4);
        return reinterpret_cast<uint4 *>(&memory.rows().rows[which][r * DIM * 2 + (u ^ (r & 7)) * 16]);
    }

    /* The rows as an operand, divided by their scales. */
    __device__ void leave_rows(const Rows &x, float (&scale)[2]) const
    {
        uint32_t high[4][2], low[4][2]; /* tile, row */
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float4 all = *reinterpret_cast<const float4 *>(memory.rows().most[lane() / 4 + 8 * r]);
            const float most = fminf(fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w)), 0x1p126f);
            scale[r] = fmaxf(power_above(most), 0x1p-100f);
            const float factor = inverse_power(scale[r]);
#pragma unroll
            for (int c = 0; c < 4; c++)
                MapBlock::split(high[c][r], low[c][r], x[c][2 * r] * factor, x[c][2 * r + 1] * factor);
        }
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
            const int column = 32 * group() + 8 * c;
            store_matrices(shared_address(row_unit(MapBlock::HIGH, column)),
                           {high[c][0], high[c][1], high[c + 1][0], high[c + 1][1]});
            store_matrices(shared_address(row_unit(MapBlock::LOW, column)),
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
            for (int k = 0; k < MapQuarter::BLOCKS; k++) {
                const int depth = 16 * (MapQuarter::BLOCKS * q + k);
                uint32_t a[4], rest[4];
                load_matrices(a, row_unit(MapBlock::HIGH, depth));
                load_matrices(rest, row_unit(MapBlock::LOW, depth));
#pragma unroll
                for (int c = 0; c < 4; c += 2) {
                    const int u = 4 * group() + c + (lane() >> 4);
                    uint32_t high[4], low[4]; /* tile, depth / 8 */
                    load_matrices_transposed(high, map.block[k].unit(MapBlock::HIGH, lane() & 15, u));
                    load_matrices_transposed(low, map.block[k].unit(MapBlock::LOW, lane() & 15, u));
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
    __device__ void find_group(const fkda_cut_sequence &c, int group, int &first, int &last) const
    {
        first = c.first_slot + 1 + group * FKDA_GROUP_MAPS;
        last = min(first + FKDA_GROUP_MAPS, c.first_slot + c.segments - 1) - 1;
    }

    /* A group's maps one after the other, from rows of the first map; and its states, from those after the first map. */
    __device__ Way way_of_composing(const fkda_cut_sequence &c, int group, bool state) const
    {
        int first, last;
        find_group(c, group, first, last);
        return {cut.maps, first + 1, last - first, first + 2, 1, last + 1, state, false};
    }

    __device__ void compose(const fkda_cut_sequence &c, int group, bool state, const Way &way)
    {
        Rows x;
        if (state)
            load(x, place(cut.states, way.first_map));
        else
            load_map(x, place(cut.maps, way.first_map - 1));
        carry(x, way);
        if (state)
            store(place(cut.states, way.last_slot), x);
        else
            store_map(place(cut.composed, c.first_group + group), x);
    }

    /* Through so many maps, from state to state. */
    __device__ Way way_through(int first_map, int count) const
    {
        return {cut.maps, first_map, count, first_map + 1, 1, first_map + count, true, true};
    }

    /* From state to state of all segments, or where the maps are many of all groups. */
    __device__ Way way_of_chain(const fkda_cut_sequence &c, int groups) const
    {
        const int maps = c.segments - 2, last = c.first_slot + c.segments - 1;
        return groups ? Way{cut.composed,    c.first_group, groups, c.first_slot + 1 + FKDA_GROUP_MAPS,
                            FKDA_GROUP_MAPS, last,          true,   true}
                      : Way{cut.maps, c.first_slot + 1, maps, c.first_slot + 2, 1, last, true, true};
    }

    /* Through a group, up to the segment whose state is there already. */
    __device__ Way way_of_expanding(const fkda_cut_sequence &c, int group) const
    {
        int first, last;
        find_group(c, group, first, last);
        return way_through(first, last - first);
    }

    /* From the state in a slot on. */
    __device__ void carry_from(int first_slot, const Way &way)
    {
        Rows x;
        load(x, place(cut.states, first_slot));
        carry(x, way);
    }
};

/* A step for all cut sequences: every gridDim.x-th item of work. */
template <JoinStep step> static __device__ void join(const fkda_fwd_args &args, const fkda_cut &cut)
{
    constexpr unsigned PARTS =
        DIM / FKDA_JOIN_ROWS * (step == COMPOSE ? 2 : 1); /* of rows, to a matrix or to two */
    JoinMemory::Shared &shared = *reinterpret_cast<JoinMemory::Shared *>(block_memory());
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
    wait_for_kernel_before();
    const int count = rules.cut_sequences();
    const unsigned heads = static_cast<unsigned>(args.heads);
    unsigned before = 0; /* items of the sequences before c */
    for (unsigned c = 0, item = blockIdx.x; c < static_cast<unsigned>(count); c++) {
        const fkda_cut_sequence sequence = rules.cut_sequence(static_cast<int>(c));
        const int groups = Cut::groups_of(sequence.segments);
        const unsigned items = static_cast<unsigned>(step == CHAIN ? 1 : groups) * heads * PARTS;
        for (; item < before + items; item += gridDim.x) {
            const unsigned within = item - before, block = within % PARTS;
            const int group = static_cast<int>(within / PARTS / heads);
            const bool state = block >= DIM / FKDA_JOIN_ROWS; /* of COMPOSE */
            work.head = static_cast<int>(within / PARTS) - group * args.heads;
            work.row = static_cast<int>(block % (DIM / FKDA_JOIN_ROWS)) * FKDA_JOIN_ROWS;
            const auto way = step == COMPOSE ? work.way_of_composing(sequence, group, state)
                             : step == CHAIN ? work.way_of_chain(sequence, groups)
                                             : work.way_of_expanding(sequence, group);
            if (brings)
                work.bring(way, [](int) {});
            else if (step == COMPOSE)
                work.compose(sequence, group, state, way);
            else
                work.carry_from(step == CHAIN ? sequence.first_slot + 1 : way.first_map, way);
        }
        before += items;
    }
}

} // namespace fkda

#endif
