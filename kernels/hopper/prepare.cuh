/*
 * The preparation role: everything of a chunk that does not depend on the state, ahead of the recurrence. Each group of
 * four warps prepares every GROUPS-th chunk. Warp w of a group owns channels 32 w to 32 w + 31; lane (g, t) = (lane / 4,
 * lane % 4) of it owns tokens permuted(g) and permuted(g) + 2 of channels 32 w + 8 t to + 7. With rows of tokens
 * permuted like this, what 16-byte loads bring is at once A and B fragment of every product, no element changes lanes but
 * through the tensor core, and stores of the tiles are 8 and 16 bytes wide.
 */
#ifndef FKDA_HOPPER_PREPARE_CUH
#define FKDA_HOPPER_PREPARE_CUH

#include "shared.cuh"

namespace fkda
{

/* One chunk of one task of the walk. */
template <int rows> struct Position {
    Walk<rows> walk;
    int head;
    int left;        /* tokens of the sequence from the chunk's first on */
    long long token; /* the chunk's first, counted over the whole tensor */

    /* The chunk `chunks` after the first. */
    __device__ Position(const fkda_fwd_args &args, int chunks) : head(0), left(0), token(0)
    {
        if (walk.done(args)) return;
        enter(args);
        advance(args, chunks);
    }

    __device__ void enter(const fkda_fwd_args &args)
    {
        const Task task = find_task(args, walk.index());
        head = task.head, left = task.length, token = task.begin;
    }

    /* Goes on by `chunks`, into later tasks where this one ends. */
    __device__ void advance(const fkda_fwd_args &args, int chunks)
    {
        left -= chunks * CHUNK;
        token += chunks * CHUNK;
        while (left <= 0) {
            const int over = -left / CHUNK * CHUNK;
            walk.advance();
            if (walk.done(args)) return;
            enter(args);
            left -= over, token += over;
        }
    }
};

/* This lane's elements of a chunk, as they come from memory. */
struct Raw {
    Eight q[2], k[2], g[2];
};

__device__ __forceinline__ Eight load_eight_if(const void *base, long long at, bool valid)
{
    uint4 x = load_16_if(static_cast<const uint16_t *>(base) + at, valid);
    return {{x.x, x.y, x.z, x.w}};
}

__device__ __forceinline__ void store_eight(uint4 *to, const Eight &x)
{
    *to = make_uint4(x.pair[0], x.pair[1], x.pair[2], x.pair[3]);
}

__device__ __forceinline__ Eight pack_eight(const float *x)
{
    return {{pack_half(x[0], x[1]), pack_half(x[2], x[3]), pack_half(x[4], x[5]), pack_half(x[6], x[7])}};
}

template <int rows> struct Preparation {
    const fkda_fwd_args &args;
    Shared &shared;
    Scratch &scratch;
    int group, warp, lane, g, t;
    int token;           /* permuted(g) */
    int channel;         /* the first of eight */
    float inverse_bound; /* 1 / (lower_bound log2(e)): decays are powers of two here */

    float gate_factor;    /* of the task's head: -exp(A_log) log2(e) */
    float gate_offset[4]; /* that times dt_bias, of the channels that this lane has after a transposition */

    __device__ Preparation(const fkda_fwd_args &a, Shared &s, int thread)
        : args(a), shared(s), scratch(s.scratch[thread / GROUP_THREADS]), group(thread / GROUP_THREADS),
          warp(thread % GROUP_THREADS / 32), lane(thread % 32), g(lane / 4), t(lane % 4), token(permuted(g)),
          channel(32 * warp + 8 * t), inverse_bound(1.0f / (fminf(a.lower_bound, -1e-30f) * LOG2_E))
    {
    }

    __device__ void sync() const
    {
        barrier_sync<1, GROUP_THREADS>(group);
    }

    __device__ void load_gate_parameters(int head)
    {
        const float exponent = args.A_log[head] * LOG2_E;
        gate_factor = ex2(exponent > 100.0f ? 100.0f : exponent) * -LOG2_E; /* finite */
        const float *dt_bias = &args.dt_bias[head * DIM + 32 * warp + 8 * (g / 2) + g % 2];
#pragma unroll
        for (int b = 0; b < 4; b++) gate_offset[b] = dt_bias[2 * b] * gate_factor;
    }

    /* Zeros past the end. */
    __device__ void load(Raw &raw, const Position<rows> &at) const
    {
        const int step = args.heads * DIM;
        const long long from = (at.token + token) * step + at.head * DIM + channel;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const bool valid = token + 2 * e < at.left;
            raw.g[e] = load_eight_if(args.g, from + 2 * e * step, valid);
            raw.k[e] = load_eight_if(args.k, from + 2 * e * step, valid);
            raw.q[e] = load_eight_if(args.q, from + 2 * e * step, valid);
        }
    }

