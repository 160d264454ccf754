/*
 * The third step of a chunk: sums over V.
 *
 *     dQ~ = dO S^T      dK~ = - dR S^T      dKr = U D^T      kept = the sum over V of S D
 *     dO U^T and - dR U^T between tokens, below the diagonal
 *
 * A warp has 16 channels of K as rows, and all tokens as columns.
 */
#ifndef FKDA_HOPPER_CHUNKS_SUMS_CUH
#define FKDA_HOPPER_CHUNKS_SUMS_CUH

#include "values.cuh"

namespace fkda
{

/* Sums over V of a warp's channels: rows are channels g, g, g + 8, g + 8. */
struct ChannelSums {
    float q[CHUNK_TOKENS / 8][4], k[CHUNK_TOKENS / 8][4], k_rest[CHUNK_TOKENS / 8][4];
    float kept[2]; /* of channels g and g + 8 */
};

template <class Block> struct ChunkSums {
    Shared<Block> &s;
    int warp, lane, g, t;
    float scale;                     /* the call's, which dO lacks */
    float state_unit, gradient_unit; /* of the images */
    float pair_unit;                 /* what all results are divided by */

    __device__ ChunkSums(Shared<Block> &shared, float scale_of_call, float2 units)
        : s(shared), scale(scale_of_call), state_unit(units.x), gradient_unit(units.y)
    {
        const ThreadPlace p = thread_place();
        warp = p.warp, lane = p.lane, g = p.g, t = p.t;
        /* Sums of products of operands are below 2^35. Divided by this they are below 2^55. */
        float u = 0.0f, most = 0.0f;
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++)
            u = fmaxf(u, s.unit[OF_U][i]),
            most = fmaxf(most, fmaxf(s.unit[OF_DR][i], fabsf(s.unit[OF_DOUT][i] * scale)));
        pair_unit = fmaxf(fmaxf(most * u, 0x1p-20f * state_unit * fmaxf(most, gradient_unit)),
                          fmaxf(0x1p-20f * gradient_unit * u, 0x1p-120f));
        if (warp == 0 && lane == 0) s.pair_unit = pair_unit;
    }

    /* The operand [tokens, V] in half of the rows of V. */
    __device__ const unsigned char *u(int half) const
    {
        return s.tokens[0].v[half];
    }
    __device__ const unsigned char *minus_dr(int half) const
    {
        return s.tokens[0].half[half].tile[Q];
    }
    __device__ const unsigned char *dout(int half) const
    {
        return s.dout[half];
    }

    static constexpr int STEPS = 2; /* of 16 rows of V, whose products are in flight at the same time */

    /* The warp's 16 channels of rows 16 d to 16 d + 15 of V, as an A operand whose rows are channels. The
     * image's rows are brought to one scale. */
    __device__ void load_rows(uint32_t (&a)[4], const ImageRows &image, int which, int d) const
    {
        load_matrices_transposed(a, shared_address(image.bytes) + (image_columns(0, lane) ^ 32 * warp) +
                                        16 * d * ImageRows::ROW_BYTES);
        const uint2 factor = *reinterpret_cast<const uint2 *>(s.row_factors(which) + 16 * d + 4 * t);
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = multiply_halves(a[i], i / 2 ? factor.y : factor.x);
    }

