/*
 * The second step of a chunk, by rows of V: what the chunk writes, and the gradients with respect to it.
 *
 * Algorithm. With S before the chunk, D after it, N = K~ K^^T below the diagonal:
 *
 *     R  = V - K~ S         U  = T R         M  = R - N U       (what the state does not predict)
 *     dU = Kr D + P^T dO    dR = T^T dU      dX = dU - N^T dR
 *
 * dR is the gradient of v. The gradient of b is the sum over V of dX M, which equals the sum of dR U / b^2,
 * because U = b M and dR = b dX. The sum of dR U / b^2 is cheaper than that of dX M, and more accurate,
 * because T has the differences in it. Where b is so small that T does not hold it well, M and dX are
 * computed after all. A warp has 16 rows of V, and all tokens as columns, so that the accumulators of one
 * product are the A operand of the next one.
 *
 * U, - dR and dO are left as operands of the sums over V (sums.cuh), divided by one unit each.
 */
#ifndef FKDA_HOPPER_CHUNKS_VALUES_CUH
#define FKDA_HOPPER_CHUNKS_VALUES_CUH

#include "block.cuh"

namespace fkda
{

/* Rows g, g, g + 8, g + 8 of V of the warp, and tokens 8 i + 2 t, + 1, + 0, + 1. */
typedef float Rows[CHUNK_TOKENS / 8][4];

template <class Block> struct ChunkValues {
    static constexpr int TILES = CHUNK_TOKENS / 8, DEPTHS = CHUNK_TOKENS / 16;
    const fkda_hopper_chunk_args &call;
    Shared<Block> &s;
    int warp, lane, g, t;

    __device__ ChunkValues(const fkda_hopper_chunk_args &a, Shared<Block> &shared) : call(a), s(shared)
    {
        const ThreadPlace p = thread_place();
        warp = p.warp, lane = p.lane, g = p.g, t = p.t;
    }

    /* ---- Images ---- */

    /* The largest scale of an image's rows. It leaves for the sums over V what each of the warp's own rows is
     * multiplied by, so that all rows have this scale. */
    __device__ float find_unit_of_image(int image, const float (&scale)[DIM]) const
    {
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < DIM / 32; i++) most = max(most, __float_as_uint(scale[32 * i + lane]));
        const float unit = __uint_as_float(__reduce_max_sync(~0u, most));
        const int row = 16 * warp + lane;
        if (lane < 16) {
            const float factor = scale[row] * inverse_power(unit);
            s.row_factors(image)[gamma_place(row)] = static_cast<uint16_t>(pack_half(factor, factor));
        }
        return unit;
    }

