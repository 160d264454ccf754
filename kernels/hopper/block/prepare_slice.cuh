/*
 * The arithmetic of the preparation of a slice: 16 channels of a subchunk, which a warp takes from raw inputs
 * to decayed tiles and products over channels.
 *
 * Why decays are counted from the subchunk's start. Even if all 16 gates are at the bound of -5, exp(-G) is
 * at most e^80, which fp32 and tf32 hold; and k exp(G) and q exp(G) are K~ and Q~ without another factor. The
 * portable kernel counts from token 7 and the CPU from a constant (docs/portable-kernel.md, src/cpu/head.h).
 *
 * Lane (g, t) = (lane / 4, lane % 4) owns tokens g and g + 8 of channels 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
 * This is the layout of the tensor core's fragments, so elements go from ldmatrix through the products to
 * stmatrix without changing lanes.
 */
#ifndef FKDA_HOPPER_PREPARE_SLICE_CUH
#define FKDA_HOPPER_PREPARE_SLICE_CUH

#include "shared.cuh"

namespace fkda
{

template <class Block> struct SlicePreparation {
    static constexpr int WARPS = Block::TEAM_WARPS, SUBCHUNKS = Block::SUBCHUNKS;
    static_assert(SUBCHUNKS <= 2, "a subchunk has at most one other subchunk");
    static constexpr uint32_t ONE = 0x3f80; /* in bf16 */
    /* With two subchunks registers are short. Threads then find their place anew for each chunk, and read the
     * gate's constants from shared memory for each use, so that what is made from them need not be kept in
     * between. */
    static constexpr bool SAVES_REGISTERS = SUBCHUNKS == 2;
    const fkda_fwd_args &args;
    Shared<Block> &shared;
    int team, warp, lane, g, t; /* warp: of the team */
    HeadGate gate_here;

    __device__ SlicePreparation(const fkda_fwd_args &a, Shared<Block> &s) : args(a), shared(s)
    {
        find_place();
    }

    __device__ void find_place()
    {
        int cta, thread;
        read_indices(cta, thread);
        const unsigned id =
            static_cast<unsigned>(thread) / 32 - Block::RECURRENCE_WARPS; /* unsigned: division by shifts */
        team = static_cast<int>(id / WARPS), warp = static_cast<int>(id % WARPS);
        lane = thread & 31, g = lane >> 2, t = lane & 3;
    }

    /*
     * The products over a warp's channels, in tiles of 8 x 8 tokens.
     *
     * within[i]: subchunk i with itself. With outputs the three products are tiles (0, 0), (1, 0) and (1, 1),
     * with the rows of K~ above the rows of Q~. Without outputs the first product is (0, 0) above (1, 0), and
     * the lower half of the second one is (1, 1). Nobody needs tile (0, 1).
     *
     * across[w][n]: the second subchunk with the first one; w is 0 for K~ and 1 for Q~, n numbers eight
     * columns.
     */
    struct Sums {
        float within[SUBCHUNKS][3][4], across[2][2][4];
    };

    /* The raw gates of a chunk in fp32, which come from global memory: row 0 is the chunk's first token, of which
     * `at` is the first channel of the slice. */
    struct GatesInMemory {
        const float *at;
        long long step; /* from a token to the next one */
        int left;       /* tokens of the work item from the chunk's first one on */
        bool repairs;   /* NaN counts as no decay: see bad_tokens.cuh */
    };

    /* The log2 decays x[b] of channel 8 b + g of a slice, for tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of subchunk
     * `sub`, in a general block. `at` and `offset` are as in accumulate_gates(). */
    __device__ void find_decays(float (&x)[2][4], uint32_t at, const float *offset,
                                const GatesInMemory &memory, int sub) const
    {
        const GateOfCall call = {args.gate};
        if (args.g_is_f32) {
            const int token = sub * SUBCHUNK + 2 * t;
            const float *from = memory.at + token * memory.step + g;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int ahead = i / 2 * 8 + i % 2;
                const bool valid = token + ahead < memory.left;
#pragma unroll
                for (int b = 0; b < 2; b++)
                    x[b][i] = valid ? __ldg(from + ahead * memory.step + 8 * b) : call.neutral();
            }
        } else {
            uint32_t raw[4];
            load_matrices_transposed(raw, at);
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    x[b][i] = i % 2 ? bf16_high(raw[2 * b + i / 2]) : bf16_low(raw[2 * b + i / 2]);
        }
        const HeadGate gate_of_head = SAVES_REGISTERS ? shared.gate[team][warp] : gate_here;
#pragma unroll
        for (int b = 0; b < 2; b++) {
            activate_gates(x[b], call, gate_of_head, offset[8 * b + g]);
            if (args.g_is_f32 && memory.repairs)
#pragma unroll
                for (int i = 0; i < 4; i++) x[b][i] = x[b][i] == x[b][i] ? x[b][i] : 0.0f;
        }
    }

