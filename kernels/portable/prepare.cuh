/*
 * The preparation role: everything of a chunk that does not depend on the state, one or two chunks ahead of
 * the recurrence. Warp w owns channels 16 w to 16 w + 15; lane 4 p + t of it owns tokens 2 p and 2 p + 1 of
 * channels 16 w + 4 t to + 3. That is at once an 8-byte load, the A and B fragments of the products
 * over channels, and 16-byte stores of the prepared tiles.
 */
#ifndef FKDA_PORTABLE_PREPARE_CUH
#define FKDA_PORTABLE_PREPARE_CUH

#include "shared.cuh"

namespace fkda {

constexpr float LOG2_E = 1.4426950408889634f;

/* One lane's part of a chunk as it comes from memory; rows past the end are zeros. */
struct RawChunk {
    uint2 q[2], k[2], g[2];
    uint16_t beta; /* of token thread / 16 */
};

__device__ __forceinline__ void store_four(float *to, const float (&x)[4])
{
    *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

struct Preparation {
    const fkda_portable_args &args;
    const Task &task;
    Shared &shared;
    int thread, warp, pair, t; /* pair: tokens 2 pair, 2 pair + 1 */
    int channel;               /* the first of four */
    float gate_factor;         /* -exp(A_log) log2(e) */
    float dt_bias[4];
    float bound; /* lower_bound log2(e): decays are powers of two here */

    __device__ Preparation(const fkda_portable_args &a, const Task &k, Shared &s, int id)
        : args(a), task(k), shared(s), thread(id), warp(id / 32), pair(id % 32 / 4), t(id % 4),
          channel(16 * warp + 4 * t), bound(a.lower_bound * LOG2_E)
    {
        gate_factor = ex2(a.A_log[k.head] * LOG2_E) * -LOG2_E;
        float4 bias = *reinterpret_cast<const float4 *>(&a.dt_bias[k.head * DIM + channel]);
        dt_bias[0] = bias.x, dt_bias[1] = bias.y, dt_bias[2] = bias.z, dt_bias[3] = bias.w;
    }

    __device__ long long row(int token) const
    {
        return (task.begin + token) * args.heads + task.head;
    }

    __device__ void load(RawChunk &raw, int chunk) const
    {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int token = chunk * CHUNK + 2 * pair + e;
            raw.q[e] = raw.k[e] = raw.g[e] = make_uint2(0, 0);
            if (token >= task.length) continue;
            long long at = (row(token) * DIM + channel) / 4;
            raw.q[e] = __ldg(static_cast<const uint2 *>(args.q) + at);
            raw.k[e] = __ldg(static_cast<const uint2 *>(args.k) + at);
            raw.g[e] = __ldg(static_cast<const uint2 *>(args.g) + at);
        }
        int token = chunk * CHUNK + thread / CHUNK;
        raw.beta = token < task.length ? __ldg(static_cast<const uint16_t *>(args.beta) + row(token)) : 0;
    }

    /* Starts the copy of a chunk's values; a group is committed even if there is no such chunk. */
    __device__ void load_values(int chunk) const
    {
        if (chunk < task.chunks) {
            int r = thread / 16, c = thread % 16 * 8, token = chunk * CHUNK + r;
            bool valid = token < task.length;
            const uint16_t *from = static_cast<const uint16_t *>(args.v) + (valid ? row(token) * DIM + c : 0);
            copy_async_16(&shared.v[chunk % V_STAGES][r][c], from, valid);
        }
        copy_async_commit();
    }

    /* The running sums of the log2 decay of this lane's tokens, and those of tokens 7 and 15. */
    __device__ void accumulate_gates(const RawChunk &raw, int chunk, float (&sum)[2][4], float (&middle)[4],
                                     float (&last)[4]) const
    {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            bool valid = chunk * CHUNK + 2 * pair + e < task.length;
            float g[4] = {bf16_low(raw.g[e].x), bf16_high(raw.g[e].x), bf16_low(raw.g[e].y),
                          bf16_high(raw.g[e].y)};
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float sigmoid = rcp(1.0f + ex2((g[c] + dt_bias[c]) * gate_factor));
                sum[e][c] = valid ? sigmoid * bound : 0.0f;
            }
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float even = sum[0][c], running = even + sum[1][c];
#pragma unroll
            for (int distance = 1; distance < 8; distance *= 2) {
                float below = __shfl_up_sync(~0u, running, 4 * distance);
                if (pair >= distance) running += below;
            }
            float before = __shfl_up_sync(~0u, running, 4);
            sum[0][c] = pair ? before + even : even;
            sum[1][c] = running;
            middle[c] = __shfl_sync(~0u, running, 4 * 3 + t);
            last[c] = __shfl_sync(~0u, running, 4 * 7 + t);
        }
    }

    /* Leaves the sums of squares over this warp's channels in shared memory. */
    __device__ void store_squares(const float (&q)[2][4], const float (&k)[2][4]) const
    {
        float s[4];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            s[2 * e] = q[e][0] * q[e][0] + q[e][1] * q[e][1] + q[e][2] * q[e][2] + q[e][3] * q[e][3];
            s[2 * e + 1] = k[e][0] * k[e][0] + k[e][1] * k[e][1] + k[e][2] * k[e][2] + k[e][3] * k[e][3];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[i] += __shfl_xor_sync(~0u, s[i], 1);
            s[i] += __shfl_xor_sync(~0u, s[i], 2);
        }
        if (t == 0) shared.squares[warp][pair] = make_float4(s[0], s[1], s[2], s[3]);
    }

    /* Scales this lane's q by scale / |q| and its k by 1 / |k|. */
    __device__ void normalise(float (&q)[2][4], float (&k)[2][4]) const
    {
        float4 s = shared.squares[0][pair];
#pragma unroll
        for (int w = 1; w < PREPARE_WARPS; w++) {
            float4 part = shared.squares[w][pair];
            s.x += part.x, s.y += part.y, s.z += part.z, s.w += part.w;
        }
        const float q_factor[2] = {rsqrt_approx(s.x + 1e-6f) * args.scale, rsqrt_approx(s.z + 1e-6f) * args.scale};
        const float k_factor[2] = {rsqrt_approx(s.y + 1e-6f), rsqrt_approx(s.w + 1e-6f)};
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                q[e][c] *= q_factor[e];
                k[e][c] *= k_factor[e];
            }
    }

    /* Writes the decayed tiles of this lane's elements, and its warp's part of the two products over channels.
     * Exponents are taken relative to token 7: 16 tokens at the bound of -5 nats span e^80, and neither
     * e^35 nor e^-40 leaves fp32. */
    __device__ void decay(Stage &stage, const float (&q)[2][4], const float (&k)[2][4], const float (&sum)[2][4],
                          const float (&middle)[4], const float (&last)[4]) const
    {
        float q_up[2][4], k_up[2][4], k_down[2][4], q_decayed[2][4], minus_k_decayed[2][4], rest[2][4], gamma[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float to_middle = ex2(middle[c]), to_last = ex2(last[c] - middle[c]);
            gamma[c] = to_middle * to_last;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float up = ex2(sum[e][c] - middle[c]), down = ex2(middle[c] - sum[e][c]);
                q_up[e][c] = q[e][c] * up;
                k_up[e][c] = k[e][c] * up;
                k_down[e][c] = k[e][c] * down;
                q_decayed[e][c] = round_tf32(q_up[e][c] * to_middle);
                minus_k_decayed[e][c] = round_tf32(-(k_up[e][c] * to_middle));
                rest[e][c] = round_tf32(k_down[e][c] * to_last);
            }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            store_four(&stage.q_decayed[2 * pair + e][channel], q_decayed[e]);
            store_four(&stage.minus_k_decayed[2 * pair + e][channel], minus_k_decayed[e]);
        }
        stage.k_rest[pair][8 * warp + 2 * t] = make_float4(rest[0][0], rest[1][0], rest[0][2], rest[1][2]);
        stage.k_rest[pair][8 * warp + 2 * t + 1] = make_float4(rest[0][1], rest[1][1], rest[0][3], rest[1][3]);
        if (pair == 0) store_four(&stage.gamma[channel], gamma);
        store_products(0, k_up, k_down);
        store_products(1, q_up, k_down);
    }

    /* rows . columns^T over this warp's 16 channels. Row g of the tile is token 2 g and row g + 8 token
     * 2 g + 1; so are the columns of its two halves, and a lane gets four columns in a row. */
    __device__ void store_products(int which, const float (&rows)[2][4], const float (&columns)[2][4]) const
    {
        float even[4] = {}, odd[4] = {};
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
            mma_tf32(even, rows[0][c], rows[1][c], rows[0][c + 1], rows[1][c + 1], columns[0][c], columns[0][c + 1]);
            mma_tf32(odd, rows[0][c], rows[1][c], rows[0][c + 1], rows[1][c + 1], columns[1][c], columns[1][c + 1]);
        }
        float(&to)[CHUNK][CHUNK] = shared.partial[warp][which];
        *reinterpret_cast<float4 *>(&to[2 * pair][4 * t]) = make_float4(even[0], odd[0], even[1], odd[1]);
        *reinterpret_cast<float4 *>(&to[2 * pair + 1][4 * t]) = make_float4(even[2], odd[2], even[3], odd[3]);
    }

    /* Adds the warps' parts: L = tril(diag(b) K~ K^^T, -1) to its scratch, tril(Q~ K^^T) to the stage. */
    __device__ void add_products(Stage &stage, const RawChunk &raw, int chunk) const
    {
        int i = thread / CHUNK, j = thread % CHUNK;
        float sums[2];
#pragma unroll
        for (int which = 0; which < 2; which++) {
            sums[which] = shared.partial[0][which][i][j];
#pragma unroll
            for (int w = 1; w < PREPARE_WARPS; w++) sums[which] += shared.partial[w][which][i][j];
        }
        float logit = __uint_as_float(static_cast<uint32_t>(raw.beta) << 16);
        float b = chunk * CHUNK + i < task.length ? rcp(1.0f + ex2(logit * -LOG2_E)) : 0.0f;
        shared.l_columns[j][i] = j < i ? sums[0] * b : 0.0f;
        stage.attend[i][j] = j <= i ? round_tf32(sums[1]) : 0.0f;
        if (j == 0) shared.beta[i] = b;
    }

    /* (I + L)^-1 diag(b) by forward substitution in fp32, a column to a lane; run by one warp. */
    __device__ void solve(Stage &stage) const
    {
        int j = thread % CHUNK;
        float b = shared.beta[j], x[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; i++) x[i] = i == j ? b : 0.0f;
#pragma unroll
        for (int m = 0; m < CHUNK - 1; m++) {
            float column[CHUNK];
#pragma unroll
            for (int i = (m + 1) / 4 * 4; i < CHUNK; i += 4) {
                float4 four = *reinterpret_cast<const float4 *>(&shared.l_columns[m][i]);
                column[i] = four.x, column[i + 1] = four.y, column[i + 2] = four.z, column[i + 3] = four.w;
            }
#pragma unroll
            for (int i = m + 1; i < CHUNK; i++) x[i] = __fmaf_rn(-column[i], x[m], x[i]);
        }
        if (thread % 32 < CHUNK)
#pragma unroll
            for (int i = 0; i < CHUNK; i++) stage.solve[i][j] = round_tf32(x[i]);
    }

    __device__ void run() const
    {
        RawChunk next;
        load_values(0);
        load(next, 0);
        for (int chunk = 0; chunk < task.chunks; chunk++) {
            const RawChunk raw = next;
            Stage &stage = shared.stage[chunk % STAGES];
            if (chunk + 1 < task.chunks) load(next, chunk + 1);

            float q[2][4], k[2][4], sum[2][4], middle[4], last[4];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                q[e][0] = bf16_low(raw.q[e].x), q[e][1] = bf16_high(raw.q[e].x);
                q[e][2] = bf16_low(raw.q[e].y), q[e][3] = bf16_high(raw.q[e].y);
                k[e][0] = bf16_low(raw.k[e].x), k[e][1] = bf16_high(raw.k[e].x);
                k[e][2] = bf16_low(raw.k[e].y), k[e][3] = bf16_high(raw.k[e].y);
            }
            store_squares(q, k);
            accumulate_gates(raw, chunk, sum, middle, last);
            barrier_sync(PREPARE, PREPARE_THREADS);
            normalise(q, k);
            if (chunk >= STAGES) barrier_sync(EMPTY + chunk % STAGES, THREADS);
            load_values(chunk + 1);
            decay(stage, q, k, sum, middle, last);
            barrier_sync(PREPARE, PREPARE_THREADS);
            add_products(stage, raw, chunk);
            barrier_sync(PREPARE, PREPARE_THREADS);
            if (warp == 0) solve(stage);
            copy_async_wait<1>(); /* this chunk's values have landed; the next one's may be in flight */
            barrier_arrive(FULL + chunk % STAGES, THREADS);
        }
        copy_async_wait<0>();
    }
};

} // namespace fkda

#endif
