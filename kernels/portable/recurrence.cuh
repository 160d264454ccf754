/*
 * The recurrence: carries the state through a sequence's chunks, in order.
 *
 * Algorithm. For each chunk, with the matrices of its stage (shared.cuh) and S the state:
 *
 *     R = V - K~ S      U = T R      O = Q~ S + P U      S = diag(gamma) S + Kr^T U
 *
 * Layout. Warp w owns rows 16 w to 16 w + 15 of V and all of K, as the transposed state S^T [V, K] in fp32
 * accumulators, and needs nothing of other warps. An accumulator tile serves unchanged as an A operand: lane
 * t of a quad holds columns 2 t and 2 t + 1, which the product takes as its depths t and t + 4. B operands
 * are stored in that order.
 */
#ifndef FKDA_PORTABLE_RECURRENCE_CUH
#define FKDA_PORTABLE_RECURRENCE_CUH

#include "bad_tokens.cuh"

namespace fkda
{

/* d += tile (b0, b1), with an accumulator tile as the A operand. */
__device__ __forceinline__ void multiply(float (&d)[4], const float (&tile)[4], float b0, float b1)
{
    mma_tf32(d, tile[0], tile[2], tile[1], tile[3], b0, b1);
}

/* The recurrence of a CTA that carries `rows` rows of V. */
template <int rows> struct Recurrence {
    const fkda_fwd_args &args;
    const Task &task;
    Shared &shared;
    int lane, g, t;
    int first_row; /* of V, of this warp */
    /* state[j][h]: rows g, g, g + 8, g + 8 and channels 16 j + 4 t + 2 h, + 1, + 0, + 1 */
    float state[DIM / 16][2][4];

    __device__ Recurrence(const fkda_fwd_args &a, const Task &k, Shared &s, int thread, int row)
        : args(a), task(k), shared(s), lane(thread % 32), g(lane / 4), t(lane % 4),
          first_row(row + thread / 32 * FKDA_PORTABLE_ROWS_PER_WARP)
    {
    }

    /* ---- The state from and to memory ---- */

    /* Where this lane's part of a head's state begins, in elements of the state. */
    __device__ int state_begin() const
    {
        return (first_row + g) * DIM + 4 * t;
    }

    __device__ void load_state()
    {
        const bool is_there = shared.addresses.initial_state != NO_SLOT;
        const long long begin = shared.addresses.initial_state + state_begin();
#pragma unroll
        for (int j = 0; j < DIM / 16; j++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float4 x = make_float4(0, 0, 0, 0);
                if (is_there && args.state_is_bf16) {
                    uint2 b = *reinterpret_cast<const uint2 *>(
                        static_cast<const uint16_t *>(args.initial_state.data) + begin + 8 * r * DIM +
                        16 * j);
                    x = make_float4(bf16_low(b.x), bf16_high(b.x), bf16_low(b.y), bf16_high(b.y));
                } else if (is_there) {
                    x = *reinterpret_cast<const float4 *>(
                        static_cast<const float *>(args.initial_state.data) + begin + 8 * r * DIM + 16 * j);
                }
                state[j][0][2 * r] = x.x, state[j][0][2 * r + 1] = x.y;
                state[j][1][2 * r] = x.z, state[j][1][2 * r + 1] = x.w;
            }
    }

    __device__ void store_state() const
    {
        const long long begin = shared.addresses.final_state + state_begin();
#pragma unroll
        for (int j = 0; j < DIM / 16; j++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float4 x = make_float4(state[j][0][2 * r], state[j][0][2 * r + 1], state[j][1][2 * r],
                                       state[j][1][2 * r + 1]);
                if (args.state_is_bf16)
                    *reinterpret_cast<uint2 *>(static_cast<uint16_t *>(args.final_state.data) + begin +
                                               8 * r * DIM + 16 * j) =
                        make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
                else
                    *reinterpret_cast<float4 *>(static_cast<float *>(args.final_state.data) + begin +
                                                8 * r * DIM + 16 * j) = x;
            }
    }

    /* ---- One chunk ---- */

    /* u = V^T of this warp's rows; tile i has tokens 8 i to 8 i + 7. */
    __device__ void load_values(int chunk, float (&u)[2][4]) const
    {
        uint32_t v[4];
        int token = lane % 8 + 8 * (lane / 16), row = first_row + lane / 8 % 2 * 8;
        load_matrices_transposed(v, &shared.v[slot<V_STAGES>(chunk)][token][value_column(token, row)]);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                u[i][2 * r] = bf16_low(v[2 * i + r]);
                u[i][2 * r + 1] = bf16_high(v[2 * i + r]);
            }
    }

