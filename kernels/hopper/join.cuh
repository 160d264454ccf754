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

struct JoinShared {
    static constexpr int BUFFERS = 2;
    __align__(1024) MapImage map[BUFFERS];                                     /* on their way, whole ones */
    __align__(16) unsigned char rows[2][FKDA_JOIN_ROWS * MapImage::ROW_BYTES]; /* as operands: high, low */
    __align__(16) float most[FKDA_JOIN_ROWS][4]; /* in a warp's columns of a row */
    uint64_t full[BUFFERS];
};
static_assert(sizeof(JoinShared) <= FKDA_HOPPER_SHARED_BYTES, "what a block can have");

/* Products on the tensor core in fp16: rows are divided by a power of two above them, and a number is the sum of what fp16 keeps of it and
 * of the rest (map.cuh); of the four products of such sums three are taken, which leaves 2^-22 of a product out. A warp has 16 of the
 * block's rows and 32 of the places in an image; lane (g, t) = (lane / 4, lane % 4) of that rows g and g + 8 and, of tile c of eight
 * places, places 2 t and 2 t + 1, which are eight neighbouring channels. The code is kept small: each launch has to fetch it. */
struct Join {
    static constexpr int BUFFERS = JoinShared::BUFFERS;
    static constexpr int MATRIX = DIM * DIM;
    static_assert(FKDA_JOIN_THREADS / 32 == FKDA_JOIN_ROWS / 16 * 4, "16 rows and 32 places to a warp");
    using Rows = float[4][4]; /* by tile */
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    JoinShared &shared;
    int head, row;        /* of V or, of a map, a place in its image: the first of the block's */
    unsigned asked, used; /* maps that were asked for so far, and that were used */

    /* A head's matrix in a slot. */
    __device__ float *place(float *matrices, int slot) const
    {
        return matrices + (static_cast<long long>(slot) * args.heads + head) * MATRIX;
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

    __device__ void ask_for(const float *map)
    {
        const int buffer = static_cast<int>(asked++ % BUFFERS);
        if (threadIdx.x != 0) return;
        mbarrier_arrive_expecting(&shared.full[buffer], sizeof(MapImage));
        copy_bulk(&shared.map[buffer], map, sizeof(MapImage), &shared.full[buffer]);
    }

    /* The first of the warp's rows among the block's, and this lane's; its group of places; the lane's t. */
    static __device__ int warp_rows()
    {
        return static_cast<int>(threadIdx.x) >> 7 << 4;
    }
    static __device__ int lane_row()
    {
        return warp_rows() + (static_cast<int>(threadIdx.x) >> 2 & 7);
    }
    static __device__ int group()
    {
        return static_cast<int>(threadIdx.x) >> 5 & 3;
    }
    static __device__ int lane_pair()
    {
        return static_cast<int>(threadIdx.x) & 3;
    }

    /* To and from a matrix in fp32. */
    __device__ void store(float *matrix, const Rows &x) const
    {
        float *to = matrix + (row + lane_row()) * DIM + 32 * group() + 8 * lane_pair();
#pragma unroll
        for (int i = 0; i < 4; i++)
            store_four(to + i / 2 * 8 * DIM + i % 2 * 4, x[i % 2 * 2][i / 2 * 2], x[i % 2 * 2][i / 2 * 2 + 1],
                       x[i % 2 * 2 + 1][i / 2 * 2], x[i % 2 * 2 + 1][i / 2 * 2 + 1]);
    }

    __device__ void load(Rows &x, const float *matrix) const
    {
        const float *from = matrix + (row + lane_row()) * DIM + 32 * group() + 8 * lane_pair();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 four = *reinterpret_cast<const float4 *>(from + i / 2 * 8 * DIM + i % 2 * 4);
            x[i % 2 * 2][i / 2 * 2] = four.x, x[i % 2 * 2][i / 2 * 2 + 1] = four.y;
            x[i % 2 * 2 + 1][i / 2 * 2] = four.z, x[i % 2 * 2 + 1][i / 2 * 2 + 1] = four.w;
        }
    }

