/* The solving role: adds up a team's products and turns them into the small matrices of a chunk. Several solving warps
 * take turns with the chunks. */
#ifndef FKDA_HOPPER_SOLVE_CUH
#define FKDA_HOPPER_SOLVE_CUH

#include "shared.cuh"

namespace fkda
{

__device__ __forceinline__ uint4 pack_eight(const float *x)
{
    return make_uint4(pack_half(x[0], x[1]), pack_half(x[2], x[3]), pack_half(x[4], x[5]),
                      pack_half(x[6], x[7]));
}

/* L = tril(diag(b) K~ K^^T, -1), transposed, and tril(Q~ K^^T). Lane 2 i + h has columns 8 h to 8 h + 7 of row i. */
__device__ __forceinline__ void add_products(float (&l_columns)[CHUNK][CHUNK + 4], Stage &stage,
                                             const Products &products, float b, int lane)
{
    const int i = lane / 2, first = lane % 2 * 8;
    const int block =
        i / 8 + (i / 8 & lane % 2); /* where row i has none, any: its columns are above the diagonal */
    float sums[2][8];
#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            float4 s = *reinterpret_cast<const float4 *>(&products.part[0][which][block][i % 8][j]);
#pragma unroll
            for (int w = 1; w < TEAM_WARPS; w++) {
                float4 x = *reinterpret_cast<const float4 *>(&products.part[w][which][block][i % 8][j]);
                s.x += x.x, s.y += x.y, s.z += x.z, s.w += x.w;
            }
            sums[which][j] = s.x, sums[which][j + 1] = s.y, sums[which][j + 2] = s.z,
            sums[which][j + 3] = s.w;
        }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        l_columns[first + j][i] = first + j < i ? sums[0][j] * (UNTRUNCATE * b) : 0.0f;
        sums[1][j] = first + j <= i ? sums[1][j] * UNTRUNCATE : 0.0f;
    }
    *stage.attend.at(i, first) = pack_eight(sums[1]);
}

/* (I + L)^-1 diag(b) by forward substitution in fp32, a column to a lane; own is the column's b. */
__device__ __forceinline__ void solve_columns(Stage &stage, const float (&l_columns)[CHUNK][CHUNK + 4],
                                              float own, int lane)
{
    const int j = lane % CHUNK;
    float x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = i == j ? own : 0.0f;
#pragma unroll
    for (int m = 0; m < CHUNK - 1; m++) {
        float column[CHUNK];
#pragma unroll
        for (int i = (m + 1) / 4 * 4; i < CHUNK; i += 4) {
            float4 four = *reinterpret_cast<const float4 *>(&l_columns[m][i]);
            column[i] = four.x, column[i + 1] = four.y, column[i + 2] = four.z, column[i + 3] = four.w;
        }
#pragma unroll
        for (int i = m + 1; i < CHUNK; i++) x[i] = __fmaf_rn(-column[i], x[m], x[i]);
    }
    if (lane < CHUNK) {
        *stage.solve.at(0, j) = pack_eight(&x[0]);
        *stage.solve.at(8, j) = pack_eight(&x[8]);
    }
}

/* b of token lane / 2: its logit through a sigmoid, zero past the end. */
__device__ __forceinline__ uint16_t load_beta(const fkda_fwd_args &args, const Position &at, int lane)
{
    const uint16_t *beta = static_cast<const uint16_t *>(args.beta);
    return lane / 2 < at.left ? __ldg(beta + (at.token + lane / 2) * args.heads + at.head) : 0;
}

/* 1, or if all of the warp's b are below 2^-6 a power of two above them: what keeps small ones in fp16's range. */
__device__ __forceinline__ float strength_above(float b)
{
    const uint32_t most = __reduce_max_sync(~0u, __float_as_uint(b)); /* as integers: none is negative */
    const float above = __uint_as_float((most & 0x7f800000u) + 0x00800000u);
    return above > 0x1p-6f ? 1.0f : fmaxf(above, 0x1p-100f);
}

template <int rows>
__device__ __forceinline__ void solve(const fkda_fwd_args &args, Shared<rows> &shared, int solver, int lane)
{
    constexpr int SOLVERS = Shared<rows>::SOLVERS;
    Slot<SLOTS> slot(solver);
    Slot<Shared<rows>::TEAMS> in(solver);
    Position at(shared.pieces, solver);
    uint16_t logit = at.done() ? 0 : load_beta(args, at, lane);
    while (!at.done()) {
        Stage &stage = shared.stage[slot.index];
        const float x = __uint_as_float(static_cast<uint32_t>(logit) << 16);
        const float b = lane / 2 < at.left ? rcp(1.0f + ex2(x * -LOG2_E)) : 0.0f;
        /* The next logit is loaded ahead within a piece. The next piece may be dealt out only after this chunk is solved. */
        const bool ahead = at.left > SOLVERS * CHUNK;
        if (ahead) {
            at.advance(SOLVERS);
            logit = load_beta(args, at, lane);
        }
        mbarrier_wait(&shared.product_ring.full[in.index], in.parity);
        add_products(shared.l_columns[solver], stage, shared.products[in.index], b, lane);
        mbarrier_arrive_warp(&shared.product_ring.empty[in.index]); /* all of l_columns is there too */
        const float strength = strength_above(b);
        if (lane == 0) stage.strength = strength;
        const float own = __shfl_sync(~0u, b, 2 * (lane % CHUNK)) * inverse_power(strength);
        solve_columns(stage, shared.l_columns[solver], own, lane);
        fence_async_proxy();
        mbarrier_arrive_warp(&shared.chunks.ready[slot.index]);
        slot.advance(SOLVERS);
        in.advance(SOLVERS);
        if (!ahead) {
            at.advance(SOLVERS);
            if (!at.done()) logit = load_beta(args, at, lane);
        }
    }
}

} // namespace fkda

#endif
