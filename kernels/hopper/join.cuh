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

/* Maps on their way, whole ones, and a block's rows as an operand, in the same form (map.cuh). */
struct JoinShared {
    static constexpr int BUFFERS = 3;
    __align__(1024) MapImage map[BUFFERS];
    __align__(1024) unsigned char rows[2][FKDA_JOIN_ROWS * MapImage::ROW_BYTES]; /* high, low */
    __align__(16) float most[FKDA_JOIN_ROWS][FKDA_JOIN_THREADS / 32]; /* in a warp's columns of a row */
    uint64_t full[BUFFERS];
};
static_assert(sizeof(JoinShared) <= FKDA_HOPPER_SHARED_BYTES, "what a block can have");

/* Products on the tensor core in fp16: a number is the sum of what fp16 keeps of it and of 2^-11 times what it keeps of the rest, and of
 * the four products of such sums three are taken, which leaves 2^-22 of a product out. Rows are divided by a power of two above them first; maps
 * are at most one in size. A warp has 16 columns of the block's rows; lane (g, t) = (lane / 4, lane % 4) of tile c of eight
 * columns and tile r of 16 rows rows g and g + 8 and columns 2 t and 2 t + 1. */
struct Join {
    static constexpr int WARPS = FKDA_JOIN_THREADS / 32;
    static constexpr int ROW_TILES = FKDA_JOIN_ROWS / 16, BUFFERS = JoinShared::BUFFERS;
    static constexpr int MATRIX = DIM * DIM;
    static_assert(DIM / WARPS == 16 && WARPS == 8,
                  "two tiles of columns to a warp, eight numbers to a row of `most`");
    using Rows = float[ROW_TILES][2][4]; /* tile of rows, of columns */
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    JoinShared &shared;
    int head, row;        /* of V or, of a map, of K: the first of the block's */
    unsigned asked, used; /* maps that were asked for so far, and that were used */
    /* The maps are not there yet: an item is gone through once for its code, from rows of zeros. */
    bool rehearsal;

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

    /* visit(row tile, column tile, half, row, column): of this lane's pairs of numbers; the column's place in images. */
    template <class Visit> __device__ void for_each_pair(Visit visit) const
    {
        const int lane = threadIdx.x & 31, first = static_cast<int>(threadIdx.x) >> 5 << 4;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                visit(r, i / 2, i % 2, 16 * r + 8 * (i % 2) + (lane >> 2),
                      first + 8 * (i / 2) + 2 * (lane & 3));
    }

    __device__ void store(float *matrix, const Rows &x) const
    {
        for_each_pair([&](int r, int c, int half, int at, int column) {
            store_two(matrix + (row + at) * DIM + MapImage::image(column), x[r][c][2 * half],
                      x[r][c][2 * half + 1]);
        });
    }

    __device__ void load(Rows &x, const float *matrix) const
    {
        for_each_pair([&](int r, int c, int half, int at, int column) {
            const float2 two =
                *reinterpret_cast<const float2 *>(matrix + (row + at) * DIM + MapImage::image(column));
            x[r][c][2 * half] = two.x, x[r][c][2 * half + 1] = two.y;
        });
    }

    /* Rows of a map: those that are at these places. */
    __device__ void store_map(float *matrix, const Rows &x) const
    {
        MapImage &map = *reinterpret_cast<MapImage *>(matrix);
        for_each_pair([&](int r, int c, int half, int at, int column) {
            const int from = MapImage::place(row + at, column / 8) + column % 8 * 2;
            MapImage::split(*reinterpret_cast<uint32_t *>(&map.high[from]),
                            *reinterpret_cast<uint32_t *>(&map.low[from]), x[r][c][2 * half],
                            x[r][c][2 * half + 1]);
        });
    }

    __device__ void load_map(Rows &x, const float *matrix) const
    {
        const MapImage &map = *reinterpret_cast<const MapImage *>(matrix);
        for_each_pair([&](int r, int c, int half, int at, int column) {
            const int from = MapImage::place(row + at, column / 8) + column % 8 * 2;
            MapImage::join(x[r][c][2 * half], x[r][c][2 * half + 1],
                           *reinterpret_cast<const uint32_t *>(&map.high[from]),
                           *reinterpret_cast<const uint32_t *>(&map.low[from]));
        });
    }

