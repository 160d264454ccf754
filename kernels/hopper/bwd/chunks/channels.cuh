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
 * Why gates do not lose slow or fast channels. For A_ij with both tokens in one subchunk, dg_t is the sum
 * from t on of the rows of A less that of its columns: what does not cross t cancels. Rows and columns are
 * sums of the same products of numbers that are rounded to tf32 beforehand, so they differ by the rounding of
 * fp32 sums alone, and each A_ij has a decay as a factor, since the diagonal is left out. All other terms are
 * added, and none is subtracted.
 *
 * Units. All terms are linear in P, L, dQ~, dK~, dKr and kept, which sums.cuh leaves divided by one number,
 * pair_unit, so that no product with a decay leaves the range of fp32. Results are multiplied by it.
 *
 * Lane (g, t) has channels g and g + 8 of the warp's 16, and tokens 8 i + 2 t and + 1. Registers are short,
 * so what a subchunk needs later waits in shared memory.
 */
#ifndef FKDA_HOPPER_CHUNKS_CHANNELS_CUH
#define FKDA_HOPPER_CHUNKS_CHANNELS_CUH

#include "sums.cuh"

namespace fkda
{

template <class Block> struct ChunkChannels {
    /* A subchunk's elements of this lane: tile of eight tokens, then channels g, g, g + 8, g + 8 at tokens 2
     * t, 2 t + 1, 2 t, 2 t + 1. */
    typedef float Elements[2][4];

    const fkda_hopper_chunk_args &all;
    const fkda_fwd_args &args;
    Shared<Block> &s;
    int warp, lane, g, t;

    __device__ ChunkChannels(const fkda_hopper_chunk_args &a, Shared<Block> &shared)
        : all(a), args(a.bwd.fwd), s(shared)
    {
        const ThreadPlace p = thread_place();
        warp = p.warp, lane = p.lane, g = p.g, t = p.t;
    }

    /* ---- Inputs and sums over tokens ---- */

    /* Of channel g + 8 r. */
    __device__ float offset(int r) const
    {
        return s.gate_offset[0][16 * warp + g + 8 * r];
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
        unpack(x, pairs);
    }
    static __device__ void unpack(Elements &x, const uint32_t (&pairs)[4])
    {
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i / 4][i % 4] = i % 2 ? bf16_high(pairs[i / 2]) : bf16_low(pairs[i / 2]);
    }

