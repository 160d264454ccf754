/*
 * The preparation: everything of a chunk that does not depend on the state, ahead of the recurrence.
 *
 * Algorithm. Each stage has a team of four warps, which prepares every STAGES-th chunk: gates and their
 * running sums, norms, the decayed tiles and the products over channels of each warp, then L and P from the
 * sum of these products, and last T = (I + L)^-1 diag(b) by forward substitution, in one warp.
 *
 * Layout. Warp w of a team owns channels 32 w to 32 w + 31. Lane 4 p + t of it owns tokens 2 p and 2 p + 1 of
 * channels 32 w + 8 t to 32 w + 8 t + 7. With this layout loads and stores have 16 bytes, and elements are
 * fragments of both operands of the products over channels without changing lanes.
 */
#ifndef FKDA_PORTABLE_PREPARE_CUH
#define FKDA_PORTABLE_PREPARE_CUH

#include "bad_tokens.cuh"
#include "solve.cuh"
#include "unbounded.cuh"

namespace fkda
{

/* Eight neighbouring elements of g, as they are in memory: fp32, or bf16 in the first four words. */
struct EightOfEither {
    uint32_t word[8];
};

template <bool general> struct GateElements {
    using Type = Eight;
};
template <> struct GateElements<true> {
    using Type = EightOfEither;
};

/* `rows`: rows of V that the recurrence of the CTA carries. `general`: the call may have every option; else
 * it has bf16 inputs, the bounded gate, beta as a logit, and q and k that are not normalised. */
template <int rows, bool general> struct Preparation {
    using Gates = typename GateElements<general>::Type;

    const fkda_fwd_args &args;
    const Task &task;
    Shared &shared;
    Scratch &scratch;
    Stage &stage;
    int team, thread, warp, pair,
        t;       /* thread: of the team; pair: the lane has tokens 2 pair and 2 pair + 1 */
    int channel; /* the first of eight */
    float bound; /* of the gate */

    __device__ Preparation(const fkda_fwd_args &a, const Task &k, Shared &s, int id)
        : args(a), task(k), shared(s), scratch(s.scratch[id / TEAM_THREADS]),
          stage(s.stage[id / TEAM_THREADS]), team(id / TEAM_THREADS), thread(id % TEAM_THREADS),
          warp(thread / 32), pair(thread % 32 / 4), t(thread % 4), channel(32 * warp + 8 * t),
          bound(sigmoid_gate_bound(a.lower_bound))
    {
        const float slope = sigmoid_gate_slope(a.A_log ? a.A_log[k.head] : 0.0f);
        const float dt_bias = a.dt_bias ? a.dt_bias[k.head * DIM + channel + pair] : 0.0f;
        if (thread % 32 == 0) scratch.gate_slope[warp] = slope;
        scratch.gate_offset[channel + pair] =
            general && a.gate != FLASH_KDA_GATE_BOUNDED ? dt_bias : sigmoid_gate_offset(dt_bias, slope);
        if (general && thread == 0)
            scratch.checkpoint = next_checkpoint(a, s.addresses.sequence, k.length, team * CHUNK);
        __syncwarp(); /* a warp reads only what its own lanes have written */
    }

    /* The thread of the team. What is made of it occupies registers only here. */
    static __device__ int read_thread()
    {
        int cta, id;
        read_indices(cta, id);
        return id % TEAM_THREADS;
    }

    /* Finds the thread's place again. What is made of it then does not occupy registers from one step to the
     * next, where the general kernels have too few. */
    __device__ void find_place()
    {
        if (!general) return;
        forget(thread);
        const unsigned id = static_cast<unsigned>(thread); /* never negative, which saves instructions */
        warp = id / 32, pair = id % 32 / 4, t = id % 4, channel = 32 * warp + 8 * t;
    }

    /* The team's warps wait for each other. */
    __device__ void sync() const
    {
        barrier_sync<TEAM, TEAM_THREADS>(team);
    }

    /* ---- Loading ---- */

    /* This lane's first channel of a token of q, k, v or g, in a tensor whose elements have that many bytes.
     * `tensor` is from Addresses. Strides between tokens have 31 bits, which flash_kda_fwd() checks. */
    __device__ const char *at(const char *tensor, const fkda_token_strides &strides, int token,
                              int element_bytes = 2) const
    {
        const int step = static_cast<int>(strides.token);
        return tensor + (static_cast<long long>(token) * step + channel) * element_bytes;
    }

    /* Loads this lane's two tokens of q, k or g; zeros past the end of the sequence. */
    __device__ void load(Eight (&x)[2], const char *tensor, const fkda_token_strides &strides,
                         int chunk) const
    {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int token = chunk * CHUNK + 2 * pair + e;
            x[e] = token < task.length ? load_eight(at(tensor, strides, token), 0) : Eight{};
        }
    }