    /*
     * sum[b] = the running sums of the log2 decay, for a subchunk's tokens g, g, g + 8, g + 8 and channels c
     * + 8 b + 2 t, + 1, + 0, + 1.
     *
     * The gates are loaded transposed (ldmatrix.trans), so that a lane has four tokens of one channel and
     * needs one offset for them. The tensor core adds them up: a triangle of ones times the gates, which also
     * transposes back. Each gate enters as the sum of two bf16, which leaves out at most 2^-18 of the
     * gate, with either sign. Sums are fp32, of at most 16 gates.
     *
     * `at` is this lane's row of the subchunk's gates, `offset` the gate offset of the first of the channels.
     */
    __device__ void accumulate_gates(uint32_t at, const float *offset, const GatesInMemory &memory, int sub,
                                     float (&sum)[2][4]) const
    {
        if constexpr (Block::GENERAL) {
            float x[2][4];
            find_decays(x, at, offset, memory, sub);
#pragma unroll
            for (int b = 0; b < 2; b++) add_up(x[b], sum[b]);
            return;
        }
        const HeadGate gate_of_head = SAVES_REGISTERS ? shared.gate[team][warp] : gate_here;
        uint32_t raw[4];
        load_matrices_transposed(raw, at);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float shift = offset[8 * b + g];
            float x[4]; /* tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9 */
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float gate = i % 2 ? bf16_high(raw[2 * b + i / 2]) : bf16_low(raw[2 * b + i / 2]);
                x[i] = hopper_sigmoid_gate(gate, gate_of_head, shift);
            }
            add_up(x, sum[b]);
        }
    }

    /* The running sums of one b. */
    __device__ void add_up(const float (&x)[4], float (&sum)[4]) const
    {
        const uint32_t triangle = (2 * t <= g ? ONE : 0) | (2 * t + 1 <= g ? ONE << 16 : 0);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = 0.0f;
        uint32_t high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            high[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
            low[i] = pack_bf16(x[2 * i] - bf16_low(high[i]), x[2 * i + 1] - bf16_high(high[i]));
        }
        mma_bf16(sum, triangle, ONE << 16 | ONE, 0, triangle, low[0], low[1]);
        mma_bf16(sum, triangle, ONE << 16 | ONE, 0, triangle, high[0], high[1]);
    }

    /* ---- Unbounded gates ---- */

    /*
     * The products of a subchunk with itself are of k exp(G - G_0) with k exp(G_0 - G), where G_0 is the decay of
     * the first token, which no product contains. exp(G_0 - G) is at most 2^WIDEST in the range of fp32 and tf32.
     * A row is *wide* in a slice if G_0 - G is larger in one of the slice's channels. The slice's part of its
     * products is then computed directly, pair by pair, with exp(G_i - G_j) of each channel.
     *
     * Whether a row is wide depends on the tokens up to the row's own alone, and the operands of wide rows and of
     * their columns are zeros, so that a token changes no bit of the tokens before it.
     */
    static constexpr float WIDEST = 110.0f;

    /* What is between the first token and this lane's tokens, in log2. */
    struct Width {
        float first[2][2]; /* the first token's sums, in this lane's channels: b, channel */
        bool wide[2];      /* the rows of tokens g and g + 8 */
        bool any;          /* whether any row of the slice is wide: equal in all lanes */

        __device__ float lead(int b, int i) const
        {
            return ex2(first[b][i]);
        }
    };

    __device__ Width find_width(const float (&sum)[2][4]) const
    {
        Width x = {};
        float least = 0.0f;
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                x.first[b][i] = __shfl_sync(~0u, sum[b][i], t);
                least = fminf(least, sum[b][2 + i] - x.first[b][i]); /* token g + 8 comes after token g */
            }
        x.any = __any_sync(~0u, least < -WIDEST);
        if (__builtin_expect(x.any, 0))
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int wide = false;
#pragma unroll
                for (int b = 0; b < 2; b++)