    /* A box brings tokens of the next sequence past the end of this one. They become zeros, and their gates
     * such that they decay by nothing and have no derivative. All threads meet. */
    __device__ void clear_past_end() const
    {
        const uint32_t none = no_decay<Block>(args);
#pragma unroll 1
        for (int row = s.at.left; row < CHUNK_TOKENS; row++)
            if (warp < 6 && lane < ROW / 16) {
                const uint32_t x = warp % 3 == G ? none : 0;
                reinterpret_cast<uint4 *>(s.raw[warp / 3].tile[warp % 3] + row * ROW)[lane] =
                    make_uint4(x, x, x, x);
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

    /* Raw gates, also those in fp32, which come from global memory. */
    __device__ void load_gates(Elements &x, int sub) const
    {
        if (!has_fp32_gates<Block>(args)) {
            load(x, G, sub);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int token = 16 * sub + 8 * (i / 4) + 2 * t + i % 2;
            const long long at = s.at.place(args.g_strides, token) + 16 * warp + g + i % 4 / 2 * 8;
            x[i / 4][i % 4] = token < s.at.left ? __ldg(static_cast<const float *>(args.g) + at)
                                                : gate_of_call<Block>(args).neutral();
        }
    }

    /* The running sums of the log2 decays from the subchunk's start, by the tensor core as in
     * ../../block/prepare_slice.cuh, with channels as rows. */
    __device__ void sum_gates(Elements &sum, int sub) const
    {
        constexpr uint32_t ONE = 0x3f80; /* in bf16 */
        float x[2][4];
        Elements raw_gates;
        load_gates(raw_gates, sub);
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int i = 0; i < 4; i++) x[r][i] = raw_gates[i / 2][2 * r + i % 2];
            activate_gates(x[r], gate_of_call<Block>(args), s.gate[0][warp], offset(r));
            if (Block::UNBOUNDED)
#pragma unroll
                for (int i = 0; i < 4; i++) x[r][i] = hold_log2_decay(x[r][i]);
        }
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) { /* tile i / 2, channel i % 2 */
            const float a = x[i % 2][i / 2 * 2], b = x[i % 2][i / 2 * 2 + 1];
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

    /* ---- Products between tokens ---- */

    /* Numbers between tokens enter with all their bits: the tensor core takes the upper ones, and then the
     * others. */
    static __device__ void multiply_pairs(float (&d)[4], const float (&x)[4], float b0, float b1)
    {
        mma_tf32(d, x[0], x[2], x[1], x[3], b0, b1);
        mma_tf32(d, x[0], x[2], x[1], x[3], b0 - cut_to_tf32(b0), b1 - cut_to_tf32(b1));
    }

    /* to[t] += the sum of x from token t on, and the sum of y before token t: products with triangles of
     * ones. The tensor core takes 11 bits of x, and then 11 bits of what is left. */
    __device__ void add_from_here_and_before(Elements &to, const Elements &x, const Elements &y) const
    {
        const float from[2] = {2 * t >= g ? 1.0f : 0.0f, 2 * t + 1 >= g ? 1.0f : 0.0f},
                    before[2] = {1.0f - from[0], 1.0f - from[1]};
        sum_tokens(to[0], x[0], from[0], from[1]);
        sum_tokens(to[0], x[1], 1.0f, 1.0f);
        sum_tokens(to[1], x[1], from[0], from[1]);
        sum_tokens(to[0], y[0], before[0], before[1]);
        sum_tokens(to[1], y[0], 1.0f, 1.0f);
        sum_tokens(to[1], y[1], before[0], before[1]);
    }
    static __device__ void sum_tokens(float (&d)[4], const float (&x)[4], float b0, float b1)
    {
        const float low[4] = {x[0] - cut_to_tf32(x[0]), x[1] - cut_to_tf32(x[1]), x[2] - cut_to_tf32(x[2]),
                              x[3] - cut_to_tf32(x[3])};
        mma_tf32(d, low[0], low[2], low[1], low[3], b0, b1);
        mma_tf32(d, x[0], x[2], x[1], x[3], b0, b1);
    }

    /* Where the lane's row of four matrices of a TokenPairs is, and its first element of a transposed one, as
     * offsets in bytes. */
    __device__ uint32_t reader_place() const
    {
        return lane % 8 * TokenPairs::ROW_BYTES + lane / 8 * 16;
    }
    __device__ uint32_t writer_place() const
    {
        return 2 * t * TokenPairs::ROW_BYTES + 4 * TokenPairs::column(g);
    }

    /* d[i] += x pairs^T: readers i from writers j. x has the writers, of subchunk `from`; the readers are
     * those of subchunk `to`. In one subchunk, only tiles with j <= i. */
    template <bool one_subchunk>
    __device__ void read(Elements &d, const Elements &x, const TokenPairs &pairs, int to, int from) const
    {
        const uint32_t at = shared_address(&pairs) + TokenPairs::tile(to, from) + reader_place();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t b[4]; /* of writers 2 t and 2 t + 1, and 8 more */
            load_matrices(b, at + 8 * i * TokenPairs::ROW_BYTES);
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (!one_subchunk || j <= i)
                    multiply_pairs(d[i], x[j], __uint_as_float(b[2 * j]), __uint_as_float(b[2 * j + 1]));
        }
    }

