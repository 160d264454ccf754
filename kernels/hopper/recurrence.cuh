/*
 * The recurrence role: the state through a sequence's chunks, in order. A warpgroup owns 64 rows of V and all of K, as the
 * transposed state S^T [V, K] in fp32 accumulators of wgmma; warp w of it has rows 16 w to 16 w + 15, lane (g, t) of that
 * rows g and g + 8. Accumulators serve as A operands as they are, B comes from the
 * tiles of the stage, and neither the state nor U passes through shared memory.
 */
#ifndef FKDA_HOPPER_RECURRENCE_CUH
#define FKDA_HOPPER_RECURRENCE_CUH

#include "shared.cuh"

namespace fkda
{

/* For outputs Q~ S is read from the state beside K~ S, and there are four tiles of that instead of two. */
template <int rows, bool mixed> struct Recurrence {
    const fkda_fwd_args &args;
    Shared<rows> &shared;
    int lane, g, t;
    int warp_row;                  /* the warp's first row of V, of the piece's */
    int value_place, output_place; /* this lane's in the rows of v: for matrices of 8 x 8, for an output */
    /* state[s]: rows g, g, g + 8, g + 8 and channels 8 s + 2 t, + 1, + 0, + 1 */
    float state[DIM / 8][4];
    float scale[2];  /* of the two rows, powers of two: state, V and U are kept divided by them */
    bool look_again; /* the scales have just changed */
    bool faint;      /* since they were chosen a chunk had a strength below one */
    bool unit;       /* the piece is one of a map: values are zeros */

    __device__ Recurrence(const fkda_fwd_args &a, Shared<rows> &s, int thread)
        : args(a), shared(s), lane(thread & 31), g(lane >> 2), t(lane & 3), warp_row(thread >> 5 << 4)
    {
        const int half = (warp_row >> 6) * HALF_TOKENS, first = (warp_row & 63) >> 3;
        output_place = half + ((lane >> 1) * ROW | ((lane & 1) ^ first ^ (lane >> 1 & 7)) * 16);
        value_place = half + (matrix_row_by_token(lane) ^ first * 16);
    }

    /* Where this lane's part of a piece's state begins, in elements of the head's. */
    __device__ int state_begin(const Piece &piece) const
    {
        return (piece.first_row + warp_row + g) * DIM + 2 * t;
    }

    /* Tiles s, s + 1, ... of the state as they are in memory. */
    template <int s>
    static __device__ void load_tiles(float (&raw)[DIM / 8][4], const void *from, bool is_fp32, bool is_bf16)
    {
        float(&x)[4] = raw[s];
        x[0] = x[1] = x[2] = x[3] = 0.0f;
        load_two_if<8 * s>(x[0], x[1], from, is_fp32, is_bf16);
        load_two_if<8 * s + 8 * DIM>(x[2], x[3], from, is_fp32, is_bf16);
        if constexpr (s + 1 < DIM / 8) load_tiles<s + 1>(raw, from, is_fp32, is_bf16);
    }

    /* All loads are under way before the first is waited for. Nothing branches: ptxas would put wgmma in order. */
    __device__ void load_state(const Piece &piece)
    {
        const bool is_bf16 = piece.initial && piece.kind & INITIAL_BF16, is_fp32 = piece.initial && !is_bf16;
        const int begin = state_begin(piece);
        float raw[DIM / 8][4];
        load_tiles<0>(raw,
                      static_cast<const char *>(global_memory(piece.initial)) + begin * (is_bf16 ? 2 : 4),
                      is_fp32, is_bf16);
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x = raw[s][2 * r], y = raw[s][2 * r + 1];
                y = is_bf16 ? bf16_high(__float_as_uint(x)) : y;
                x = is_bf16 ? bf16_low(__float_as_uint(x)) : x;
                if constexpr (mixed) { /* element (i, i) of a matrix is the one at i * (DIM + 1) */
                    const int at = begin + 8 * r * DIM + 8 * s;
                    x = unit && at % (DIM + 1) == 0 ? 1.0f : x;
                    y = unit && (at + 1) % (DIM + 1) == 0 ? 1.0f : y;
                }
                state[s][2 * r] = x, state[s][2 * r + 1] = y;
            }
    }

