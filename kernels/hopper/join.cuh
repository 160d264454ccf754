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
#include "sm90.cuh"

namespace fkda
{

enum JoinStep { COMPOSE, CHAIN, EXPAND };

/* Strides keep a warp's loads of fragments in different banks. */
struct JoinShared {
    __align__(16) float map[2][DIM][DIM + 8]; /* the one that is used and the one that comes */
    /* Before a step, and those that are written for the next. */
    __align__(16) float rows[2][FKDA_JOIN_ROWS][DIM + 4];
};
static_assert(sizeof(JoinShared) <= FKDA_HOPPER_SHARED_BYTES, "what a block can have");

/* Products on the tensor core in tf32: an operand is the sum of what tf32 keeps of it and the rest, and of the four products of
 * such sums three are taken, which leaves 2^-22 of a product out. A warp has 16 columns of the block's rows, two tiles; lane (g, t) =
 * (lane / 4, lane % 4) of that rows g and g + 8 and columns 2 t and 2 t + 1 of both tiles. The code is kept small: each
 * launch has to fetch it. */
struct Join {
    static constexpr int WARP_COLUMNS = DIM / (FKDA_JOIN_THREADS / 32);
    static constexpr int MATRIX = DIM * DIM;
    static_assert(FKDA_JOIN_ROWS == 16 && WARP_COLUMNS == 16, "a tile's rows, and two tiles' columns");
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    JoinShared &shared;
    int head, row; /* of V or, of a map, of K: the first of the block's */

    /* Element (row, 0) of a head's matrix in a slot. */
    __device__ float *place(float *matrices, int slot) const
    {
        return matrices + (static_cast<long long>(slot) * args.heads + head) * MATRIX + row * DIM;
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

    __device__ void fetch_map(int buffer, const float *from) const
    {
#pragma unroll 4
        for (int i = 4 * static_cast<int>(threadIdx.x); i < MATRIX; i += 4 * FKDA_JOIN_THREADS)
            copy_async_16(&shared.map[buffer][i / DIM][i % DIM], from + i, true);
        copy_async_commit();
    }

    /* This lane's numbers of a row's tiles, 8 apart, to and from rows of `stride`. */
    static __device__ void store(float *to, int stride, const float (&x)[2][4])
    {
#pragma unroll
        for (int i = 0; i < 4; i++)
            store_two(to + i / 2 * 8 + i % 2 * 8 * stride, x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
    }

    static __device__ void load(float (&x)[2][4], const float *from)
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 two = *reinterpret_cast<const float2 *>(from + i / 2 * 8 + i % 2 * 8 * DIM);
            x[i / 2][i % 2 * 2] = two.x, x[i / 2][i % 2 * 2 + 1] = two.y;
        }
    }

    /* Rows `from` through the maps; the last sum is written to `to`, unless null. */
    __device__ void carry(const float *from, const Way &way, float *to) const
    {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        const int column = (threadIdx.x >> 5) * WARP_COLUMNS, at = g * DIM + column + 2 * t;
        const float *map = place(way.maps, way.first_map) - row * DIM;
        float x[2][4];
        __syncthreads(); /* of another item of work, all is read */
        if (way.count > 0) fetch_map(0, map);
        load(x, from + at);
#pragma unroll 1
        for (int i = 0; i < way.count; i++) {
            float(*rows)[DIM + 4] = shared.rows[i % 2];
            float *state = place(cut.states, way.slot(i));
            store(&rows[g][column + 2 * t], DIM + 4, x);
            if (way.add)
                load(x, state + at);
            else
                x[0][0] = x[0][1] = x[0][2] = x[0][3] = x[1][0] = x[1][1] = x[1][2] = x[1][3] = 0.0f;
            copy_async_wait_all();
            __syncthreads(); /* the map and all rows are there, and the other buffers are no longer read */
            map += static_cast<long long>(args.heads) * MATRIX;
            if (i + 1 < way.count) fetch_map((i + 1) % 2, map);
            multiply_add(x, rows, shared.map[i % 2], column, g, t);
            if (way.keep) store(state + at, DIM, x);
        }
        if (to) store(to + at, DIM, x);
    }

    /* x to the nearest that tf32 has, but for bits that the tensor core does not read. */
    static __device__ float rounded(float x)
    {
        return __uint_as_float(__float_as_uint(x) + 0x1000u);
    }

    static __device__ float rest(float x, float nearest)
    {
        return rounded(x - __uint_as_float(__float_as_uint(nearest) & 0xffffe000u));
    }