    /* d[j] += x pairs: what the readers i of subchunk `to`, which x has, give the writers j of `from`. */
    template <bool one_subchunk>
    __device__ void write(Elements &d, const Elements &x, const TokenPairs &pairs, int to, int from) const
    {
        const auto *const at = reinterpret_cast<const float *>(
            reinterpret_cast<const unsigned char *>(&pairs) + TokenPairs::tile(to, from) + writer_place());
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (one_subchunk && j > i) continue;
                const float *const b = at + 8 * i * TokenPairs::ROW_FLOATS + 8 * j;
                multiply_pairs(d[j], x[i], b[0], b[TokenPairs::ROW_FLOATS]);
            }
    }

    static __device__ void round(Elements &x)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i / 4][i % 4] = nearest_tf32(x[i / 4][i % 4]);
    }
    static __device__ void copy(Elements &x, const float (*from)[4])
    {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i / 4][i % 4] = from[i / 4][i % 4];
    }
    static __device__ void clear(Elements &x)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i / 4][i % 4] = 0.0f;
    }

    /* ---- Decays ---- */

    /* Of a subchunk, for channels g and g + 8. */
    struct Decays {
        float2 before; /* from the subchunk's start to its eighth token */
        float2 rest;   /* from there to the subchunk's end */
        float2 log_before, log_rest;
        bool wide; /* unbounded gates: factors of the warp's channels would leave the range of fp32 */
    };
    /* Counts the sums from the eighth token. */
    __device__ Decays find_decays(Elements &sum) const
    {
        const float2 last = last_of(sum[1]), middle = last_of(sum[0]);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i / 4][i % 4] -= of(middle, i % 4);
        const float2 rest = make_float2(last.x - middle.x, last.y - middle.y);
        bool wide = false;
        if (Block::UNBOUNDED) {
            constexpr float MOST = 60.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) wide |= fabsf(sum[i / 4][i % 4]) > MOST;
            wide = __any_sync(~0u, wide);
        }
        return {make_float2(ex2(middle.x), ex2(middle.y)), make_float2(ex2(rest.x), ex2(rest.y)), middle,
                rest, wide};
    }

    /* The decays from the subchunk's start to a token, and from a token to the subchunk's end. up and down
     * are those from the eighth token and to it. */
    static __device__ float from_start(float up, float sum, const Decays &d, int r)
    {
        return Block::UNBOUNDED ? ex2(sum + of(d.log_before, r)) : up * of(d.before, r);
    }
    static __device__ float to_end(float down, float sum, const Decays &d, int r)
    {
        return Block::UNBOUNDED ? ex2(of(d.log_rest, r) - sum) : down * of(d.rest, r);
    }
    static __device__ float2 product(const float2 &x, const float2 &y)
    {
        return make_float2(x.x * y.x, x.y * y.y);
    }
    static __device__ float of(const float2 &x, int r) /* r: element of a tile */
    {
        return r / 2 ? x.y : x.x;
    }

    /* ---- A subchunk ---- */

    /* Numbers of this thread that wait in shared memory. */
    static __device__ void stash(float4 *to, const float (*x)[4])
    {
        to[0] = make_float4(x[0][0], x[0][1], x[0][2], x[0][3]);
        to[FKDA_HOPPER_CHUNK_THREADS] = make_float4(x[1][0], x[1][1], x[1][2], x[1][3]);
    }
    static __device__ void unstash(Elements &x, const float4 *from)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 four = from[FKDA_HOPPER_CHUNK_THREADS * i];
            x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
        }
    }
    /* Where eight numbers of the thread wait: dQ~, dK~ or dKr of the first subchunk; dq or dk of the second
     * one. */
    __device__ float4 *sum_stash(int sub, int i) const
    {
        const int thread = 32 * warp + lane, part = 2 * FKDA_HOPPER_CHUNK_THREADS * i;
        return (sub == 0 ? s.stash : s.result_stash()) + part + thread;
    }

    /* Of what the second subchunk leaves for the first one. */
    __device__ float4 *late_stash() const
    {
        return s.late_stash + 32 * warp + lane;
    }

    /* The sums of the gates of the first subchunk, over - dR. */
    __device__ float4 *gate_stash() const
    {
        return reinterpret_cast<float4 *>(s.tokens[0].half[warp / 4].tile[Q]) + 64 * (warp % 4) + lane;
    }
    __device__ void stash_gates(const Elements &sum) const
    {
        float4 *const to = gate_stash();
        to[0] = make_float4(sum[0][0], sum[0][1], sum[0][2], sum[0][3]);
        to[32] = make_float4(sum[1][0], sum[1][1], sum[1][2], sum[1][3]);
    }
    __device__ void unstash_gates(Elements &sum) const
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 four = gate_stash()[32 * i];
            sum[i][0] = four.x, sum[i][1] = four.y, sum[i][2] = four.z, sum[i][3] = four.w;
        }
    }

    /* Numbers of channels g and g + 8 that wait in shared memory. */
    __device__ void note(float (&row)[DIM], const float2 &x) const
    {
        if (t == 0) row[16 * warp + g] = x.x, row[16 * warp + g + 8] = x.y;
    }
    __device__ float2 noted(const float (&row)[DIM]) const
    {
        return make_float2(row[16 * warp + g], row[16 * warp + g + 8]);
    }

    __device__ void note_decays(const Decays &d, int sub) const
    {
        note(s.notes.before[sub], d.before), note(s.notes.rest[sub], d.rest);
        if (!Block::UNBOUNDED) return;
        note(s.log_notes().before[sub], d.log_before), note(s.log_notes().rest[sub], d.log_rest);
    }
    __device__ Decays noted_decays(int sub) const
    {
        Decays d = {};
        d.before = noted(s.notes.before[sub]), d.rest = noted(s.notes.rest[sub]);
        if (!Block::UNBOUNDED) return d;
        d.log_before = noted(s.log_notes().before[sub]), d.log_rest = noted(s.log_notes().rest[sub]);
        return d;
    }
    /* Over all of a subchunk. */
    __device__ float2 noted_decay(int sub) const
    {
        return product(noted(s.notes.before[sub]), noted(s.notes.rest[sub]));
    }

    /* The keys of the first subchunk, decayed to the border, as operands; and first_y, the sum over that
     * subchunk of F_last,j k_j dKr_j. after: the decay over the second subchunk. */
    __device__ void find_writers(Elements &writers, float2 &first_y, const float2 &after) const
    {
        const Decays d = noted_decays(0);
        Elements sum, y;
        unstash_gates(sum);
        unstash(y, sum_stash(0, 2));
        load_normalised(writers, K, 0);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &k = writers[i / 4][i % 4];
            k *= to_end(ex2(-sum[i / 4][i % 4]), sum[i / 4][i % 4], d, i % 4);
            y[i / 4][i % 4] *= k;
        }
        first_y = product(sum_of_tokens(y), after);
        round(writers);
    }

    /* Adds the pairs of tokens of a subchunk: to dq and dk what readers get, to w what writers get, and to x
     * the sums of the rows of A less those of its columns. */
    __device__ void pair(int sub, Elements &dq, Elements &dk, Elements &w, Elements &x, const Elements &q,
                         const Elements &k, const Elements &up, const Elements &down) const
    {
        Elements k_down, of_w;
        clear(of_w);
#pragma unroll
        for (int i = 0; i < 8; i++) k_down[i / 4][i % 4] = k[i / 4][i % 4] * down[i / 4][i % 4];
        round(k_down);
        pair_readers(sub, dq, of_w, x, q, up, k_down, s.queries_with_writes());
        pair_readers(sub, dk, of_w, x, k, up, k_down, s.keys_with_writes());
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int n = i / 4, r = i % 4;
            x[n][r] = __fmaf_rn(-k_down[n][r], of_w[n][r], x[n][r]);
            w[n][r] = __fmaf_rn(of_w[n][r], down[n][r], w[n][r]);
        }
    }

    /* Queries or keys as readers. Products are those of what the tensor core has taken, so that rows and
     * columns agree. */
    __device__ void pair_readers(int sub, Elements &dx, Elements &of_w, Elements &x, const Elements &reader,
                                 const Elements &up, const Elements &k_down, const TokenPairs &pairs) const
    {
        Elements reader_up, sum;
        clear(sum);
        read<true>(sum, k_down, pairs, sub, sub);
#pragma unroll
        for (int i = 0; i < 8; i++) reader_up[i / 4][i % 4] = reader[i / 4][i % 4] * up[i / 4][i % 4];
        round(reader_up);
        write<true>(of_w, reader_up, pairs, sub, sub);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int n = i / 4, r = i % 4;
            x[n][r] = __fmaf_rn(reader_up[n][r], sum[n][r], x[n][r]);
            dx[n][r] = __fmaf_rn(sum[n][r], up[n][r], dx[n][r]);
        }
    }

    /* Queries or keys of the second subchunk as readers of the first one. */
    __device__ void read_first(Elements &dx, Elements &x, Elements &written, const Elements &reader,
                               const Elements &up, const Elements &sum, const Decays &d,
                               const Elements &writers, const TokenPairs &pairs) const
    {
        Elements got;
        clear(got);
        read<false>(got, writers, pairs, 1, 0);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int n = i / 4, r = i % 4;
            const float from_border = from_start(up[n][r], sum[n][r], d, r),
                        there = reader[n][r] * from_border;
            dx[n][r] = __fmaf_rn(got[n][r], from_border, dx[n][r]);
            x[n][r] = __fmaf_rn(there, got[n][r], x[n][r]);
            got[n][r] = there;
        }
        round(got);
        write<false>(written, got, pairs, 1, 0);
    }

    /* The same pair by pair, for gates that forget so much that factors would leave the range of fp32. */
    __device__ void pair_directly(int sub, Elements &dq, Elements &dk, Elements &w, Elements &x,
                                  const Elements &q, const Elements &k, const Elements &sum) const
    {
        const TokenPairs &P = s.queries_with_writes(), &L = s.keys_with_writes();
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll 1
                for (int lane_of_j = 0; lane_of_j < 4; lane_of_j++) { /* of the writer, in the quad */
                    const int j = 16 * sub + 8 * n + 2 * lane_of_j + r % 2, from = (lane & ~3) | lane_of_j;
                    const float k_j = __shfl_sync(~0u, k[n][r], from),
                                sum_j = __shfl_sync(~0u, sum[n][r], from);
                    float of_w = 0.0f;
#pragma unroll
                    for (int m = 0; m < 4; m++) { /* the lane's readers of the channel */
                        const int i = 16 * sub + 8 * (m / 2) + 2 * t + m % 2, e = r / 2 * 2 + m % 2;
                        if (i <= j) continue;
                        const float f = ex2(sum[m / 2][e] - sum_j), by_q = P.at(i, j) * f,
                                    by_k = L.at(i, j) * f;
                        of_w = __fmaf_rn(by_q, q[m / 2][e], __fmaf_rn(by_k, k[m / 2][e], of_w));
                        const float of_q = by_q * k_j, of_k = by_k * k_j;
                        dq[m / 2][e] += of_q, dk[m / 2][e] += of_k;
                        x[m / 2][e] = __fmaf_rn(q[m / 2][e], of_q, __fmaf_rn(k[m / 2][e], of_k, x[m / 2][e]));
                    }
                    __syncwarp();
                    of_w = sum_of_quad(of_w);
                    if (t != lane_of_j) continue;
                    w[n][r] += of_w;
                    x[n][r] = __fmaf_rn(-k_j, of_w, x[n][r]);
                }
    }

    /* From dQ~, dK~ and dKr of the subchunk, which are in dq, dk and w, finds dq and dk of normalised queries
     * and keys, and the gradient of the log decay, which it leaves in dg. before: the decay of all tokens
     * before the subchunk; after: of all after it. */
    __device__ void compute(int sub, Elements &dq, Elements &dk, Elements &w, Elements &dg,
                            const Elements &sum, bool wide) const
    {
        const TokenPairs &P = s.queries_with_writes(), &L = s.keys_with_writes();
        const float2 ones = make_float2(1.0f, 1.0f), before = sub ? noted_decay(0) : ones,
                     after = sub ? ones : noted_decay(1);
        const Decays d = noted_decays(sub);
        float2 from_other = make_float2(0.0f, 0.0f); /* first_y or second_x */
        Elements q, k, x, y; /* x: terms that are summed from t on; y: those summed before t */
        load_normalised(q, Q, sub), load_normalised(k, K, sub);

        Elements up, down;
#pragma unroll
        for (int i = 0; i < 8; i++)
            up[i / 4][i % 4] = ex2(sum[i / 4][i % 4]), down[i / 4][i % 4] = ex2(-sum[i / 4][i % 4]);

            /* ---- The state before the chunk as a writer, and the state after it as a reader ---- */
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int n = i / 4, r = i % 4;
            const float start = from_start(up[n][r], sum[n][r], d, r) * of(before, r);
            dq[n][r] *= start, dk[n][r] *= start;
            w[n][r] *= to_end(down[n][r], sum[n][r], d, r) * of(after, r);
            x[n][r] = __fmaf_rn(q[n][r], dq[n][r], k[n][r] * dk[n][r]);
            y[n][r] = k[n][r] * w[n][r];
        }
        if (sub == 1) note(s.notes.second_x, sum_of_tokens(x));
        float4 *const y_stash = sum_stash(sub, 0);
        stash(y_stash, y);

        /* ---- The subchunk itself ---- */
        if (Block::UNBOUNDED && __builtin_expect(wide, 0))
            pair_directly(sub, dq, dk, w, x, q, k, sum);
        else
            pair(sub, dq, dk, w, x, q, k, up, down);

        /* ---- The other subchunk ---- */
        if (sub == 1) {
            Elements writers;
            find_writers(writers, from_other, noted_decay(1));
            Elements written; /* what these readers give the writers of the first subchunk */
            clear(written);
            const Decays again = noted_decays(sub);
            read_first(dq, x, written, q, up, sum, again, writers, P);
            read_first(dk, x, written, k, up, sum, again, writers, L);
            stash(late_stash(), written);
            unstash(y, y_stash);
        } else {
            from_other = noted(s.notes.second_x);
            Elements written;
            unstash(written, late_stash());
            unstash(y, y_stash);
            const Decays again = noted_decays(sub);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int n = i / 4, r = i % 4;
                const float by = written[n][r] * to_end(down[n][r], sum[n][r], again, r);
                w[n][r] += by;
                y[n][r] = __fmaf_rn(k[n][r], by, y[n][r]);
            }
        }

        /* ---- Sums ---- */
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float2 own = factor(s.on_diagonal, sub, n);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float p = r % 2 ? own.y : own.x;
                dk[n][r] += __fmaf_rn(p, q[n][r], w[n][r]);
                dq[n][r] = __fmaf_rn(p, k[n][r], dq[n][r]);
                dg[n][r] = of(from_other, r);
            }
        }
        if (!(Block::OPTIONS && args.qk_is_normalised)) announce_along(q, dq, k, dk, sub);
        const float2 kept = noted(s.notes.kept);