    __device__ void sum_channels(ChannelSums &to) const
    {
        float both[2][4] = {};
        uint32_t a[IMAGES][STEPS][4];
#pragma unroll
        for (int i = 0; i < DIM / 16 / STEPS; i++) {
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                load_rows(a[STATE][j], s.state, STATE, STEPS * i + j);
                load_rows(a[GRADIENT][j], s.gradient, GRADIENT, STEPS * i + j);
                /* The sum of S D is the diagonal of a product of channels with channels. */
                const uint32_t(&x)[4] = a[STATE][j], (&y)[4] = a[GRADIENT][j];
                mma_half(both[0], x[0], x[1], x[2], x[3], y[0], y[2]);
                mma_half(both[1], x[0], x[1], x[2], x[3], y[1], y[3]);
            }
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                const int d = STEPS * i + j;
                const uint64_t of_dout = token_operand(dout(d / 4), d),
                               of_dr = token_operand(minus_dr(d / 4), d), of_u = token_operand(u(d / 4), d);
                if (d == 0) {
                    wgmma<false, false>(to.q, a[STATE][j], of_dout);
                    wgmma<false, false>(to.k, a[STATE][j], of_dr);
                    wgmma<false, false>(to.k_rest, a[GRADIENT][j], of_u);
                } else {
                    wgmma<true, false>(to.q, a[STATE][j], of_dout);
                    wgmma<true, false>(to.k, a[STATE][j], of_dr);
                    wgmma<true, false>(to.k_rest, a[GRADIENT][j], of_u);
                }
            }
            wgmma_commit();
            wgmma_wait<0>(); /* the other warps of the SM work meanwhile */
        }
        const float state = state_unit / pair_unit, gradient = gradient_unit / pair_unit;
        multiply_by_units(to.q, state * scale, OF_DOUT);
        multiply_by_units(to.k, state, OF_DR);
        multiply_by_units(to.k_rest, gradient, OF_U);
        /* Channel g of the diagonal is in lane t = g / 2. */
        const float top = g % 2 ? both[0][1] : both[0][0], low = g % 2 ? both[1][3] : both[1][2];
        to.kept[0] = __shfl_sync(~0u, top, 4 * g + g / 2) * (state * gradient_unit);
        to.kept[1] = __shfl_sync(~0u, low, 4 * g + g / 2) * (state * gradient_unit);
    }

    __device__ void multiply_by_units(float (&x)[TOKEN_TILES][4], float factor, int which) const
    {
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
            const float all = s.unit[which][i] * factor;
#pragma unroll
            for (int r = 0; r < 4; r++) x[i][r] *= all;
        }
    }

    /* 16 rows of a product between tokens in each warp of the first warpgroup. */
    __device__ void sum_between_tokens() const
    {
        constexpr int DEPTHS = DIM / 16;
        if (warp >= 4) return;
        const int which = warp / 2, rows = warp % 2;
        float sum[TOKEN_TILES][4];
        uint32_t a[DEPTHS][4];
#pragma unroll
        for (int d = 0; d < DEPTHS; d++) {
            const unsigned char *const x = which ? minus_dr(d / 4) : dout(d / 4);
            load_matrices(a[d], shared_address(x) + (matrix_row(lane) ^ d % 4 * 32) + rows * SUBCHUNK_BYTES);
        }
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < DEPTHS; d++) {
            const uint64_t of_u = token_operand(u(d / 4), d);
            if (d == 0)
                wgmma<false, false>(sum, a[d], of_u);
            else
                wgmma<true, false>(sum, a[d], of_u);
        }
        wgmma_commit();
        wgmma_wait<0>();
        TokenPairs &to = which ? s.keys_with_writes() : s.queries_with_writes();
        const float inverse = (which ? 1.0f : scale) / pair_unit;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float unit = s.unit[which ? OF_DR : OF_DOUT][2 * rows + r] * inverse;
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
                const int i = 16 * rows + g + 8 * r, j = 8 * n + 2 * t;
                if (n >= 2 && rows == 0) continue;
                const float factor = s.unit[OF_U][n] * unit;
                const float x = sum[n][2 * r] * factor, y = sum[n][2 * r + 1] * factor;
                to.at(i, j) = j < i ? x : 0.0f, to.at(i, j + 1) = j + 1 < i ? y : 0.0f;
                if (which == 0 && j == i) s.on_diagonal[i] = x;
                if (which == 0 && j + 1 == i) s.on_diagonal[i] = y;
            }
        }
    }
};

} // namespace fkda

#endif
