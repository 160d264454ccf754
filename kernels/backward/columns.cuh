/*
 * The gradient with respect to a state as [K, V]: each warp has 16 channels of K. The products that are sums
 * over V need K as rows, and the accumulators of rows.cuh have V. Carrying the gradient once more takes two
 * products for each chunk, and spares states and gradients a way through shared memory.
 */
#ifndef FKDA_BACKWARD_COLUMNS_CUH
#define FKDA_BACKWARD_COLUMNS_CUH

#include "rows.cuh"

namespace fkda
{

/*
 * The gradient. The warp's channels of q_read, k_read and k_rest, which only this warp still needs, become
 * the gradients with respect to them, without the factors exp(G) and exp(G_last - G).
 */
struct Columns {
    /* x[j]: channels g, g, g + 8, g + 8 of the warp and rows 8 j + 2 t, + 1, + 0, + 1 of V */
    float x[DIM / 8][4];

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) x[i / 4][i % 4] = 0.0f;
    }

    __device__ __forceinline__ void load(StateMemory from, int first_channel, int g, int t)
    {
        from.at += (first_channel + g) * from.channel_step + 2 * t * from.row_step;
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) {
            forget(from.at);
#pragma unroll
            for (int r = 0; r < 4; r++) x[j][r] = from.load(r / 2 * 8, 8 * j + r % 2);
        }
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
    static __device__ __forceinline__ float2 two_of_dout(const Raw &raw, int token, int row)
    {
        const uint32_t pair =
            *reinterpret_cast<const uint32_t *>(&raw.values[token][value_column(token, row)]);
        return make_float2(bf16_low(pair), bf16_high(pair));
    }

    static __device__ __forceinline__ float one_of_dout(const Raw &raw, int token, int row)
    {
        return __uint_as_float(static_cast<uint32_t>(raw.values[token][value_column(token, row)]) << 16);
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

    /* The sums over V with the state [V, K] before the chunk: of queries, of keys, and of S D. */
    __device__ __forceinline__ void read_state(float (&dq)[2][4], float (&dk)[2][4], float (&kept)[2],
                                               const float *state, const Shared &s, const Raw &raw,
                                               int first_channel, int lane) const
    {
        state += lane % 4 * 2 * DIM + first_channel + lane / 4;
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) {
            forget(lane); /* addresses are made anew for each tile, for lack of registers */
            const unsigned id = static_cast<unsigned>(lane);
            const int g = id / 4, row = 8 * j + 2 * (id % 4);
            float before[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                before[r] = state[(8 * j + r % 2) * DIM + r / 2 * 8];
                kept[r / 2] = __fmaf_rn(before[r], x[j][r], kept[r / 2]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                multiply(dq[i], before, two_of_dout(raw, 8 * i + g, row));
                multiply(dk[i], before, s.dr.two(8 * i + g, row));
            }
        }
    }

    /* The sums over V with this gradient, which becomes that with respect to the state before the chunk. */
    __device__ __forceinline__ void step_back(float (&dk_rest)[2][4], const float (&q)[2][4],
                                              const float (&minus_k)[2][4], const Shared &s, const Raw &raw,
                                              int first_channel, int lane)
    {
        float factor[2], more[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            factor[r] = s.factor[first_channel + lane / 4 + 8 * r];
            more[r] = s.more[first_channel + lane / 4 + 8 * r];
        }
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) {
            forget(lane);
            const unsigned id = static_cast<unsigned>(lane);
            const int g = id / 4, t = id % 4, row = 8 * j + g;
#pragma unroll
            for (int i = 0; i < 2; i++) multiply(dk_rest[i], x[j], s.u.two(8 * i + g, 8 * j + 2 * t));
#pragma unroll
            for (int r = 0; r < 4; r++) x[j][r] = __fmaf_rn(x[j][r], more[r / 2], x[j][r] * factor[r / 2]);
#pragma unroll
            for (int i = 0; i < 2; i++)
                mma_tf32(x[j], q[i][0], q[i][1], q[i][2], q[i][3], one_of_dout(raw, 8 * i + t, row),
                         one_of_dout(raw, 8 * i + t + 4, row));
#pragma unroll
            for (int i = 0; i < 2; i++)
                mma_tf32(x[j], minus_k[i][0], minus_k[i][1], minus_k[i][2], minus_k[i][3],
                         s.dr.at(8 * i + t, row), s.dr.at(8 * i + t + 4, row));
        }
    }

    /* Goes back over a chunk with the state [V, K] before it. */
    __device__ __forceinline__ void go_back(const float *state, Shared &s, const Raw &raw, float scale,
                                            int first_channel, int lane)
    {
        float q[2][4], minus_k[2][4];
        const int g = lane / 4, t = lane % 4;
        {
            float dq[2][4] = {}, dk[2][4] = {}, kept[2] = {};
            read_state(dq, dk, kept, state, s, raw, first_channel, lane);
            load_operand<false>(q, s.q_read, first_channel, g, t);
            load_operand<true>(minus_k, s.k_read, first_channel, g, t);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 8; i++) dq[i / 4][i % 4] *= scale, dk[i / 4][i % 4] *= -1.0f;
            store_columns<false>(s.q_read, dq, first_channel, g, t);
            store_columns<false>(s.k_read, dk, first_channel, g, t);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                kept[r] += __shfl_xor_sync(~0u, kept[r], 1);
                kept[r] += __shfl_xor_sync(~0u, kept[r], 2);
                if (t == 0) s.kept[first_channel + g + 8 * r] = kept[r];
            }
        }
        float dk_rest[2][4] = {};
        step_back(dk_rest, q, minus_k, s, raw, first_channel, lane);
        store_columns<false>(s.k_rest, dk_rest, first_channel, g, t);
    }
};

/* The products over V between tokens, dO U^T and dR U^T, over 64 rows of V: one matrix and eight columns of
 * it for each warp. */
__device__ __forceinline__ void multiply_by_writes(Shared &s, const Raw &raw, int warp, int lane)
{
    const int g = lane / 4, t = lane % 4, which = warp % 2, column = warp / 2 % 2 * 8, part = warp / 4;
    float sum[4] = {};
#pragma unroll
    for (int j = 0; j < DIM / 16; j++) {
        const int row = DIM / 2 * part + 8 * j + 2 * t;
        const float2 top = which ? s.dr.two(g, row) : Columns::two_of_dout(raw, g, row),
                     bottom = which ? s.dr.two(g + 8, row) : Columns::two_of_dout(raw, g + 8, row),
                     b = s.u.two(column + g, row);
        mma_tf32(sum, top.x, bottom.x, top.y, bottom.y, b.x, b.y);
    }
    store_two(&s.products[part][which][g][column + 2 * t], sum[0], sum[1]);
    store_two(&s.products[part][which][g + 8][column + 2 * t], sum[2], sum[3]);
}

} // namespace fkda

#endif