#pragma unroll
        for (int i = 0; i < 8; i++) dg[i / 4][i % 4] += of(kept, i % 4);
        add_from_here_and_before(dg, x, y);
    }

    /* ---- Gates ---- */

    /* Turns the gradient of the log decay into that of the raw gate, and adds up for dt_bias and A_log. The
     * bounded gate is lower_bound s with s = 1 / (1 + 2^z) and z = slope (g + dt_bias), and its derivative by
     * z is - lower_bound ln 2 s (1 - s); what is common to all elements is left to finish_sums(). */
    __device__ void finish_gates(Elements &dg, int sub) const
    {
        float by_bias[2] = {}, by_rate[2] = {};
        constexpr float MOST = 125.0f; /* 2^z stays in the range of fp32 */
        Elements raw_gates;
        load_gates(raw_gates, sub);
        if (Block::UNBOUNDED && !gate_of_call<Block>(args).is_bounded()) {
            finish_unbounded_gates(dg, raw_gates, sub, by_bias, by_rate);
            add_parameter_sums(by_bias, by_rate, sub);
            return;
        }
        const float slope = s.gate[0][warp].slope, factor = gate_factor() * s.pair_unit;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float z = __fmaf_rn(raw_gates[n][r], slope, offset(r / 2));
                z = z > MOST ? MOST : z; /* fminf would hide a NaN */
                z = z < -MOST ? -MOST : z;
                const float e = ex2(z), sigmoid = rcp(1.0f + e);
                float &x = dg[n][r];
                x *= e * sigmoid * sigmoid;
                by_rate[r / 2] = __fmaf_rn(x, z, by_rate[r / 2]);
                by_bias[r / 2] += x;
                x *= factor;
            }
        add_parameter_sums(by_bias, by_rate, sub);
    }

    /* The softplus gate is -exp(A_log) softplus(g + dt_bias), and the activated one is g. The gradient of a
     * gate has its decay as a factor. Where this is next to nothing, the gradient is 0: what the sums have
     * left is their rounding, and A_log would multiply it by a log decay without a bound. */
    __device__ void finish_unbounded_gates(Elements &dg, const Elements &raw_gates, int sub,
                                           float (&by_bias)[2], float (&by_rate)[2]) const
    {
        const bool softplus = gate_of_call<Block>(args).is_softplus();
        const float factor = softplus ? s.gate[0][warp].factor : 1.0f;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                constexpr float NEXT_TO_NOTHING = -30.0f;
                const float z = __fmaf_rn(raw_gates[n][r], LOG2_E, offset(r / 2)),
                            log_decay = softplus ? factor * log2_of_1_plus_ex2(z) : z;
                float &x = dg[n][r];
                if (log_decay < NEXT_TO_NOTHING || 16 * sub + 8 * n + 2 * t + r % 2 >= s.at.left)
                    x = 0.0f;
                else if (softplus) {
                    by_rate[r / 2] = __fmaf_rn(x * s.pair_unit, log_decay, by_rate[r / 2]);
                    x *= factor * rcp(1.0f + ex2(-z));
                }
                x *= s.pair_unit;
                by_bias[r / 2] += x;
            }
    }

    /* lower_bound exp(A_log): the derivative of the bounded gate by g is this times s (1 - s). */
    __device__ float gate_factor() const
    {
        return s.gate[0][warp].slope * (-1.0f / LOG2_E) * args.lower_bound;
    }

    /* Each thread's sums over the second subchunk, which comes first, wait for those over the first one. */
    __device__ void add_parameter_sums(float (&by_bias)[2], float (&by_rate)[2], int sub) const
    {
        if (!all.bwd.sums) return;
        float4 &second = s.parameter_sums[32 * warp + lane];
        if (sub == 1) {
            second = make_float4(by_bias[0], by_bias[1], by_rate[0], by_rate[1]);
            return;
        }
        by_bias[0] += second.x, by_bias[1] += second.y, by_rate[0] += second.z, by_rate[1] += second.w;
        float *const to = all.bwd.sums + (s.at.slot * args.heads + s.at.head) * (2 * DIM);
        const bool bounded = !Block::UNBOUNDED || gate_of_call<Block>(args).is_bounded();
        const float of_bias = bounded ? gate_factor() * s.pair_unit : 1.0f,
                    of_rate = bounded ? args.lower_bound * (-1.0f / LOG2_E) * s.pair_unit : 1.0f / LOG2_E;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int channel = 16 * warp + g + 8 * r;
            const float bias = sum_of_quad(by_bias[r]) * of_bias, rate = sum_of_quad(by_rate[r]) * of_rate;
            if (t == 0) to[channel] = bias, to[DIM + channel] = rate;
        }
    }

    /* ---- Outputs ---- */

    /* Leaves the subchunk's elements in bf16 in the place of a raw tile, in which they take this warp's own
     * channels. */
    __device__ void leave(const Elements &x, int which, int sub) const
    {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = pack_bf16(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
        store_matrices_transposed(place(which, sub), pairs);
    }

    /* Stores what the warp has left. Two lanes store the channels of a token. first: where the
     * chunk's first token has its row; stride: from row to row, in bytes. */
    __device__ void store(int which, int sub, unsigned char *first, long long stride) const
    {
        const int token = 16 * sub + token_of_pair(lane);
        const uint4 eight = *token_unit(raw(which), token, 16 * warp % 64 / 8 + lane % 2);
        unsigned char *const row = row_of_token(first, stride, token);
        if (token < s.at.left) *reinterpret_cast<uint4 *>(row + 2 * (16 * warp + lane % 2 * 8)) = eight;
    }

    /* Stores the subchunk's elements in fp32. */
    __device__ void store_fp32(const Elements &x, int sub, unsigned char *first, long long stride) const
    {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int n = i / 4, token = 16 * sub + 8 * n + 2 * t + i % 2;
            float *const row = reinterpret_cast<float *>(row_of_token(first, stride, token));
            if (token < s.at.left) row[16 * warp + g + i % 4 / 2 * 8] = x[n][i % 4];
        }
    }

    /* The sum over the warp's channels of x y, for each token. */
    __device__ void announce_along(const Elements &q, const Elements &dq, const Elements &k,
                                   const Elements &dk, int sub) const
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

    /* For the gradient through the norm of a query (warp 0) or a key (warp 1), by tokens: the scale is
     * 1 / |x| times pair_unit, and `along` is 1 / |x| times the sum over all channels of the gradient times
     * x / |x|. */
    __device__ void find_norm_sums() const
    {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < CHUNK_WARPS; w++) sum += s.norm_sums.of_warp[warp][w][lane];
        const float inverse_norm = s.inverse_norm[0][0][warp == 0][lane];
        s.norm_sums.along[warp][lane] = sum * inverse_norm;
        s.norm_sums.scale[warp][lane] = inverse_norm * s.pair_unit;
    }

    /* Turns the gradient of normalised queries (i = 0) or keys (i = 1) into that of raw ones, which are in
     * `pairs`. */
    __device__ void find_raw_gradient(Elements &result, const uint32_t (&pairs)[4], int i, int sub) const
    {
        if (Block::OPTIONS && args.qk_is_normalised) {
#pragma unroll
            for (int n = 0; n < 8; n++) result[n / 4][n % 4] *= s.pair_unit;
            return;
        }
        Elements x;
        unpack(x, pairs);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float2 along = factor(s.norm_sums.along[i], sub, n),
                         scale = factor(s.norm_sums.scale[i], sub, n);
#pragma unroll
            for (int r = 0; r < 4; r++)
                result[n][r] = __fmaf_rn(-x[n][r], r % 2 ? along.y : along.x, result[n][r]) *
                               (r % 2 ? scale.y : scale.x);
        }
    }

    /* Gradients of queries and keys through the norm, and to memory. dq and dk are those of the first
     * subchunk. Sums for norms are there when the CTA meets. */
    __device__ void store_through_norms(const Elements &dq, const Elements &dk) const
    {
        const fkda_bwd_args &b = all.bwd;
        Elements results[2][2]; /* of queries and keys, and of each subchunk */
        uint32_t raw_pairs[2][2][4];
        copy(results[0][0], dq), copy(results[1][0], dk);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unstash(results[i][1], sum_stash(1, i));
#pragma unroll
            for (int sub = 0; sub < 2; sub++)
                load_matrices_transposed(raw_pairs[i][sub], place(i ? K : Q, sub));
        }
        __syncthreads();
        const bool parts = b.dq_parts || b.dk_parts;
        const long long part_stride = 4LL * DIM * args.heads;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int sub = 0; sub < 2; sub++) {
                Elements &result = results[i][sub];
                find_raw_gradient(result, raw_pairs[i][sub], i, sub);
                if (!parts)
                    leave(result, i ? K : Q, sub);
                else if (i ? b.dk : b.dq)
                    store_fp32(result, sub, i ? s.places.dk : s.places.dq, part_stride);
            }
        if (parts) return;
        __syncwarp();