    /* Leaves the sums of squares over this warp's channels in shared memory: the diagonals of x x^T. */
    __device__ void store_squares(const Eight (&x)[2], float (&squares)[CHUNK][GROUP_WARPS]) const
    {
        float first[4] = {}, second[4] = {};
#pragma unroll
        for (int b = 0; b < 4; b += 2) {
            mma_bf16(first, x[0].pair[b], x[1].pair[b], x[0].pair[b + 1], x[1].pair[b + 1], x[0].pair[b],
                     x[0].pair[b + 1]);
            mma_bf16(second, x[0].pair[b], x[1].pair[b], x[0].pair[b + 1], x[1].pair[b + 1], x[1].pair[b],
                     x[1].pair[b + 1]);
        }
        if (t == g / 2) {
            squares[token][warp] = g % 2 ? first[1] : first[0];
            squares[token + 2][warp] = g % 2 ? second[3] : second[2];
        }
    }

    /* 1 / |x| of a token. */
    __device__ static float inverse_norm(const float (&squares)[GROUP_WARPS])
    {
        float4 s = *reinterpret_cast<const float4 *>(squares);
        return rsqrt_approx(s.x + s.y + (s.z + s.w) + 1e-6f);
    }

    /* sum[b]: the running sums of the log2 decay, of tokens `token`, `token`, + 2, + 2 and channels `channel` + 2 b, + 1,
     * + 0, + 1. Gates are evaluated transposed, four tokens of one channel to a lane, and added
     * up by the tensor core, which transposes back: once with the 13 low bits missing, once those. */
    __device__ void accumulate_gates(const Eight (&raw)[2], int valid, float (&sum)[4][4]) const
    {
        float ones[2][4]; /* row: this token, depth: the tokens up to it that exist */
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int j = 4 * t + 2 * i + r / 2;
                ones[i][r] = j <= token + r % 2 * 2 && j < valid ? 1.0f : 0.0f;
            }
#pragma unroll
        for (int b = 0; b < 4; b++) {
            float x[4], low[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t pair = transpose_matrix(raw[i].pair[b]);
                x[2 * i] = bf16_low(pair), x[2 * i + 1] = bf16_high(pair);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float e = ex2(__fmaf_rn(x[i], gate_factor, gate_offset[b]));
                x[i] = rcp(__fmaf_rn(e, inverse_bound, inverse_bound));
                low[i] = x[i] - __uint_as_float(__float_as_uint(x[i]) & 0xffffe000u);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) sum[b][i] = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                mma_tf32(sum[b], ones[i][0], ones[i][1], ones[i][2], ones[i][3], low[2 * i], low[2 * i + 1]);
                mma_tf32(sum[b], ones[i][0], ones[i][1], ones[i][2], ones[i][3], x[2 * i], x[2 * i + 1]);
            }
        }
    }

    /* Writes the state's decay over the chunk, less one: rounded to fp32 itself, the decay of a slow channel would be
     * off by the same amount chunk after chunk. The lanes with the last token know the sums; each of the eight
     * lanes with the same channels takes one. */
    __device__ void store_gamma(float *gamma, const float (&sum)[4][4]) const
    {
        if (g == 7) {
            store_four(&gamma[channel], sum[0][2], sum[0][3], sum[1][2], sum[1][3]);
            store_four(&gamma[channel + 4], sum[2][2], sum[2][3], sum[3][2], sum[3][3]);
        }
        __syncwarp();
        gamma[channel + g] = ex2_minus_1(gamma[channel + g]);
    }

    /* Writes the decayed tiles of this lane's elements, and its warp's part of the two products over channels. */
    __device__ void decay(Stage &stage, const Raw &raw, const float (&sum)[4][4]) const
    {
        float k_products[2][4] = {}, q_products[2][4] = {}, k_factor[2], q_factor[2];
        Eight k_decayed[2], q_decayed[2], k_rest[2]; /* packed to fp16 */
#pragma unroll
        for (int e = 0; e < 2; e++) {
            q_factor[e] = inverse_norm(scratch.squares[0][token + 2 * e]);
            k_factor[e] = inverse_norm(scratch.squares[1][token + 2 * e]);
        }
#pragma unroll
        for (int b = 0; b < 4; b++) {
            float k_up[2][2], q_up[2][2], k_down[2][2], last[2]; /* token, channel */
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const float k = raw.k[e][2 * b + c] * k_factor[e], q = raw.q[e][2 * b + c] * q_factor[e];
                    const float up = ex2(sum[b][2 * e + c]);
                    k_up[e][c] = k * -up;
                    q_up[e][c] = q * up;
                    k_down[e][c] = k * ex2(-sum[b][2 * e + c]);
                    if (e == 1) last[c] = __shfl_sync(~0u, up, 4 * 7 + t);
                }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                mma_tf32(k_products[n], k_up[0][0], k_up[1][0], k_up[0][1], k_up[1][1], k_down[n][0],
                         k_down[n][1]);
                mma_tf32(q_products[n], q_up[0][0], q_up[1][0], q_up[0][1], q_up[1][1], k_down[n][0],
                         k_down[n][1]);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                k_decayed[e].pair[b] = pack_half(k_up[e][0], k_up[e][1]);
                q_decayed[e].pair[b] = pack_half(q_up[e][0], q_up[e][1]);
                k_rest[e].pair[b] = pack_half(k_down[e][0] * last[0], k_down[e][1] * last[1]);
            }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int row = token + 2 * e, r = 2 * e;
            store_eight(stage.decayed.at(row, channel), k_decayed[e]);
            store_eight(stage.decayed.at(CHUNK + row, channel), q_decayed[e]);
            store_eight(stage.k_rest.at(channel, row), k_rest[e]);
            store_four(&scratch.products[warp][0][row][4 * t], k_products[0][r], k_products[0][r + 1],
                       k_products[1][r], k_products[1][r + 1]);
            store_four(&scratch.products[warp][1][row][4 * t], q_products[0][r], q_products[0][r + 1],
                       q_products[1][r], q_products[1][r + 1]);
        }
    }

    /* The logit of token lane / 2, needed late. */
    __device__ uint16_t load_beta(const Position<rows> &at) const
    {
        const uint16_t *beta = static_cast<const uint16_t *>(args.beta);
        return lane / 2 < at.left ? __ldg(beta + (at.token + lane / 2) * args.heads + at.head) : 0;
    }

    /* Adds the warps' parts: L = tril(diag(b) K~ K^^T, -1) to the scratch, tril(Q~ K^^T) to the stage. Lane 2 i + h has
     * columns 8 h to 8 h + 7 of row i. */
    __device__ void add_products(Stage &stage, float b) const
    {
        const int i = lane / 2, first = lane % 2 * 8;
        float sums[2][8];
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll
            for (int j = 0; j < 8; j += 4) {
                float4 s = *reinterpret_cast<const float4 *>(&scratch.products[0][which][i][first + j]);
#pragma unroll
                for (int w = 1; w < GROUP_WARPS; w++) {
                    float4 x = *reinterpret_cast<const float4 *>(&scratch.products[w][which][i][first + j]);
                    s.x += x.x, s.y += x.y, s.z += x.z, s.w += x.w;
                }
                sums[which][j] = s.x, sums[which][j + 1] = s.y, sums[which][j + 2] = s.z,
                sums[which][j + 3] = s.w;
            }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            scratch.l_columns[first + j][i] = first + j < i ? sums[0][j] * (-UNTRUNCATE * b) : 0.0f;
            sums[1][j] = first + j <= i ? sums[1][j] * UNTRUNCATE : 0.0f;
        }
        store_eight(stage.attend.at(i, first), pack_eight(sums[1]));
    }

    /* (I + L)^-1 diag(b) by forward substitution in fp32, a column to a lane. */
    __device__ void solve(Stage &stage, float b) const
    {
        const int j = lane % CHUNK;
        const float own = __shfl_sync(~0u, b, 2 * j);
        float x[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; i++) x[i] = i == j ? own : 0.0f;
#pragma unroll
        for (int m = 0; m < CHUNK - 1; m++) {
            float column[CHUNK];
#pragma unroll
            for (int i = (m + 1) / 4 * 4; i < CHUNK; i += 4) {
                float4 four = *reinterpret_cast<const float4 *>(&scratch.l_columns[m][i]);
                column[i] = four.x, column[i + 1] = four.y, column[i + 2] = four.z, column[i + 3] = four.w;
            }
#pragma unroll
            for (int i = m + 1; i < CHUNK; i++) x[i] = __fmaf_rn(-column[i], x[m], x[i]);
        }
        if (lane < CHUNK) {
            store_eight(stage.solve.at(0, j), pack_eight(&x[0]));
            store_eight(stage.solve.at(8, j), pack_eight(&x[8]));
        }
    }

    /* The small matrices of a chunk, by one warp of the group. */
    __device__ void finish(Stage &stage, uint16_t logit, bool valid) const
    {
        const float x = __uint_as_float(static_cast<uint32_t>(logit) << 16);
        const float b = valid ? rcp(1.0f + ex2(x * -LOG2_E)) : 0.0f;
        add_products(stage, b);
        __syncwarp();
        solve(stage, b);
    }

    __device__ void run()
    {
        Position<rows> here(args, group);
        Raw raw;
        int head = -1;
        if (!here.walk.done(args)) load(raw, here);
        for (int n = group; !here.walk.done(args); n += GROUPS) {
            Stage &stage = shared.stage[stage_of(n)];
            const int valid = here.left;
            const bool finishes = n / GROUPS % GROUP_WARPS == warp;
            const uint16_t logit = finishes ? load_beta(here) : 0;
            float sum[4][4];
            if (here.head != head) load_gate_parameters(head = here.head);
            store_squares(raw.q, scratch.squares[0]);
            store_squares(raw.k, scratch.squares[1]);
            accumulate_gates(raw.g, valid, sum);
            mbarrier_wait(&shared.empty[stage_of(n)], parity_of(n) ^ 1);
            sync();
            decay(stage, raw, sum);
            store_gamma(stage.gamma_minus_1, sum);
            here.advance(args, GROUPS);
            if (!here.walk.done(args)) load(raw, here);
            sync();
            if (finishes) finish(stage, logit, lane / 2 < valid);
            fence_async_proxy();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&shared.full[stage_of(n)]);
        }
    }
};

} // namespace fkda

#endif