    /* x[i][j] *= factor scale, where the scale is that of the element's row of V. */
    __device__ void scale_rows(Rows &x, const float (&scale)[DIM], float factor) const
    {
        const float of_row[2] = {scale[16 * warp + g] * factor, scale[16 * warp + g + 8] * factor};
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++) x[i / 4][i % 4] *= of_row[i % 4 / 2];
    }

    /* x = (image) (keys)^T, where keys are K~ or Kr, and lack(half) is what they lack in half of the
     * channels. The result is multiplied by key_scale(), and lacks the scales of the image's rows. The
     * warpgroup's four warps take part together. */
    template <class Lack> __device__ void read(Rows &x, const ImageRows &image, int tile, Lack lack) const
    {
        const uint32_t rows = shared_address(image.bytes) + image_rows(16 * warp, lane);
        constexpr int STEPS = 4; /* of 16 channels, whose products are in flight at the same time */
#pragma unroll
        for (int first = 0; first < DIM / 16; first += STEPS) {
            uint32_t a[STEPS][4];
#pragma unroll
            for (int i = 0; i < STEPS; i++) load_matrices(a[i], rows ^ 32 * (first + i));
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                const int d = first + i;
                const uint64_t keys = token_operand(s.tokens[0].half[d / 4].tile[tile], d);
                if (d == 0)
                    wgmma<false, false>(x, a[i], keys);
                else
                    wgmma<true, false>(x, a[i], keys);
                wgmma<true, false>(x, a[i], token_operand(lack(d / 4), d));
            }
            wgmma_commit();
            wgmma_wait<0>();
        }
    }

    /* v in global memory: of token 8 i + g, rows 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of the warp. */
    struct RawValues {
        uint32_t pair[TILES][2];
    };
    __device__ RawValues load_v() const
    {
        RawValues raw;
        const long long stride = 2 * call.bwd.fwd.v_strides.token;
        const unsigned char *row = row_of_token(s.places.v, stride, g) + 2 * (16 * warp + 2 * t);
        const int left = s.at.left - g;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int r = 0; r < 2; r++)
                raw.pair[i][r] = 8 * i < left ? __ldg(reinterpret_cast<const uint32_t *>(row) + 4 * r) : 0;
            row += 8 * stride;
        }
        return raw;
    }
    /* x = v - x */
    static __device__ void subtract_from(const RawValues &raw, Rows &x)
    {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint32_t two = transpose_matrix(raw.pair[i][r]);
                x[i][2 * r] = bf16_low(two) - x[i][2 * r];
                x[i][2 * r + 1] = bf16_high(two) - x[i][2 * r + 1];
            }
    }

    /* ---- Rows of V of a tile [tokens, V] in shared memory ---- */

    /* Where the lane's row is for the warp's rows of V; `half` has 64 of them. */
    __device__ uint32_t value_place() const
    {
        return matrix_row_by_token(lane) ^ 16 * warp % 64 / 8 * 16;
    }

    /* bf16; zeros past the sequence's end. */
    __device__ void load_values(Rows &x, const unsigned char *half) const
    {
#pragma unroll
        for (int sub = 0; sub < Block::SUBCHUNKS; sub++) {
            uint32_t raw[4];
            load_matrices_transposed(raw, shared_address(half) + value_place() + sub * SUBCHUNK_BYTES);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t pair = raw[i / 2];
                const int tile = 2 * sub + i / 4, e = i % 2;
                x[tile][i % 4] = e ? bf16_high(pair) : bf16_low(pair);
            }
        }
        const int left = s.at.left;
        if (left == CHUNK_TOKENS) return;
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++)
            if (8 * (i / 4) + 2 * t + i % 2 >= left) x[i / 4][i % 4] = 0.0f;
    }

    template <class Pack> __device__ void store(const Rows &x, unsigned char *half, Pack pack_two) const
    {
#pragma unroll
        for (int sub = 0; sub < Block::SUBCHUNKS; sub++) {
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                pairs[i] = pack_two(x[2 * sub + i / 2][i % 2 * 2], x[2 * sub + i / 2][i % 2 * 2 + 1]);
            store_matrices_transposed(shared_address(half) + value_place() + sub * SUBCHUNK_BYTES, pairs);
        }
    }

    /* `inverse`: what operand and tile number `lane` is multiplied by. */
    __device__ void store_operand(Rows &x, unsigned char *half, float inverse, int which) const
    {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const float factor = __shfl_sync(~0u, inverse, TILES * which + i);
#pragma unroll
            for (int r = 0; r < 4; r++) x[i][r] *= factor;
        }
        store(x, half, [](float a, float b) { return pack_half(a, b); });
    }

    /* Stores dv through the place of dout. Two lanes have the rows of V of a token of each subchunk. */
    __device__ void store_dv(const Rows &dr, unsigned char *half) const
    {
        store(dr, half, [](float a, float b) { return pack_bf16(a, b); });
        __syncwarp();
        if (call.bwd.dv) {
            const int token = token_of_pair(lane);
            const long long stride = 2 * call.bwd.dv_strides.token;
            unsigned char *row = row_of_token(s.places.dv, stride, token) + 2 * (16 * warp + lane % 2 * 8);
            const auto *const from = reinterpret_cast<const unsigned char *>(
                token_unit(half, token, 16 * warp % 64 / 8 + lane % 2));
            const int left = s.at.left - token;
#pragma unroll
            for (int sub = 0; sub < Block::SUBCHUNKS; sub++) {
                const uint4 eight = *reinterpret_cast<const uint4 *>(from + sub * SUBCHUNK_BYTES);
                if (SUBCHUNK * sub < left) *reinterpret_cast<uint4 *>(row) = eight;
                row += SUBCHUNK * stride;
            }
        }
        __syncwarp();
    }

    /* ---- Products with matrices between tokens ---- */

    /* d += x m with `place(column, depth)` the lane's row of the matrices for tiles of columns n and n + 1
     * and 16 depths. lower: m is zero where depth < column, otherwise where depth > column. x enters in tf32,
     * since its tokens may be of very different sizes; exact: with what tf32 lacks. An accumulator tile is an
     * A operand whose depths t and t + 4 are tokens 2 t and 2 t + 1, and these are the two fp16 of a register
     * of m. */
    template <bool lower, bool transposed, bool exact = false, class Place>
    __device__ void multiply(Rows &d, const Rows &x, Place place) const
    {
        Rows a;
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++) a[i / 4][i % 4] = nearest_tf32(x[i / 4][i % 4]);
#pragma unroll
        for (int j = 0; j < DEPTHS; j++)