    __device__ void load_gates(Gates (&g)[2], int chunk) const
    {
        const char *tensor = shared.addresses.g;
        if constexpr (!general) {
            load(g, tensor, args.g_strides, chunk);
        } else if (!args.g_is_f32) {
            Eight x[2];
            load(x, tensor, args.g_strides, chunk);
#pragma unroll
            for (int i = 0; i < 8; i++) g[i / 4].word[i % 4] = x[i / 4].pair[i % 4];
        } else {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int token = chunk * CHUNK + 2 * pair + e;
                const char *from = at(tensor, args.g_strides, token, 4);
                const Eight low = token < task.length ? load_eight(from, 0) : Eight{},
                            high = token < task.length ? load_eight(from, 8) : Eight{};
#pragma unroll
                for (int i = 0; i < 4; i++) g[e].word[i] = low.pair[i], g[e].word[4 + i] = high.pair[i];
            }
        }
    }

    __device__ void load_inputs(Eight (&q)[2], Eight (&k)[2], Gates (&g)[2], int chunk) const
    {
        load_gates(g, chunk);
        load(q, shared.addresses.q, args.q_strides, chunk);
        load(k, shared.addresses.k, args.k_strides, chunk);
    }

    /* Starts the copies of a chunk's values. A group of copies is committed even if there is no such chunk,
     * so that copy_async_wait counts chunks. */
    __device__ void load_values(int chunk) const
    {
        const char *from = shared.addresses.v;
        if (chunk < task.chunks) {
            __nv_bfloat16(&to)[CHUNK][DIM] = shared.v[slot<V_STAGES>(chunk)];
            const int column = value_column(2 * pair, channel);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int token = chunk * CHUNK + 2 * pair + e;
                bool valid = token < task.length;
                /* value_column(2 * pair + 1, channel) is column ^ 8 */
                copy_async_16(&to[2 * pair + e][column ^ 8 * e],
                              valid ? at(from, args.v_strides, token) : from, valid);
            }
        }
        copy_async_commit();
    }

    /* Loads beta of tokens thread / 16 and thread / 16 + 8, as bits. The solver needs beta late in the chunk,
     * so beta is not loaded a chunk ahead. */
    __device__ void load_beta(uint32_t (&beta)[2], int chunk) const
    {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int token = chunk * CHUNK + thread / CHUNK + 8 * e;
            const long long at = token * args.beta_strides.token;
            const char *tensor = shared.addresses.beta;
            beta[e] = 0;
            if (token >= task.length) continue;
            if (general && args.beta_is_f32)
                beta[e] = __ldg(reinterpret_cast<const uint32_t *>(tensor) + at);
            else
                beta[e] = __ldg(reinterpret_cast<const uint16_t *>(tensor) + at);
        }
    }

    /* ---- Elements ---- */

    /* The elements of g as numbers. */
    __device__ void unpack(const Gates (&g)[2], float (&x)[2][8]) const
    {
        if constexpr (!general) {
#pragma unroll
            for (int i = 0; i < 16; i++) x[i / 8][i % 8] = g[i / 8][i % 8];
        } else if (args.g_is_f32) {
#pragma unroll
            for (int i = 0; i < 16; i++) x[i / 8][i % 8] = __uint_as_float(g[i / 8].word[i % 8]);
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const uint32_t word = g[i / 8].word[i % 8 / 2];
                x[i / 8][i % 8] = i % 2 ? bf16_high(word) : bf16_low(word);
            }
        }
    }

    /* Makes log2 decays of the elements of g. */
    __device__ void activate(float (&x)[2][8]) const
    {
        const float slope = scratch.gate_slope[warp];
        const float4 offsets[2] = {*reinterpret_cast<const float4 *>(&scratch.gate_offset[channel]),
                                   *reinterpret_cast<const float4 *>(&scratch.gate_offset[channel + 4])};
        const float offset[8] = {offsets[0].x, offsets[0].y, offsets[0].z, offsets[0].w,
                                 offsets[1].x, offsets[1].y, offsets[1].z, offsets[1].w};
        if (!general || args.gate == FLASH_KDA_GATE_BOUNDED) {
#pragma unroll
            for (int i = 0; i < 16; i++)
                x[i / 8][i % 8] = sigmoid_gate(x[i / 8][i % 8], slope, offset[i % 8], bound);
        } else if (args.gate == FLASH_KDA_GATE_SOFTPLUS) {
#pragma unroll
            for (int i = 0; i < 16; i++)
                x[i / 8][i % 8] = softplus_gate(x[i / 8][i % 8], slope, offset[i % 8]);
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) x[i / 8][i % 8] = activated_gate(x[i / 8][i % 8]);
        }
    }

    /* The running sums of the log2 decay up to this lane's two tokens. With `repair`, gates that are NaN do
     * not decay, and their tokens are noted as bad. */
    __device__ void accumulate_gates(const Gates (&g)[2], int chunk, float (&sum)[2][8], bool repair) const
    {
        int bad = NO_TOKEN;
        unpack(g, sum);
        activate(sum);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            bool valid = chunk * CHUNK + 2 * pair + e < task.length;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                sum[e][c] = valid ? sum[e][c] : 0.0f;
                if (repair && sum[e][c] != sum[e][c]) bad = min(bad, 2 * pair + e), sum[e][c] = 0.0f;
            }
        }
        if (repair) note_bad_token(scratch, warp, bad);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            float even = sum[0][c], running = even + sum[1][c];
