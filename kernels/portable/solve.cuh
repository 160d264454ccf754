/*
 * The small matrices of a chunk, from the products over channels of a team's warps:
 *
 *     T = (I + L)^-1 diag(b)   with L = tril(diag(b) K~ K^^T, -1)         P = tril(Q~ K^^T)
 *
 * The whole team adds up the products. One warp then finds T by forward substitution in fp32.
 */
#ifndef FKDA_PORTABLE_SOLVE_CUH
#define FKDA_PORTABLE_SOLVE_CUH

#include "bad_tokens.cuh"

namespace fkda
{

/* Adds up the warps' products: L = tril(diag(b) K~ K^^T, -1) goes to the scratch, and P = tril(Q~ K^^T) to
 * the stage. `strength` is b of tokens thread / 16 and thread / 16 + 8. From the first bad token on
 * (bad_tokens.cuh) b is zero and P is NaN, and so is the state's decay. */
__device__ __forceinline__ void add_products(Stage &stage, Scratch &scratch, const Task &task,
                                             const float (&strength)[2], int chunk, int thread)
{
    const int j = thread % CHUNK, first_bad = first_bad_token(scratch);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int i = thread / CHUNK + 8 * e;
        float sums[2];
#pragma unroll
        for (int which = 0; which < 2; which++) {
            sums[which] = scratch.products[0][which][product_row(i)][j];
#pragma unroll
            for (int w = 1; w < TEAM_WARPS; w++) sums[which] += scratch.products[w][which][product_row(i)][j];
        }
        float b = chunk * CHUNK + i < task.length ? strength[e] * UNTRUNCATE : 0.0f;
        if (i >= first_bad) b = 0.0f, sums[1] = NAN;
        scratch.l_columns[j][i] = j < i ? sums[0] * b : 0.0f;
        stage.attend[i][j] = j <= i ? sums[1] * (UNTRUNCATE * UNTRUNCATE) : 0.0f;
        if (j == 0) scratch.beta[i] = b;
    }
    if (first_bad != NO_TOKEN) stage.gamma_minus_1[thread] = NAN;
}

/* T = (I + L)^-1 diag(b) by forward substitution in fp32, one column to a lane. One warp runs it. */
__device__ __forceinline__ void solve(Stage &stage, Scratch &scratch, int thread)
{
    const int j = thread % CHUNK;
    float x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = i == j ? scratch.beta[j] : 0.0f;
#pragma unroll
    for (int m = 0; m < CHUNK - 1; m++) {
        float column[CHUNK];
#pragma unroll
        for (int i = (m + 1) / 4 * 4; i < CHUNK; i += 4) {
            float4 four = *reinterpret_cast<const float4 *>(&scratch.l_columns[m][i]);
            column[i] = four.x, column[i + 1] = four.y, column[i + 2] = four.z, column[i + 3] = four.w;
        }
#pragma unroll
        for (int i = m + 1; i < CHUNK; i++) x[i] = __fmaf_rn(-column[i], x[m], x[i]);
    }
    if (thread % 32 < CHUNK)
#pragma unroll
        for (int i = 0; i < CHUNK; i++) stage.solve[i][j] = x[i];
}

} // namespace fkda

#endif