    /* Rows of a map: those that are at these places. */
    __device__ void store_map(float *matrix, const Rows &x) const
    {
        MapImage &map = *reinterpret_cast<MapImage *>(matrix);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at = row + lane_row() + i / 4 * 8, place = 32 * group() + i % 4 * 8 + 2 * lane_pair();
            MapImage::split(*MapImage::pair(map.high, at, place), *MapImage::pair(map.low, at, place),
                            x[i % 4][i / 4 * 2], x[i % 4][i / 4 * 2 + 1]);
        }
    }

    __device__ void load_map(Rows &x, float *matrix) const
    {
        MapImage &map = *reinterpret_cast<MapImage *>(matrix);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at = row + lane_row() + i / 4 * 8, place = 32 * group() + i % 4 * 8 + 2 * lane_pair();
            const uint32_t high = *MapImage::pair(map.high, at, place),
                           low = *MapImage::pair(map.low, at, place);
            x[i % 4][i / 4 * 2] = half_low(high) + half_low(low);
            x[i % 4][i / 4 * 2 + 1] = half_high(high) + half_high(low);
        }
    }

    /* The first map, before anything else is loaded. */
    __device__ void begin(const Way &way)
    {
        __syncthreads(); /* of another item of work, all is read */
        if (way.count > 0) ask_for(place(way.maps, way.first_map));
    }

    /* Rows x through the maps; without `add` they are of a map themselves. */
    __device__ void carry(Rows &x, const Way &way)
    {
        const float *map = place(way.maps, way.first_map);
        const long long next_map = static_cast<long long>(args.heads) * MATRIX;
        const int count = way.count;
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            float *state = place(cut.states, way.slot(i));
            Rows sum = {};
            float scale[2];
            if (way.add) load(sum, state);
            leave_most(x);
            __syncthreads(); /* the product before is over */
            leave_rows(x, scale);
            const int buffer = static_cast<int>(used % BUFFERS);
            mbarrier_wait(&shared.full[buffer], static_cast<int>(used / BUFFERS % 2));
            used++;
            map += next_map;
            if (i + 1 < count) ask_for(map); /* one at a time, since all blocks want the same at once */
            __syncthreads();
            multiply(x, shared.map[buffer]);
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
            if (lane_pair() == 0) shared.most[lane_row() + 8 * r][group()] = most;
        }
    }

    /* This lane's row for ldmatrix of a tile of 16 rows or depths x 16 places. */
    static __device__ uint4 *matrix_unit(unsigned char *rows, int first, int place)
    {
        const int lane = static_cast<int>(threadIdx.x) & 31;
        return MapImage::unit(rows, first + (lane & 15), place / 8 + (lane >> 4));
    }

    /* The rows as an operand, divided by their scales. */
    __device__ void leave_rows(const Rows &x, float (&scale)[2]) const
    {
        uint32_t high[4][2], low[4][2]; /* tile, row */
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float4 all = *reinterpret_cast<const float4 *>(shared.most[lane_row() + 8 * r]);
            const float most = fminf(fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w)), 0x1p126f);
            scale[r] = fmaxf(power_above(most), 0x1p-100f);
            const float factor = inverse_power(scale[r]);