#pragma unroll
        for (int sub = 0; sub < 2; sub++) {
            if (b.dq) store(Q, sub, s.places.dq, 2 * b.dq_strides.token);
            if (b.dk) store(K, sub, s.places.dk, 2 * b.dk_strides.token);
        }
    }

    /* ---- The step ---- */

    __device__ void run(ChannelSums &sums)
    {
        stash(sum_stash(0, 0), sums.q), stash(sum_stash(0, 1), sums.k), stash(sum_stash(0, 2), sums.k_rest);
        Elements q, k;
        copy(q, sums.q + 2), copy(k, sums.k + 2);
        /* The inputs come for the second time, or for the third one if the preparation was careful. */
        mbarrier_wait(&s.inputs_there, Block::UNBOUNDED && s.is_wide ? 0 : 1);
        if (s.at.left < CHUNK_TOKENS) clear_past_end();
        {
            Elements gates;
            bool wide[2];
#pragma unroll
            for (int sub = 0; sub < 2; sub++) {
                sum_gates(gates, sub);
                const Decays d = find_decays(gates);
                note_decays(d, sub);
                wide[sub] = d.wide;
                if (sub == 0) stash_gates(gates);
            }
            __syncwarp();
            note(s.notes.kept,
                 product(product(noted_decay(0), noted_decay(1)), make_float2(sums.kept[0], sums.kept[1])));
            __syncwarp();
            Elements w;
            copy(w, sums.k_rest + 2);
            /* A loop, so that the code is there once. */
#pragma unroll 1
            for (int sub = 1; sub >= 0; sub--) {
                const ChunkChannels here(all, s); /* its places are found anew, and do not fill registers */
                Elements dg;
                here.compute(sub, q, k, w, dg, gates, wide[1]);
                here.finish_gates(dg, sub);
                here.store_gates(dg, sub);
                if (sub == 0) break;
                here.stash(here.sum_stash(1, 0), q), here.stash(here.sum_stash(1, 1), k);
                here.unstash(q, here.sum_stash(0, 0)), here.unstash(k, here.sum_stash(0, 1));
                here.unstash(w, here.sum_stash(0, 2));
                here.unstash_gates(gates);
                wide[1] = wide[0];
            }
        }

        /* ---- Norms ---- */
        __syncthreads();
        if (warp < 2) find_norm_sums();
        const ChunkChannels here(all, s);
        here.store_through_norms(q, k);
    }

    __device__ void store_gates(const Elements &dg, int sub) const
    {
        if (Block::OPTIONS && args.g_is_f32) {
            if (all.bwd.dg) store_fp32(dg, sub, s.places.dg, 4 * all.bwd.dg_strides.token);
            return;
        }
        leave(dg, G, sub);
        __syncwarp();
        if (all.bwd.dg) store(G, sub, s.places.dg, 2 * all.bwd.dg_strides.token);
    }
};

} // namespace fkda

#endif
