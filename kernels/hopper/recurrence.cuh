/*
 * The recurrence role: the state through a sequence's chunks, in order. A warpgroup owns 64 rows of V and all of K, as the
 * transposed state S^T [V, K] in fp32 accumulators of wgmma; warp w of it has rows 16 w to 16 w + 15, lane (g, t) of that
 * rows permuted(g) and permuted(g) + 2. Accumulators serve as A operands as they are, B comes from the
 * tiles of the stage, and neither the state nor U passes through shared memory.
 */
#ifndef FKDA_HOPPER_RECURRENCE_CUH
#define FKDA_HOPPER_RECURRENCE_CUH

#include "shared.cuh"

namespace fkda
{

/* Row r of the 16 of a warp stands for row permuted(r) of V: rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 for the neighbours 4 t to
 * 4 t + 3, which a lane holds after a transposition. */
__device__ __forceinline__ int permuted(int row)
{
    return row % 8 / 2 * 4 + row % 2 + row / 8 * 2;
}

template <int rows> struct Recurrence {
    static constexpr int WARPS = rows / 16;
    const fkda_fwd_args &args;
    Shared &shared;
    int lane, g, t;
    int warp_row; /* the warp's first row of V, within the piece */
    /* state[s]: rows permuted(g), the same, + 2, + 2 and channels 8 s + 2 t, + 1, + 0, + 1 */
    float state[DIM / 8][4];
    float scale[2]; /* of the two rows, powers of two: state, V and U are kept divided by them */

    __device__ Recurrence(const fkda_fwd_args &a, Shared &s, int thread)
        : args(a), shared(s), lane(thread % 32), g(lane / 4), t(lane % 4), warp_row(thread / 32 * 16)
    {
    }

    /* Where this lane's part of a task's state begins, in elements. */
    __device__ long long state_begin(const Walk<rows> &walk) const
    {
        const int row = walk.first_row() + warp_row + permuted(g);
        return static_cast<long long>(walk.index()) * (DIM * DIM) + (row * DIM + 2 * t);
    }

    __device__ void load_state(long long begin)
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const long long at = begin + 2 * r * DIM + 8 * s;
                float2 x = make_float2(0, 0);
                if (args.initial_state && args.state_is_bf16) {
                    uint32_t pair = *reinterpret_cast<const uint32_t *>(
                        static_cast<const uint16_t *>(args.initial_state) + at);
                    x = make_float2(bf16_low(pair), bf16_high(pair));
                } else if (args.initial_state) {
                    x = *reinterpret_cast<const float2 *>(static_cast<const float *>(args.initial_state) + at);
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
                const long long at = begin + 2 * r * DIM + 8 * s;
                const float x = state[s][2 * r] * scale[r], y = state[s][2 * r + 1] * scale[r];
                if (args.state_is_bf16)
                    *reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(args.final_state) + at) =
                        pack_bf16(x, y);
                else
                    store_two(static_cast<float *>(args.final_state) + at, x, y);
            }
    }

    /* Where this lane's rows of V are in v and out at a sequence's token g, in bytes. A lane loads and stores four rows of
     * tokens g and g + 8 of a chunk, which a transposition makes the lane's two rows of four tokens. */
    __device__ long long value_begin(const Walk<rows> &walk, const Task &task) const
    {
        return 2 * (((task.begin + g) * args.heads + task.head) * DIM + walk.first_row() + warp_row + 4 * t);
    }

    /* Of the chunk at `at`, which has `left` tokens. */
    __device__ void load_values(uint2 (&v)[2], long long at, int left) const
    {
        const char *from = static_cast<const char *>(args.v) + at;
        v[0] = load_8_if(from, g < left);
        v[1] = load_8_if(from + args.half_chunk_bytes, g + 8 < left);
    }

    /* v^T: rows as in the state, tile i has tokens 8 i + 2 t, + 1, + 0, + 1. */
    __device__ static void transpose_values(float (&v)[2][4], const uint2 (&raw)[2])
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t x = transpose_matrix(raw[i].x), y = transpose_matrix(raw[i].y);
            v[i][0] = bf16_low(x), v[i][1] = bf16_high(x);
            v[i][2] = bf16_low(y), v[i][3] = bf16_high(y);
        }
    }

    /* The largest |v| of this lane's tokens in row r. */
    __device__ static float largest(const float (&v)[2][4], int r)
    {
        return fmaxf(fmaxf(fabsf(v[0][2 * r]), fabsf(v[0][2 * r + 1])),
                     fmaxf(fabsf(v[1][2 * r]), fabsf(v[1][2 * r + 1])));
    }

    /* 1 / x for a power of two within 2^-126 and 2^126. */
    __device__ static float inverse_power(float x)
    {
        return __uint_as_float(0x7f000000u - __float_as_uint(x));
    }

    /* Chooses both rows' scales anew, so that the largest of the state and the coming values is in [1/2, 1). */
    __device__ void rescale(const float (&v)[2][4])
    {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = 0.0f;
#pragma unroll
            for (int s = 0; s < DIM / 8; s++)
                most = fmaxf(most, fmaxf(fabsf(state[s][2 * r]), fabsf(state[s][2 * r + 1])));
            most = fmaxf(most * scale[r], largest(v, r));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const float above = __uint_as_float((__float_as_uint(most) & 0x7f800000u) + 0x00800000u);
            const float next = fminf(fmaxf(above, fmaxf(scale[r] * 0x1p-100f, 0x1p-126f)), 0x1p126f);
            const float factor = scale[r] * inverse_power(next);
#pragma unroll
            for (int s = 0; s < DIM / 8; s++) state[s][2 * r] *= factor, state[s][2 * r + 1] *= factor;
            scale[r] = next;
        }
    }

    /* Products take the state, R and U as fp16. A row of the state grows by at most the square root of the sum of its v^2
     * (normalised keys, decays below 1), so that with |v| <= 16 scales and 2^20 tokens it stays below 2^14.1 of
     * fp16's 2^16. Rows that fade are scaled up again: every eighth chunk is looked at, if v is small there. */
    __device__ void keep_in_range(const float (&v)[2][4], bool first, bool look)
    {
        const float top = largest(v, 0), low = largest(v, 1);
        const bool large = first | (top > 16.0f * scale[0]) | (low > 16.0f * scale[1]);
        const bool act = large | (look & ((top < 0x1p-9f * scale[0]) | (low < 0x1p-9f * scale[1])));
        if (__any_sync(~0u, act)) rescale(v);
    }

    /* Two tiles of accumulators side by side as an A operand. */
    __device__ static void pack_operand(uint32_t (&a)[4], const float (&x)[4], const float (&y)[4])
    {
        a[0] = pack_half(x[0], x[1]), a[1] = pack_half(x[2], x[3]);
        a[2] = pack_half(y[0], y[1]), a[3] = pack_half(y[2], y[3]);
    }

    /* Tile i of the sum has tokens 8 i to 8 i + 7. */
    __device__ void store_output(const float (&x)[2][4], const float (*y)[4], long long at, int left) const
    {
        const float top = args.scale * scale[0], low = args.scale * scale[1];
        char *to = static_cast<char *>(args.out) + at;
#pragma unroll
        for (int i = 0; i < 2; i++, to += args.half_chunk_bytes) {
            const uint32_t a = pack_bf16((x[i][0] + y[i][0]) * top, (x[i][1] + y[i][1]) * top);
            const uint32_t b = pack_bf16((x[i][2] + y[i][2]) * low, (x[i][3] + y[i][3]) * low);
            store_8_if(to, make_uint2(transpose_matrix(a), transpose_matrix(b)), g + 8 * i < left);
        }
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

    /* One chunk with values v^T; leaves (Q~ S)^T in both[2] and both[3] and, in flight with the update of the state, what
     * the chunk's own tokens add to it in `own`. `stage` counts in descriptors. */
    __device__ void step(const float *gamma_minus_1, int stage, const float (&v)[2][4], float (&both)[4][4],
                         float (&own)[2][4])
    {
        const Stage &first = shared.stage[0];
        float u[2][4]; /* of R^T = (V - K~ S)^T, then of U^T; 8 tokens to a tile */
        uint32_t a[DIM / 16][4];
#pragma unroll
        for (int s = 0; s < DIM / 16; s++) pack_operand(a[s], state[2 * s], state[2 * s + 1]);
        wgmma_fence();
        wgmma<false, false>(both, a[0], first.decayed.operand(0) + stage);
#pragma unroll
        for (int s = 1; s < DIM / 16; s++) wgmma<true, false>(both, a[s], first.decayed.operand(s) + stage);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) u[i][r] = __fmaf_rn(v[i][r], inverse_power(scale[r / 2]), -both[i][r]);
        pack_operand(a[0], u[0], u[1]);
        wgmma_fence();
        wgmma<false, true>(u, a[0], first.solve.operand(0) + stage);
        wgmma_commit();
        decay(gamma_minus_1);
        wgmma_wait<0>();
        pack_operand(a[1], u[0], u[1]);
        wgmma_fence();
        wgmma<false, false>(own, a[1], first.attend.operand(0) + stage);
        wgmma_commit();
        wgmma<true, true>(state, a[1], first.k_rest.operand(0) + stage);
        wgmma_commit();
    }

    __device__ void run()
    {
        Slot<STAGES> slot(0);
        for (Walk<rows> walk; !walk.done(args); walk.advance()) {
            const Task task = find_task(args, walk.index());
            long long at = value_begin(walk, task);
            uint2 raw[2];
            load_values(raw, at, task.length);
            load_state(state_begin(walk));
            scale[0] = scale[1] = 1.0f;
            for (int left = task.length; left > 0; left -= CHUNK) {
                float v[2][4], both[4][4], own[2][4];
                transpose_values(v, raw);
                keep_in_range(v, left == task.length, (left & 7 * CHUNK) == 0);
                load_values(raw, at + args.chunk_bytes, left - CHUNK);
                mbarrier_wait(&shared.stages.full[slot.index], slot.parity);
                step(shared.stage[slot.index].gamma_minus_1, slot.index * static_cast<int>(sizeof(Stage) / 16), v,
                     both, own);
                wgmma_wait<1>();
                store_output(own, &both[2], at, left);
                at += args.chunk_bytes;
                wgmma_wait<0>();
                __syncwarp();
                if (lane == 0) mbarrier_arrive(&shared.stages.empty[slot.index]);
                slot.advance(1);
            }
            if (args.final_state) store_state(state_begin(walk));
        }
    }
};

} // namespace fkda

#endif
