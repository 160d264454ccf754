/*
 * The join: from the maps and states that the first pass left in the workspace to the states that segments
 * start from.
 *
 * With S_i^T the state before segment i of a sequence, as rows of V, M_i the segment's map and B_i the state
 * that the segment makes of zeros,
 *
 *     S_(i+1)^T = S_i^T M_i + B_i
 *
 * The slot of segment i + 1 holds B_i before the join and S_(i+1) after it. S_1, the state after the first
 * segment, is there from the start.
 *
 * Algorithm. Rows of a state are independent, so a CTA carries FKDA_JOIN_ROWS rows through all maps of a
 * sequence, one map after the other (step CHAIN). If a sequence has more than FKDA_MAPS_CHAINED maps, it is
 * done in three steps, each of which is a launch: COMPOSE multiplies the maps of each group of
 * FKDA_GROUP_MAPS to one map and one state, all groups in parallel; CHAIN carries states from group to group;
 * and EXPAND carries them through the maps of each group, again in parallel.
 *
 * Precision. Products are made on the tensor core in fp16, close to the precision of fp32: rows are divided
 * by a power of two above their largest number, and each number is the sum of what fp16 keeps of it and of
 * its remainder (map.cuh). A product of two sums has four terms, of which three are computed; the fourth one
 * would be 2^-22 of the product.
 *
 * Optimizations. One warp does nothing but fetch maps, in quarters, ahead of the four warps that multiply.
 * These meet twice a step. The code is kept small, because each launch has to fetch it from memory first.
 */
#ifndef FKDA_HOPPER_JOIN_CUH
#define FKDA_HOPPER_JOIN_CUH

#include "../../common/elements.cuh"
#include "../block/block.cuh"
#include "../block/ring.cuh"
#include "../ptx/control.cuh"
#include "../ptx/copies.cuh"
#include "../ptx/memory.cuh"
#include "../schedule/cut.cuh"
#include "map.cuh"

namespace fkda
{

/* ---- Shared memory ------------------------------------------------------------------------------------- */

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

/* Where the kernel fkda_hopper_join has maps and rows: in all of its shared memory. A relay has another such
 * struct (relay_join.cuh). */
struct JoinMemory {
    static constexpr int QUARTERS = 8;
    struct Shared {
        __align__(1024) MapQuarter quarter[QUARTERS];
        JoinRows rows;
        Ring<QUARTERS> ring;
    };
    static_assert(sizeof(Shared) <= FKDA_HOPPER_SHARED_BYTES, "an SM has no more shared memory");
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

