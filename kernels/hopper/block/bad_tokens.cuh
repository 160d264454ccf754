/*
 * Bad tokens: a token whose key, gate or write strength is not a number. Everything after such a token is
 * unknown, and everything before it must not change by a bit.
 *
 * Algorithm. A product multiplies a NaN by the zeros of a triangle, which are NaN too, and would carry it to
 * earlier tokens. So no NaN of a key, a gate or a write strength ever enters a product:
 *
 *   norms        A key that is not finite becomes a key of zeros, and all gates of its token become NaN.
 *   preparation  A NaN among a warp's gates makes the sum over the chunk NaN in its channel. The warp then
 *                restores its inputs from global memory, with gates of -inf (a decay of one) in place of NaN,
 *                prepares the chunk once more, and tells the solver which token is the first bad one.
 *   solver       From the first bad token on, write strengths are zero, and NaN stands on the diagonal of P
 *                and in the state's decay over the chunk.
 *
 * The diagonal of P brings NaN to the outputs of the first bad token and of all tokens after it in the chunk.
 * The decay brings NaN to the whole state, which brings it to all tokens after the chunk. A query that is not
 * finite needs none of this, because only its own row of the products depends on it. Values that are not
 * finite concern single rows of the state (scaled_rows.cuh).
 *
 * Why. A chunk without bad tokens pays two votes for the search. Everything else is a branch that is not
 * taken.
 */
#ifndef FKDA_HOPPER_BAD_TOKENS_CUH
#define FKDA_HOPPER_BAD_TOKENS_CUH

#include "shared.cuh"

namespace fkda
{

/* Two bf16. A gate of -inf decays by exactly nothing. */
constexpr uint32_t TWO_NANS = 0x7fc07fc0, TWO_MINUS_INFINITIES = 0xff80ff80;

/* The unit of 16 bytes that holds channels 8 unit to 8 unit + 7 of a token, in half of the channels. */
__device__ __forceinline__ uint4 *token_unit(unsigned char *tile, int token, int unit)
{
    return reinterpret_cast<uint4 *>(tile + token * ROW + (unit ^ token % 8) * 16);
}

/* ---- Norms --------------------------------------------------------------------------------------------- */

/* What 1 / |k| is for a token whose key is not finite: a zero that can be told from others. */
constexpr float BAD_KEY = -0.0f;

/*
 * Finds the norms of a subchunk's tokens whose sums of squares are not finite, in which case store_inverse_
 * norms has left 0 or NaN. `to` and `x` are as there; `first_half` is the half of the tokens that x points
 * into.
 *
 * The squares of finite elements above 2^60 overflow; scaled down they do not. A key that is not finite is
 * cleared, and its token's gates become NaN. The norm of a query that is not finite becomes NaN.
 */
template <class Block>
__device__ __forceinline__ void find_unusual_norms(float *to, Tokens<Block> &tokens, int which, int sub,
                                                   int lane)
{
    constexpr float DOWN = 0x1p-68f; /* 128 squares of less than 2^60 have a finite sum */
    __syncwarp();
    if (lane < SUBCHUNK && !(to[lane] > 0.0f)) {
        const int token = SUBCHUNK * sub + lane;
        float sum = 0.0f;
#pragma unroll 1
        for (int i = 0; i < DIM / 8; i++) {
            const uint4 raw = *token_unit(tokens.half[i / 8].tile[which], token, i % 8);
            const Eight x = {{raw.x, raw.y, raw.z, raw.w}};
#pragma unroll
            for (int c = 0; c < 8; c++) sum = __fmaf_rn(x[c] * DOWN, x[c] * DOWN, sum);
        }
        const bool finite = sum < INFINITY;
        to[lane] = finite ? rsqrt_approx(sum) * DOWN : which == K ? BAD_KEY : NAN;
        if (!finite && which == K)
#pragma unroll 1
            for (int i = 0; i < DIM / 8; i++) {
                *token_unit(tokens.half[i / 8].tile[K], token, i % 8) = make_uint4(0, 0, 0, 0);
                *token_unit(tokens.half[i / 8].tile[G], token, i % 8) =
                    make_uint4(TWO_NANS, TWO_NANS, TWO_NANS, TWO_NANS);
            }
    }
    __syncwarp();
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
        uint4 *const to_g = token_unit(half.tile[G], token, place), *const to_k = token_unit(half.tile[K],
                                                                                             token, place);
        uint32_t g[4] = {TWO_MINUS_INFINITIES, TWO_MINUS_INFINITIES, TWO_MINUS_INFINITIES,
                         TWO_MINUS_INFINITIES};
        Eight k = {}, q = {};
        if (token < at.left) {
            const long long from =
                ((at.token + token) * args.heads + at.head) * DIM + first_channel + 8 * unit;
            const Eight raw = load_eight(args.g, from);
            bool bad = __float_as_uint(key_factor[token]) == __float_as_uint(BAD_KEY);
            if (!bad) k = load_eight(args.k, from);
            if (Block::OUTPUTS) q = load_eight(args.q, from);
#pragma unroll
            for (int c = 0; c < 8; c++) {
                const float log2_decay = hopper_sigmoid_gate(raw[c], gate, offset[8 * unit + c]);
                const uint32_t mask = c % 2 ? 0xffff0000u : 0xffffu;
                if (log2_decay == log2_decay)
                    g[c / 2] = (g[c / 2] & ~mask) | (raw.pair[c / 2] & mask);
                else
                    bad = true;
            }
            if (bad) first_bad = min(first_bad, token);
        }
        *to_g = make_uint4(g[0], g[1], g[2], g[3]);
        *to_k = make_uint4(k.pair[0], k.pair[1], k.pair[2], k.pair[3]);
        if constexpr (Block::OUTPUTS)
            *token_unit(half.tile[Q], token, place) = make_uint4(q.pair[0], q.pair[1], q.pair[2], q.pair[3]);
    }
    return static_cast<int>(__reduce_min_sync(~0u, static_cast<uint32_t>(first_bad)));
}

/* ---- Solver -------------------------------------------------------------------------------------------- */

/* The chunk's first bad token, of all warps of its team and of the write strengths b, or NO_TOKEN. What the
 * team has left is taken back for its next chunk. */
template <class Block>
__device__ __forceinline__ int first_bad_token(Products<Block> &products, float b, int lane)
{
    int first = b == b ? NO_TOKEN : lane % Block::CHUNK;
    if (lane < Block::TEAM_WARPS) {
        first = min(first, products.first_bad[lane]);
        products.first_bad[lane] = NO_TOKEN;
    }
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