    static __device__ void multiply_add(float (&x)[2][4], const float (*rows)[DIM + 4],
                                        const float (*map)[DIM + 8], int column, int g, int t)
    {
        float sums[2][4] = {}, rests[2][4] = {}; /* by tile */
#pragma unroll 2
        for (int k = t; k < DIM; k += 8) {
            const float own[4] = {rows[g][k], rows[g + 8][k], rows[g][k + 4], rows[g + 8][k + 4]};
            float a[4], a_rest[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = rounded(own[i]), a_rest[i] = rest(own[i], a[i]);
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const float m[2] = {map[k][column + 8 * tile + g], map[k + 4][column + 8 * tile + g]};
                const float b[2] = {rounded(m[0]), rounded(m[1])};
                mma_tf32(rests[tile], a_rest[0], a_rest[1], a_rest[2], a_rest[3], b[0], b[1]);
                mma_tf32(sums[tile], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_tf32(rests[tile], a[0], a[1], a[2], a[3], rest(m[0], b[0]), rest(m[1], b[1]));
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) x[i / 4][i % 4] += sums[i / 4][i % 4] + rests[i / 4][i % 4];
    }

    /* The maps of a group, from the first to the last. */
    __device__ void find_group(const fkda_cut_sequence &c, int group, int &first, int &last) const
    {
        first = c.first_slot + 1 + group * FKDA_GROUP_MAPS;
        last = min(first + FKDA_GROUP_MAPS, c.first_slot + c.segments - 1) - 1;
    }

    /* A group's maps one after the other, from rows of the first map; and its states, from those after the first map. */
    __device__ void compose(const fkda_cut_sequence &c, int group, bool state) const
    {
        int first, last;
        find_group(c, group, first, last);
        const Way way = {cut.maps, first + 1, last - first, first + 2, 1, last + 1, state, false};
        if (state)
            carry(place(cut.states, first + 1), way, place(cut.states, last + 1));
        else
            carry(place(cut.maps, first), way, place(cut.composed, c.first_group + group));
    }

    /* From state to state of all segments, or where the maps are many of all groups. */
    __device__ void chain(const fkda_cut_sequence &c, int groups) const
    {
        const int maps = c.segments - 2, last = c.first_slot + c.segments - 1;
        const float *from = place(cut.states, c.first_slot + 1);
        if (groups)
            carry(from,
                  {cut.composed, c.first_group, groups, c.first_slot + 1 + FKDA_GROUP_MAPS, FKDA_GROUP_MAPS,
                   last, true, true},
                  nullptr);
        else
            carry(from, {cut.maps, c.first_slot + 1, maps, c.first_slot + 2, 1, last, true, true}, nullptr);
    }

    /* Through a group, up to the segment whose state is there already. */
    __device__ void expand(const fkda_cut_sequence &c, int group) const
    {
        int first, last;
        find_group(c, group, first, last);
        carry(place(cut.states, first), {cut.maps, first, last - first, first + 1, 1, last, true, true},
              nullptr);
    }
};

/* A step for all cut sequences: every gridDim.x-th item of work. */
template <JoinStep step> static __device__ void join(const fkda_fwd_args &args, const fkda_cut &cut)
{
    constexpr int PARTS =
        DIM / FKDA_JOIN_ROWS * (step == COMPOSE ? 2 : 1); /* of rows, to a matrix or to two */
    Join work = {args, cut, *reinterpret_cast<JoinShared *>(block_memory()), 0, 0};
    const Cut rules = {args, cut};
    const int count = rules.cut_sequences();
    int before = 0; /* items of the sequences before c */
    for (int c = 0, item = static_cast<int>(blockIdx.x); c < count; c++) {
        const fkda_cut_sequence sequence = rules.cut_sequence(c);
        const int groups = Cut::groups_of(sequence.segments);
        const int items = (step == CHAIN ? 1 : groups) * args.heads * PARTS;
        for (; item < before + items; item += static_cast<int>(gridDim.x)) {
            const int within = item - before, block = within % PARTS, group = within / PARTS / args.heads;
            work.head = within / PARTS % args.heads;
            work.row = block % (DIM / FKDA_JOIN_ROWS) * FKDA_JOIN_ROWS;
            if constexpr (step == COMPOSE) work.compose(sequence, group, block >= DIM / FKDA_JOIN_ROWS);
            if constexpr (step == CHAIN) work.chain(sequence, groups);
            if constexpr (step == EXPAND) work.expand(sequence, group);
        }
        before += items;
    }
}

} // namespace fkda

#endif
