/*
 * The last step of a chunk, by channels of K: gradients of queries, keys and gates.
 *
 * Algorithm. Let F_ij be the decay of a channel between the writing of token j and the reading of token i,
 * E_i the one from the chunk's start to token i, P = dO U^T, L = - dR U^T, and let q and k be normalised:
 *
 *     dq_i = E_i dQ~_i + sum over j <= i of F_ij P_ij k_j
 *     dk_j = E_j dK~_j + sum over m < j of F_jm L_jm k_m
 *            + F_last,j dKr_j + sum over i > j of F_ij (P_ij q_i + L_ij k_i) + P_jj q_j
 *     dg_t = the sum of all terms whose decay has the gate of token t as a factor, times q or k:
 *            E_i (q_i dQ~_i + k_i dK~_i) for i >= t, F_last,j k_j dKr_j for j < t,
 *            A_ij = F_ij k_j (P_ij q_i + L_ij k_i) for j < t <= i, and E_last kept
 *
 * The chunk has two subchunks of 16 tokens. Decays inside a subchunk are counted from its eighth token, so
 * that factors 2^(G_i - G_8) and 2^(G_8 - G_j) stay in the range of tf32 if all gates are at the bound of -5.
 * Decays between the subchunks are counted from the border between them.
 *
 * Why gates do not lose slow or fast channels. For A_ij with both tokens in one subchunk, dg_t is the sum from
 * t on of the rows of A less that of its columns: what does not cross t cancels. Rows and columns are sums of
 * the same products of numbers that are rounded to tf32 beforehand, so they differ by the rounding of fp32
 * sums alone, and each A_ij has a decay as a factor, since the diagonal is left out. All other terms are
 * added, and none is subtracted.
 *
 * Lane (g, t) has channels g and g + 8 of the warp's 16, and tokens 8 i + 2 t and + 1.
 */
#ifndef FKDA_HOPPER_CHUNKS_CHANNELS_CUH
#define FKDA_HOPPER_CHUNKS_CHANNELS_CUH

#include "../../../backward/gates.cuh"
#include "sums.cuh"

namespace fkda
{

template <class Block> struct ChunkChannels {
    /* A subchunk's elements of this lane: tile of eight tokens, then channels g, g, g + 8, g + 8 at tokens 2 t,
     * 2 t + 1, 2 t, 2 t + 1. */
    typedef float Elements[2][4];

    const fkda_hopper_chunk_args &all;
    const fkda_fwd_args &args;
    Shared<Block> &s;
    int warp, lane, g, t;
    float offset[2], bias[2]; /* of the gates of channels g and g + 8 */

    __device__ ChunkChannels(const fkda_hopper_chunk_args &a, Shared<Block> &shared)
        : all(a), args(a.bwd.fwd), s(shared)
    {
        const ThreadPlace p = thread_place();
        warp = p.warp, lane = p.lane, g = p.g, t = p.t;
    }

    /* ---- Inputs and sums over tokens ---- */

    __device__ void load_bias()
    {
        const GateOfCall call = gate_of_call<Block>(args);
        const float slope = s.gate[0][warp].slope;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int channel = 16 * warp + g + 8 * r;
            bias[r] =
                Block::OPTIONS && !args.dt_bias ? 0.0f : __ldg(&args.dt_bias[s.at.head * DIM + channel]);
            offset[r] = Block::OPTIONS ? call.offset(bias[r], slope)
                                       : hopper_sigmoid_gate_offset(bias[r], slope);
        }
    }