    /* Rows x through the maps; without `add` they are of a map themselves. A rehearsal goes one step, with whatever is there, and leaves all
     * but x as it is. */
    __device__ void carry(Rows &x, const Way &way)
    {
        const float *map = place(way.maps, way.first_map);
        const long long next_map = static_cast<long long>(args.heads) * MATRIX;
        const int count = rehearsal ? 1 : way.count;
        Rows sum = {};   /* what is added: on its way a step ahead */
        __syncthreads(); /* of another item of work, all is read */
        if (!rehearsal) {
            for (int i = 0; i < min(count, BUFFERS); i++) ask_for(map + i * next_map);
            if (way.add && count) load(sum, place(cut.states, way.slot(0)));
        }
        map += BUFFERS * next_map;
#pragma unroll 1
        for (int i = 0; i < count; i++, map += next_map) {
            Rows next = {};
            if (way.add && i + 1 < count) load(next, place(cut.states, way.slot(i + 1)));
            leave_most(x);
            __syncthreads(); /* the product before is over */
            if (i && i + BUFFERS - 1 < count) ask_for(map - next_map);
            float scale[ROW_TILES][2];
            leave_rows(x, scale);
            const int buffer = static_cast<int>(used % BUFFERS);
            if (!rehearsal) {
                mbarrier_wait(&shared.full[buffer], static_cast<int>(used / BUFFERS % 2));
                used++;
            }
            __syncthreads();
            multiply_add(sum, scale, shared.map[buffer]);
            if (way.keep && !rehearsal) store(place(cut.states, way.slot(i)), sum);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int c = 0; c < 2; c++)
#pragma unroll
                    for (int n = 0; n < 4; n++) x[r][c][n] = sum[r][c][n], sum[r][c][n] = next[r][c][n];
        }
    }

    /* The largest number of each row in the warp's columns. */
    __device__ void leave_most(const Rows &x) const
    {
        const int lane = threadIdx.x & 31, warp = static_cast<int>(threadIdx.x) >> 5;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = fmaxf(fmaxf(fabsf(x[r][0][2 * half]), fabsf(x[r][0][2 * half + 1])),
                                   fmaxf(fabsf(x[r][1][2 * half]), fabsf(x[r][1][2 * half + 1])));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
                if (lane % 4 == 0) shared.most[16 * r + 8 * half + lane / 4][warp] = most;
            }
    }

    /* The rows as an operand, divided by their scales. */
    __device__ void leave_rows(const Rows &x, float (&scale)[ROW_TILES][2]) const
    {
        const int lane = threadIdx.x & 31, warp = static_cast<int>(threadIdx.x) >> 5;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            uint32_t high[4], low[4]; /* column tile, half */
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float4 *all =
                    reinterpret_cast<const float4 *>(shared.most[16 * r + 8 * half + lane / 4]);
                const float4 a = all[0], b = all[1];
                const float most = fminf(
                    fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w))),
                    0x1p126f);
                scale[r][half] =
                    fmaxf(__uint_as_float((__float_as_uint(most) & 0x7f800000u) + 0x00800000u), 0x1p-100f);
                const float factor = inverse_power(scale[r][half]);
