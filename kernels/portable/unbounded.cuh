/*
 * Chunks whose decay leaves the range of fp32. A gate without a lower bound may leave e^-300 of a channel
 * after one token.
 *
 * Algorithm. L_ij and P_ij hold exp(G_i - G_j), which is at most 1 for j <= i, while the preparation
 * multiplies exp(G_i) by exp(-G_j). Where G_i is below LEAST_SUM in a channel, exp(-G_j) may overflow for
 * tokens j up to i. So from the first such token on, each warp replaces the rows of its products by sums of
 * products with exp(G_i - G_j) itself, on its own 32 channels, in fp32. All other exponents of the chunk
 * form are at most 0 and need nothing but underflow to zero, once exp(G_last - G_j) is computed as one power
 * too.
 *
 * A row takes this way because of its own gates and of those before it, never because of later tokens. So no
 * token changes a bit of the tokens before it. Gates of more than -5 nats a token never take this way.
 */
#ifndef FKDA_PORTABLE_UNBOUNDED_CUH
#define FKDA_PORTABLE_UNBOUNDED_CUH

#include "bad_tokens.cuh"

namespace fkda
{

/* Of G log2(e). 16 tokens at -5 nats reach -115.4. */
constexpr float LEAST_SUM = -116.0f;

/* The first token of the chunk for which G leaves the range in a channel of the warp, or NO_TOKEN. `sum` has
 * this lane's tokens 2 pair and 2 pair + 1. */
__device__ __forceinline__ int first_out_of_range(const float (&sum)[2][8])
{
    float least[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        least[e] = sum[e][0];
#pragma unroll
        for (int c = 1; c < 8; c++) least[e] = fminf(least[e], sum[e][c]);
    }
    /* Four lanes have the same two tokens. */
    const uint32_t even = __ballot_sync(~0u, least[0] < LEAST_SUM),
                   either = even | __ballot_sync(~0u, least[1] < LEAST_SUM);
    if (__builtin_expect(!either, 1)) return NO_TOKEN;
    const int pair = (__ffs(static_cast<int>(either)) - 1) / 4;
    return 2 * pair + ((even >> 4 * pair & 0xf) == 0);
}

/* Element i % 2 of a lane's two tokens, of the lane that owns token i and this lane's channels. */
__device__ __forceinline__ float of_token(int i, float even, float odd, int t)
{
    return __shfl_sync(~0u, i % 2 ? odd : even, 4 * (i / 2) + t);
}

__device__ __forceinline__ uint32_t of_token(int i, uint32_t even, uint32_t odd, int t)
{
    return __shfl_sync(~0u, i % 2 ? odd : even, 4 * (i / 2) + t);
}

/* Rows `first` to 15 of a warp's products K~ K^^T and Q~ K^^T, up to the diagonal. Products of the tensor
 * core are too small by UNTRUNCATE on average, and what follows makes up for it; these are not, so they are
 * divided by it. */
__device__ __forceinline__ void multiply_directly(float (&products)[2][CHUNK][CHUNK], int first,
                                                  const Eight (&q)[2], const Eight (&k)[2],
                                                  const float (&q_factor)[2], const float (&k_factor)[2],
                                                  const float (&sum)[2][8], int pair, int t)
{
#pragma unroll 1
    for (int i = first; i < CHUNK; i++) {
        const float q_i_factor = of_token(i, q_factor[0], q_factor[1], t) * (1.0f / UNTRUNCATE),
                    k_i_factor = of_token(i, k_factor[0], k_factor[1], t) * (1.0f / UNTRUNCATE);
        float of_k[2] = {}, of_q[2] = {}; /* with tokens j = 2 pair and 2 pair + 1 */
        Eight k_here[2] = {k[0], k[1]};
#pragma unroll
        for (int n = 0; n < 8; n++) forget(k_here[n / 4].pair[n % 4]);
#pragma unroll
        for (int c = 0; c < 8; c += 2) {
            const uint32_t q_pair = of_token(i, q[0].pair[c / 2], q[1].pair[c / 2], t),
                           k_pair = of_token(i, k_here[0].pair[c / 2], k_here[1].pair[c / 2], t);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float q_i = (h ? bf16_high(q_pair) : bf16_low(q_pair)) * q_i_factor,
                            k_i = (h ? bf16_high(k_pair) : bf16_low(k_pair)) * k_i_factor,
                            sum_i = of_token(i, sum[0][c + h], sum[1][c + h], t);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float k_j = k_here[e][c + h] * k_factor[e] * ex2(sum_i - sum[e][c + h]);
                    of_k[e] = __fmaf_rn(k_i, k_j, of_k[e]);
                    of_q[e] = __fmaf_rn(q_i, k_j, of_q[e]);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) {
                of_k[e] += __shfl_xor_sync(~0u, of_k[e], distance);
                of_q[e] += __shfl_xor_sync(~0u, of_q[e], distance);
            }
        if (t == 0) store_two(&products[0][product_row(i)][2 * pair], of_k[0], of_k[1]);
        if (t == 1) store_two(&products[1][product_row(i)][2 * pair], of_q[0], of_q[1]);
    }
}

} // namespace fkda

#endif