    __device__ unsigned char *raw(int which) const
    {
        return s.raw[16 * warp / 64].tile[which];
    }
    __device__ uint32_t place(int which, int sub) const
    {
        return shared_address(raw(which)) + (matrix_row_by_token(lane) ^ 16 * warp % 64 / 8 * 16) +
               sub * SUBCHUNK_BYTES;
    }
    __device__ void load(Elements &x, int which, int sub) const
    {
        uint32_t pairs[4];
        load_matrices_transposed(pairs, place(which, sub));
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i / 4][i % 4] = i % 2 ? bf16_high(pairs[i / 2]) : bf16_low(pairs[i / 2]);
    }

    /* Whether token e of the lane's pair in a tile of a subchunk belongs to the sequence. */
    __device__ bool valid(int sub, int tile, int e) const
    {
        return 16 * sub + 8 * tile + 2 * t + e < s.at.left;
    }

    /* A box brings tokens of the next sequence past the end of this one: they become zeros. All threads meet. */
    __device__ void clear_past_end() const
    {
        constexpr int UNITS = ROW / 16;
        const int rows = CHUNK_TOKENS - s.at.left;
        for (int i = 32 * warp + lane; i < 6 * rows * UNITS; i += FKDA_HOPPER_CHUNK_THREADS) {
            const int tile = i / (rows * UNITS), row = s.at.left + i / UNITS % rows;
            reinterpret_cast<uint4 *>(s.raw[tile / 3].tile[tile % 3] + row * ROW)[i % UNITS] =
                make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
    }

    /* A factor for each token, from a row of shared memory. */
    __device__ float2 factor(const float (&row)[CHUNK_TOKENS], int sub, int tile) const
    {
        return *reinterpret_cast<const float2 *>(&row[16 * sub + 8 * tile + 2 * t]);
    }
    __device__ void multiply_tokens(Elements &x, const float (&row)[CHUNK_TOKENS], int sub) const
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float2 f = factor(row, sub, i);
#pragma unroll
            for (int r = 0; r < 4; r++) x[i][r] *= r % 2 ? f.y : f.x;
        }
    }

    /* Normalised keys, or queries. */
    __device__ void load_normalised(Elements &x, int which, int sub) const
    {
        load(x, which, sub);
        multiply_tokens(x, s.inverse_norm[0][0][which == Q], sub);
    }

    /* The running sums of the log2 decays from the subchunk's start, by the tensor core as in
     * ../../block/prepare_slice.cuh, with channels as rows. */
    __device__ void sum_gates(Elements &sum, int sub) const
    {
        constexpr uint32_t ONE = 0x3f80; /* in bf16 */
        float x[2][4];
        Elements raw_gates;
        load(raw_gates, G, sub);
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int i = 0; i < 4; i++) x[r][i] = raw_gates[i / 2][2 * r + i % 2];
            activate_gates(x[r], gate_of_call<Block>(args), s.gate[0][warp], offset[r]);
        }
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) { /* tile i / 2, channel i % 2 */
            const float a = valid(sub, i / 2, 0) ? x[i % 2][i / 2 * 2] : 0.0f,
                        b = valid(sub, i / 2, 1) ? x[i % 2][i / 2 * 2 + 1] : 0.0f;
            high[i] = pack_bf16(a, b);
            low[i] = pack_bf16(a - bf16_low(high[i]), b - bf16_high(high[i]));
        }
        const uint32_t triangle = (2 * t <= g ? ONE : 0) | (2 * t + 1 <= g ? ONE << 16 : 0),
                       ones = ONE << 16 | ONE;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i / 4][i % 4] = 0.0f;
        mma_bf16(sum[0], low[0], low[1], low[2], low[3], triangle, 0);
        mma_bf16(sum[0], high[0], high[1], high[2], high[3], triangle, 0);
        mma_bf16(sum[1], low[0], low[1], low[2], low[3], ones, triangle);
        mma_bf16(sum[1], high[0], high[1], high[2], high[3], ones, triangle);
    }

    /* What the lane of the quad that has the last tokens of a tile has of its last token, for channels g and
     * g + 8. */
    __device__ float2 last_of(const float (&tile)[4]) const
    {
        return make_float2(__shfl_sync(~0u, tile[1], lane | 3), __shfl_sync(~0u, tile[3], lane | 3));
    }

    __device__ static float sum_of_quad(float x)
    {
        x += __shfl_xor_sync(~0u, x, 1);
        return x + __shfl_xor_sync(~0u, x, 2);
    }

    /* Over all tokens of the subchunk, for channels g and g + 8. */
    __device__ static float2 sum_of_tokens(const Elements &x)
    {
        return make_float2(sum_of_quad((x[0][0] + x[0][1]) + (x[1][0] + x[1][1])),
                           sum_of_quad((x[0][2] + x[0][3]) + (x[1][2] + x[1][3])));
    }

    /* x of the lane `ahead` lanes further on in the quad, or zero if there is none. */
    __device__ float from_quad(float x, int ahead) const
    {
        const bool there = static_cast<unsigned>(t + ahead) < 4;
        const float other = __shfl_sync(~0u, x, there ? lane + ahead : lane);
        return there ? other : 0.0f;
    }

    /* to[t] += the sum of x from token t on. */
    __device__ void add_from_here(Elements &to, const Elements &x) const
    {
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
            float later = 0.0f;
#pragma unroll
            for (int i = 1; i >= 0; i--) {
                const float last = x[i][r + 1], both = x[i][r] + last;
                float sum = both;
                sum += from_quad(sum, 1);
                sum += from_quad(sum, 2);
                const float behind = later + from_quad(sum, 1);
                to[i][r + 1] += behind + last;
                to[i][r] += behind + both;
                if (i) later = __shfl_sync(~0u, sum, lane & ~3);
            }
        }
    }

    /* to[t] += the sum of x before token t. */
    __device__ void add_before(Elements &to, const Elements &x) const
    {
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
            float earlier = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float sum = x[i][r] + x[i][r + 1];
                sum += from_quad(sum, -1);
                sum += from_quad(sum, -2);
                const float before = earlier + from_quad(sum, -1);
                to[i][r] += before;
                to[i][r + 1] += before + x[i][r];
                if (!i) earlier = __shfl_sync(~0u, sum, lane | 3);
            }
        }
    }

    /* ---- Products between tokens ---- */

    /* d[i] += x pairs^T: readers i from writers j. x has the writers, of subchunk `from`; the readers are those
     * of subchunk `to`. In one subchunk, only tiles with j <= i. */
    __device__ void read(Elements &d, const Elements &x, const TokenPairs &pairs, int to, int from) const
    {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (to == from && j > i) continue;
                const float2 b =
                    *reinterpret_cast<const float2 *>(&pairs[16 * to + 8 * i + g][16 * from + 8 * j + 2 * t]);
                mma_tf32(d[i], x[j][0], x[j][2], x[j][1], x[j][3], b.x, b.y);
            }
    }

    /* d[j] += x pairs: what the readers i of subchunk `to`, which x has, give the writers j of `from`. */
    __device__ void write(Elements &d, const Elements &x, const TokenPairs &pairs, int to, int from) const
    {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (to == from && j > i) continue;
                const float *const b = &pairs[16 * to + 8 * i + 2 * t][16 * from + 8 * j + g];
                mma_tf32(d[j], x[i][0], x[i][2], x[i][1], x[i][3], b[0], b[CHUNK_TOKENS + 4]);
            }
    }

    static __device__ void round(Elements &x)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i / 4][i % 4] = round_to_tf32(x[i / 4][i % 4]);
    }
    static __device__ void clear(Elements &x)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i / 4][i % 4] = 0.0f;
    }

    /* ---- Decays ---- */

    /* Of a subchunk, for channels g and g + 8. */
    struct Decays {
        float2 middle;       /* G of the eighth token */
        float2 up_to_middle; /* 2^G of it */
        float2 rest;         /* from it to the end of the subchunk */
        float2 all;          /* over the subchunk */
    };
    __device__ Decays find_decays(const Elements &sum) const
    {
        Decays d;
        const float2 last = last_of(sum[1]);
        d.middle = last_of(sum[0]);
        d.up_to_middle = make_float2(ex2(d.middle.x), ex2(d.middle.y));
        d.rest = make_float2(ex2(last.x - d.middle.x), ex2(last.y - d.middle.y));
        d.all = make_float2(ex2(last.x), ex2(last.y));
        return d;
    }
    static __device__ float of(const float2 &x, int r) /* r: element of a tile */
    {
        return r / 2 ? x.y : x.x;
    }

    /* Decays from the eighth token to each token, and from each token to the eighth one. */
    __device__ static void find_up(Elements &x, const Elements &sum, const Decays &d)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i / 4][i % 4] = ex2(sum[i / 4][i % 4] - of(d.middle, i % 4));
    }
    __device__ static void find_down(Elements &x, const Elements &sum, const Decays &d)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i / 4][i % 4] = ex2(of(d.middle, i % 4) - sum[i / 4][i % 4]);
    }

    /* ---- A subchunk ---- */

    /* What the subchunks need of each other. */
    struct Across {
        Elements writers; /* keys of the first subchunk, decayed to the border; operands */
        Elements written; /* what the readers of the second subchunk give the writers of the first one */
        float2 first_y;   /* the sum over the first subchunk of F_last,j k_j dKr_j */
        float2 second_x;  /* the sum over the second subchunk of E_i (q_i dQ~_i + k_i dK~_i) */
    };

    /* The keys that the second subchunk reads, and first_y. `after`: the decay over the second subchunk. */
    __device__ void begin_first(Across &across, const Elements &sum, const Decays &d, const float2 &after,
                                const float (*dk_rest)[4]) const
    {
        Elements y;
        load_normalised(across.writers, K, 0);
        find_down(y, sum, d);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &k = across.writers[i / 4][i % 4];
            k *= y[i / 4][i % 4] * of(d.rest, i % 4);
            y[i / 4][i % 4] = k * of(after, i % 4) * dk_rest[i / 4][i % 4];
        }
        across.first_y = sum_of_tokens(y);
        round(across.writers);
    }

    /* Turns dQ~ and dK~ of the subchunk into dq and dk of normalised queries and keys, and leaves the gradient
     * of the log decay in dg. before: the decay of all tokens before the subchunk; after: of all after it. */
    template <int sub>
    __device__ void compute(float (*dq)[4], float (*dk)[4], const float (*dk_rest)[4], Elements &dg,
                            Across &across, const Elements &sum, const Decays &d, const float2 &before,
                            const float2 &after, const float2 &kept) const
    {
        const TokenPairs &P = s.queries_with_writes(), &L = s.keys_with_writes();
        const float unit = s.pair_unit;
        Elements q, k, up, down, x, y; /* x: terms that are summed from t on; y: those summed before t */
        load_normalised(q, Q, sub), load_normalised(k, K, sub);
        find_up(up, sum, d), find_down(down, sum, d);

        /* ---- The state before the chunk as a writer, and the state after it as a reader ---- */
        Elements w; /* what the keys are written for */
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int n = i / 4, r = i % 4;
            const float from_start = up[n][r] * of(d.up_to_middle, r) * of(before, r),
                        to_end = down[n][r] * of(d.rest, r) * of(after, r);
            dq[n][r] *= from_start, dk[n][r] *= from_start;
            w[n][r] = to_end * dk_rest[n][r];
            x[n][r] = __fmaf_rn(q[n][r], dq[n][r], k[n][r] * dk[n][r]);
            y[n][r] = k[n][r] * w[n][r];
        }
        if (sub == 1) across.second_x = sum_of_tokens(x);

        /* ---- The other subchunk ---- */
        if (sub == 1) {
            Elements of_q, of_k;
            clear(of_q), clear(of_k);
            read(of_q, across.writers, P, 1, 0), read(of_k, across.writers, L, 1, 0);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int n = i / 4, r = i % 4;
                const float from_border = up[n][r] * of(d.up_to_middle, r);
                const float by_q = of_q[n][r] * from_border * unit, by_k = of_k[n][r] * from_border * unit;
                dq[n][r] += by_q, dk[n][r] += by_k;
                x[n][r] += __fmaf_rn(q[n][r], by_q, k[n][r] * by_k);
                of_q[n][r] = q[n][r] * from_border, of_k[n][r] = k[n][r] * from_border;
            }
            round(of_q), round(of_k);
            clear(across.written);
            write(across.written, of_q, P, 1, 0), write(across.written, of_k, L, 1, 0);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int n = i / 4, r = i % 4;
                const float by = across.written[n][r] * (down[n][r] * of(d.rest, r)) * unit;
                w[n][r] += by;
                y[n][r] = __fmaf_rn(k[n][r], by, y[n][r]);
            }
        }

        /* ---- The subchunk itself ---- */
        {
            Elements q_up, k_up, k_down, of_q, of_k, of_w;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int n = i / 4, r = i % 4;
                q_up[n][r] = q[n][r] * up[n][r], k_up[n][r] = k[n][r] * up[n][r];
                k_down[n][r] = k[n][r] * down[n][r];
            }
            round(q_up), round(k_up), round(k_down);
            clear(of_q), clear(of_k), clear(of_w);
            read(of_q, k_down, P, sub, sub), read(of_k, k_down, L, sub, sub);
            write(of_w, q_up, P, sub, sub), write(of_w, k_up, L, sub, sub);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int n = i / 4, r = i % 4;
                /* The tensor core ignored the low bits, so the factors here must lack them too. */
                const float across_t = __fmaf_rn(cut(q_up[n][r]), of_q[n][r], cut(k_up[n][r]) * of_k[n][r]) -
                                       cut(k_down[n][r]) * of_w[n][r];
                x[n][r] = __fmaf_rn(across_t, unit, x[n][r]);
                dq[n][r] = __fmaf_rn(of_q[n][r] * up[n][r], unit, dq[n][r]);
                dk[n][r] = __fmaf_rn(of_k[n][r] * up[n][r], unit, dk[n][r]);
                w[n][r] = __fmaf_rn(of_w[n][r] * down[n][r], unit, w[n][r]);
            }
        }

        /* ---- Sums ---- */
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int n = i / 4, r = i % 4;
            const float2 own = factor(s.on_diagonal, sub, n);
            const float p = r % 2 ? own.y : own.x;
            dk[n][r] += __fmaf_rn(p, q[n][r], w[n][r]);
            dq[n][r] = __fmaf_rn(p, k[n][r], dq[n][r]);
            dg[n][r] = of(kept, r) + (sub == 1 ? of(across.first_y, r) : of(across.second_x, r));
        }
        add_from_here(dg, x);
        add_before(dg, y);
    }

    /* What the tensor core takes of a tf32 operand. */
    static __device__ float cut(float x)
    {
        return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
    }

    /* ---- Gates ---- */

    /* Turns the gradient of the log decay into that of the raw gate, which it stores, and adds up for dt_bias
     * and A_log. */
    __device__ void finish_gates(Elements &dg, int sub, float (&by_bias)[2], float (&by_rate)[2]) const
    {
        Elements raw_gates;
        load(raw_gates, G, sub);
        const float slope =
            sigmoid_gate_slope(Block::OPTIONS && !args.A_log ? 0.0f : __ldg(&args.A_log[s.at.head]));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const ChannelGate gate(args, Block::OPTIONS ? args.gate : FLASH_KDA_GATE_BOUNDED, slope, bias[r]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = i / 2, e = 2 * r + i % 2;
                float by_g, by_A_log;
                gate.differentiate(raw_gates[n][e], by_g, by_A_log);
                const bool there = valid(sub, n, i % 2);
                by_rate[r] = there ? __fmaf_rn(dg[n][e], by_A_log, by_rate[r]) : by_rate[r];
                dg[n][e] *= by_g;
                by_bias[r] += there ? dg[n][e] : 0.0f;
            }
        }
    }

    /* ---- Outputs ---- */

    /* Stores the subchunk's elements through the place of a raw tile, in which they take this warp's own
     * channels; or in fp32 as they are. Lane i stores half of the channels of token i / 2. */
    __device__ void store(const Elements &x, int which, int sub, void *tensor, const fkda_token_strides &strides,
                          int head) const
    {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = pack_bf16(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
        store_matrices_transposed(place(which, sub), pairs);
        __syncwarp();
        const int token = 16 * sub + lane / 2;
        const uint4 eight = *token_unit(raw(which), token, 16 * warp % 64 / 8 + lane % 2);
        __syncwarp();
        if (!tensor || token >= s.at.left) return;
        *reinterpret_cast<uint4 *>(static_cast<char *>(tensor) +
                                   2 * (token_place(strides, s.at.row, s.at.token + token, head) + 16 * warp +
                                        8 * (lane % 2))) = eight;
    }

    /* In fp32, to the row of each token that begins at row(token). */
    template <class Row> __device__ void store_fp32(const Elements &x, int sub, Row row) const
    {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int n = i / 4, token = 16 * sub + 8 * n + 2 * t + i % 2;
            if (token < s.at.left) row(token)[16 * warp + g + i % 4 / 2 * 8] = x[n][i % 4];
        }
    }

    /* The sum over the warp's channels of x y, for each token. */
    __device__ void announce_along(const Elements &q, const float (*dq)[4], const Elements &k,
                                   const float (*dk)[4], int sub) const
    {
        float sums[8];
#pragma unroll
        for (int i = 0; i < 4; i++) { /* tile i / 2, token i % 2 */
            const int n = i / 2, e = i % 2;
            sums[i] = __fmaf_rn(q[n][e], dq[n][e], q[n][e + 2] * dq[n][e + 2]);
            sums[4 + i] = __fmaf_rn(k[n][e], dk[n][e], k[n][e + 2] * dk[n][e + 2]);
        }
        const float sum = sum_over_g(sums, lane); /* number g */
        s.norm_sums.of_warp[g / 4][warp][16 * sub + 8 * (g / 2 % 2) + 2 * t + g % 2] = sum;
    }

    /* Through the norm, and to memory. */
    __device__ void store_through_norm(float (*dx)[4], int which, int sub, void *tensor, float *parts,
                                       const fkda_token_strides &strides, int head) const
    {
        Elements x, result;
        load_normalised(x, which, sub);
#pragma unroll
        for (int i = 0; i < 8; i++) result[i / 4][i % 4] = dx[i / 4][i % 4];
        if (!(Block::OPTIONS && args.qk_is_normalised)) {
            multiply_tokens(x, s.norm_sums.all[which == K], sub);
#pragma unroll
            for (int i = 0; i < 8; i++) result[i / 4][i % 4] -= x[i / 4][i % 4];
            multiply_tokens(result, s.inverse_norm[0][0][which == Q], sub);
        }
        if (parts && tensor)
            store_fp32(result, sub, [&](int token) {
                return parts + ((static_cast<long long>(s.at.row) * args.tokens + s.at.token + token) *
                                    args.heads +
                                s.at.head) *
                                   DIM;
            });
        else
            store(result, which, sub, tensor, strides, head);
    }

    /* ---- The step ---- */

    __device__ void run(ChannelSums &sums)
    {
        const fkda_bwd_args &b = all.bwd;
        float by_bias[2] = {}, by_rate[2] = {};
        load_bias();
        mbarrier_wait(&s.inputs_there, 1);
        if (s.at.left < CHUNK_TOKENS) clear_past_end();
        {
            Elements first, second, dg;
            Across across;
            sum_gates(first, 0), sum_gates(second, 1);
            const Decays of_first = find_decays(first), of_second = find_decays(second);
            const float2 ones = make_float2(1.0f, 1.0f),
                         kept = make_float2(sums.kept[0] * of_first.all.x * of_second.all.x,
                                            sums.kept[1] * of_first.all.y * of_second.all.y);
            begin_first(across, first, of_first, of_second.all, sums.k_rest);
            compute<1>(sums.q + 2, sums.k + 2, sums.k_rest + 2, dg, across, second, of_second, of_first.all, ones,
                       kept);
            finish_gates(dg, 1, by_bias, by_rate);
            store_gates(dg, 1);
            compute<0>(sums.q, sums.k, sums.k_rest, dg, across, first, of_first, ones, of_second.all, kept);
            finish_gates(dg, 0, by_bias, by_rate);
            store_gates(dg, 0);
        }
        if (b.sums) {
            float *const to = b.sums + (s.at.slot * args.heads + s.at.head) * (2 * DIM) + 16 * warp + g;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float bias_sum = sum_of_quad(by_bias[r]), rate_sum = sum_of_quad(by_rate[r]);
                if (t == 0) to[8 * r] = bias_sum, to[DIM + 8 * r] = rate_sum;
            }
        }

        /* ---- Norms ---- */
