/*
 * The gradient with respect to a state as [K, V], in a second copy whose warps have 16 channels of K each, and
 * the products that are sums over V. These need K as rows, and the accumulators of ../backward/rows.cuh have V:
 * carrying the gradient twice takes two products more for each chunk, and spares two states a way through
 * shared memory.
 */
#ifndef FKDA_BACKWARD_COLUMNS_CUH
#define FKDA_BACKWARD_COLUMNS_CUH

#include "rows.cuh"

namespace fkda
{

/* What a warp computes for its 16 channels: gradients with respect to the operands of the state, transposed. */
struct ByChannel {
    float dq[2][4], dk[2][4], dk_rest[2][4]; /* [channels g and g + 8, tokens] */
    float kept[2];                           /* a lane's part of the sums over V of S D */
};

struct Columns {
    /* x[j]: channels g, g, g + 8, g + 8 of the warp and rows 8 j + 2 t, + 1, + 0, + 1 of V */
    float x[DIM / 8][4];

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) x[i / 4][i % 4] = 0.0f;
    }

    __device__ __forceinline__ void load(const StateMemory &from, int first_channel, int g, int t)
    {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++)
            x[i / 4][i % 4] = from.load(first_channel + g + i % 4 / 2 * 8, 8 * (i / 4) + 2 * t + i % 2);
    }

    /* To [K, V] in fp32. */
    __device__ __forceinline__ void store(float *to, int first_channel, int g, int t) const
    {
#pragma unroll
        for (int i = 0; i < DIM / 4; i++)
            store_two(to + (first_channel + g + i % 2 * 8) * DIM + 8 * (i / 2) + 2 * t, x[i / 2][i % 2 * 2],
                      x[i / 2][i % 2 * 2 + 1]);
    }

    /* Two neighbouring rows of dout of a token, the first of which is even. */
    static __device__ __forceinline__ float2 two_of_dout(const Shared &s, int token, int row)
    {
        const uint32_t pair =
            *reinterpret_cast<const uint32_t *>(&s.raw.dout[token][value_column(token, row)]);
        return make_float2(bf16_low(pair), bf16_high(pair));
    }

    static __device__ __forceinline__ float one_of_dout(const Shared &s, int token, int row)
    {
        return __uint_as_float(static_cast<uint32_t>(s.raw.dout[token][value_column(token, row)]) << 16);
    }

    /* The A operand [channels, tokens] of a tile, negated if `minus`. */
    template <bool minus>
    static __device__ __forceinline__ void load_operand(float (&a)[2][4], const Tile &from, int channel,
                                                        int g, int t)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float x = from.at(8 * (i / 4) + t + i % 4 / 2 * 4, channel + g + i % 2 * 8);
            a[i / 4][i % 4] = minus ? -x : x;
        }
    }

    /* Goes back over a chunk with the state [V, K] before it. */
    __device__ __forceinline__ void step_back(ByChannel &by, const float *state, const Shared &s,
                                              int first_channel, int lane)
    {
        const int g = lane / 4, t = lane % 4;
        const float factor[2] = {s.factor[first_channel + g], s.factor[first_channel + g + 8]},
                    more[2] = {s.more[first_channel + g], s.more[first_channel + g + 8]};
        float q[2][4], minus_k[2][4];
        load_operand<false>(q, s.q_read, first_channel, g, t);
        load_operand<true>(minus_k, s.k_read, first_channel, g, t);
        by = {};
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) {
            float before[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                before[r] = state[(8 * j + 2 * t + r % 2) * DIM + first_channel + g + r / 2 * 8];
                by.kept[r / 2] = __fmaf_rn(before[r], x[j][r], by.kept[r / 2]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = 8 * i + g, row = 8 * j + 2 * t;
                multiply(by.dq[i], before, two_of_dout(s, token, row));
                multiply(by.dk[i], before, s.dr.two(token, row));
                multiply(by.dk_rest[i], x[j], s.u.two(token, row));
            }
#pragma unroll
            for (int r = 0; r < 4; r++) x[j][r] = __fmaf_rn(x[j][r], more[r / 2], x[j][r] * factor[r / 2]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = 8 * i + t, row = 8 * j + g;
                mma_tf32(x[j], q[i][0], q[i][1], q[i][2], q[i][3], one_of_dout(s, token, row),
                         one_of_dout(s, token + 4, row));
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = 8 * i + t, row = 8 * j + g;
                mma_tf32(x[j], minus_k[i][0], minus_k[i][1], minus_k[i][2], minus_k[i][3],
                         s.dr.at(token, row), s.dr.at(token + 4, row));
            }
        }
    }
};

/* The products over V between tokens, dO U^T and dR U^T, over 64 rows of V: one matrix and eight columns of it
 * for each warp. */
__device__ __forceinline__ void multiply_by_writes(Shared &s, int warp, int lane)
{
    const int g = lane / 4, t = lane % 4, which = warp % 2, column = warp / 2 % 2 * 8, part = warp / 4;
    float sum[4] = {};
#pragma unroll
    for (int j = 0; j < DIM / 16; j++) {
        const int row = DIM / 2 * part + 8 * j + 2 * t;
        const float2 top = which ? s.dr.two(g, row) : Columns::two_of_dout(s, g, row),
                     bottom = which ? s.dr.two(g + 8, row) : Columns::two_of_dout(s, g + 8, row),
                     b = s.u.two(column + g, row);
        mma_tf32(sum, top.x, bottom.x, top.y, bottom.y, b.x, b.y);
    }
    store_two(&s.products[part][which][g][column + 2 * t], sum[0], sum[1]);
    store_two(&s.products[part][which][g + 8][column + 2 * t], sum[2], sum[3]);
}

/* Stores what a warp has computed, with the signs and factors of the gradients. */
__device__ __forceinline__ void store_by_channel(Shared &s, ByChannel &by, float scale, int first_channel,
                                                 int lane)
{
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) by.dq[i / 4][i % 4] *= scale, by.dk[i / 4][i % 4] *= -1.0f;
    store_columns<false>(s.q_read, by.dq, first_channel, g, t);
    store_columns<false>(s.k_read, by.dk, first_channel, g, t);
    store_columns<false>(s.k_rest, by.dk_rest, first_channel, g, t);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = by.kept[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (t == 0) s.kept[first_channel + g + 8 * r] = sum;
    }
}

} // namespace fkda

#endif
