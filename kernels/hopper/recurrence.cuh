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

template <int rows> struct Recurrence {
    const fkda_fwd_args &args;
    Shared<rows> &shared;
    int lane, g, t;
    int warp_row; /* the warp's first row of V, of the piece's */
    /* state[s]: rows g, g, g + 8, g + 8 and channels 8 s + 2 t, + 1, + 0, + 1 */
    float state[DIM / 8][4];
    float scale[2];  /* of the two rows, powers of two: state, V and U are kept divided by them */
    bool look_again; /* the scales have just changed */
    bool faint;      /* since they were chosen a chunk had a strength below one */

    __device__ Recurrence(const fkda_fwd_args &a, Shared<rows> &s, int thread)
        : args(a), shared(s), lane(thread % 32), g(lane / 4), t(lane % 4), warp_row(thread / 32 * 16)
    {
    }

    /* Where this lane's part of a piece's state begins, in elements. */
    __device__ long long state_begin(const Piece &piece) const
    {
        const int row = piece.first_row + warp_row + g;
        return static_cast<long long>(piece.index) * (DIM * DIM) + (row * DIM + 2 * t);
    }

    __device__ void load_state(long long begin)
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const long long at = begin + 8 * r * DIM + 8 * s;
                float2 x = make_float2(0, 0);
                if (args.initial_state && args.state_is_bf16) {
                    uint32_t pair = *reinterpret_cast<const uint32_t *>(
                        static_cast<const uint16_t *>(args.initial_state) + at);
                    x = make_float2(bf16_low(pair), bf16_high(pair));
                } else if (args.initial_state) {
                    x = *reinterpret_cast<const float2 *>(static_cast<const float *>(args.initial_state) +
                                                          at);
                }
                state[s][2 * r] = x.x, state[s][2 * r + 1] = x.y;
            }
    }

    __device__ void store_state(long long begin) const
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const long long at = begin + 8 * r * DIM + 8 * s;
                const float x = state[s][2 * r] * scale[r], y = state[s][2 * r + 1] * scale[r];
                if (args.state_is_bf16)
                    *reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(args.final_state) + at) =
                        pack_bf16(x, y);
                else
                    store_two(static_cast<float *>(args.final_state) + at, x, y);
            }
    }

    /* v^T: rows as in the state, tile i has tokens 8 i + 2 t, + 1, + 0, + 1. */
    __device__ void load_values(float (&v)[2][4], const uint16_t (&from)[CHUNK][PITCH], int first_row) const
    {
        uint32_t x[4];
        load_matrices_transposed(x, &from[lane % 8 + lane / 16 * 8][first_row + warp_row + lane / 8 % 2 * 8]);
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

    /* Chooses both rows' scales anew, so that the largest of the state and the coming v * strength is in [1/2, 1), and scales
     * the state and what was computed from it. */
    __device__ void rescale(const float (&v)[2][4], float strength, float (&both)[4][4])
    {
        bool changed = false;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = 0.0f;
#pragma unroll
            for (int s = 0; s < DIM / 8; s++)
                most = fmaxf(most, fmaxf(fabsf(state[s][2 * r]), fabsf(state[s][2 * r + 1])));
            most = fmaxf(most * scale[r], largest(v, r) * strength);
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            most = fminf(most, 0x1p126f);
            const float above = __uint_as_float((__float_as_uint(most) & 0x7f800000u) + 0x00800000u);
            const float next = fminf(fmaxf(above, fmaxf(scale[r] * 0x1p-100f, 0x1p-126f)), 0x1p126f);
            const float factor = scale[r] * inverse_power(next);
#pragma unroll
            for (int s = 0; s < DIM / 8; s++) state[s][2 * r] *= factor, state[s][2 * r + 1] *= factor;
#pragma unroll
            for (int i = 0; i < 4; i++) both[i][2 * r] *= factor, both[i][2 * r + 1] *= factor;
            changed |= next != scale[r];
            scale[r] = next;
        }
        look_again = __any_sync(~0u, changed);
        faint = false;
    }

    /* Products take the state, R and U as fp16. A row of the state grows by at most the square root of the sum of its v^2
     * (normalised keys, decays below 1), so that with |v| <= 16 scales and 2^20 tokens it stays below 2^14.1 of
     * fp16's 2^16. With a strength below one it is v * strength that is held to this, and the state could grow by 16 scales a
     * token: so every eighth chunk looks at it anew, if such a chunk came by. Rows that fade are scaled up again: every
     * eighth chunk is looked at, and the one after each change, if v is small there. */
    __device__ bool in_range(const float (&v)[2][4], float strength, bool eighth)
    {
        const float top = largest(v, 0) * strength, low = largest(v, 1) * strength;
        const bool large = (top > 16.0f * scale[0]) | (low > 16.0f * scale[1]);
        const bool small = (top < 0x1p-9f * scale[0]) | (low < 0x1p-9f * scale[1]);
        faint |= strength < 1.0f;
        const bool act = large | ((eighth | look_again) & small) | (eighth & faint);
        look_again = false;
        return !__any_sync(~0u, act);
    }

    /* Two tiles of accumulators side by side as an A operand. */
    __device__ static void pack_operand(uint32_t (&a)[4], const float (&x)[4], const float (&y)[4])
    {
        a[0] = pack_half(x[0], x[1]), a[1] = pack_half(x[2], x[3]);
        a[2] = pack_half(y[0], y[1]), a[3] = pack_half(y[2], y[3]);
    }

    /* Tile i of the sum has tokens 8 i to 8 i + 7; lane 2 i + h stores rows 8 h to 8 h + 7 of token i at byte `at`. */
    __device__ void store_output(const float (&x)[2][4], const float (*y)[4], long long at, bool valid) const
    {
        const float top = args.scale * scale[0], low = args.scale * scale[1];
        uint16_t(&out)[CHUNK][24] = shared.out[warp_row / 16];
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            pairs[2 * i] = pack_bf16((x[i][0] + y[i][0]) * top, (x[i][1] + y[i][1]) * top);
            pairs[2 * i + 1] = pack_bf16((x[i][2] + y[i][2]) * low, (x[i][3] + y[i][3]) * low);
        }
        store_matrices_transposed(&out[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8], pairs);
        __syncwarp();
        const uint4 row = *reinterpret_cast<const uint4 *>(&out[lane / 2][lane % 2 * 8]);
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

    /* One chunk; leaves (Q~ S)^T in both[2] and both[3] and, in flight with the update of the state, what the chunk's own
     * tokens add to it in `own`. */
    __device__ void step(int index, int first_row, bool first, bool eighth, float (&both)[4][4],
                         float (&own)[2][4])
    {
        const Stage &base = shared.stage[0], &stage = shared.stage[index];
        const int offset = index * static_cast<int>(sizeof(Stage) / 16); /* in descriptors */
        float v[2][4], u[2][4];                                          /* u: R^T = (V - K~ S)^T, then U^T */
        uint32_t a[DIM / 16][4];
#pragma unroll
        for (int s = 0; s < DIM / 16; s++) pack_operand(a[s], state[2 * s], state[2 * s + 1]);
        wgmma_fence();
        wgmma<false, false>(both, a[0], base.decayed.operand(0) + offset);
#pragma unroll
        for (int s = 1; s < DIM / 16; s++) wgmma<true, false>(both, a[s], base.decayed.operand(s) + offset);
        wgmma_commit();
        load_values(v, stage.v, first_row);
        const float strength = stage.strength;
        const bool fits = in_range(v, strength, eighth);
        wgmma_wait<0>();
        if (first || !fits) rescale(v, strength, both);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                u[i][r] = strength * __fmaf_rn(v[i][r], inverse_power(scale[r / 2]), -both[i][r]);
        pack_operand(a[0], u[0], u[1]);
        wgmma_fence();
        wgmma<false, true>(u, a[0], base.solve.operand(0) + offset);
        wgmma_commit();
        decay(stage.gamma_minus_1);
        wgmma_wait<0>();
        pack_operand(a[1], u[0], u[1]);
        wgmma_fence();
        wgmma<false, false>(own, a[1], base.attend.operand(0) + offset);
        wgmma_commit();
        wgmma<true, true>(state, a[1], base.k_rest.operand(0) + offset);
        wgmma_commit();
    }

    __device__ void run()
    {
        Slot<STAGES> slot(0);
        Walk walk(shared.pieces);
        for (Piece piece = walk.take(); piece.index >= 0; piece = walk.take()) {
            long long at = 2 * (((piece.begin + lane / 2) * args.heads + piece.head) * DIM + piece.first_row +
                                warp_row + lane % 2 * 8);
            float both[4][4] = {}, own[2][4] = {};
            load_state(state_begin(piece));
            scale[0] = scale[1] = 1.0f;
            look_again = faint = false;
            if (args.initial_state && piece.length > 0) rescale(own, 1.0f, both);
            for (int left = piece.length; left > 0; left -= CHUNK, at += args.chunk_bytes) {
                mbarrier_wait(&shared.stages.full[slot.index], slot.parity);
                step(slot.index, piece.first_row, left == piece.length, (left & 7 * CHUNK) == 0, both, own);
                wgmma_wait<1>();
                store_output(own, &both[2], at, lane / 2 < left);
                wgmma_wait<0>();
                __syncwarp();
                if (lane == 0) mbarrier_arrive(&shared.stages.empty[slot.index]);
                slot.advance(1);
            }
            if (args.final_state) store_state(state_begin(piece));
        }
    }
};

} // namespace fkda

#endif
