/*
 * The preparation role: what a chunk's tokens and channels go through one by one, ahead of the recurrence. Teams of two
 * warps take turns with the chunks; a warp has all tokens of a chunk in half the channels, 16 of them at a time.
 * Lane (g, t) = (lane / 4, lane % 4) then owns tokens g and g + 8 of channels 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: the
 * layout of the tensor core's fragments, so that elements go from ldmatrix through the products to stmatrix
 * without changing lanes.
 */
#ifndef FKDA_HOPPER_PREPARE_CUH
#define FKDA_HOPPER_PREPARE_CUH

#include "shared.cuh"

namespace fkda
{

/* Where outputs are not wanted the queries are left out. */
template <int rows, bool mixed> struct Preparation {
    static constexpr int SHARE = DIM / TEAM_WARPS; /* channels of a warp: a half of the tokens' */
    static_assert(TEAM_WARPS == 2, "a half each, and norms of q or k each");
    const fkda_fwd_args &args;
    Shared<rows> &shared;
    int team, warp, lane, g, t;
    float inverse_bound; /* 1 / (lower_bound log2(e)): decays are powers of two here */
    /* The triangle of ones as an A fragment in bf16: 1 where a token exists and comes no later than the row's. */
    uint32_t ones[4];
    float gate_factor; /* of the head: -exp(A_log) log2(e) */

    __device__ Preparation(const fkda_fwd_args &a, Shared<rows> &s, int id, int lane_id)
        : args(a), shared(s), team(id / TEAM_WARPS), warp(id % TEAM_WARPS), lane(lane_id), g(lane / 4),
          t(lane % 4), inverse_bound(1.0f / (fminf(a.lower_bound, -1e-30f) * LOG2_E))
    {
    }

    __device__ void find_ones(int left)
    {
        constexpr uint32_t one = 0x3f80;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = g + r % 2 * 8, token = 2 * t + r / 2 * 8;
            ones[r] = (token <= row && token < left ? one : 0) |
                      (token + 1 <= row && token + 1 < left ? one << 16 : 0);
        }
    }

    __device__ void load_gate_parameters(int head)
    {
        const float exponent = args.A_log[head] * LOG2_E;
        gate_factor = ex2(exponent > 100.0f ? 100.0f : exponent) * -LOG2_E; /* finite */
        __syncwarp();
#pragma unroll
        for (int c = warp * SHARE + lane; c < (warp + 1) * SHARE; c += 32)
            shared.gate_offset[team][c] = args.dt_bias[head * DIM + c] * gate_factor;
        __syncwarp();
    }

    /* Zeros for the tokens from `left` on, in this warp's half. */
    __device__ void clear_past_end(Tokens<rows> &tokens, int left) const
    {
        const uint4 zeros = make_uint4(0, 0, 0, 0);
        for (int i = left + lane / 8; i < CHUNK; i += 4) {
            const int at = i * ROW + lane % 8 * 16;
            *reinterpret_cast<uint4 *>(&tokens.half[warp].k[at]) = zeros;
            *reinterpret_cast<uint4 *>(&tokens.half[warp].q[at]) = zeros;
            *reinterpret_cast<uint4 *>(&tokens.half[warp].g[at]) = zeros;
        }
    }

