/*
 * The preparation of a chunk: everything that depends neither on the state nor on its gradient.
 *
 * Algorithm. Norms, write strengths and the running sums of the gates; then the decayed keys and queries;
 * then the products between tokens, L = tril(diag(b) K~ K^^T, -1) and P = tril(Q~ K^^T); then (I + L)^-1 by
 * forward substitution in fp32, in blocks of 8 x 8 tokens. All threads that prepare meet between these steps.
 *
 * Where exp(G) or exp(-G) leaves the range of fp32, which takes a gate without a bound, products between
 * tokens are sums with exp(G_i - G_j) itself, as in ../portable/unbounded.cuh, but for the whole chunk.
 */
#ifndef FKDA_BACKWARD_PREPARE_CUH
#define FKDA_BACKWARD_PREPARE_CUH

#include "pieces.cuh"

namespace fkda
{

/* On the way back P and Q~ are wanted, too, and the inverse is (I + L)^-1. Forwards it is (I + N)^-1 with N =
 * tril(K~ K^^T, -1) diag(b): U is diag(b) (I + N)^-1 R as well as (I + L)^-1 diag(b) R, and the first way
 * gives what the state does not predict even where b is 0. */
template <Way way, class Scratch = Shared, class Prepared = Shared> struct Preparation {
    static constexpr bool backwards = way == BACKWARDS;
    static constexpr int HALF = CHUNK / 2;
    /* Of G log2(e), down or up. 16 tokens at -5 nats reach -115.4. */
    static constexpr float RANGE = 116.0f;
    /* If a channel has a log2 decay above this over the chunk, fp16 hold decayed keys without units. */
    static constexpr float KEPT = -10.0f;
    static constexpr float MOST = 100.0f;         /* of the exponent of a unit */
    static constexpr float NORM_SCALE = 0x1p-68f; /* squares of elements above 2^60 overflow */

    typedef typename Scratch::RawChunk Raw;

    Scratch &s;   /* what nobody needs after the preparation */
    Prepared &to; /* what it leaves */
    const fkda_bwd_args &args;
    const Piece &piece;
    const GateOfHead &gate_of_head;
    const Raw &raw;
    int thread, warp, lane;
    int channel, half; /* the thread has the tokens 8 half to 8 half + 7 of a channel */

    /* The index is read again, so that no address of a tile occupies registers from chunk to chunk. */
    __device__ Preparation(Shared &shared, const fkda_bwd_args &a, const Raw &r)
        : Preparation(shared, shared, a, shared.piece, shared.gate, r)
    {
    }
    __device__ Preparation(Scratch &scratch, Prepared &prepared, const fkda_bwd_args &a, const Piece &p,
                           const GateOfHead &gate, const Raw &r)
        : s(scratch), to(prepared), args(a), piece(p), gate_of_head(gate), raw(r)
    {
        int cta;
        read_indices(cta, thread);
        const unsigned id = static_cast<unsigned>(thread); /* never negative, which saves instructions */
        warp = id / 32, lane = id % 32, channel = id % DIM, half = id / DIM;
    }

    /* 1 / |x| of a row, of which each lane has four elements. */
    __device__ float find_norm(const uint16_t *row) const
    {
        const uint2 two = *reinterpret_cast<const uint2 *>(row + 4 * lane);
        const float x[4] = {bf16_low(two.x), bf16_high(two.x), bf16_low(two.y), bf16_high(two.y)};
        float sum = sum_squares(x, 1.0f);
        if (sum < INFINITY) return rsqrt_approx(sum + 1e-6f);
        sum = sum_squares(x, NORM_SCALE);
        return rsqrt_approx(sum) * NORM_SCALE;
    }

    static __device__ float sum_squares(const float (&x)[4], float factor)
    {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) sum = __fmaf_rn(x[i] * factor, x[i] * factor, sum);
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        return sum;
    }

