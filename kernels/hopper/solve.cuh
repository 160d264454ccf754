/* The solving role, a warp: adds up a team's products and turns them into the small matrices of a chunk. */
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

/* L = tril(diag(b) K~ K^^T, -1) and, for outputs, tril(Q~ K^^T). Lane 2 i + h has columns 8 h to 8 h + 7 of row i. */
template <bool mixed>
__device__ __forceinline__ void add_products(Blocks &blocks, Stage &stage, const Products &products, float b,
                                             int kind, int lane)
{
    const int i = lane / 2, h = lane % 2;
    const int block = i / 8 + (i / 8 & h); /* where row i has none, any: its columns are above the diagonal */
    const bool outputs = wants_outputs<mixed>(kind);
    float sums[2][8];
#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            if (which == 1 && !outputs) continue;
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
        sums[0][j] = 8 * h + j < i ? sums[0][j] * (UNTRUNCATE * b) : 0.0f;
        sums[1][j] = outputs && 8 * h + j <= i ? sums[1][j] * UNTRUNCATE : 0.0f;
    }
    if (i / 8 == h) {
#pragma unroll
        for (int j = 0; j < 8; j++) blocks.diagonal[h][j][i % 8] = sums[0][j];
    } else if (h == 0) {
        *reinterpret_cast<uint4 *>(blocks.lower[i % 8]) = pack_eight(sums[0]);
    }
    if (outputs) *stage.attend.at(i, 8 * h) = pack_eight(sums[1]);
}

/* T = (I + L)^-1 diag(b). With blocks A = I + L of the first and C = I + L of the last eight tokens, T is A^-1 diag(b) and
 * C^-1 diag(b) on the diagonal, by forward substitution in fp32, a column to a lane; and below it - C^-1 lower A^-1 diag(b), two
 * products on the tensor core, of transposes: rows of the one's accumulators are the other's operand. own: column
 * lane % 16's b. */
__device__ __forceinline__ void solve_blocks(Blocks &blocks, Stage &stage, float own, int lane)
{
    const int j = lane % 8, which = lane / 8;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = i == j ? 1.0f : 0.0f;
#pragma unroll
    for (int m = 0; m < 7; m++) {
        float column[8];
#pragma unroll
        for (int i = (m + 1) / 4 * 4; i < 8; i += 4) {
            float4 four = *reinterpret_cast<const float4 *>(&blocks.diagonal[which % 2][m][i]);
            column[i] = four.x, column[i + 1] = four.y, column[i + 2] = four.z, column[i + 3] = four.w;
        }
#pragma unroll
        for (int i = m + 1; i < 8; i++) x[i] = __fmaf_rn(-column[i], x[m], x[i]);
    }
    /* Eight lanes each: A^-1 diag(b), C^-1 diag(b), zeros above the diagonal, C^-1. */
    const float factor = which < 2 ? own : which == 2 ? 0.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= factor;
    uint4 *to = which == 3 ? reinterpret_cast<uint4 *>(blocks.inverse[j])
                           : stage.solve.at(which % 2 * 8, (which > 0) * 8 + j);
    *to = pack_eight(x);
    __syncwarp();
    uint32_t first[4], second[4];
    load_matrices(first, lane / 8 % 2 ? static_cast<const void *>(blocks.lower[j]) : stage.solve.at(0, j));
    load_matrices_transposed(second, blocks.inverse[j]);
    float product[4] = {}, below[4] = {};
    mma_half(product, first[0], 0, 0, 0, first[1], 0);
    mma_half(below, pack_half(-product[0], -product[1]), 0, 0, 0, second[0], 0);
    reinterpret_cast<uint32_t *>(stage.solve.at(8, lane / 4))[lane % 4] = pack_half(below[0], below[1]);
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

/* Sends a chunk that is prepared and solved to the block that shares it, by a lane. */
template <int rows>
__device__ __forceinline__ void send(const Tokens<rows> &tokens, const Stage &stage, uint64_t *ready)
{
    copy_to_other_block(tokens.half, sizeof tokens.half, ready);
    copy_to_other_block(&stage, sizeof stage, ready);
}

template <int rows, bool mixed>
__device__ __forceinline__ void solve(const fkda_fwd_args &args, Shared<rows> &shared, int lane)
{
    constexpr int EVERY = SHARERS<rows, mixed>;
    const int first = sharer_rank<rows, mixed>();
    Slot<SLOTS> slot(first);
    Slot<TEAMS> in(0);
    Position at(shared.pieces, first);
    uint16_t logit = at.done() ? 0 : load_beta(args, at, lane);
    while (!at.done()) {
        Stage &stage = shared.stage[slot.index];
        const float x = __uint_as_float(static_cast<uint32_t>(logit) << 16);
        const float b = lane / 2 < at.left ? rcp(1.0f + ex2(x * -LOG2_E)) : 0.0f;
        const int kind = at.kind;
        /* The next logit is loaded ahead within a piece. The next piece may be dealt out only after this chunk is solved. */
        const bool ahead = at.left > EVERY * CHUNK;
        if (ahead) {
            at.advance(EVERY);
            logit = load_beta(args, at, lane);
        }
        mbarrier_wait(&shared.product_ring.full[in.index], in.parity);
        add_products<mixed>(shared.blocks, stage, shared.products[in.index], b, kind, lane);
        mbarrier_arrive_warp(&shared.product_ring.empty[in.index]); /* all of `blocks` is there too */
        const float strength = strength_above(b);
        if (lane == 0) stage.strength = strength;
        const float own = __shfl_sync(~0u, b, 2 * (lane % CHUNK)) * inverse_power(strength);
        solve_blocks(shared.blocks, stage, own, lane);
        fence_async_proxy();
        mbarrier_arrive_warp(&shared.chunks.ready[slot.index]);
        if (EVERY > 1 && elect_lane())
            send(shared.tokens[slot.index], stage, &shared.chunks.ready[slot.index]);
        slot.advance(EVERY);
        in.advance(1);
        if (!ahead) {
            at.advance(EVERY);
            if (!at.done()) logit = load_beta(args, at, lane);
        }
    }
}

} // namespace fkda

#endif