    /* 1 / |x| of a chunk's tokens, x: the q or the k of half 0. Sums of squares are the diagonal of x x^T: lane (g, t = g / 2) of the
     * accumulators has tokens g and g + 8. */
    __device__ void store_inverse_norms(float (&to)[CHUNK], const unsigned char *x) const
    {
        const uint32_t rows_at = shared_address(x) + matrix_row(lane),
                       columns_at = shared_address(x) + matrix_row_by_token(lane);
        float top[2][4] = {}, low[2][4] = {}; /* two sums each, whose products need not wait for each other */
#pragma unroll
        for (int c = 0; c < DIM / 16; c++) {
            const int half = c / 4 * 3 * HALF_TOKENS, unit = c % 4 * 32;
            uint32_t a[4], b[4]; /* the same numbers, in the orders of both operands */
            load_matrices(a, (rows_at ^ unit) + half);
            load_matrices(b, (columns_at ^ unit) + half);
            mma_bf16(top[c % 2], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma_bf16(low[c % 2], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
        if (t == g / 2) {
            to[g] = rsqrt_approx((g % 2 ? top[0][1] + top[1][1] : top[0][0] + top[1][0]) + 1e-6f);
            to[g + 8] = rsqrt_approx((g % 2 ? low[0][3] + low[1][3] : low[0][2] + low[1][2]) + 1e-6f);
        }
    }

    /* sum[b]: the running sums of the log2 decay of tokens g, g, g + 8, g + 8 and channels c + 8 b + 2 t, + 1, + 0, + 1. Gates
     * are evaluated transposed, four tokens of one channel to a lane, and added up by the tensor core, which
     * transposes back, as sums of two bf16: what is left out is 2^-18 of a gate, and as often too much as too little. */
    __device__ void accumulate_gates(uint32_t half, int c, float (&sum)[2][4]) const
    {
        uint32_t raw[4];
        load_matrices_transposed(raw, (half ^ 2 * c) + 2 * HALF_TOKENS);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float offset = shared.gate_offset[team][warp * SHARE + c + 8 * b + g];
            float x[4]; /* tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9 */
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float gate = i % 2 ? bf16_high(raw[2 * b + i / 2]) : bf16_low(raw[2 * b + i / 2]);
                const float e = ex2(__fmaf_rn(gate, gate_factor, offset));
                x[i] = rcp(__fmaf_rn(e, inverse_bound, inverse_bound));
                sum[b][i] = 0.0f;
            }
            uint32_t high[2], low[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                high[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
                low[i] = pack_bf16(x[2 * i] - bf16_low(high[i]), x[2 * i + 1] - bf16_high(high[i]));
            }
            mma_bf16(sum[b], ones[0], ones[1], ones[2], ones[3], low[0], low[1]);
            mma_bf16(sum[b], ones[0], ones[1], ones[2], ones[3], high[0], high[1]);
        }
    }

    /* The decayed tiles of 16 channels from c on, of this warp's, and their part of the products over channels: tokens 0 to 7 with 0 to 7, 8 to 15
     * with 0 to 7 and 8 to 15 with 8 to 15. A product has K~ in its upper and Q~ in its lower eight rows; without outputs all
     * of K~, with tokens 0 to 7 and with 8 to 15. */
    template <bool outputs>
    __device__ void decay(uint32_t half, float *gamma, int c, const float (&q_factor)[2],
                          const float (&k_factor)[2], const float (&sum)[2][4], float (&products)[3][4]) const
    {
        const uint32_t at = half ^ 2 * c;
        uint32_t raw_k[4], raw_q[4], k_decayed[4], q_decayed[4], k_rest[4]; /* channel / 8, token / 8 */
        load_matrices(raw_k, at);
        if (outputs) load_matrices(raw_q, at + HALF_TOKENS);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            float k_up[2][2], q_up[2][2], k_down[2][2], last[2]; /* token / 8, channel */
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t pair_k = raw_k[2 * b + e];
                    const float k = (i ? bf16_high(pair_k) : bf16_low(pair_k)) * k_factor[e];
                    const float up = ex2(sum[b][2 * e + i]);
                    k_up[e][i] = k * up;
                    if (outputs) {
                        const uint32_t pair_q = raw_q[2 * b + e];
                        q_up[e][i] = (i ? bf16_high(pair_q) : bf16_low(pair_q)) * q_factor[e] * up;
                    }
                    k_down[e][i] = k * ex2(-sum[b][2 * e + i]);
                    if (e == 1) last[i] = __shfl_sync(~0u, up, 4 * 7 + t);
                }
            if constexpr (outputs) {
                mma_tf32(products[0], k_up[0][0], q_up[0][0], k_up[0][1], q_up[0][1], k_down[0][0],
                         k_down[0][1]);
                mma_tf32(products[1], k_up[1][0], q_up[1][0], k_up[1][1], q_up[1][1], k_down[0][0],
                         k_down[0][1]);
                mma_tf32(products[2], k_up[1][0], q_up[1][0], k_up[1][1], q_up[1][1], k_down[1][0],
                         k_down[1][1]);
            } else {
                mma_tf32(products[0], k_up[0][0], k_up[1][0], k_up[0][1], k_up[1][1], k_down[0][0],
                         k_down[0][1]);
                mma_tf32(products[1], k_up[0][0], k_up[1][0], k_up[0][1], k_up[1][1], k_down[1][0],
                         k_down[1][1]);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                k_decayed[2 * b + e] = pack_half(k_up[e][0], k_up[e][1]);
                if (outputs) q_decayed[2 * b + e] = pack_half(q_up[e][0], q_up[e][1]);
                k_rest[2 * b + e] = pack_half(k_down[e][0] * last[0], k_down[e][1] * last[1]);
            }
            if (g == 7)
                *reinterpret_cast<float2 *>(&gamma[c + gamma_place(8 * b + 2 * t)]) =
                    make_float2(sum[b][2], sum[b][3]);
        }
        store_matrices(at, k_decayed);
        if (outputs) store_matrices(at + HALF_TOKENS, q_decayed);
        store_matrices(at + 2 * HALF_TOKENS, k_rest);
    }

