/*
 * The norms of a chunk's keys and queries. The team that prepares the chunk finds them or, in blocks whose
 * speed the preparation limits, the loader.
 */
#ifndef FKDA_HOPPER_NORMS_CUH
#define FKDA_HOPPER_NORMS_CUH

#include "shared.cuh"

namespace fkda
{

/* Of q and k that are used as they are. Products of keys, and of queries with keys, then stay in the range of
 * fp16 if write strengths are at most 1. */
constexpr float LARGEST_SQUARES = 0x1p15f;

/*
 * Stores 1 / |x| of a subchunk's tokens: 0 or NaN if the sum of squares is not finite (bad_tokens.cuh). If q
 * and k are used as they are, it stores 1, or 0 if the sum of squares is too large for fp16 or not finite. x
 * points to the subchunk's q or k in the first half of the channels; the second half lies sizeof(Half) behind
 * it.
 *
 * The sums of squares are the diagonal of x x^T, which the tensor core computes in 16 products of bf16: fewer
 * instructions than two for each element and a reduction by shuffles. Lane (g, t = g / 2) of the accumulators
 * has tokens g and g + 8.
 */
template <class Block>
__device__ __forceinline__ void store_inverse_norms(float *to, const unsigned char *x, bool normalised,
                                                    int lane)
{
    const uint32_t rows_at = shared_address(x) + matrix_row(lane),
                   columns_at = shared_address(x) + matrix_row_by_token(lane);
    const int g = lane >> 2, t = lane & 3;
    float top[2][4] = {}, low[2][4] = {}; /* two sums each, whose products need not wait for each other */
#pragma unroll
    for (int c = 0; c < DIM / 16; c++) {
        const int half = c / 4 * static_cast<int>(sizeof(typename Tokens<Block>::Half)), unit = c % 4 * 32;
        uint32_t a[4], b[4]; /* the same elements, in the orders of the two operands */
        load_matrices(a, (rows_at ^ unit) + half);
        load_matrices(b, (columns_at ^ unit) + half);
        mma_bf16(top[c % 2], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_bf16(low[c % 2], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
    if (t == g / 2) {
        const auto factor = [=](float sum) {
            if (Block::OPTIONS && normalised) return sum < LARGEST_SQUARES ? 1.0f : 0.0f;
            return rsqrt_approx(sum + 1e-6f);
        };
        to[g] = factor(g % 2 ? top[0][1] + top[1][1] : top[0][0] + top[1][0]);
        to[g + 8] = factor(g % 2 ? low[0][3] + low[1][3] : low[0][2] + low[1][2]);
    }
}

/* The norms of all subchunks' keys and, if there are outputs, queries. The subchunks are split among `warps`
 * warps. */
template <class Block, int warps>
__device__ __forceinline__ void store_norms(float (&to)[Block::QUERIES ? 2 : 1][Block::CHUNK],
                                            const Tokens<Block> &tokens, const fkda_fwd_args &args, int warp,
                                            int lane)
{
    constexpr int UNITS = (Block::QUERIES ? 2 : 1) * Block::SUBCHUNKS;
    if (UNITS < warps && warp >= UNITS) return;
#pragma unroll(warps == 1 ? 1 : 4)
    for (int i = 0; i < UNITS; i += warps) {
        const int which = (i + warp) / Block::SUBCHUNKS, sub = (i + warp) % Block::SUBCHUNKS;
        store_inverse_norms<Block>(&to[which][sub * SUBCHUNK],
                                   tokens.half[0].tile[which ? Q : K] + sub * SUBCHUNK_BYTES,
                                   args.qk_is_normalised, lane);
    }
}

} // namespace fkda

#endif
