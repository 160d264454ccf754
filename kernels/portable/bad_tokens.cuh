/*
 * Bad tokens: tokens with something that is not a number. Everything after such a token is unknown, and
 * everything before it must not change by a bit.
 *
 * Algorithm. A product multiplies a NaN by the zeros of a triangle, which are NaN too, and would carry it to
 * earlier tokens. So nothing that is not finite enters a product, and NaN is put in afterwards:
 *
 *   preparation  A NaN gate makes the sum over the chunk NaN, and so does a key or a query whose sum of
 *                squares is not finite. The warp then prepares its channels once more, with no decay in place
 *                of NaN and with zeros in place of a key that is not finite.
 *   solver       From the first bad token on, write strengths are zero, and NaN stands on the diagonal of P
 *                and in the state's decay over the chunk (add_products).
 *   recurrence   A value that is not finite concerns a single row of the state. The value becomes zero, the
 *                row's outputs from its token on become NaN, and so does the row's state. The general kernels
 *                look for this after the product with the state and again in U, which also finds numbers that
 *                have left the range of fp32.
 *
 * A query that is not finite needs none of this: only its own row of the products depends on it.
 */
#ifndef FKDA_PORTABLE_BAD_TOKENS_CUH
#define FKDA_PORTABLE_BAD_TOKENS_CUH

#include "shared.cuh"

namespace fkda
{

constexpr int NO_TOKEN = CHUNK;

/* Squares of elements above 2^60 overflow. Elements multiplied by this have squares with a finite sum. */
constexpr float NORM_SCALE = 0x1p-68f;

/* Notes that `token`, another one for each lane, or NO_TOKEN, is bad. The warp calls it. */
__device__ __forceinline__ void note_bad_token(Scratch &scratch, int warp, int token)
{
    const int first = static_cast<int>(__reduce_min_sync(~0u, static_cast<uint32_t>(token)));
    if (threadIdx.x % 32 == 0) scratch.first_bad[warp] = min(scratch.first_bad[warp], first);
    __syncwarp();
}

/* The first bad token of the chunk, or NO_TOKEN. The team has met since it was noted. */
__device__ __forceinline__ int first_bad_token(const Scratch &scratch)
{
    int first = NO_TOKEN;
#pragma unroll
    for (int w = 0; w < TEAM_WARPS; w++) first = min(first, scratch.first_bad[w]);
    return first;
}

/*
 * Values of one warp's 16 rows. In rows g and g + 8 of lane (g, t): takes values that are not finite out of v
 * and sets the outputs of their tokens, and of the tokens after them, to NaN. is_bad[r] tells whether row
 * g + 8 r has such a value. Tile i of v and o has tokens 8 i + 2 t, + 1, + 0, + 1.
 */
__device__ __forceinline__ void spoil_outputs(float (&v)[2][4], float (&o)[2][4], bool (&is_bad)[2], int t)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int first = NO_TOKEN;
#pragma unroll
        for (int at = 3; at >= 0; at--) {
            float &x = v[at / 2][2 * r + at % 2];
            if (!(fabsf(x) < INFINITY)) first = 8 * (at / 2) + 2 * t + at % 2, x = 0.0f;
        }
        first = min(first, __shfl_xor_sync(~0u, first, 1));
        first = min(first, __shfl_xor_sync(~0u, first, 2));
        is_bad[r] = first < NO_TOKEN;
#pragma unroll
        for (int at = 0; at < 4; at++)
            if (8 * (at / 2) + 2 * t + at % 2 >= first) o[at / 2][2 * r + at % 2] = NAN;
    }
}

} // namespace fkda

#endif