#pragma unroll
            for (int c = 0; c < 4; c++)
                MapImage::split(high[c][r], low[c][r], x[c][2 * r] * factor, x[c][2 * r + 1] * factor);
        }
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
            const int place = 32 * group() + 8 * c;
            store_matrices(shared_address(matrix_unit(shared.rows[0], warp_rows(), place)),
                           {high[c][0], high[c][1], high[c + 1][0], high[c + 1][1]});
            store_matrices(shared_address(matrix_unit(shared.rows[1], warp_rows(), place)),
                           {low[c][0], low[c][1], low[c + 1][0], low[c + 1][1]});
        }
    }

    __device__ void multiply(Rows &product, MapImage &map) const
    {
        Rows high_low = {}, low_high = {}, high_high = {}; /* sums that need not wait for each other */
#pragma unroll 2
        for (int k = 0; k < DIM; k += 16) {
            uint32_t a[4], rest[4];
            load_matrices(a, matrix_unit(shared.rows[0], warp_rows(), k));
            load_matrices(rest, matrix_unit(shared.rows[1], warp_rows(), k));
#pragma unroll
            for (int c = 0; c < 4; c += 2) {
                uint32_t high[4], low[4]; /* tile, depth / 8 */
                load_matrices_transposed(high, matrix_unit(map.high, k, 32 * group() + 8 * c));
                load_matrices_transposed(low, matrix_unit(map.low, k, 32 * group() + 8 * c));
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    mma_half(high_low[c + n], a[0], a[1], a[2], a[3], low[2 * n], low[2 * n + 1]);
                    mma_half(low_high[c + n], rest[0], rest[1], rest[2], rest[3], high[2 * n],
                             high[2 * n + 1]);
                    mma_half(high_high[c + n], a[0], a[1], a[2], a[3], high[2 * n], high[2 * n + 1]);
                }
            }
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
    __device__ void compose(const fkda_cut_sequence &c, int group, bool state)
    {
        int first, last;
        find_group(c, group, first, last);
        const Way way = {cut.maps, first + 1, last - first, first + 2, 1, last + 1, state, false};
        Rows x;
        begin(way);
        if (state)
            load(x, place(cut.states, first + 1));
        else
            load_map(x, place(cut.maps, first));
        carry(x, way);
        if (state)
            store(place(cut.states, last + 1), x);
        else
            store_map(place(cut.composed, c.first_group + group), x);
    }

    /* From state to state of all segments, or where the maps are many of all groups. */
    __device__ void chain(const fkda_cut_sequence &c, int groups)
    {
        const int maps = c.segments - 2, last = c.first_slot + c.segments - 1;
        const Way way = groups
                            ? Way{cut.composed,    c.first_group, groups, c.first_slot + 1 + FKDA_GROUP_MAPS,
                                  FKDA_GROUP_MAPS, last,          true,   true}
                            : Way{cut.maps, c.first_slot + 1, maps, c.first_slot + 2, 1, last, true, true};
        Rows x;
        begin(way);
        load(x, place(cut.states, c.first_slot + 1));
        carry(x, way);
    }

    /* Through a group, up to the segment whose state is there already. */
    __device__ void expand(const fkda_cut_sequence &c, int group)
    {
        int first, last;
        find_group(c, group, first, last);
        const Way way = {cut.maps, first, last - first, first + 1, 1, last, true, true};
        Rows x;
        begin(way);
        load(x, place(cut.states, first));
        carry(x, way);
    }
};

/* A step for all cut sequences: every gridDim.x-th item of work. */
template <JoinStep step> static __device__ void join(const fkda_fwd_args &args, const fkda_cut &cut)
{
    constexpr unsigned PARTS =
        DIM / FKDA_JOIN_ROWS * (step == COMPOSE ? 2 : 1); /* of rows, to a matrix or to two */
    Join work = {args, cut, *reinterpret_cast<JoinShared *>(block_memory()), 0, 0, 0, 0};
    const Cut rules = {args, cut};
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (uint64_t &barrier : work.shared.full) mbarrier_init(&barrier, 1);
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
            const unsigned within = item - before, block = within % PARTS, group = within / PARTS / heads;
            work.head = static_cast<int>(within / PARTS - group * heads);
            work.row = static_cast<int>(block % (DIM / FKDA_JOIN_ROWS)) * FKDA_JOIN_ROWS;
            if constexpr (step == COMPOSE)
                work.compose(sequence, static_cast<int>(group), block >= DIM / FKDA_JOIN_ROWS);
            if constexpr (step == CHAIN) work.chain(sequence, groups);
            if constexpr (step == EXPAND) work.expand(sequence, static_cast<int>(group));
        }
        before += items;
    }
}

} // namespace fkda

#endif
