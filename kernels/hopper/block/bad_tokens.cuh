/*
 * Bad tokens: a token whose key is not finite, or whose gate or write strength is NaN. Everything after such
 * a token is unknown, and everything before it must not change by a bit.
 *
 * Algorithm. In a product a NaN also meets the zeros of a triangular matrix. NaN times zero is NaN, which
 * would reach earlier tokens. So no NaN of a key, a gate or a write strength enters a product whose result is
 * used:
 *
 *   norms        The loader or the team stores 1 / |x|, which is 0 or NaN if the sum of squares is not
 *                finite.
 *   preparation  A NaN among a warp's gates makes the sum over the chunk NaN in its channel. A warp that
 *                finds such a sum, or a norm that is 0 or NaN, restores its inputs from global memory, with
 *                gates of -inf (a decay of one) in place of NaN and zeros in place of keys that are not
 *                finite. The warp then prepares the chunk once more, and tells the solver which token is the
 *                first bad one.
 *   solver       From the first bad token on, write strengths are zero, and NaN stands on the diagonal of P
 *                and in the state's decay over the chunk.
 *   recurrence   A value that is not finite is 0 in the products, and its row of V becomes NaN behind them:
 *                in what was read from the state for the outputs from its token on, and in the state.
 *
 * The functions of the first three steps are in this file, and prepare.cuh and solve.cuh call them. That of
 * the last step is spoil_rows() in scaled_rows.cuh, since it needs the scales of the rows.
 *
 * The diagonal of P brings NaN to the outputs of the first bad token and of all tokens after it in the chunk.
 * The decay brings NaN to the whole state, which brings it to all tokens after the chunk. A query that is not
 * finite gets a norm of NaN and stays in the products, because only its own row of them depends on it.
 *
 * Why. A chunk without bad tokens pays a look at the norms and a vote of each preparing warp, and two
 * comparisons of the solver. Everything else is code that is jumped over.
 */
#ifndef FKDA_HOPPER_BAD_TOKENS_CUH
#define FKDA_HOPPER_BAD_TOKENS_CUH

#include "shared.cuh"

namespace fkda
{

/* Two raw gates in bf16 that decay by exactly nothing. */
template <class Block> __device__ __forceinline__ uint32_t no_decay(const fkda_fwd_args &args)
{
    constexpr uint32_t TWO_MINUS_INFINITIES = 0xff80ff80;
    return gate_of_call<Block>(args).neutral() == 0.0f ? 0 : TWO_MINUS_INFINITIES;
}

/* The unit of 16 bytes that holds channels 8 unit to 8 unit + 7 of a token, in half of the channels. */
__device__ __forceinline__ uint4 *token_unit(unsigned char *tile, int token, int unit)
{
    return reinterpret_cast<uint4 *>(tile + token * ROW + (unit ^ token % 8) * 16);
}

/* ---- Norms --------------------------------------------------------------------------------------------- */

/* Whether the sum of a token's squares was finite, by 1 / |x|. */
__device__ __forceinline__ bool is_usual_norm(float inverse_norm)
{
    return inverse_norm > 0.0f;
}

/* Stands in place of 1 / |k| of a key that is not finite and counts as zeros: -0.0, which the code tells from
 * +0.0 by its bits. */
constexpr float BAD_KEY = -0.0f;

/* 1 / |x| of a token whose sum of squares was not finite; `at` is its first channel in q or k.
 *
 * The squares of finite elements above 2^60 overflow; scaled down they do not. A key that is not finite
 * itself gets BAD_KEY and a query NaN. If q and k are used as they are, a key that comes here is bad even if
 * it is finite, since it would leave the range of fp16. */
template <class Block>
__device__ __forceinline__ float unusual_inverse_norm(const fkda_fwd_args &args, bool is_key, long long at)
{
    const void *tensor = is_key ? args.k : args.q;
    const float otherwise = is_key ? BAD_KEY : NAN;
    constexpr float DOWN = 0x1p-68f; /* 128 squares of less than 2^60 have a finite sum */
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < DIM; i += 8) {
        const Eight x = load_eight(tensor, at + i);
#pragma unroll
        for (int c = 0; c < 8; c++) sum = __fmaf_rn(x[c] * DOWN, x[c] * DOWN, sum);
    }
    if (Block::OPTIONS && args.qk_is_normalised) return sum < INFINITY && !is_key ? 1.0f : otherwise;
    return sum < INFINITY ? rsqrt_approx(sum) * DOWN : otherwise;
}

