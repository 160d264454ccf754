/*
 * The sums over V of a chunk, by the row warps: gradients of Q~, K~ and Kr for 16 channels of K in each warp,
 * the sum of S D for each of these channels, and dO U^T and dR U^T between tokens.
 *
 * The sum of S D over V is the diagonal of a product of 16 x 16 channels: an A operand of 16 channels is a B
 * operand of two tiles of eight channels, too, so the diagonal costs no loads and no arithmetic in fp32.
 */
#ifndef FKDA_HOPPER_BWD_SUMS_CUH
#define FKDA_HOPPER_BWD_SUMS_CUH

#include "shared.cuh"

namespace fkda
{

/* Where a thread of the row warps is. The index is read again at each call, so that no register keeps it from
 * one step of a chunk to the next. */
struct RowPlace {
    int warp, lane, g, t;
    int first; /* row of V, or channel of K, of the warp */
};

__device__ __forceinline__ RowPlace row_place()
{
    int cta, id;
    read_indices(cta, id);
    const unsigned thread = static_cast<unsigned>(id - TEAM_THREADS), lane = thread % 32;
    return {static_cast<int>(thread / 32), static_cast<int>(lane), static_cast<int>(lane / 4),
            static_cast<int>(lane % 4), static_cast<int>(thread / 32 * 16)};
}

__device__ __forceinline__ void multiply_by(float (&x)[2][4], float factor)
{
#pragma unroll
    for (int i = 0; i < 8; i++) x[i / 4][i % 4] *= factor;
}

/* What the operands of the sums are divided by. */
struct SumUnits {
    float state, gradient, dout, dr, writes; /* dout: times the call's scale */
};

/* With the state before the chunk: dQ~ = dO S^T, dK~ = -dR S^T. */
__device__ __forceinline__ void sum_with_state(HopperShared &s, float unit_of_q, float unit_of_k)
{
    float dq[2][4] = {}, dk[2][4] = {};
    const RowPlace p = row_place();
#pragma unroll
    for (int v = 0; v < DIM / 16; v++) {
        uint32_t a[4], b[4];
        s.images[0].load_rows_transposed(a, 16 * v, p.first, p.lane);
        s.operands.dout.load_columns(b, 0, 16 * v, p.lane);
        multiply(dq, a, b);
        s.operands.minus_dr.load_columns(b, 0, 16 * v, p.lane);
        multiply(dk, a, b);
    }
    multiply_by(dq, unit_of_q);
    multiply_by(dk, unit_of_k);
    store_columns<false>(s.results.q_read, dq, p.first, p.g, p.t);
    store_columns<false>(s.results.k_read, dk, p.first, p.g, p.t);
}

/* With the gradient after the chunk: dKr = U D^T, and the sum of S D. */
__device__ __forceinline__ void sum_with_gradient(HopperShared &s, float unit, float unit_of_both)
{
    float dk_rest[2][4] = {}, both[2][4] = {};
    const RowPlace p = row_place();
#pragma unroll
    for (int v = 0; v < DIM / 16; v++) {
        uint32_t state[4], a[4], b[4];
        s.images[1].load_rows_transposed(a, 16 * v, p.first, p.lane);
        s.operands.u.load_columns(b, 0, 16 * v, p.lane);
        multiply(dk_rest, a, b);
        s.images[0].load_rows_transposed(state, 16 * v, p.first, p.lane);
        multiply(both[0], state, a[0], a[2]);
        multiply(both[1], state, a[1], a[3]);
    }
    multiply_by(dk_rest, unit);
    store_columns<false>(s.results.k_rest, dk_rest, p.first, p.g, p.t);
    if (p.t != p.g / 2) return;
    s.results.kept[p.first + p.g] = (p.g % 2 ? both[0][1] : both[0][0]) * unit_of_both;
    s.results.kept[p.first + p.g + 8] = (p.g % 2 ? both[1][3] : both[1][2]) * unit_of_both;
}

/* dP and dL: one matrix and eight of its columns in each of four warps. */
__device__ __forceinline__ void sum_between_tokens(HopperShared &s, float unit_of_p, float unit_of_l)
{
    const RowPlace p = row_place();
    if (p.warp >= 4) return;
    const int which = p.warp % 2, column = p.warp / 2 * 8;
    const TokenTile &tile = which ? s.operands.minus_dr : s.operands.dout;
    float sum[4] = {};
#pragma unroll
    for (int v = 0; v < DIM / 16; v++) {
        uint32_t a[4], b[4];
        tile.load_rows(a, 0, 16 * v, p.lane);
        s.operands.u.load_columns(b, 0, 16 * v, p.lane);
        multiply(sum, a, column ? b[2] : b[0], column ? b[3] : b[1]);
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        float2 &pair = s.results.pairs[p.g + r / 2 * 8][column + 2 * p.t + r % 2];
        (which ? pair.y : pair.x) = sum[r] * (which ? unit_of_l : unit_of_p);
    }
}

__device__ __forceinline__ void sum_over_rows(HopperShared &s, SumUnits units)
{
    sum_with_state(s, units.state * units.dout, units.state * units.dr);
    sum_with_gradient(s, units.writes * units.gradient, units.state * units.gradient);
    sum_between_tokens(s, units.dout * units.writes, units.dr * units.writes);
}

} // namespace fkda

#endif