    __device__ void find_norms() const
    {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int token = 2 * warp + e;
            float k = 1.0f, q = 1.0f;
            if (!args.fwd.qk_is_normalised) {
                k = find_norm(raw.k[token]);
                if (backwards) q = find_norm(raw.q[token]);
            }
            if (lane == 0) to.k_scale[token] = k, to.q_scale[token] = q;
        }
    }

    /* `beta`: of token `thread`. */
    __device__ void find_strengths(int chunk, float beta) const
    {
        if (thread >= CHUNK) return;
        const bool valid = chunk * CHUNK + thread < piece.task.length;
        float slope;
        const float strength = write_strength(args.fwd.beta_kind, beta, slope);
        to.strength[thread] = valid ? strength : 0.0f;
        to.strength_slope[thread] = slope;
    }

    /* The running sums of the thread's tokens from its first one on. */
    __device__ void sum_gates(const ChannelGate &gate, int chunk, float (&sum)[HALF]) const
    {
        float total = 0.0f;
#pragma unroll
        for (int e = 0; e < HALF; e++) {
            const int token = HALF * half + e;
            const float x = gate.log2_decay(raw_gate(raw, args.fwd.g_is_f32, token, channel));
            total += chunk * CHUNK + token < piece.task.length ? x : 0.0f;
            sum[e] = total;
        }
        s.totals[half][channel] = total;
    }

    /* Writes the decayed tiles. `sum` becomes G. */
    template <bool products> __device__ void decay(float (&sum)[HALF]) const
    {
        const float before = half ? s.totals[0][channel] : 0.0f,
                    last = s.totals[0][channel] + s.totals[1][channel];
        bool out = false;
#pragma unroll
        for (int e = 0; e < HALF; e++) {
            const int token = HALF * half + e;
            sum[e] += before;
            const float k = from_bf16_bits(raw.k[token][channel]) * to.k_scale[token], up = ex2(sum[e]);
            to.template put_key<way>(s, token, channel, k, up);
            if (products) {
                out |= !(fabsf(sum[e]) < RANGE);
                to.template put_rest<way>(token, channel, k * ex2(last - sum[e]));
                s.k_up.at(token, channel) = to_tf32(k * ex2(-sum[e]));
            }
            if (!backwards) continue;
            const float q = from_bf16_bits(raw.q[token][channel]) * to.q_scale[token];
            to.put_query(s, token, channel, q, args.fwd.scale, up);
        }
        if (out) s.is_out_of_range = 1;
        if constexpr (products && Prepared::HAS_UNITS)
            if (last > KEPT) s.is_kept = 1;
        if (!half) to.put_decay(channel, last);
    }

    /* Makes the decayed tiles again, where all channels forget much. Divides those of a token by a unit, a
     * power of two near the decay of the channel that keeps most. `sum` is G. */
    __device__ void decay_with_units(const float (&sum)[HALF]) const
    {
        float(&least)[CHUNK][CHUNK + 4] = s.l_columns; /* of each warp: of G down, and of G_last - G down */
        const float last = s.totals[0][channel] + s.totals[1][channel];
#pragma unroll
        for (int e = 0; e < HALF; e++) {
            const float down = least_of_warp(fmaxf(-sum[e], 0.0f)),
                        rest = least_of_warp(fmaxf(sum[e] - last, 0.0f));
            if (lane == 0) least[warp][e] = down, least[warp][HALF + e] = rest;
        }
        Scratch::Team::meet();
#pragma unroll
        for (int e = 0; e < HALF; e++) {
            const int token = HALF * half + e;
            float down = MOST, rest = MOST;
#pragma unroll
            for (int w = 0; w < 4; w++) {
                down = fminf(down, least[4 * half + w][e]);
                rest = fminf(rest, least[4 * half + w][HALF + e]);
            }
            down = floorf(down), rest = floorf(rest);
            const float g = sum[e], k = from_bf16_bits(raw.k[token][channel]) * to.k_scale[token],
                        up = ex2(g + down);
            const float q = backwards ? from_bf16_bits(raw.q[token][channel]) * to.q_scale[token] : 0.0f;
            to.template put_all<way>(token, channel, k * up, k * ex2(last - g + rest), q * up);
            if (channel == 0) to.read_unit[token] = ex2(-down), to.rest_unit[token] = ex2(-rest);
        }
        Scratch::Team::meet(); /* all have read `least` */
    }

    static __device__ float least_of_warp(float x) /* x >= 0 */
    {
        return __uint_as_float(~__reduce_max_sync(~0u, ~__float_as_uint(x)));
    }

    /* Products over 64 channels: one matrix and eight columns of it for each warp. */
    __device__ void multiply_tokens() const
    {
        const int g = lane / 4, t = lane % 4, which = warp % 2, column = warp / 2 % 2 * 8, part = warp / 4;
        if (which && !backwards) return;
        const Tile &a = which ? s.q_read : s.k_read;
        float sum[4] = {};
#pragma unroll 2 /* for lack of registers */
        for (int j = 0; j < DIM / 16; j++) {
            const int c = DIM / 2 * part + 8 * j + 2 * t;
            const float2 top = a.two(g, c), bottom = a.two(g + 8, c), b = s.k_up.two(column + g, c);
            mma_tf32(sum, top.x, bottom.x, top.y, bottom.y, b.x, b.y);
        }
        store_two(&s.products[part][which][g][column + 2 * t], sum[0], sum[1]);
        store_two(&s.products[part][which][g + 8][column + 2 * t], sum[2], sum[3]);
    }

    /* The same without factors that are out of range. k_up has G. */
    __device__ void multiply_directly() const
    {
        const int i = thread / CHUNK, j = thread % CHUNK;
        float of_k = 0.0f, of_q = 0.0f;
        if (j <= i) {
#pragma unroll 1
            for (int c = 0; c < DIM; c++) {
                const float faded = from_bf16_bits(raw.k[j][c]) * ex2(s.k_up.at(i, c) - s.k_up.at(j, c));
                of_k = __fmaf_rn(from_bf16_bits(raw.k[i][c]) * to.k_scale[i], faded, of_k);
                if (backwards)
                    of_q =
                        __fmaf_rn(from_bf16_bits(raw.q[i][c]) * to.q_scale[i] * args.fwd.scale, faded, of_q);
            }
            of_k *= to.k_scale[j], of_q *= to.k_scale[j];
        }
        s.products[0][0][i][j] = of_k, s.products[1][0][i][j] = 0.0f;
        s.products[0][1][i][j] = of_q, s.products[1][1][i][j] = 0.0f;
    }

    __device__ void add_products() const
    {
        const int i = thread / CHUNK, j = thread % CHUNK;
        const float of_k = s.products[0][0][i][j] + s.products[1][0][i][j];
        s.l_columns[j][i] = j < i ? of_k * to.strength[backwards ? i : j] : 0.0f;
        if (backwards)
            to.attend_t[j][i] = j <= i ? to_tf32(s.products[0][1][i][j] + s.products[1][1][i][j]) : 0.0f;
    }

    /* The inverse, by blocks of 8 x 8 tokens, in one warp: those on the diagonal by forward substitution, one
     * column to a lane, then T21 = -T22 (L21 T11). */
    __device__ void solve() const
    {
        float(&blocks)[2][CHUNK][CHUNK + 2] = s.products[0], (&product)[CHUNK][CHUNK + 2] = s.products[1][0];
        if (lane < CHUNK) solve_block(blocks[lane / HALF], lane / HALF * HALF, lane % HALF);
        __syncwarp();
        const int i = lane / 4, j = lane % 4 * 2;
        float sum[2] = {};
#pragma unroll
        for (int m = 0; m < HALF; m++) {
            const float l = s.l_columns[m][HALF + i];
            sum[0] = __fmaf_rn(l, blocks[0][m][j], sum[0]),
            sum[1] = __fmaf_rn(l, blocks[0][m][j + 1], sum[1]);
        }
        product[i][j] = sum[0], product[i][j + 1] = sum[1];
        __syncwarp();
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int m = 0; m < HALF; m++) {
            const float t = -blocks[1][i][m];
            sum[0] = __fmaf_rn(t, product[m][j], sum[0]), sum[1] = __fmaf_rn(t, product[m][j + 1], sum[1]);
        }
        to.template put_inverse<way>(HALF + i, j, sum[0]);
        to.template put_inverse<way>(HALF + i, j + 1, sum[1]);
    }

    /* Column j of the block on the diagonal that begins with token `first`. */
    __device__ void solve_block(float (&block)[CHUNK][CHUNK + 2], int first, int j) const
    {
        float x[HALF];
#pragma unroll
        for (int i = 0; i < HALF; i++) x[i] = i == j ? 1.0f : 0.0f;
#pragma unroll
        for (int m = 0; m < HALF - 1; m++)
#pragma unroll
            for (int i = m + 1; i < HALF; i++)
                x[i] = __fmaf_rn(-s.l_columns[first + m][first + i], x[m], x[i]);
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            block[i][j] = x[i];
            to.template put_inverse<way>(first + i, first + j, x[i]);
        }
    }

    /* Norms and decayed tiles alone, without k_rest. */
    __device__ void run_without_products(int chunk) const
    {
        float sum[HALF];
        find_norms();
        sum_gates({args.fwd, gate_of_head, channel}, chunk, sum);
        Scratch::Team::meet();
        decay<false>(sum);
        Scratch::Team::meet();
    }

    /* The threads meet after the last step, too. */
    __device__ void run(int chunk, float beta) const
    {
        run_to_last_meeting(chunk, beta);
        Scratch::Team::meet();
    }

    __device__ void run_to_last_meeting(int chunk, float beta) const
    {
        float sum[HALF];
        if (thread == 0) s.is_out_of_range = 0;
        if constexpr (Prepared::HAS_UNITS)
            if (thread == 0) s.is_kept = 0;
        find_norms();
        find_strengths(chunk, beta);
        sum_gates({args.fwd, gate_of_head, channel}, chunk, sum);
        Scratch::Team::meet();
        decay<true>(sum);
        Scratch::Team::meet();
        if constexpr (Prepared::HAS_UNITS) {
            if (__builtin_expect(!s.is_kept, 0))
                decay_with_units(sum);
            else if (thread == 0)
                to.put_no_units();
        }
        if (__builtin_expect(s.is_out_of_range, 0)) {
            Scratch::Team::meet(); /* all have read the flag, which the next chunk clears */
#pragma unroll
            for (int e = 0; e < HALF; e++) s.k_up.at(HALF * half + e, channel) = sum[e];
            Scratch::Team::meet();
            multiply_directly();
        } else {
            multiply_tokens();
        }
        Scratch::Team::meet();
        add_products();
        Scratch::Team::meet();
        if (warp == 0) solve();
    }
};

} // namespace fkda

#endif