    __device__ void store_state(const Piece &piece) const
    {
        void *to = global_memory(piece.final);
        const bool is_bf16 = piece.kind & FINAL_BF16;
        const int begin = state_begin(piece);
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int at = begin + 8 * r * DIM + 8 * s;
                const float x = state[s][2 * r] * scale[r], y = state[s][2 * r + 1] * scale[r];
                if (is_bf16)
                    *reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(to) + at) = pack_bf16(x, y);
                else
                    store_two(static_cast<float *>(to) + at, x, y);
            }
    }

    /* v^T: rows as in the state, tile i has tokens 8 i + 2 t, + 1, + 0, + 1. */
    __device__ void load_values(float (&v)[2][4], const Tokens<rows> &tokens) const
    {
        uint32_t x[4] = {};
        if (!mixed || !unit) load_matrices_transposed(x, &tokens.v[0][value_place]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i / 2][i % 2 * 2] = bf16_low(x[i]);
            v[i / 2][i % 2 * 2 + 1] = bf16_high(x[i]);
        }
    }

    /* The largest |v| of this lane's tokens in row r. */
    __device__ static float largest(const float (&v)[2][4], int r)
    {
        return fmaxf(fmaxf(fabsf(v[0][2 * r]), fabsf(v[0][2 * r + 1])),
                     fmaxf(fabsf(v[1][2 * r]), fabsf(v[1][2 * r + 1])));
    }

    /* Chooses both rows' scales anew, so that the largest of the state and the coming v is in [1/2, 1), and scales
     * the state and what was computed from it. */
    template <int tiles> __device__ void rescale(const float (&v)[2][4], float (&read)[tiles][4])
    {
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = 0.0f;
#pragma unroll
            for (int s = 0; s < DIM / 8; s++)
                most = fmaxf(most, fmaxf(fabsf(state[s][2 * r]), fabsf(state[s][2 * r + 1])));
            most = fmaxf(most * scale[r], largest(v, r));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            most = fminf(most, 0x1p126f);
            const float above = __uint_as_float((__float_as_uint(most) & 0x7f800000u) + 0x00800000u);
            const float next = fminf(fmaxf(above, fmaxf(scale[r] * 0x1p-100f, 0x1p-126f)), 0x1p126f);
            factor[r] = scale[r] * inverse_power(next);
            scale[r] = next;
        }
        look_again = __any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f);
        faint = false;
        if (!look_again) return;
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int s = 0; s < DIM / 8; s++) state[s][2 * r] *= factor[r], state[s][2 * r + 1] *= factor[r];
#pragma unroll
            for (int i = 0; i < tiles; i++) read[i][2 * r] *= factor[r], read[i][2 * r + 1] *= factor[r];
        }
    }

    /* Products take the state, R and U as fp16. A row of the state grows by at most the square root of the sum of its v^2
     * (normalised keys, decays below 1), so that with |v| <= 16 scales and 2^20 tokens it stays below 2^14.1 of
     * fp16's 2^16. */
    __device__ bool large(const float (&v)[2][4]) const
    {
        return (largest(v, 0) > 16.0f * scale[0]) | (largest(v, 1) > 16.0f * scale[1]);
    }

    /* What chunks need that are not just like the one before. Rows that fade are scaled up again: every eighth chunk is
     * looked at, and the one after each change, if v is small there. With a strength below one it is v * strength that is
     * held to the range, and the state could grow by 16 scales a token: so every eighth chunk chooses scales, if such a chunk
     * came by. */
    template <int tiles>
    __device__ void adapt(float (&v)[2][4], float (&read)[tiles][4], float strength, int left, bool first,
                          bool eighth)
    {
        if (left < CHUNK) { /* what follows the last token is of another sequence, or anything */
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int r = 0; r < 4; r++) v[i][r] = 8 * i + 2 * t + r % 2 < left ? v[i][r] : 0.0f;
        }
        if (strength < 1.0f) {
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int r = 0; r < 4; r++) v[i][r] *= strength, read[i][r] *= strength;
        }
        const bool small = (largest(v, 0) < 0x1p-9f * scale[0]) | (largest(v, 1) < 0x1p-9f * scale[1]);
        const bool act = large(v) | ((eighth | look_again) & small);
        look_again = false;
        if (__any_sync(~0u, act) || first || (eighth && faint)) rescale(v, read);
        faint |= strength < 1.0f;
    }

    /* Two tiles of accumulators side by side as an A operand. */
    __device__ static void pack_operand(uint32_t (&a)[4], const float (&x)[4], const float (&y)[4])
    {
        a[0] = pack_half(x[0], x[1]), a[1] = pack_half(x[2], x[3]);
        a[2] = pack_half(y[0], y[1]), a[3] = pack_half(y[2], y[3]);
    }

    /* A chunk's outputs turn through shared memory, of which tile i of the sum has tokens 8 i to 8 i + 7. With room of their
     * own they are stored while the next chunk's first product is on its way; else they go where the warp's v was, and
     * at once. */
    static constexpr bool LATER = Shared<rows>::OUTPUTS > 0;

    __device__ unsigned char *output_tile(int index) const
    {
        if constexpr (LATER)
            return shared.outputs[0];
        else
            return shared.tokens[index].v[0];
    }

    __device__ void leave_output(int index, const float (&x)[2][4], const float (*y)[4]) const
    {
        const float top = args.scale * scale[0], low = args.scale * scale[1];
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            pairs[2 * i] = pack_bf16((x[i][0] + y[i][0]) * top, (x[i][1] + y[i][1]) * top);
            pairs[2 * i + 1] = pack_bf16((x[i][2] + y[i][2]) * low, (x[i][3] + y[i][3]) * low);
        }
        store_matrices_transposed(shared_address(output_tile(index) + value_place), pairs);
        if (!LATER) fence_async_proxy(); /* later copies overwrite this */
    }

    /* Lane 2 i + h takes rows 8 h to 8 h + 7 of token i, */
    __device__ uint4 take_output(int index) const
    {
        __syncwarp();
        return *reinterpret_cast<const uint4 *>(output_tile(index) + output_place);
    }

    /* which go to byte `at`. */
    __device__ void store_output(uint4 row, long long at, bool valid) const
    {
        store_16_if(static_cast<char *>(args.out) + at, row, valid);
    }

    /* S^T = S^T diag(gamma) */
    __device__ void decay(const float *gamma_minus_1)
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s += 2) {
            const float4 x = *reinterpret_cast<const float4 *>(&gamma_minus_1[8 * s + 4 * t]);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                state[s][r] = __fmaf_rn(state[s][r], r % 2 ? x.y : x.x, state[s][r]);
                state[s + 1][r] = __fmaf_rn(state[s + 1][r], r % 2 ? x.w : x.z, state[s + 1][r]);
            }
        }
    }

    /* One chunk, with `left` tokens of the piece from its first on; its outputs will go to byte `at`. Leaves the update of the
     * state in flight and, for outputs, (Q~ S)^T in read[2] and read[3] and, in flight too, what the chunk's own tokens add to it
     * in `own`. If outputs are stored later, stores those of the chunk before. */
    template <int tiles>
    __device__ void step(int index, int left, bool first, long long at, float (&read)[tiles][4],
                         float (&own)[2][4])
    {
        const bool eighth = (left & 7 * CHUNK) == 0, whole = left >= CHUNK;
        const Stage &stage = shared.stage[index];
        const uint32_t tokens_place =
            descriptor_address(shared.tokens) + index * static_cast<int>(sizeof(Tokens<rows>) / 16);
        const uint32_t stage_place =
            descriptor_address(shared.stage) + index * static_cast<int>(sizeof(Stage) / 16);
        float v[2][4], u[2][4]; /* u: R^T = (V - K~ S)^T, then U^T */
        uint32_t a[DIM / 16][4];
        uint4 output;
        if constexpr (LATER && tiles == 4) output = take_output(index);
#pragma unroll
        for (int s = 0; s < DIM / 16; s++) pack_operand(a[s], state[2 * s], state[2 * s + 1]);
        wgmma_fence();
        wgmma<false, false>(read, a[0], Tokens<rows>::decayed(tokens_place, 0));
#pragma unroll
        for (int s = 1; s < DIM / 16; s++)
            wgmma<true, false>(read, a[s], Tokens<rows>::decayed(tokens_place, s));
        wgmma_commit();
        load_values(v, shared.tokens[index]);
        if constexpr (LATER && tiles == 4) store_output(output, at - args.chunk_bytes, !first);
        const float strength = stage.strength;
        const bool usual =
            !__any_sync(~0u, large(v)) && strength == 1.0f && !first && !eighth && whole && !look_again;
        wgmma_wait<0>();
        if (!usual) adapt(v, read, strength, left, first, eighth);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                u[i][r] = __fmaf_rn(v[i][r], inverse_power(scale[r / 2]), -read[i][r]);
        pack_operand(a[0], u[0], u[1]);
        wgmma_fence();
        wgmma<false, true>(u, a[0],
                           decltype(stage.solve)::operand(stage_place + offsetof(Stage, solve) / 16));
        wgmma_commit();
        decay(stage.gamma_minus_1);
        wgmma_wait<0>();
        pack_operand(a[1], u[0], u[1]);
        wgmma_fence();
        if constexpr (tiles == 4) {
            wgmma<false, false>(own, a[1],
                                decltype(stage.attend)::operand(stage_place + offsetof(Stage, attend) / 16));
            wgmma_commit();
        }
        wgmma<true, true>(state, a[1], Tokens<rows>::k_rest(tokens_place));
        wgmma_commit();
    }

    template <bool outputs> __device__ void walk_through(const Piece &piece, Slot<SLOTS> &slot)
    {
        long long at = 2 * (((piece.begin + lane / 2) * args.heads + piece.head) * DIM + piece.first_row +
                            warp_row + lane % 2 * 8);
        float read[outputs ? 4 : 2][4] = {}, own[2][4] = {};
        unit = piece.kind & UNIT;
        load_state(piece);
        scale[0] = scale[1] = 1.0f;
        look_again = faint = false;
        if ((piece.initial || (!outputs && unit)) && piece.length > 0) rescale(own, read);
        int left = piece.length;
        for (; left > 0; left -= CHUNK, at += args.chunk_bytes) {
            mbarrier_wait(&shared.chunks.ready[slot.index], slot.parity);
            step(slot.index, left, left == piece.length, at, read, own);
            if constexpr (outputs) {
                wgmma_wait<1>();
                leave_output(slot.index, own, &read[2]);
                if (!LATER) store_output(take_output(slot.index), at, lane / 2 < left);
            }
            wgmma_wait<0>();
            release(slot);
        }
        if (LATER && outputs && piece.length > 0)
            store_output(take_output(0), at - args.chunk_bytes, lane / 2 < left + CHUNK);
        if (piece.final) store_state(piece);
    }

    /* The warp has read all it needs of a chunk; the next one. */
    __device__ void release(Slot<SLOTS> &slot) const
    {
        uint64_t *empty = &shared.chunks.empty[slot.index];
        mbarrier_arrive_warp(empty);
        if (SHARERS<rows, mixed> == 2 && slot.index % 2 != sharer_rank<rows, mixed>())
            mbarrier_arrive_warp_there(empty);
        slot.advance(1);
    }

    /* A piece in which this warp has no rows. */
    __device__ void pass_by(const Piece &piece, Slot<SLOTS> &slot)
    {
        for (int left = piece.length; left > 0; left -= CHUNK) {
            mbarrier_wait(&shared.chunks.ready[slot.index], slot.parity);
            release(slot);
        }
    }

    __device__ void run()
    {
        Slot<SLOTS> slot(0);
        Walk walk(shared.pieces);
        for (;; walk.leave()) {
            const Piece &piece = walk.look(); /* read again where it is needed: registers are dear */
            if (piece.kind & NO_PIECE) break;
            if (mixed && piece.kind & HALF && warp_row >= 64)
                pass_by(piece, slot);
            else if (wants_outputs<mixed>(piece.kind))
                walk_through<true>(piece, slot);
            else
                walk_through<false>(piece, slot);
        }
    }
};

} // namespace fkda

#endif
