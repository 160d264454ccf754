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
    static constexpr int BUFFERS = 3;
    __align__(1024) MapImage map[BUFFERS]; /* on their way, whole ones */
    uint64_t full[BUFFERS];
};
static_assert(sizeof(JoinShared) <= FKDA_HOPPER_SHARED_BYTES, "what a block can have");

/* Rows are carried in accumulators of wgmma, which serve as its operands too: a warp has 16 of the block's 64 rows, lane (g, t) =
 * (lane / 4, lane % 4) rows g and g + 8, of which it has the channels of maps' images (map.cuh). Products in fp16: rows are divided by a
 * power of two above them, and a number is the sum of what fp16 keeps of it and of the rest; of the four products of such
 * sums three are taken, which leaves 2^-22 of a product out. */
struct Join {
    static constexpr int BUFFERS = JoinShared::BUFFERS;
    static constexpr int MATRIX = DIM * DIM;
    static_assert(FKDA_JOIN_ROWS == 64 && FKDA_JOIN_THREADS == 128, "a warpgroup's");
    using Rows = float[DIM / 8][4]; /* tiles of eight places in an image */
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    JoinShared &shared;
    int head, row;        /* of V or, of a map, a place in its image: the first of the block's */
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

    /* This lane's first row. */
    __device__ int lane_row() const
    {
        return row + (static_cast<int>(threadIdx.x) >> 5 << 4) + (static_cast<int>(threadIdx.x) >> 2 & 7);
    }
    static __device__ int lane_column()
    {
        return static_cast<int>(threadIdx.x) & 3;
    }

    /* To and from a matrix in fp32, and rows of a map. */
    __device__ void store(float *matrix, const Rows &x) const
    {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < DIM / 32; j++) {
                float *to = matrix + (lane_row() + 8 * r) * DIM + 32 * j + 8 * lane_column();
#pragma unroll
                for (int i = 0; i < 4; i += 2)
                    store_four(to + 2 * i, x[4 * j + i][2 * r], x[4 * j + i][2 * r + 1],
                               x[4 * j + i + 1][2 * r], x[4 * j + i + 1][2 * r + 1]);
            }
    }

    __device__ void load(Rows &x, const float *matrix) const
    {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < DIM / 32; j++) {
                const float *from = matrix + (lane_row() + 8 * r) * DIM + 32 * j + 8 * lane_column();
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const float4 four = *reinterpret_cast<const float4 *>(from + 2 * i);
                    x[4 * j + i][2 * r] = four.x, x[4 * j + i][2 * r + 1] = four.y;
                    x[4 * j + i + 1][2 * r] = four.z, x[4 * j + i + 1][2 * r + 1] = four.w;
                }
            }
    }

    __device__ void store_map(float *matrix, const Rows &x) const
    {
        MapImage &map = *reinterpret_cast<MapImage *>(matrix);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int s = 0; s < DIM / 8; s++) {
                const int at = lane_row() + 8 * r, column = 8 * s + 2 * lane_column();
                MapImage::split(*MapImage::pair(map.high, at, column), *MapImage::pair(map.low, at, column),
                                x[s][2 * r], x[s][2 * r + 1]);
            }
    }

    __device__ void load_map(Rows &x, float *matrix) const
    {
        MapImage &map = *reinterpret_cast<MapImage *>(matrix);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int s = 0; s < DIM / 8; s++) {
                const int at = lane_row() + 8 * r, column = 8 * s + 2 * lane_column();
                const uint32_t high = *MapImage::pair(map.high, at, column),
                               low = *MapImage::pair(map.low, at, column);
                x[s][2 * r] = half_low(high) + half_low(low);
                x[s][2 * r + 1] = half_high(high) + half_high(low);
            }
    }

    /* Rows x through the maps; without `add` they are of a map themselves. A rehearsal goes one step, with whatever is there, and leaves all
     * but x as it is. */
    __device__ void carry(Rows &x, const Way &way)
    {
        const float *map = place(way.maps, way.first_map);
        const long long next_map = static_cast<long long>(args.heads) * MATRIX;
        const int count = rehearsal ? 1 : way.count;
        __syncthreads(); /* of another item of work, all is read */
        if (!rehearsal)
            for (int i = 0; i < min(count, BUFFERS); i++) ask_for(map + i * next_map);
        map += BUFFERS * next_map;
#pragma unroll 1
        for (int i = 0; i < count; i++, map += next_map) {
            float scale[2];
            uint32_t high[DIM / 16][4], low[DIM / 16][4];
            make_operands(x, scale, high, low);
            const int buffer = static_cast<int>(used % BUFFERS);
            if (!rehearsal) {
                mbarrier_wait(&shared.full[buffer], static_cast<int>(used / BUFFERS % 2));
                used++;
            }
            float *state = place(cut.states, way.slot(i));
            if (way.add && !rehearsal) load(x, state); /* on its way meanwhile */
            Rows product;
            multiply(product, high, low, shared.map[buffer]);
            __syncthreads(); /* the map is read */
            if (i + BUFFERS < count) ask_for(map);
#pragma unroll
            for (int s = 0; s < DIM / 8; s++)
#pragma unroll
                for (int n = 0; n < 4; n++)
                    x[s][n] = __fmaf_rn(product[s][n], scale[n / 2], way.add ? x[s][n] : 0.0f);
            if (way.keep && !rehearsal) store(state, x);
        }
    }

    /* The rows divided by their scales, in two parts. */
    static __device__ void make_operands(const Rows &x, float (&scale)[2], uint32_t (&high)[DIM / 16][4],
                                         uint32_t (&low)[DIM / 16][4])
    {
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = 0.0f;
#pragma unroll
            for (int s = 0; s < DIM / 8; s++)
                most = fmaxf(most, fmaxf(fabsf(x[s][2 * r]), fabsf(x[s][2 * r + 1])));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fminf(fmaxf(most, __shfl_xor_sync(~0u, most, 2)), 0x1p126f);
            scale[r] = fmaxf(__uint_as_float((__float_as_uint(most) & 0x7f800000u) + 0x00800000u), 0x1p-100f);
            factor[r] = inverse_power(scale[r]);
        }
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int i = s % 2 * 2 + r;
                MapImage::split(high[s / 2][i], low[s / 2][i], x[s][2 * r] * factor[r],
                                x[s][2 * r + 1] * factor[r]);
            }
    }

    static __device__ void multiply(Rows &product, const uint32_t (&high)[DIM / 16][4],
                                    const uint32_t (&low)[DIM / 16][4], const MapImage &map)
    {
        const uint32_t high_place = descriptor_address(&map.high), low_place = descriptor_address(&map.low);
        wgmma_fence();
        wgmma<false, true>(product, high[0], MapImage::operand(low_place, 0));
#pragma unroll
        for (int i = 1; i < DIM / 16; i++)
            wgmma<true, true>(product, high[i], MapImage::operand(low_place, i));
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) {
            wgmma<true, true>(product, low[i], MapImage::operand(high_place, i));
            wgmma<true, true>(product, high[i], MapImage::operand(high_place, i));
        }
        wgmma_commit();
        wgmma_wait<0>();
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