    /* Turns the sums of the last token into the state's decay over the chunk, less one: rounded to fp32 itself, the decay
     * of a slow channel would be off by the same amount chunk after chunk. */
    __device__ void finish_gamma(float *gamma) const
    {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < SHARE / 32; i++) {
            float &x = gamma[32 * i + lane];
            x = ex2_minus_1(x);
        }
    }

    template <bool outputs>
    __device__ void store_products(float (&to)[2][3][8][8], const float (&products)[3][4]) const
    {
        if constexpr (outputs) {
#pragma unroll
            for (int n = 0; n < 3; n++)
#pragma unroll
                for (int which = 0; which < 2; which++)
                    store_two(&to[which][n][g][2 * t], products[n][2 * which], products[n][2 * which + 1]);
        } else {
            store_two(&to[0][0][g][2 * t], products[0][0], products[0][1]);
            store_two(&to[0][1][g][2 * t], products[0][2], products[0][3]);
            store_two(&to[0][2][g][2 * t], products[1][2], products[1][3]);
        }
    }

    /* A chunk whose inputs have come, up to its products over channels. */
    template <bool outputs>
    __device__ void prepare(Tokens<rows> &tokens, float *gamma, int round, float (&products)[3][4]) const
    {
        const uint32_t half = shared_address(&tokens.half[warp]) + matrix_row(lane);
        float q_factor[2] = {}, k_factor[2];
        if (outputs || warp)
            store_inverse_norms(shared.inverse_norm[team][round][warp],
                                warp ? tokens.half[0].k : tokens.half[0].q);
        barrier_sync<1, 32 * TEAM_WARPS>(team);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (outputs) q_factor[e] = shared.inverse_norm[team][round][0][g + 8 * e];
            k_factor[e] = shared.inverse_norm[team][round][1][g + 8 * e];
        }
        float sum[2][4];
        accumulate_gates(half, 0, sum);
#pragma unroll 1
        for (int c = 0; c < SHARE - 16; c += 16) {
            float next[2][4]; /* gates are a slice ahead, so that two slices' waits fill each other */
            accumulate_gates(half, c + 16, next);
            decay<outputs>(half, gamma, c, q_factor, k_factor, sum, products);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i / 4][i % 4] = next[i / 4][i % 4];
        }
        decay<outputs>(half, gamma, SHARE - 16, q_factor, k_factor, sum, products);
        finish_gamma(gamma);
        fence_async_proxy();
        mbarrier_wait(&shared.product_ring.empty[team], round ^ 1);
        store_products<outputs>(shared.products[team].part[warp], products);
    }

    __device__ void run()
    {
        const int first = team * SHARERS<rows, mixed> + sharer_rank<rows, mixed>();
        constexpr int EVERY = TEAMS * SHARERS<rows, mixed>;
        Slot<SLOTS> slot(first);
        int head = -1;
        static_assert(SLOTS / EVERY % 2 == 0, "rounds of a team can be told by its slots");
        find_ones(CHUNK);
        for (Position at(shared.pieces, first); !at.done(); at.advance(EVERY)) {
            Tokens<rows> &tokens = shared.tokens[slot.index];
            float *gamma = &shared.stage[slot.index].gamma_minus_1[warp * SHARE];
            float products[3][4] = {};
            const int round = slot.index / EVERY % 2;
            const bool whole = at.left >= CHUNK;
            if (!whole) find_ones(at.left);
            if (at.head != head) load_gate_parameters(head = at.head);
            mbarrier_wait(&shared.chunks.loaded[slot.index], slot.parity);
            if (!whole) {
                clear_past_end(tokens, at.left);
                barrier_sync<1, 32 * TEAM_WARPS>(team);
            }
            if (wants_outputs<mixed>(at.kind))
                prepare<true>(tokens, gamma, round, products);
            else
                prepare<false>(tokens, gamma, round, products);
            mbarrier_arrive_warp(&shared.product_ring.full[team]);
            mbarrier_arrive_warp(&shared.chunks.ready[slot.index]);
            if (!whole) find_ones(CHUNK);
            slot.advance(EVERY);
        }
    }
};

} // namespace fkda

#endif