#pragma unroll
            for (int distance = 1; distance < 8; distance *= 2) {
                float below = __shfl_up_sync(~0u, running, 4 * distance);
                if (pair >= distance) running += below;
            }
            float before = __shfl_up_sync(~0u, running, 4);
            sum[0][c] = pair ? before + even : even;
            sum[1][c] = running;
        }
    }

    /* Leaves the sums of squares of q and k over this warp's channels, of elements multiplied by `factor`. */
    __device__ void store_squares(const Eight (&q)[2], const Eight (&k)[2], float factor = 1.0f) const
    {
        float s[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Eight &x = i % 2 ? k[i / 2] : q[i / 2];
            float y = x[0] * factor;
            s[i] = y * y;
#pragma unroll
            for (int c = 1; c < 8; c++) y = x[c] * factor, s[i] = __fmaf_rn(y, y, s[i]);
            s[i] += __shfl_xor_sync(~0u, s[i], 1);
            s[i] += __shfl_xor_sync(~0u, s[i], 2);
        }
        if (t == 0) scratch.squares[warp][pair] = make_float4(s[0], s[1], s[2], s[3]);
    }

    /* The sums of squares over all channels: of q and k of this lane's first token, then of its second. */
    __device__ float4 sum_squares() const
    {
        float4 s = scratch.squares[0][pair];
#pragma unroll
        for (int w = 1; w < TEAM_WARPS; w++) {
            float4 part = scratch.squares[w][pair];
            s.x += part.x, s.y += part.y, s.z += part.z, s.w += part.w;
        }
        return s;
    }

    /* What q and k that are normalised already are multiplied by, if they are. */
    __device__ void leave_normalised(float (&q_factor)[2], float (&k_factor)[2]) const
    {
        if (general && args.qk_is_normalised) q_factor[0] = q_factor[1] = k_factor[0] = k_factor[1] = 1.0f;
    }

    /* 1 / |q| and 1 / |k| of this lane's two tokens. Returns whether all sums of squares of the chunk are
     * finite. All warps of the team have the same sums. */
    __device__ bool find_norms(float (&q_factor)[2], float (&k_factor)[2]) const
    {
        const float4 s = sum_squares();
        q_factor[0] = rsqrt_approx(s.x + 1e-6f), q_factor[1] = rsqrt_approx(s.z + 1e-6f);
        k_factor[0] = rsqrt_approx(s.y + 1e-6f), k_factor[1] = rsqrt_approx(s.w + 1e-6f);
        const bool all_finite = !__any_sync(~0u, !(s.x + s.y + s.z + s.w < INFINITY));
        if (all_finite) leave_normalised(q_factor, k_factor);
        return all_finite;
    }

    /* Makes keys that are not finite, whose factor is zero, zeros. */
    static __device__ void clear_bad_keys(Eight (&k)[2], const float (&k_factor)[2])
    {
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (k_factor[e] == 0.0f) k[e] = Eight{};
    }

    /* As find_norms, and finds the norms of large q and k, whose squares overflow. Notes tokens whose keys
     * are not finite, and makes these keys zeros. All warps of the team come here together if one sum is not
     * finite. */
    __device__ void find_all_norms(const Eight (&q)[2], Eight (&k)[2], float (&q_factor)[2],
                                   float (&k_factor)[2]) const
    {
        if (find_norms(q_factor, k_factor)) return;
        const float4 before = sum_squares();
        sync(); /* all warps have read the squares */
        store_squares(q, k, NORM_SCALE);
        sync();
        const float4 s = sum_squares();
        const float q_before[2] = {before.x, before.z}, k_before[2] = {before.y, before.w};
        const float q_sum[2] = {s.x, s.z}, k_sum[2] = {s.y, s.w};
        int bad = NO_TOKEN;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (!(q_before[e] < INFINITY))
                q_factor[e] = q_sum[e] < INFINITY ? rsqrt_approx(q_sum[e]) * NORM_SCALE : NAN;
            if (!(k_before[e] < INFINITY)) k_factor[e] = rsqrt_approx(k_sum[e]) * NORM_SCALE;
            if (k_sum[e] < INFINITY) continue;
            bad = min(bad, 2 * pair + e);
            k_factor[e] = 0.0f;
        }
        clear_bad_keys(k, k_factor);
        leave_normalised(q_factor, k_factor);
        note_bad_token(scratch, warp, bad);
    }

    /* Writes the state's decay over the chunk, less one. The decay of a slow channel, rounded to fp32 itself,
     * would be off by one amount chunk after chunk. The lane with the last tokens knows the sums of eight
     * channels; each of the eight lanes that own the eight channels computes one. Returns whether one of the
     * warp's sums is NaN. */
    __device__ bool store_gamma(const float (&sum)[2][8]) const
    {
        float *gamma = &stage.gamma_minus_1[channel];
        if (pair == 7) {
            store_four(gamma, sum[1][0], sum[1][1], sum[1][2], sum[1][3]);
            store_four(gamma + 4, sum[1][4], sum[1][5], sum[1][6], sum[1][7]);
        }
        __syncwarp();
        const float x = gamma[pair];
        gamma[pair] = ex2_minus_1(x);
        return __any_sync(~0u, x != x);
    }

    /* Writes what decay() leaves out if G leaves the range of fp32 from token `out` on: the rows of products
     * from that token on, and all of k_rest. */
    __device__ void decay_directly(int out, const Eight (&q)[2], const Eight (&k)[2],
                                   const float (&q_factor)[2], const float (&k_factor)[2],
                                   const float (&sum)[2][8]) const
    {
        multiply_directly(scratch.products[warp], out, q, k, q_factor, k_factor, sum, pair, t);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            const float last = __shfl_sync(~0u, sum[1][c], 4 * 7 + t);
            float4 &rest = stage.k_rest[pair][9 * (channel / 16) + channel % 16 / 2 + c / 4 * 2 + c % 2];
            float after[2];
#pragma unroll
            for (int e = 0; e < 2; e++) after[e] = k[e][c] * k_factor[e] * ex2(last - sum[e][c]) * UNTRUNCATE;
            store_two(&rest.x + c % 4 / 2 * 2, after[0], after[1]);
        }
    }

    /* Writes the decayed tiles of this lane's elements, and the two products over this warp's channels.
     * Decays are counted from the chunk's start, and not from a token, so that no token's gate changes a bit
     * of the tokens before it. The gates of 16 tokens at the bound of -5 reach e^-80 and e^80, which fp32
     * holds. What leaves the range without a bound is left to unbounded.cuh. */
    __device__ void decay(const Eight (&raw_q)[2], const Eight (&raw_k)[2], const float (&q_factor)[2],
                          const float (&k_factor)[2], const float (&sum)[2][8]) const
    {
        int out = NO_TOKEN; /* the first token that leaves the range */
        if (general && args.gate != FLASH_KDA_GATE_BOUNDED) {
            out = first_out_of_range(sum);
            if (__builtin_expect(out != NO_TOKEN, 0))
                decay_directly(out, raw_q, raw_k, q_factor, k_factor, sum);
        }
        float products[2][2][4] = {};
#pragma unroll
        for (int first = 0; first < 8; first += 2) { /* two channels at a time, for lack of registers */
            float q_up[2][2], k_up[2][2], k_down[2][2], to_last[2];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                to_last[c] = ex2(__shfl_sync(~0u, sum[1][first + c], 4 * 7 + t)) * UNTRUNCATE;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float up = ex2(sum[e][first + c]), down = ex2(-sum[e][first + c]);
                    float q = raw_q[e][first + c] * q_factor[e], k = raw_k[e][first + c] * k_factor[e];
                    q_up[e][c] = q * up;
                    k_up[e][c] = k * up;
                    k_down[e][c] = k * down;
                }
            }
            multiply_channels(products[0], k_up, k_down);
            multiply_channels(products[1], q_up, k_down);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float4 &rest = stage.k_rest[pair][9 * (channel / 16) + channel % 16 / 2 + first / 4 * 2 + c];
                if (!general || out == NO_TOKEN)
                    store_two(&rest.x + first % 4, k_down[0][c] * to_last[c], k_down[1][c] * to_last[c]);
            }
            const int column = decayed_column(2 * pair, channel + first / 4 * 4) + first % 4;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                store_two(&stage.q_decayed[2 * pair + e][column], q_up[e][0] * UNTRUNCATE,
                          q_up[e][1] * UNTRUNCATE);
                store_two(&stage.minus_k_decayed[2 * pair + e][column], k_up[e][0] * -UNTRUNCATE,
                          k_up[e][1] * -UNTRUNCATE);
            }
        }
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const float(&even)[4] = products[which][0], (&odd)[4] = products[which][1];
            float(&to)[CHUNK][CHUNK] = scratch.products[warp][which];
            if (!general || 2 * pair < out)
                store_four(&to[product_row(2 * pair)][4 * t], even[0], odd[0], even[1], odd[1]);
            if (!general || 2 * pair + 1 < out)
                store_four(&to[product_row(2 * pair + 1)][4 * t], even[2], odd[2], even[3], odd[3]);
        }
    }

    /* product += x y^T over two channels of each lane. Row g of the tiles is token 2 g, and row g + 8 is
     * token 2 g + 1. product[0] has the even tokens of y as columns, and product[1] the odd ones. */
    __device__ static void multiply_channels(float (&product)[2][4], const float (&x)[2][2],
                                             const float (&y)[2][2])
    {
#pragma unroll
        for (int e = 0; e < 2; e++)
            mma_tf32(product[e], x[0][0], x[1][0], x[0][1], x[1][1], y[e][0], y[e][1]);
    }

    /* beta as a number, from what load_beta() gives. */
    __device__ float beta_value(uint32_t beta) const
    {
        return __uint_as_float(general && args.beta_is_f32 ? beta : beta << 16);
    }

    /* Notes tokens whose write strength is not finite. */
    __device__ void note_bad_beta(const uint32_t (&beta)[2]) const
    {
        const auto is_bad = [&](uint32_t x) {
            if (general && args.beta_kind == FLASH_KDA_BETA_ACTIVATED)
                return !(fabsf(beta_value(x)) < INFINITY);
            return beta_value(x) != beta_value(x);
        };
        if (__builtin_expect(__any_sync(~0u, is_bad(beta[0]) || is_bad(beta[1])), 0))
            note_bad_token(scratch, warp,
                           is_bad(beta[0])   ? thread / CHUNK
                           : is_bad(beta[1]) ? thread / CHUNK + 8
                                             : NO_TOKEN);
    }

    __device__ float write_strength(uint32_t beta) const
    {
        const float x = beta_value(beta);
        if (general && args.beta_kind == FLASH_KDA_BETA_ACTIVATED) return x;
        const float strength = rcp(1.0f + ex2(x * -LOG2_E));
        return general && args.beta_kind == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.0f * strength : strength;
    }

    /* Says whether the state after a chunk is a checkpoint. One thread of the team calls it, when the stage
     * is empty. The other team has passed checkpoints between this team's chunks. */
    __device__ void mark_checkpoint(int chunk) const
    {
        const int offset = (chunk + 1) * CHUNK;
        if (scratch.checkpoint != NO_CHECKPOINT && scratch.checkpoint < offset)
            scratch.checkpoint = next_checkpoint(args, shared.addresses.sequence, task.length, offset - 1);
        stage.is_checkpoint = scratch.checkpoint == offset;
    }

    /* ---- The role ---- */

    __device__ void run()
    {
        Eight q[2], k[2];
        Gates g[2];
        if (team >= task.chunks) return;
        if (thread % 32 == 0) scratch.first_bad[warp] = NO_TOKEN;
        __syncwarp();
        load_values(team);
        load_inputs(q, k, g, team);
        for (int chunk = team; chunk < task.chunks; chunk += STAGES) {
            const int next = chunk + STAGES; /* loaded as soon as registers of this chunk are free */
            find_place();
            float sum[2][8];
            uint32_t beta[2];
            accumulate_gates(g, chunk, sum, false);
            store_squares(q, k);
            sync();
            if (chunk >= STAGES) barrier_sync<EMPTY, STAGE_THREADS<rows>>(team);
            if (general && thread == 0) mark_checkpoint(chunk);
            find_place();
            float q_factor[2], k_factor[2];
            if (!find_norms(q_factor, k_factor)) sum[1][0] = NAN; /* brings all warps to the repair */
            decay(q, k, q_factor, k_factor, sum);
            load_beta(beta, chunk);
            if (__builtin_expect(store_gamma(sum), 0)) {
                const int here = __shfl_sync(~0u, chunk, 0); /* so that no address is kept for this */
                load_inputs(q, k, g, here);
                find_all_norms(q, k, q_factor, k_factor);
                accumulate_gates(g, here, sum, true);
                decay(q, k, q_factor, k_factor, sum);
                store_gamma(sum);
            }
            note_bad_beta(beta);
            load_values(next);
            load_inputs(q, k, g, next);
            sync();
            const float strength[2] = {write_strength(beta[0]), write_strength(beta[1])};
            add_products(stage, scratch, task, strength, chunk, general ? read_thread() : thread);
            const bool any_bad = first_bad_token(scratch) != NO_TOKEN;
            sync();
            if (warp == 0) solve(stage, scratch, thread);
            if (__builtin_expect(any_bad, 0) && thread % 32 == 0) scratch.first_bad[warp] = NO_TOKEN;
            sync(); /* for racecheck, which does not see that arriving at FULL orders what solve() wrote */
            copy_async_wait<1>(); /* this chunk's values have come; the next chunk's may be in flight */
            barrier_arrive<FULL, STAGE_THREADS<rows>>(team);
        }
        copy_async_wait<0>();
    }
};

} // namespace fkda

#endif