    /* Copies a quarter, whose bytes are already announced to `barrier`. */
    static __device__ void fetch(MapQuarter *to, const MapQuarter *from, int, uint64_t *barrier)
    {
        copy_bulk(to, from, sizeof *to, barrier);
    }
    /* This warp has read the quarter. */
    static __device__ void release(uint64_t *barrier)
    {
        mbarrier_arrive_warp(barrier);
    }
};

/* ---- One CTA's work ------------------------------------------------------------------------------------ */

/*
 * Each of the four computing warps has all rows of the CTA and 32 of the columns; lane (g, t) = (lane / 4,
 * lane % 4) has rows g and g + 8 and, of tile c of eight columns, columns 2 t and 2 t + 1.
 */
template <class Memory> struct Join {
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

    __device__ Join(const fkda_fwd_args &a, const fkda_cut &c, Memory m)
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
            const auto *map = reinterpret_cast<const MapQuarter *>(place(path.maps, path.first_map + i));
            await(path.first_map + i);
#pragma unroll 1
            for (int q = 0; q < 4; q++) {
                uint64_t *full = &memory.ring().full[slot.index];
                mbarrier_wait(&memory.ring().empty[slot.index], slot.parity ^ 1);
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

    /* ---- The three steps ---- */

    /* The first and the last map of a map group. */
    __device__ void find_map_group(const fkda_cut_sequence &c, int map_group, int &first, int &last) const
    {
        first = c.first_slot + 1 + map_group * FKDA_GROUP_MAPS;
        last = min(first + FKDA_GROUP_MAPS, c.first_slot + c.segments - 1) - 1;
    }

    /* COMPOSE: through the maps of a group but the first one, from rows of the first map or, for the group's
     * state, from the state after the first map. */
    __device__ Path path_of_composing(const fkda_cut_sequence &c, int map_group, bool state) const
    {
        int first, last;
        find_map_group(c, map_group, first, last);
        return {cut.maps, first + 1, last - first, first + 2, 1, last + 1, state, false};
    }

    /* CHAIN: through all maps of a sequence or, if there are `groups` map groups, through their composed
     * maps. */
    __device__ Path path_of_chain(const fkda_cut_sequence &c, int groups) const
    {
        const int maps = c.segments - 2, last = c.first_slot + c.segments - 1;
        return groups ? Path{cut.composed,    c.first_group, groups, c.first_slot + 1 + FKDA_GROUP_MAPS,
                             FKDA_GROUP_MAPS, last,          true,   true}
                      : Path{cut.maps, c.first_slot + 1, maps, c.first_slot + 2, 1, last, true, true};
    }

    /* EXPAND: through the maps of a group but the last one; the state after the group is there already. */
    __device__ Path path_of_expanding(const fkda_cut_sequence &c, int map_group) const
    {
        int first, last;
        find_map_group(c, map_group, first, last);
        return path_through(first, last - first);
    }
};

/* ---- The kernel ---------------------------------------------------------------------------------------- */

/* One step (FKDA_JOIN_COMPOSE, ...) for all cut sequences. A work item is 16 rows of one head's state or map;
 * CTA i has the work items i, i + gridDim.x, ... */
static __device__ __forceinline__ void join(const fkda_fwd_args &args, const fkda_cut &cut, int step)
{
    JoinMemory::Shared &shared = *reinterpret_cast<JoinMemory::Shared *>(cta_memory());
    Join<JoinMemory> work(args, cut, JoinMemory{shared});
    const Cut rules = {args, cut};
    const bool fetches = threadIdx.x >= FKDA_JOIN_THREADS;
    const bool composes = step == FKDA_JOIN_COMPOSE, chains = step == FKDA_JOIN_CHAIN;
    constexpr unsigned ROW_GROUPS = DIM / FKDA_JOIN_ROWS;
    const unsigned row_groups =
        composes ? 2 * ROW_GROUPS : ROW_GROUPS; /* of a map and a state, or of a state */

    /* ---- Barriers ---- */
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (uint64_t &barrier : shared.ring.full) mbarrier_init(&barrier, 1);
        for (uint64_t &barrier : shared.ring.empty) mbarrier_init_for_warps(&barrier, work.WARPS);
        fence_mbarrier_init();
    }
    __syncthreads();
    wait_for_previous_kernel();

    /* ---- Work items ---- */
    const int count = rules.cut_sequences();
    const unsigned heads = static_cast<unsigned>(args.heads);
    unsigned before = 0; /* work items of the sequences before c */
    for (unsigned c = 0, item = blockIdx.x; c < static_cast<unsigned>(count); c++) {
        const fkda_cut_sequence sequence = rules.cut_sequence(static_cast<int>(c));
        const int groups = Cut::groups_of(sequence.segments);
        const unsigned items = static_cast<unsigned>(chains ? 1 : groups) * heads * row_groups;
        for (; item < before + items; item += gridDim.x) {
            const unsigned within = item - before, row_group = within % row_groups;
            const int map_group = static_cast<int>(within / row_groups / heads);
            const bool state = row_group >= ROW_GROUPS; /* COMPOSE: of the group's state, not of its map */
            work.head = static_cast<int>(within / row_groups) - map_group * args.heads;
            work.row = static_cast<int>(row_group % ROW_GROUPS) * FKDA_JOIN_ROWS;
            const auto path = composes ? work.path_of_composing(sequence, map_group, state)
                              : chains ? work.path_of_chain(sequence, groups)
                                       : work.path_of_expanding(sequence, map_group);
            if (fetches) {
                work.fetch(path, [](int) {});
                continue;
            }
            Join<JoinMemory>::Rows x;
            if (composes && !state)
                work.load_map(x, work.place(cut.maps, path.first_map - 1));
            else
                work.load(x, work.place(cut.states, chains ? sequence.first_slot + 1 : path.first_map));
            work.carry(x, path);
            if (composes && state) work.store(work.place(cut.states, path.last_slot), x);
            if (composes && !state)
                work.store_map(work.place(cut.composed, sequence.first_group + map_group), x);
        }
        before += items;
    }
}

} // namespace fkda

#endif
