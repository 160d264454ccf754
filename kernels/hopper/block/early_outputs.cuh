/*
 * The outputs of a chunk's first tokens to one another, O = P U with U = T R, for the 16 rows of one warp.
 *
 * The recurrence computes both products for all tokens (recurrence.cuh). A row needs this file if its scale
 * is about to grow so much that the tokens before the large value would vanish in the new scale
 * (scaled_rows.cuh). Such rows are rare, so this file is written for little code and not for speed.
 */
#ifndef FKDA_HOPPER_EARLY_OUTPUTS_CUH
#define FKDA_HOPPER_EARLY_OUTPUTS_CUH

#include "shared.cuh"

namespace fkda
{

/* The sum over j <= i of m(i, j) x(j), where m is fp16 and x has a row's tokens in fp16. */
template <class Matrix, class Row> __device__ __forceinline__ float multiply_early(int i, Matrix m, Row x)
{
    float sum = 0.0f;
#pragma unroll 1
    for (int j = 0; j <= i; j++) sum = __fmaf_rn(half_low(m(i, j)), half_low(*x(j)), sum);
    return sum;
}

/*
 * Replaces R of this lane's first `tokens` tokens by their outputs. Lane i < 16 has row i of the warp;
 * `values` has the rows of the CTA as the tokens of a slot have v, but in fp16.
 */
template <class Block>
__device__ __forceinline__ void compute_early_outputs(unsigned char *values, Stage<Block> &stage, int tokens)
{
    int cta, thread; /* read again: otherwise the compiler would keep places that are made from it */
    read_indices(cta, thread);
    const int row = thread / 32 * 16 + thread % 16;
    const auto x = [=](int token) {
        return reinterpret_cast<uint16_t *>(values + row / 64 * Block::HALF_TOKENS + token * ROW +
                                            (row % 64 / 8 ^ token % 8) * 16) +
               row % 8;
    };
    __syncwarp();
#pragma unroll 1
    for (int i = tokens - 1; i >= 0; i--) /* U: from the last token on, so that R is still there */
        *x(i) = static_cast<uint16_t>(pack_half(
            multiply_early(
                i,
                [&](int c, int d) { return reinterpret_cast<uint16_t *>(stage.solve.at(c & ~7, d))[c % 8]; },
                x),
            0.0f));
#pragma unroll 1
    for (int i = tokens - 1; i >= 0; i--)
        *x(i) = static_cast<uint16_t>(pack_half(
            multiply_early(
                i,
                [&](int c, int d) { return reinterpret_cast<uint16_t *>(stage.attend.at(c, d & ~7))[d % 8]; },
                x),
            0.0f));
    __syncwarp();
}

} // namespace fkda

#endif
