/*
 * Joins segments: from what the first pass left in the workspace to the states that they start from. With S_i^T the state that
 * segment i of a sequence starts from, as rows of V, M_i its map and B_i what it makes of zeros,
 *
 *     S_(i+1)^T = S_i^T M_i + B_i
 *
 * S_1 is there, the state after the first segment, and B_i is where S_(i+1) goes. Rows are independent: a block carries FKDA_JOIN_ROWS of them through all maps, to fp32's precision. Of many
 * maps, groups are composed first, in parallel, to one map and one state each; then states are carried from group to group, then
 * through each group, in parallel again.
 */
#ifndef FKDA_HOPPER_JOIN_CUH
#define FKDA_HOPPER_JOIN_CUH

#include "../common/elements.cuh"
#include "../common/task.cuh"
#include "fwd_args.h"
#include "fwd_shape.h"
#include "plan.cuh"
#include "sm90.cuh"

namespace fkda
{

enum JoinStep { COMPOSE, CHAIN, EXPAND };

/* A block's rows before a step, with the ones that are written for the next. The stride keeps a warp's loads apart. */
struct JoinShared {
    __align__(16) float rows[2][FKDA_JOIN_ROWS][DIM + 4];
};

/* Products on the tensor core in tf32: an operand is the sum of what tf32 keeps of it and the rest, and of the four products of
 * such sums three are taken, which leaves 2^-22 of a product out. A warp has 16 columns of the block's rows; lane (g, t) =
 * (lane / 4, lane % 4) of that rows g and g + 8 of four neighbouring columns, two each of both tiles of accumulators. */
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

    /* Rows `from` through the maps; the last sum is written to `to`, unless null. */
    __device__ void carry(const float *from, const Way &way, float *to) const
    {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        const int column = (threadIdx.x >> 5) * WARP_COLUMNS, at = g * DIM + column + 4 * t;
        const long long map_step = static_cast<long long>(args.heads) * MATRIX;
        /* Of the map, rows 8 s + t and 8 s + t + 4 and columns 2 g and 2 g + 1 of the warp's: one for each tile. */
        const float *map = place(way.maps, way.first_map) - row * DIM + t * DIM + column + 2 * g;
        float2 factors[DIM / 8][2];
        float4 x[2];
        __syncthreads(); /* of another item of work, all is read */
        for (int s = 0; s < DIM / 8 && way.count > 0; s++) load_factors(factors[s], map, s);
#pragma unroll
        for (int r = 0; r < 2; r++) x[r] = *reinterpret_cast<const float4 *>(&from[at + 8 * r * DIM]);
        for (int i = 0; i < way.count; i++) {
            float(*rows)[DIM + 4] = shared.rows[i % 2];
            float *state = place(cut.states, way.slot(i));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                *reinterpret_cast<float4 *>(&rows[g + 8 * r][column + 4 * t]) = x[r];
                x[r] = way.add ? *reinterpret_cast<const float4 *>(&state[at + 8 * r * DIM])
                               : make_float4(0, 0, 0, 0);
            }
            map += map_step;
            __syncthreads(); /* all rows are there, and those of the step before are no longer read */
            multiply_add(x, rows, factors, i + 1 < way.count ? map : nullptr, g, t);
#pragma unroll
            for (int r = 0; r < 2 && way.keep; r++) *reinterpret_cast<float4 *>(&state[at + 8 * r * DIM]) = x[r];
        }
#pragma unroll
        for (int r = 0; r < 2 && to; r++) *reinterpret_cast<float4 *>(&to[at + 8 * r * DIM]) = x[r];
    }

    static __device__ void load_factors(float2 (&factors)[2], const float *map, int s)
    {
#pragma unroll
        for (int e = 0; e < 2; e++) factors[e] = *reinterpret_cast<const float2 *>(&map[(8 * s + 4 * e) * DIM]);
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

    /* Leaves the next map's factors, if there is one, in the place of this one's. */
    static __device__ void multiply_add(float4 (&x)[2], const float (*rows)[DIM + 4], float2 (&factors)[DIM / 8][2],
                                        const float *next, int g, int t)
    {
        float sums[2][4] = {}, rests[2][4] = {}; /* by tile */
#pragma unroll
        for (int s = 0; s < DIM / 8; s++) {
            const float own[4] = {rows[g][8 * s + t], rows[g + 8][8 * s + t], rows[g][8 * s + t + 4],
                                  rows[g + 8][8 * s + t + 4]};
            const float map[2][2] = {{factors[s][0].x, factors[s][1].x}, {factors[s][0].y, factors[s][1].y}};
            float a[4], a_rest[4];
            if (next) load_factors(factors[s], next, s);
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = rounded(own[i]), a_rest[i] = rest(own[i], a[i]);
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const float b[2] = {rounded(map[tile][0]), rounded(map[tile][1])};
                mma_tf32(rests[tile], a_rest[0], a_rest[1], a_rest[2], a_rest[3], b[0], b[1]);
                mma_tf32(sums[tile], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_tf32(rests[tile], a[0], a[1], a[2], a[3], rest(map[tile][0], b[0]), rest(map[tile][1], b[1]));
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            x[r].x += sums[0][2 * r] + rests[0][2 * r];
            x[r].y += sums[1][2 * r] + rests[1][2 * r];
            x[r].z += sums[0][2 * r + 1] + rests[0][2 * r + 1];
            x[r].w += sums[1][2 * r + 1] + rests[1][2 * r + 1];
        }
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
    constexpr int BLOCKS =
        DIM / FKDA_JOIN_ROWS * (step == COMPOSE ? 2 : 1); /* of rows, to a matrix or to two */
    Join work = {args, cut, *reinterpret_cast<JoinShared *>(block_memory()), 0, 0};
    const int count = cut.counts->cut_sequences;
    int before = 0; /* items of the sequences before c */
    for (int c = 0, item = static_cast<int>(blockIdx.x); c < count; c++) {
        const fkda_cut_sequence sequence = cut.cut_sequences[c];
        const int groups = Plan::groups_of(sequence.segments);
        const int items = (step == CHAIN ? 1 : groups) * args.heads * BLOCKS;
        for (; item < before + items; item += static_cast<int>(gridDim.x)) {
            const int within = item - before, block = within % BLOCKS, group = within / BLOCKS / args.heads;
            work.head = within / BLOCKS % args.heads;
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