#pragma unroll
                    for (int i = 0; i < 2; i++) wide |= sum[b][2 * e + i] - x.first[b][i] < -WIDEST;
                wide |= __shfl_xor_sync(~0u, wide, 1);
                x.wide[e] = wide | __shfl_xor_sync(~0u, wide, 2);
            }
        return x;
    }

    /* The channel of `pair`, two neighbours in bf16, times a factor. */
    static __device__ float element(uint32_t pair, int i, float factor)
    {
        return (i ? bf16_high(pair) : bf16_low(pair)) * factor;
    }

    /* Adds a slice's part of the products of wide rows to `within`, in the units of products in tf32. Element i of
     * half b of the slice's channels is at lane t = channel of each token's quad. */
    __device__ void add_wide_rows(float (&within)[3][4], const Width &width, const float (&sum)[2][4],
                                  const uint32_t (&raw_k)[4], const uint32_t (&raw_q)[4],
                                  const float *factor) const
    {
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll 1
                for (int of = 0; of < 4; of++) {
                    float row_sum[2], row_k[2], row_q[2]; /* of tokens g and g + 8 */
                    float column_sum[2][2], column_k[2][2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float own_sum = sum[b][2 * e + i],
                                    own_k = element(raw_k[2 * b + e], i, factor[8 * e]);
                        row_sum[e] = __shfl_sync(~0u, own_sum, 4 * g + of);
                        row_k[e] = __shfl_sync(~0u, own_k, 4 * g + of) * (1.0f / UNTRUNCATE);
                        if (Block::OUTPUTS)
                            row_q[e] =
                                __shfl_sync(~0u, element(raw_q[2 * b + e], i, factor[Block::CHUNK + 8 * e]),
                                            4 * g + of) *
                                (1.0f / UNTRUNCATE);
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            column_sum[e][j] = __shfl_sync(~0u, own_sum, 4 * (2 * t + j) + of);
                            column_k[e][j] = __shfl_sync(~0u, own_k, 4 * (2 * t + j) + of);
                        }
                    }
                    /* Row 8 e + g, columns 8 f + 2 t and the next one. What is above the diagonal counts for
                     * nothing, and must be finite. */
#pragma unroll
                    for (int tile = 0; tile < 3; tile++) {
                        const int e = tile > 0, f = tile > 1;
                        float(&to_k)[4] = within[Block::OUTPUTS ? tile : f];
                        const int at = Block::OUTPUTS ? 0 : 2 * e;
                        if (!width.wide[e]) continue;
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const float with =
                                column_k[f][j] * ex2(fminf(row_sum[e] - column_sum[f][j], 0.0f));
                            to_k[at + j] = __fmaf_rn(row_k[e], with, to_k[at + j]);
                            if (Block::OUTPUTS) to_k[2 + j] = __fmaf_rn(row_q[e], with, to_k[2 + j]);
                        }
                    }
                }
    }

    /* ---- A slice ---- */

    /*
     * Prepares 16 channels of subchunk `sub`: writes the decayed tiles K~, Q~ and Kr over k, q and g, and
     * adds the products over the 16 channels to `sums`. The products of the subchunk with itself go to the
     * last element of `within`, from which Preparation::prepare() moves those of the first subchunk to
     * within[0] before the second subchunk begins.
     *
     * Decays are counted from the subchunk's start. So when the second subchunk is done, its K~ and Q~ are
     * multiplied by the decay over the first subchunk, and the first one's Kr by the decay over the second.
     * The products of the second subchunk with the first one are taken before these multiplications, while
     * the decays in K~ and Q~ of the second and in Kr of the first are counted from the border between them.
     *
     * `at` is this lane's row of the slice's gates; `offset` is the gate offset of its first channel,
     * `factor` the inverse norm of this lane's first token, and `gamma` has the channels' sums over all
     * tokens so far.
     */
    __device__ void prepare_slice(int sub, uint32_t at, const float *offset, const float *factor,
                                  float *gamma, const GatesInMemory &memory, Sums &sums) const
    {
        const bool second = SUBCHUNKS == 2 && sub == 1;
        float sum[2][4], over[2][2]; /* over: the decay over this subchunk */
        uint32_t raw_k[4], raw_q[4], k_decayed[4], q_decayed[4], rest[4]; /* channel / 8, token / 8 */
        accumulate_gates(at, offset, memory, sub, sum);
        load_matrices(raw_k, at + K * Block::HALF_TOKENS);
        if (Block::OUTPUTS) load_matrices(raw_q, at + Q * Block::HALF_TOKENS);

        /* ---- Elements, and products of the subchunk with itself ---- */
        float(&within)[3][4] = sums.within[SUBCHUNKS - 1];
        Width width = {};
        if (Block::GENERAL) width = find_width(sum);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            float k_up[2][2], q_up[2][2], k_down[2][2]; /* token / 8, channel */
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t pair_k = raw_k[2 * b + e];
                    const float k = (i ? bf16_high(pair_k) : bf16_low(pair_k)) * factor[8 * e];
                    const float log2 =
                        Block::GENERAL ? sum[b][2 * e + i] - width.first[b][i] : sum[b][2 * e + i];
                    const float up = ex2(log2);
                    k_up[e][i] = k * up;
                    if (Block::OUTPUTS) {
                        const uint32_t pair_q = raw_q[2 * b + e];
                        q_up[e][i] =
                            (i ? bf16_high(pair_q) : bf16_low(pair_q)) * factor[Block::CHUNK + 8 * e] * up;
                    }
                    k_down[e][i] = k * ex2(-log2);
                    if (e == 1) over[b][i] = __shfl_sync(~0u, up, 4 * 7 + t);
                }
            if constexpr (Block::GENERAL) {
                const float lead[2] = {width.lead(b, 0), width.lead(b, 1)};
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int n = 2 * b + e;
                    k_decayed[n] = pack_half(k_up[e][0] * lead[0], k_up[e][1] * lead[1]);
                    if (Block::OUTPUTS) q_decayed[n] = pack_half(q_up[e][0] * lead[0], q_up[e][1] * lead[1]);
                    rest[n] = pack_half(k_down[e][0] * over[b][0], k_down[e][1] * over[b][1]);
                }
                over[b][0] *= lead[0], over[b][1] *= lead[1];
                if (__builtin_expect(width.any, 0)) {
                    const float last[2] = {__shfl_sync(~0u, sum[b][2], 4 * 7 + t),
                                           __shfl_sync(~0u, sum[b][3], 4 * 7 + t)};
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float k_rest[2];
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            k_rest[i] = element(raw_k[2 * b + e], i, factor[8 * e]) *
                                        ex2(last[i] - sum[b][2 * e + i]);
                            if (width.wide[e]) k_up[e][i] = q_up[e][i] = k_down[e][i] = 0.0f;
                        }
                        rest[2 * b + e] = pack_half(k_rest[0], k_rest[1]);
                    }
                }
            }
            if constexpr (Block::OUTPUTS) {
                mma_tf32(within[0], k_up[0][0], q_up[0][0], k_up[0][1], q_up[0][1], k_down[0][0],
                         k_down[0][1]);
                mma_tf32(within[1], k_up[1][0], q_up[1][0], k_up[1][1], q_up[1][1], k_down[0][0],
                         k_down[0][1]);
                mma_tf32(within[2], k_up[1][0], q_up[1][0], k_up[1][1], q_up[1][1], k_down[1][0],
                         k_down[1][1]);
            } else {
                mma_tf32(within[0], k_up[0][0], k_up[1][0], k_up[0][1], k_up[1][1], k_down[0][0],
                         k_down[0][1]);
                mma_tf32(within[1], k_up[0][0], k_up[1][0], k_up[0][1], k_up[1][1], k_down[1][0],
                         k_down[1][1]);
            }
            if constexpr (!Block::GENERAL)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    k_decayed[2 * b + e] = pack_half(k_up[e][0], k_up[e][1]);
                    if (Block::OUTPUTS) q_decayed[2 * b + e] = pack_half(q_up[e][0], q_up[e][1]);
                    rest[2 * b + e] = pack_half(k_down[e][0] * over[b][0], k_down[e][1] * over[b][1]);
                }
        }
        if (Block::GENERAL && __builtin_expect(width.any, 0))
            add_wide_rows(within, width, sum, raw_k, raw_q, factor);
        store_matrices(at, rest);

        /* ---- The second subchunk with the first one ---- */
        if (second) {
            uint32_t k_rest[4];
            load_matrices(k_rest, at - SUBCHUNK_BYTES);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                mma_half(sums.across[0][n], k_decayed[0], k_decayed[1], k_decayed[2], k_decayed[3], k_rest[n],
                         k_rest[2 + n]);
                if (Block::OUTPUTS)
                    mma_half(sums.across[1][n], q_decayed[0], q_decayed[1], q_decayed[2], q_decayed[3],
                             k_rest[n], k_rest[2 + n]);
            }