#pragma unroll
        for (int sub = 0; sub < 2; sub++) {
            Elements q, k;
            load_normalised(q, Q, sub), load_normalised(k, K, sub);
            announce_along(q, sums.q + 2 * sub, k, sums.k + 2 * sub, sub);
        }
        __syncthreads();
        if (warp < 2) { /* the sum of a token: of its query in warp 0, of its key in warp 1 */
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < CHUNK_WARPS; w++) sum += s.norm_sums.of_warp[warp][w][lane];
            s.norm_sums.all[warp][lane] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int sub = 0; sub < 2; sub++) {
            store_through_norm(sums.q + 2 * sub, Q, sub, b.dq, b.dq_parts, b.dq_strides, s.at.qk_head);
            store_through_norm(sums.k + 2 * sub, K, sub, b.dk, b.dk_parts, b.dk_strides, s.at.qk_head);
        }
    }

    __device__ void store_gates(const Elements &dg, int sub) const
    {
        if (Block::OPTIONS && args.g_is_f32) {
            if (!all.bwd.dg) return;
            store_fp32(dg, sub, [&](int token) {
                return static_cast<float *>(all.bwd.dg) + s.at.place(all.bwd.dg_strides, token);
            });
        } else {
            store(dg, G, sub, all.bwd.dg, all.bwd.dg_strides, s.at.head);
        }
    }
};

} // namespace fkda

#endif