#pragma unroll
            for (int n = 0; n < DEPTHS; n++) {
                if (lower ? n > j : n < j) continue;
                uint32_t b[4];
                if (transposed)
                    load_matrices_transposed(b, place(16 * n, 16 * j));
                else
                    load_matrices(b, place(16 * n, 16 * j));
#pragma unroll
                for (int i = 0; i < 4; i++) { /* column tile i / 2, depth tile i % 2 */
                    const float(&from)[4] = a[2 * j + i % 2];
                    mma_tf32(d[2 * n + i / 2], from[0], from[2], from[1], from[3], half_low(b[i]),
                             half_high(b[i]));
                    const float(&all)[4] = x[2 * j + i % 2];
                    if (exact)
                        mma_tf32(d[2 * n + i / 2], all[0] - from[0], all[2] - from[2], all[1] - from[1],
                                 all[3] - from[3], half_low(b[i]), half_high(b[i]));
                }
            }
    }

    /* What a matrix between tokens lacks on its diagonal, of tokens 8 i + 2 t and + 1. */
    __device__ float2 lack_of(const float (&of_token)[CHUNK_TOKENS], int i) const
    {
        return *reinterpret_cast<const float2 *>(&of_token[8 * i + 2 * t]);
    }

    /* d = x times what T lacks on its diagonal, to which the product with T is added. */
    __device__ void begin_with_lack(Rows &d, const Rows &x) const
    {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const float2 lack = lack_of(s.solve_lack, i);
#pragma unroll
            for (int r = 0; r < 4; r++) d[i][r] = x[i][r] * (r % 2 ? lack.y : lack.x);
        }
    }

    /* The lane's place in the two tiles, for matrices (column, depth), (column, depth + 8), (column + 8,
     * depth), (column + 8, depth + 8). along: the tile's units run along the columns of the product. */
    __device__ int column(int c) const
    {
        return c + lane / 16 * 8;
    }
    __device__ int depth(int d) const
    {
        return d + lane / 8 % 2 * 8;
    }

    /* ---- Tokens with tiny write strengths ---- */

    /* Where the thread's rows of M wait: over K~ and what it lacks, which all warps are through with. */
    __device__ float4 *missed_place(int i) const
    {
        return reinterpret_cast<float4 *>(s.tokens[0].half[warp / 4].tile[i / 2 ? Q : K]) + 32 * (i % 2) +
               64 * (warp % 4) + lane;
    }

    /* M = R - N U */
    __device__ void find_missed(const Rows &r, const Rows &u) const
    {
        Rows sum = {};
        multiply<false, false>(sum, u,
                               [&](int c, int d) { return s.keys.at(column(c) + lane % 8, depth(d)); });
#pragma unroll
        for (int i = 0; i < TILES; i++)
            *missed_place(i) = make_float4(r[i][0] - sum[i][0], r[i][1] - sum[i][1], r[i][2] - sum[i][2],
                                           r[i][3] - sum[i][3]);
    }

    /* The lane's parts of the sums of dX M, of tokens with tiny write strengths. */
    __device__ void sum_missed(float (&sums)[8], const Rows &du, const Rows &dr) const
    {
        Rows x = {};
        multiply<true, true>(x, dr, [&](int c, int d) { return s.keys.at(depth(d) + lane % 8, column(c)); });
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const float4 missed = *missed_place(i);
            const float m[4] = {missed.x, missed.y, missed.z, missed.w};
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (!is_faint(s.strength[8 * i + 2 * t + e], s.stage[0].divisor)) continue;
                sums[2 * i + e] = (du[i][e] - x[i][e]) * m[e] + (du[i][e + 2] - x[i][e + 2]) * m[e + 2];
            }
        }
    }

    /* ---- The step ---- */

    /* The largest magnitudes of the warp's rows. */
    __device__ void announce(int which, const Rows &x) const
    {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const float most =
                fmaxf(fmaxf(fabsf(x[i][0]), fabsf(x[i][1])), fmaxf(fabsf(x[i][2]), fabsf(x[i][3])));
            const uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(most));
            if (lane == 0) s.largest[which][i][warp] = bits;
        }
    }

    /* The unit of one operand and tile in each of the first lanes. */
    __device__ Unit find_unit() const
    {
        const int i = lane < OPERANDS * TILES ? lane : 0;
        const uint32_t *const of_warp = s.largest[i / TILES][i % TILES];
        uint32_t most = 0;
#pragma unroll
        for (int w = 0; w < CHUNK_WARPS; w++) most = max(most, of_warp[w]);
        const Unit unit(most);
        if (warp == 0 && lane == i) s.unit[i / TILES][i % TILES] = unit.size;
        return unit;
    }

    /* Before: the CTA has prepared, and one more meeting makes T, P and N known. `values` is what load_v()
     * has returned. `load_gradient` starts the copy of D, whose place the solver has used until then. Returns
     * the units of the images. */
    template <class Load> __device__ float2 run(const RawValues &values, Load load_gradient) const
    {
        using SolveTile = decltype(Stage<Block>::solve);
        SolveTile &solve = s.stage[0].solve;
        auto &attend = s.stage[0].attend;
        const int row8 = lane % 8;
        unsigned char *const v = s.tokens[0].v[16 * warp / 64], *const dout = s.dout[16 * warp / 64];

        /* ---- R ---- */
        const float key_unit = inverse_power(SlicePreparation<Block>::key_scale(call.bwd.fwd));
        Rows r, u;
        mbarrier_wait(&s.state_there, 0);
        const float state_unit = find_unit_of_image(STATE, s.image_scale);
        read(r, s.state, K, [&](int half) { return s.tokens[0].half[half].tile[Q]; });
        scale_rows(r, s.image_scale, key_unit);
        subtract_from(values, r);
        __syncthreads(); /* T, P and N are there */
        load_gradient();
        const float divisor = s.stage[0].divisor;

        /* ---- U ---- */
        begin_with_lack(u, r);
        multiply<false, true, true>(u, r, [&](int c, int d) { return solve.at(column(c), depth(d) + row8); });
        multiply_by(u, divisor);

        /* ---- dU and dR ---- */
        const bool faint = s.has_faint_write;
        if (__builtin_expect(faint, 0)) find_missed(r, u);
        Rows du, dr, x = {};
        mbarrier_wait(&s.gradient_there, 0);
        const float gradient_unit = find_unit_of_image(GRADIENT, s.image_scale);
        read(du, s.gradient, G, [&](int half) { return s.tokens[0].v[half]; });
        scale_rows(du, s.image_scale, key_unit);
        if (call.bwd.dout) mbarrier_wait(&s.dout_there, 0);
        load_values(r, dout); /* without the call's scale, so that fp16 holds it exactly */
        multiply<true, true>(x, r, [&](int c, int d) { return attend.at(depth(d) + row8, column(c)); });
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const float2 lack = lack_of(s.attend_lack, i);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float sum = __fmaf_rn(r[i][e], e % 2 ? lack.y : lack.x, x[i][e]);
                du[i][e] = __fmaf_rn(sum, call.bwd.fwd.scale, du[i][e]);
            }
        }
        begin_with_lack(dr, du);
        multiply<true, false, true>(dr, du,
                                    [&](int c, int d) { return solve.at(depth(d), column(c) + row8); });
        multiply_by(dr, divisor);

        /* ---- dbeta and dv ---- */
        float sums[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float b = s.strength[8 * (i / 2) + 2 * t + i % 2];
            sums[i] =
                __fmaf_rn(dr[i / 2][i % 2], u[i / 2][i % 2], dr[i / 2][i % 2 + 2] * u[i / 2][i % 2 + 2]) *
                rcp(b) * rcp(b);
        }
        if (__builtin_expect(faint, 0)) sum_missed(sums, du, dr);
        const float dbeta = sum_over_g(sums, lane); /* of token 8 (g / 2) + 2 t + g % 2 */
        store_dv(dr, dout);

        /* ---- Operands ---- */
        announce(OF_U, u), announce(OF_DR, dr), announce(OF_DOUT, r);
        __syncthreads();
        s.dbeta[warp][8 * (g / 2) + 2 * t + g % 2] = dbeta;
        const float inverse = find_unit().inverse;
        store_operand(u, v, inverse, OF_U);
        store_operand(dr, s.tokens[0].half[16 * warp / 64].tile[Q], -inverse, OF_DR);
        store_operand(r, dout, inverse, OF_DOUT);
        fence_async_proxy(); /* wgmma reads the operands */
        __syncthreads();
        return make_float2(state_unit, gradient_unit);
    }
};

} // namespace fkda

#endif