#pragma unroll
            for (int b = 0; b < 2; b++) {
                float2 &all = *reinterpret_cast<float2 *>(&gamma[gamma_place(8 * b + 2 * t)]);
                const float2 first = all;
                const uint32_t over_first = pack_half(ex2(first.x), ex2(first.y)),
                               over_second = pack_half(over[b][0], over[b][1]);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int i = 2 * b + e;
                    k_rest[i] = multiply_halves(k_rest[i], over_second);
                    k_decayed[i] = multiply_halves(k_decayed[i], over_first);
                    if (Block::OUTPUTS) q_decayed[i] = multiply_halves(q_decayed[i], over_first);
                }
                sum[b][2] += first.x, sum[b][3] += first.y;
            }
            store_matrices(at - SUBCHUNK_BYTES, k_rest);
        }

        /* ---- Tiles and sums to shared memory ---- */
        store_matrices(at + K * Block::HALF_TOKENS, k_decayed);
        if (Block::OUTPUTS) store_matrices(at + Q * Block::HALF_TOKENS, q_decayed);
        __syncwarp(); /* all lanes have read the sums of the first subchunk */
        if (g == 7)
#pragma unroll
            for (int b = 0; b < 2; b++)
                *reinterpret_cast<float2 *>(&gamma[gamma_place(8 * b + 2 * t)]) =
                    make_float2(sum[b][2], sum[b][3]);
    }
};

} // namespace fkda

#endif