/* ---- Preparation --------------------------------------------------------------------------------------- */

/*
 * Restores the inputs of a chunk in this warp's channels, without what must not enter a product, and returns
 * the first bad token, or NO_TOKEN. `gate` and `offset` are finite, `key_factor` has 1 / |k| of all tokens.
 */
template <class Block, int channels>
__device__ __forceinline__ int restore_inputs(const fkda_fwd_args &args, Tokens<Block> &tokens,
                                              const ChunkCursor<Block> &at, int first_channel,
                                              const HeadGate &gate, const float *offset,
                                              const float *key_factor, int lane)
{
    constexpr int UNITS = channels / 8;
    int first_bad = NO_TOKEN;
    auto &half = tokens.half[first_channel / 64];
#pragma unroll 1
    for (int i = lane; i < Block::CHUNK * UNITS; i += 32) {
        const int token = i / UNITS, unit = i % UNITS, place = first_channel % 64 / 8 + unit;
        const uint32_t none = no_decay<Block>(args);
        uint32_t g[4] = {none, none, none, none};
        Eight k = {}, q = {};
        if (token < at.here()) {
            const int channel = first_channel + 8 * unit;
            const long long from = at.place(args.g_strides, token) + channel;
            const bool fp32 = has_fp32_gates<Block>(args);
            const Eight raw = fp32 ? Eight{} : load_eight(args.g, from);
            bool bad = __float_as_uint(key_factor[token]) == __float_as_uint(BAD_KEY);
            if (!bad) k = load_eight(args.k, at.place(args.k_strides, token, args.group) + channel);
            if (Block::QUERIES) q = load_eight(args.q, at.place(args.q_strides, token, args.group) + channel);
#pragma unroll
            for (int c = 0; c < 8; c++) {
                float log2_decay;
                if constexpr (Block::UNBOUNDED) {
                    float x[1] = {fp32 ? __ldg(static_cast<const float *>(args.g) + from + c) : raw[c]};
                    activate_gates(x, gate_of_call<Block>(args), gate, offset[8 * unit + c]);
                    log2_decay = x[0];
                } else
                    log2_decay = hopper_sigmoid_gate(raw[c], gate, offset[8 * unit + c]);
                const uint32_t mask = c % 2 ? 0xffff0000u : 0xffffu;
                if (log2_decay == log2_decay)
                    g[c / 2] = (g[c / 2] & ~mask) | (raw.pair[c / 2] & mask);
                else
                    bad = true;
            }
            if (bad) first_bad = min(first_bad, token);
        }
        *token_unit(half.tile[G], token, place) = make_uint4(g[0], g[1], g[2], g[3]);
        *token_unit(half.tile[K], token, place) = make_uint4(k.pair[0], k.pair[1], k.pair[2], k.pair[3]);
        if constexpr (Block::QUERIES)
            *token_unit(half.tile[Q], token, place) = make_uint4(q.pair[0], q.pair[1], q.pair[2], q.pair[3]);
    }
    return static_cast<int>(__reduce_min_sync(~0u, static_cast<uint32_t>(first_bad)));
}

/* ---- Solver -------------------------------------------------------------------------------------------- */

/* The chunk's first bad token, of its team and of the write strengths b. Resets products.first_bad for
 * the team's next chunk. */
template <class Block>
__device__ __forceinline__ int take_first_bad_token(Products<Block> &products, float b, int lane)
{
    const int first = min(products.first_bad, b == b ? NO_TOKEN : lane % Block::CHUNK);
    __syncwarp();
    if (lane == 0) products.first_bad = NO_TOKEN;
    return static_cast<int>(__reduce_min_sync(~0u, static_cast<uint32_t>(first)));
}

/* Makes the state after the chunk NaN. */
template <class Block> __device__ __forceinline__ void spoil_decay(Stage<Block> &stage, int lane)
{
#pragma unroll
    for (int i = 0; i < DIM / 32; i++) stage.gamma_minus_1[32 * i + lane] = NAN;
}

/* Makes the chunk's outputs NaN from token `first` on. */
template <class Block> __device__ __forceinline__ void spoil_outputs(Stage<Block> &stage, int first, int lane)
{
    constexpr uint16_t NAN_HALF = 0x7fff;
    if (lane >= first && lane < Block::CHUNK)
        reinterpret_cast<uint16_t *>(stage.attend.at(lane, lane / 8 * 8))[lane % 8] = NAN_HALF;
}

} // namespace fkda

#endif
