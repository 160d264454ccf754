/*
 * Joins segments: from what the first pass left in the workspace to the states that they start from. With S_i^T the state that
 * segment i of a sequence starts from, as rows of V, M_i its map and B_i what it makes of zeros,
 *
 *     S_(i+1)^T = S_i^T M_i + B_i
 *
 * S_1 is there, the state after the first segment, and B_i is where S_(i+1) goes. Rows are independent: a block carries FKDA_JOIN_ROWS of them through all maps, in fp32. Of many
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

namespace fkda
{

enum JoinStep { COMPOSE, CHAIN, EXPAND };

struct JoinShared {
    __align__(16) float map[2][DIM][DIM]; /* the one that is used and the one that comes */
    __align__(16) float rows[2][FKDA_JOIN_ROWS][DIM];
};

struct Join {
    static constexpr int ROWS = FKDA_JOIN_ROWS, HALVES = FKDA_JOIN_THREADS / DIM, OWN = ROWS / HALVES;
    static constexpr int MATRIX = DIM * DIM;
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    JoinShared &shared;
    int head, row; /* of V or, of a map, of K: the first of the block's */

    /* Element (row, 0) of a head's matrix in a slot. */
    __device__ float *place(float *matrices, int slot) const
    {
        return matrices + (static_cast<long long>(slot) * args.heads + head) * MATRIX + row * DIM;
    }

    __device__ void fetch_map(int buffer, int slot, float *maps) const
    {
        const float *from = place(maps, slot) - row * DIM;
        float *to = shared.map[buffer][0];
#pragma unroll 4
        for (int i = 4 * static_cast<int>(threadIdx.x); i < MATRIX; i += 4 * FKDA_JOIN_THREADS)
            copy_async_16(to + i, from + i, true);
        copy_async_commit();
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
        const int column = threadIdx.x % DIM, half = threadIdx.x / DIM;
        float x[OWN];
        if (way.count > 0) fetch_map(0, way.first_map, way.maps);
#pragma unroll
        for (int r = 0; r < OWN; r++) x[r] = from[(half * OWN + r) * DIM + column];
        for (int i = 0; i < way.count; i++) {
            float(*rows)[DIM] = &shared.rows[i % 2][half * OWN];
#pragma unroll
            for (int r = 0; r < OWN; r++) rows[r][column] = x[r];
            float *state = place(cut.states, way.slot(i));
#pragma unroll
            for (int r = 0; r < OWN; r++) x[r] = way.add ? state[(half * OWN + r) * DIM + column] : 0.0f;
            copy_async_wait_all();
            __syncthreads(); /* the map and all rows are there, and the other buffer is no longer read */
            if (i + 1 < way.count) fetch_map((i + 1) % 2, way.first_map + i + 1, way.maps);
            multiply_add(x, rows, shared.map[i % 2], column);
            if (way.keep) {
#pragma unroll
                for (int r = 0; r < OWN; r++) state[(half * OWN + r) * DIM + column] = x[r];
            }
        }
        __syncthreads();
        if (!to) return;
#pragma unroll
        for (int r = 0; r < OWN; r++) to[(half * OWN + r) * DIM + column] = x[r];
    }

    static __device__ void multiply_add(float (&x)[OWN], const float (*rows)[DIM],
                                        const float (&map)[DIM][DIM], int column)
    {
#pragma unroll 4
        for (int k = 0; k < DIM; k += 4) {
            const float m[4] = {map[k][column], map[k + 1][column], map[k + 2][column], map[k + 3][column]};
#pragma unroll
            for (int r = 0; r < OWN; r++) {
                const float4 four = *reinterpret_cast<const float4 *>(&rows[r][k]);
                x[r] = __fmaf_rn(four.x, m[0], x[r]);
                x[r] = __fmaf_rn(four.y, m[1], x[r]);
                x[r] = __fmaf_rn(four.z, m[2], x[r]);
                x[r] = __fmaf_rn(four.w, m[3], x[r]);
            }
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