#pragma unroll
                for (int c = 0; c < 2; c++)
                    MapImage::split(high[2 * c + half], low[2 * c + half], x[r][c][2 * half] * factor,
                                    x[r][c][2 * half + 1] * factor);
            }
            const int at = MapImage::place(16 * r + lane % 16, 2 * warp + lane / 16);
            store_matrices(shared_address(&shared.rows[0][at]), high);
            store_matrices(shared_address(&shared.rows[1][at]), low);
        }
    }

    __device__ void multiply_add(Rows &x, const float (&scale)[ROW_TILES][2], const MapImage &map) const
    {
        const int lane = threadIdx.x & 31, warp = static_cast<int>(threadIdx.x) >> 5;
        Rows sums = {}, rests = {};
#pragma unroll 2
        for (int k = 0; k < DIM / 16; k++) {
            uint32_t high[4], low[4]; /* of the map: column tile, depth / 8 */
            const int from = MapImage::place(16 * k + lane % 16, 2 * warp + lane / 16);
            load_matrices_transposed(high, &map.high[from]);
            load_matrices_transposed(low, &map.low[from]);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                uint32_t a[4], rest[4];
                const int at = MapImage::place(16 * r + lane % 16, 2 * k + lane / 16);
                load_matrices(a, &shared.rows[0][at]);
                load_matrices(rest, &shared.rows[1][at]);
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    mma_half(sums[r][c], a[0], a[1], a[2], a[3], high[2 * c], high[2 * c + 1]);
                    mma_half(rests[r][c], a[0], a[1], a[2], a[3], low[2 * c], low[2 * c + 1]);
                    mma_half(rests[r][c], rest[0], rest[1], rest[2], rest[3], high[2 * c], high[2 * c + 1]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int c = 0; c < 2; c++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    x[r][c][i] = __fmaf_rn(__fmaf_rn(rests[r][c][i], MapImage::REST, sums[r][c][i]),
                                           scale[r][i / 2], x[r][c][i]);
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
        Rows x = {};
        if (!rehearsal) {
            if (state)
                load(x, place(cut.states, first + 1));
            else
                load_map(x, place(cut.maps, first));
        }
        carry(x, {cut.maps, first + 1, last - first, first + 2, 1, last + 1, state, false});
        if (rehearsal) return;
        if (state)
            store(place(cut.states, last + 1), x);
        else
            store_map(place(cut.composed, c.first_group + group), x);
    }

    /* From state to state of all segments, or where the maps are many of all groups. */
    __device__ void chain(const fkda_cut_sequence &c, int groups)
    {
        const int maps = c.segments - 2, last = c.first_slot + c.segments - 1;
        Rows x = {};
        if (!rehearsal) load(x, place(cut.states, c.first_slot + 1));
        const Way way = groups
                            ? Way{cut.composed,    c.first_group, groups, c.first_slot + 1 + FKDA_GROUP_MAPS,
                                  FKDA_GROUP_MAPS, last,          true,   true}
                            : Way{cut.maps, c.first_slot + 1, maps, c.first_slot + 2, 1, last, true, true};
        carry(x, way);
    }

    /* Through a group, up to the segment whose state is there already. */
    __device__ void expand(const fkda_cut_sequence &c, int group)
    {
        int first, last;
        find_group(c, group, first, last);
        Rows x = {};
        if (!rehearsal) load(x, place(cut.states, first));
        carry(x, {cut.maps, first, last - first, first + 1, 1, last, true, true});
    }
};

/* A step for all cut sequences: every gridDim.x-th item of work. */
template <JoinStep step> static __device__ void join(const fkda_fwd_args &args, const fkda_cut &cut)
{
    constexpr int PARTS =
        DIM / FKDA_JOIN_ROWS * (step == COMPOSE ? 2 : 1); /* of rows, to a matrix or to two */
    Join work = {args, cut, *reinterpret_cast<JoinShared *>(block_memory()), 0, 0, 0, 0, true};
    const Cut rules = {args, cut};
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (uint64_t &barrier : work.shared.full) mbarrier_init(&barrier, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    const int count = rules.cut_sequences();
    int before = 0; /* items of the sequences before c */
    for (int c = 0, item = static_cast<int>(blockIdx.x); c < count; c++) {
        const fkda_cut_sequence sequence = rules.cut_sequence(c);
        const int groups = Cut::groups_of(sequence.segments);
        const int items = (step == CHAIN ? 1 : groups) * args.heads * PARTS;
        while (item < before + items) {
            const int within = item - before, block = within % PARTS, group = within / PARTS / args.heads;
            work.head = within / PARTS % args.heads;
            work.row = block % (DIM / FKDA_JOIN_ROWS) * FKDA_JOIN_ROWS;
            if constexpr (step == COMPOSE) work.compose(sequence, group, block >= DIM / FKDA_JOIN_ROWS);
            if constexpr (step == CHAIN) work.chain(sequence, groups);
            if constexpr (step == EXPAND) work.expand(sequence, group);
            if (!work.rehearsal) item += static_cast<int>(gridDim.x);
            if (work.rehearsal) wait_for_kernel_before();
            work.rehearsal = false;
        }
        before += items;
    }
    if (work.rehearsal) wait_for_kernel_before();
}

} // namespace fkda

#endif