    static __device__ bool all_finite(const float (&x)[2][4])
    {
        float zero = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) zero = __fmaf_rn(x[i / 4][i % 4], 0.0f, zero);
        return zero == 0.0f;
    }

    /* Makes bad rows of the state NaN. */
    __device__ void spoil_state(const bool (&is_bad)[2])
    {
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (is_bad[r])
#pragma unroll
                for (int i = 0; i < DIM / 8; i++)
                    state[i / 2][i % 2][2 * r] = state[i / 2][i % 2][2 * r + 1] = NAN;
    }

    /* d += u M^T for a lower triangular M of 16 x 16, whose upper right tile of 8 x 8 is zero. */
    __device__ void multiply_lower(float (&d)[2][4], const float (&u)[2][4],
                                   const float (&m)[CHUNK][CHUNK + 8]) const
    {
        float2 top = *reinterpret_cast<const float2 *>(&m[g][2 * t]);
        float2 left = *reinterpret_cast<const float2 *>(&m[g + 8][2 * t]);
        float2 right = *reinterpret_cast<const float2 *>(&m[g + 8][2 * t + 8]);
        multiply(d[0], u[0], top.x, top.y);
        multiply(d[1], u[0], left.x, left.y);
        multiply(d[1], u[1], right.x, right.y);
    }

    /* x = x gamma, given gamma - 1. */
    __device__ static void decay(float &x, float gamma_minus_1)
    {
        x = __fmaf_rn(x, gamma_minus_1, x);
    }

    /* S^T = S^T diag(gamma) + U^T Kr */
    __device__ void update_state(const Stage &stage, const float (&u)[2][4])
    {
#pragma unroll
        for (int j = 0; j < DIM / 16; j++) {
            float4 gamma_1 = *reinterpret_cast<const float4 *>(&stage.gamma_minus_1[16 * j + 4 * t]);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                decay(state[j][0][2 * r], gamma_1.x);
                decay(state[j][0][2 * r + 1], gamma_1.y);
                decay(state[j][1][2 * r], gamma_1.z);
                decay(state[j][1][2 * r + 1], gamma_1.w);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float4 k = stage.k_rest[4 * i + t][9 * j + g];
                multiply(state[j][0], u[i], k.x, k.y);
                multiply(state[j][1], u[i], k.z, k.w);
            }
        }
    }

    /* Stores the outputs of a chunk. A lane has two tokens of one row of V; the transposes make two
     * neighbouring rows of one token of them. */
    __device__ void store_output(int chunk, const float (&o)[2][4]) const
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t low = transpose_matrix(pack_bf16(o[i][0] * args.scale, o[i][1] * args.scale));
            uint32_t high = transpose_matrix(pack_bf16(o[i][2] * args.scale, o[i][3] * args.scale));
            int token = chunk * CHUNK + 8 * i + g;
            if (token >= task.length) continue;
            const int step = static_cast<int>(args.out_strides.token);
            char *row = shared.addresses.out + static_cast<long long>(token) * step * 2;
            uint32_t *to = reinterpret_cast<uint32_t *>(row) + first_row / 2 + t;
            to[0] = low;
            to[4] = high;
        }
    }

    /* ---- The role ---- */

    __device__ void run()
    {
        load_state();
        for (int chunk = 0; chunk < task.chunks; chunk++) {
            const Stage &stage = shared.stage[slot<STAGES>(chunk)];
            float r[2][4], u[2][4] = {}, o[2][4] = {};
            barrier_sync<FULL, STAGE_THREADS<rows>>(slot<STAGES>(chunk));
            load_values(chunk, r);
            bool is_bad[2] = {};
            const bool any_bad = __any_sync(~0u, !all_finite(r));
            if (__builtin_expect(any_bad, 0)) spoil_outputs(r, o, is_bad, t);
#pragma unroll
            for (int j = 0; j < DIM / 16; j++) { /* r = (V - K~ S)^T, o = (Q~ S)^T */
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = 8 * i + g, column = 16 * j + decayed_column(g, 4 * t);
                    float4 k = *reinterpret_cast<const float4 *>(&stage.minus_k_decayed[row][column]);
                    float4 q = *reinterpret_cast<const float4 *>(&stage.q_decayed[row][column]);
                    multiply(r[i], state[j][0], k.x, k.y);
                    multiply(o[i], state[j][0], q.x, q.y);
                    multiply(r[i], state[j][1], k.z, k.w);
                    multiply(o[i], state[j][1], q.z, q.w);
                }
            }
            if (__builtin_expect(any_bad, 0)) spoil_state(is_bad);
            multiply_lower(u, r, stage.solve);
            multiply_lower(o, u, stage.attend);
            update_state(stage, u);
            if (chunk + STAGES < task.chunks) barrier_arrive<EMPTY, STAGE_THREADS<rows>>(slot<STAGES>(chunk));
            store_output(chunk, o);
        }
        if (shared.addresses.final_state != NO_SLOT) store_state();
    }
};

} // namespace fkda

#endif
