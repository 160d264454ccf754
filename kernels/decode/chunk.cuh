/*
 * Decode all tokens of a sequence at once, also where they are a tree.
 *
 * Algorithm. Let D_ij be the decay of each channel from token j to token i, along the tokens between them,
 * and D_i the decay from the starting state S0. With "j < i" for "token j is an ancestor of token i",
 *
 *     P_i = S0^T (D_i k_i),  R_i = S0^T (D_i q_i)                      for all tokens, in one pass over S0
 *     u_i = b_i (v_i - P_i - sum over j < i of (k_i . D_ij k_j) u_j)    token after token
 *     out_i = scale (R_i + sum over j <= i of (q_i . D_ij k_j) u_j)
 *     S_i = D_i S0 + sum over j <= i of (D_ij k_j) u_j^T                only where a state is written
 *
 * Decays are products of the decays of tokens. No division and no logarithm is needed, so that decays of
 * zero, and decays above 1, are as accurate as others.
 *
 * A token that is not an ancestor of another one does not touch it, even if it is NaN.
 *
 * Optimizations.
 * - Tensor cores compute P, R and what is added to the last state, for eight tokens at a time. A tensor core
 *   takes 11 bits of the mantissa of an operand, so that operands are divided in a high part and a low part,
 *   and the product is high high + high low + low high. That leaves out 2^-21 of it. A state of bf16 has no
 *   low part.
 * - The sum over the channels may be in any order. The order is such that what a lane loads of a state is
 *   what the tensor core expects from it (tile.cuh).
 */
#ifndef FKDA_DECODE_CHUNK_CUH
#define FKDA_DECODE_CHUNK_CUH

#include "prepare.cuh"
#include "tile.cuh"

namespace fkda
{

constexpr int TILE_TOKENS = 8; /* that a tensor core computes at a time */

__device__ __forceinline__ float *chunk_vector(int which, int i)
{
    return vector_at<FKDA_DECODE_VECTORS_OF_A_CHUNK>(which, i);
}

/*
 * The operands of tensor cores, each as a high part and a low part (which = 0 and 1).
 *
 * - Keys and queries with the decay from the start, which lie side by side: those of token i and place p are
 *   numbers 2 p and 2 p + 1 of token i, but with bit 2 flipped in odd tokens.
 * - Keys with the decay to the last token, of pairs of tokens: those of tokens 2 i and 2 i + 1 and place p
 *   are numbers 2 p and 2 p + 1 of pair i, but with bits 3 and 4 flipped by bits 0 and 1 of i.
 *
 * The flips are for lanes that read several tokens. They find them in different banks.
 */
__device__ __forceinline__ float *start_part(int which, int i)
{
    return chunk_vector(which ? START_LOW : START_HIGH, i);
}

__device__ __forceinline__ float *last_part(const Small &small, int which, int pair)
{
    const int tokens = FKDA_DECODE_EIGHTS(small.sequence.length);
    return chunk_vector(0, tokens) + (2 * pair + which) * (2 * DIM);
}

/* Four neighbouring numbers in shared memory. */
__device__ __forceinline__ void read_four(float (&x)[4], const float *from)
{
    const float4 y = *reinterpret_cast<const float4 *>(from);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}

__device__ __forceinline__ float multiply_four(const float (&x)[4], const float (&y)[4])
{
    float sum = x[0] * y[0];
#pragma unroll
    for (int c = 1; c < 4; c++) sum = __fmaf_rn(x[c], y[c], sum);
    return sum;
}

/* The bits of fp32 that a tensor core takes. */
constexpr uint32_t TF32_MASK = 0xffffe000u;

/* Divides x in a high part, which is rounded to tf32, and a low part. */
__device__ __forceinline__ void divide(float &high, float &low, float x)
{
    high = __uint_as_float((__float_as_uint(x) + 0x1000u) & TF32_MASK);
    low = x - high;
}

/* Writes the parts of two vectors side by side. Of them the lane has numbers of places 4 lane to 4 lane + 3;
 * `flip` is as above. */
__device__ __forceinline__ void store_parts(float *high, float *low, int flip, const float (&x)[4],
                                            const float (&y)[4])
{
    const int at = 8 * (static_cast<int>(threadIdx.x) % 32);
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
        float h[4], l[4];
        divide(h[0], l[0], x[c]), divide(h[1], l[1], y[c]);
        divide(h[2], l[2], x[c + 1]), divide(h[3], l[3], y[c + 1]);
        const int to = (at + 2 * c) ^ flip;
        store_four(high + to, h[0], h[1], h[2], h[3]);
        store_four(low + to, l[0], l[1], l[2], l[3]);
    }
}

template <bool is_tree> __device__ __forceinline__ int parent_of(const Small &small, int i)
{
    return is_tree ? small.parent[i] : i - 1;
}

/*
 * A warp walks from token i to the starting state: products with the ancestors, and the key and the query
 * with the decay from the start.
 *
 * Products with eight ancestors are 16 sums over the warp's lanes, of which every two lanes get one.
 */
template <bool is_tree> __device__ __forceinline__ void walk(Small &small, int i)
{
    const int lane = static_cast<int>(threadIdx.x) % 32, at = 4 * lane, which = lane / 2 % 2;
    float k[4], q[4], decay[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    uint32_t before = 0;
    read_four(k, chunk_vector(KEY, i) + at);
    read_four(q, chunk_vector(QUERY, i) + at);
#pragma unroll 1
    for (int j = i; j >= 0;) {
        float sums[16] = {};
        int mine = -1; /* the token of this lane's sum */
        if (!is_tree) mine = j - lane / 4;
#pragma unroll
        for (int s = 0; s < 8; s++) {
            if (j < 0) continue;
            float x[4], d[4];
            read_four(x, chunk_vector(KEY, j) + at);
            read_four(d, chunk_vector(DECAY, j) + at);
#pragma unroll
            for (int c = 0; c < 4; c++) x[c] *= decay[c], decay[c] *= d[c];
            sums[2 * s] = multiply_four(k, x), sums[2 * s + 1] = multiply_four(q, x);
            if (is_tree && lane / 4 == s) mine = j;
            if (is_tree) before |= 1u << j;
            j = parent_of<is_tree>(small, j);
        }
        sum_and_scatter<32>(sums);
        if (mine >= 0 && lane % 2 == 0) small.product[which][i][mine] = sums[0];
    }
    if (is_tree && lane == 0) small.before[i] = before;
#pragma unroll
    for (int c = 0; c < 4; c++) k[c] *= decay[c], q[c] *= decay[c];
    store_parts(start_part(0, i), start_part(1, i), i % 2 * 4, k, q);
}

/* A warp writes the keys with the decay to the last token, zeros for what is not an ancestor of the last
 * token, and the decay of all tokens. */
template <bool is_tree> __device__ __forceinline__ void walk_from_last(Small &small)
{
    const int at = 4 * (static_cast<int>(threadIdx.x) % 32), length = small.sequence.length;
    float decay[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    int next = length - 1; /* on the way to the start */
#pragma unroll 1
    for (int pair = FKDA_DECODE_EIGHTS(length) / 2 - 1; pair >= 0; pair--) {
        float keys[2][4] = {};
#pragma unroll
        for (int i = 1; i >= 0; i--) {
            const int j = 2 * pair + i;
            if (j != next) continue;
            float d[4];
            read_four(keys[i], chunk_vector(KEY, j) + at);
            read_four(d, chunk_vector(DECAY, j) + at);
#pragma unroll
            for (int c = 0; c < 4; c++) keys[i][c] *= decay[c], decay[c] *= d[c];
            next = parent_of<is_tree>(small, j);
        }
        store_parts(last_part(small, 0, pair), last_part(small, 1, pair), pair % 4 * 8, keys[0], keys[1]);
    }
    store_four(small.total + at, decay[0], decay[1], decay[2], decay[3]);
}

template <bool is_tree> __device__ __forceinline__ void walk_all(Small &small, bool writes_last)
{
    const int length = small.sequence.length, warp = static_cast<int>(threadIdx.x) / 32,
              warps = static_cast<int>(blockDim.x) / 32;
    if (writes_last && warp == 0) walk_from_last<is_tree>(small);
#pragma unroll 1
    for (int pass = 0; pass * warps < length; pass++) {
        /* Later tokens have longer walks: every other pass goes backwards. */
        const int i = pass * warps + (pass % 2 ? warps - 1 - warp : warp);
        if (i < length) walk<is_tree>(small, i);
    }
}

/* P - v, which takes the place of v in shared memory, and R of all tokens, in the warp's rows. */
template <bool has_low, class Tile>
__device__ __forceinline__ void multiply_start(const Tile &tile, const Small &small)
{
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = tile.lane;
#pragma unroll 1
    for (int first = 0; first < small.sequence.length; first += TILE_TOKENS) {
        const int token = first + g, flip = token % 2 * 4;
        const float *parts = start_part(0, token) + 8 * t;
        float sums[2][4] = {}, small_sums[2][4] = {}; /* of rows of V 2 n and 2 n + 1 */
        /* The subtracted number is 0. With it the compiler makes the low parts of the state in each turn, and
         * not once: there are no registers to keep them. */
        const uint32_t mask = TF32_MASK - static_cast<uint32_t>(first / MAX_TOKENS);
#pragma unroll
        for (int c = 0; c < Tile::CHANNELS; c += 2) {
            float high[4], low[4];
            const float *from = parts + c / 4 * 32 + (c % 4 ? 4 - flip : flip);
            read_four(high, from), read_four(low, from + (START_LOW - START_HIGH) * DIM);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float x = tile.x[r][c], y = tile.x[r][c + 1];
                mma_tf32(sums[r], high[0], high[1], high[2], high[3], x, y);
                mma_tf32(small_sums[r], low[0], low[1], low[2], low[3], x, y);
                if (has_low)
                    mma_tf32(small_sums[r], high[0], high[1], high[2], high[3],
                             x - __uint_as_float(__float_as_uint(x) & mask),
                             y - __uint_as_float(__float_as_uint(y) & mask));
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[r][i] += small_sums[r][i];
        /* The lane has P and R of the token in columns 2 t and 2 t + 1, which are rows 4 t to 4 t + 3 of the
         * warp. */
        const int row = tile.row - 2 * g + 4 * t;
        float *value = chunk_vector(VALUE, token) + row, v[4];
        read_four(v, value);
        store_four(value, sums[0][0] - v[0], sums[1][0] - v[1], sums[0][1] - v[2], sums[1][1] - v[3]);
        store_four(chunk_vector(OUTPUT, token) + row, sums[0][2], sums[1][2], sums[0][3], sums[1][3]);
    }
    __syncwarp(); /* lanes read each other's numbers */
}

/* x = x + sum over j of product_j u_j, for those of `count` tokens whose bit is set. Without a tree it is set
 * for all. */
template <bool is_tree, int count>
__device__ __forceinline__ void add_products(float &x, const float *product, const float (&u)[4],
                                             uint32_t before)
{
    float y[4];
    read_four(y, product);
#pragma unroll
    for (int j = 0; j < count; j++)
        if (!is_tree || before >> j & 1) x = __fmaf_rn(y[j], u[j], x);
}

/* u of all tokens in one row of V, which takes the place of P - v in shared memory, and the outputs. Two
 * lanes have the row. Both compute u, and one has the outputs of even tokens and one those of odd tokens. It
 * is four tokens at a time, so that registers need not hold all u. */
template <bool is_tree>
__device__ __forceinline__ void solve(const fkda_decode_args &args, const Small &small)
{
    const unsigned thread = threadIdx.x;
    const int row = small.work.first_row + static_cast<int>(thread / 32 * 16 + thread % 16),
              is_odd = static_cast<int>(thread / 16 % 2), length = small.sequence.length;
    uint16_t *to = static_cast<uint16_t *>(args.out) +
                   find_row(args.out_strides, small.sequence, is_odd, small.work.head) + row;
#pragma unroll 1
    for (int first = 0; first < length; first += 4) {
        float x[4], out[2], beta[4], u[4];
        uint32_t before[4] = {}, before_out[2] = {};
        read_four(beta, small.beta + first);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            x[e] = chunk_vector(VALUE, first + e)[row];
            if (is_tree) before[e] = small.before[first + e];
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            out[e] = chunk_vector(OUTPUT, first + 2 * e + is_odd)[row];
            if (is_tree) before_out[e] = small.before[first + 2 * e + is_odd];
        }
        const float *product = small.product[0][first], *product_out = small.product[1][first + is_odd];
#pragma unroll 1
        for (int four = 0; four < first; four += 4) {
#pragma unroll
            for (int e = 0; e < 4; e++) u[e] = chunk_vector(VALUE, four + e)[row];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                add_products<is_tree, 4>(x[e], product + e * MAX_TOKENS, u, before[e]);
                if (is_tree) before[e] >>= 4;
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                add_products<is_tree, 4>(out[e], product_out + 2 * e * MAX_TOKENS, u, before_out[e]);
                if (is_tree) before_out[e] >>= 4;
            }
            product += 4, product_out += 4;
        }
        u[0] = -beta[0] * x[0];
        add_products<is_tree, 1>(x[1], product + MAX_TOKENS, u, before[1]);
        u[1] = -beta[1] * x[1];
        add_products<is_tree, 2>(x[2], product + 2 * MAX_TOKENS, u, before[2]);
        u[2] = -beta[2] * x[2];
        add_products<is_tree, 3>(x[3], product + 3 * MAX_TOKENS, u, before[3]);
        u[3] = -beta[3] * x[3];
        __syncwarp(); /* both lanes have read P - v */
        if (!is_odd) {
#pragma unroll
            for (int e = 0; e < 4; e++) chunk_vector(VALUE, first + e)[row] = u[e];
        }
        __syncwarp(); /* u is there for all lanes of the warp */
        /* With a tree the bits of tokens behind the output's are not set. */
        if (!is_tree) before_out[0] = is_odd ? 3 : 1, before_out[1] = is_odd ? 15 : 7;
        add_products<true, 2>(out[0], product_out, u, before_out[0]);
        add_products<true, 4>(out[1], product_out + 2 * MAX_TOKENS, u, before_out[1]);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (first + 2 * e + is_odd < length)
                *to = static_cast<uint16_t>(pack_bf16(args.scale * out[e], 0.0f));
            to += 2 * args.out_strides.token;
        }
    }
    if (!args.records) return;
#pragma unroll 1
    for (int i = is_odd; i < length; i += 2)
        if (float *record = find_record(args, small.work, i, 2)) record[row] = chunk_vector(VALUE, i)[row];
}

/* The last state, made of the starting state in registers. */
template <class Tile>
__device__ __forceinline__ void make_last_state(Tile &tile, const Small &small, bool is_tree)
{
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = tile.lane, length = small.sequence.length;
    const uint32_t counts = is_tree ? small.before[length - 1] : (1u << length) - 1;
    float u[2][4], low_u[2][4]; /* of eight tokens each, of which the lane has 2 t and 2 t + 1 */
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int token = i / 4 * TILE_TOKENS + 2 * t + i % 4 / 2;
        const float x = counts >> token & 1 ? chunk_vector(VALUE, token)[tile.row + i % 2] : 0.0f;
        u[i / 4][i % 4] = x, low_u[i / 4][i % 4] = x - __uint_as_float(__float_as_uint(x) & TF32_MASK);
    }
    const float *keys = last_part(small, 0, t) + (4 * g ^ t * 8);
#pragma unroll
    for (int f = 0; f < Tile::CHANNELS / 4; f++) {
        float added[2][4] = {}, d[4];
#pragma unroll
        for (int eight = 0; eight < 2; eight++) {
            if (eight * TILE_TOKENS >= length) break;
            const float(&a)[4] = u[eight], (&low_a)[4] = low_u[eight];
            float k[4], low_k[4];
            read_four(k, keys + eight * (TILE_TOKENS * 2 * DIM) + 32 * f);
            read_four(low_k, keys + eight * (TILE_TOKENS * 2 * DIM) + 32 * f + 2 * DIM);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                mma_tf32(added[e], low_a[0], low_a[1], low_a[2], low_a[3], k[2 * e], k[2 * e + 1]);
                mma_tf32(added[e], a[0], a[1], a[2], a[3], low_k[2 * e], low_k[2 * e + 1]);
                mma_tf32(added[e], a[0], a[1], a[2], a[3], k[2 * e], k[2 * e + 1]);
            }
        }
        /* Column 2 t of product e is channel e of the lane's four, and column 2 t + 1 channel 2 + e. */
        read_four(d, small.total + 16 * f + 4 * t);
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float &x = tile.x[r][4 * f + c];
                x = __fmaf_rn(x, d[c], added[c % 2][2 * r + c / 2]);
            }
    }
}

/* Stores the state after token i, made of the starting state, to element `at` of args.written. */
template <class Tile>
__device__ __forceinline__ void store_state_after(const fkda_decode_args &args, const Tile &tile,
                                                  const Small &small, int i, long long at,
                                                  const Rounding &rounding)
{
    constexpr int PART = Tile::PART;
#pragma unroll
    for (int part = 0; part < Tile::PARTS; part++) {
        float decay[PART], y[Tile::ROWS][PART] = {};
#pragma unroll
        for (int e = 0; e < PART; e++) decay[e] = 1.0f;
#pragma unroll 1
        for (int j = i; j >= 0; j = small.parent[j]) {
            float u[Tile::ROWS];
#pragma unroll
            for (int r = 0; r < Tile::ROWS; r++) u[r] = chunk_vector(VALUE, j)[tile.row + r];
#pragma unroll
            for (int four = 0; four < PART / 4; four++) {
                const float4 k = tile.read(chunk_vector(KEY, j), part * PART / 4 + four),
                             d = tile.read(chunk_vector(DECAY, j), part * PART / 4 + four);
                const float ks[4] = {k.x, k.y, k.z, k.w}, ds[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int e = 4 * four + c;
                    const float key = ks[c] * decay[e];
                    decay[e] *= ds[c];
#pragma unroll
                    for (int r = 0; r < Tile::ROWS; r++) y[r][e] = __fmaf_rn(key, u[r], y[r][e]);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < PART; e++)
#pragma unroll
            for (int r = 0; r < Tile::ROWS; r++)
                y[r][e] = __fmaf_rn(tile.x[r][part * PART + e], decay[e], y[r][e]);
        tile.store_part(args.written.data, at, part, y, i, rounding);
    }
}

/* Finds the CTA's work and begins to load the state. Returns false if there is nothing left to do. */
template <class Tile>
__device__ __forceinline__ bool begin_chunk(const fkda_decode_args &args, Small &small, Tile &tile)
{
    const Work work = find_work(args.heads, args.split);
    const Sequence sequence = find_sequence(args, work.sequence);
    const long long slot = find_start_slot(args, work.sequence);
    if (slot == NO_SLOT) {
        clear_sequence(args, work, sequence);
        return false;
    }
    if (sequence.left_out)
        clear_outputs(args, work, sequence, sequence.length, sequence.length + sequence.left_out);
    if (sequence.length == 0) return false;
    const long long at = find_state(args.state, slot, work.head);
    if (threadIdx.x == 0) small.work = work, small.sequence = sequence, small.at = at;
    tile.set_row(work.first_row);
    prepare_and_load<FKDA_DECODE_VECTORS_OF_A_CHUNK>(args, work, sequence, at, tile, small);
    return true;
}

template <bool is_bf16, bool k_first>
__device__ __forceinline__ void decode_chunk(const fkda_decode_args &args)
{
    Small &small = *reinterpret_cast<Small *>(cta_memory());
    Tile<is_bf16, k_first, 4> tile(0);
    if (!begin_chunk(args, small, tile)) return;
    const bool writes_last = args.write_states == FLASH_KDA_WRITE_LAST;
    if (args.parents.data)
        walk_all<true>(small, writes_last);
    else
        walk_all<false>(small, writes_last);
    __syncthreads();
    tile.find_place_again(small.work.first_row);
    multiply_start<!is_bf16>(tile, small);
    if (args.parents.data)
        solve<true>(args, small);
    else
        solve<false>(args, small);
    tile.find_place_again(small.work.first_row);
    const Rounding rounding = find_rounding(is_bf16 ? args.rounding : nullptr, small.work, args.heads);
    if (writes_last) {
        make_last_state(tile, small, args.parents.data != nullptr);
        long long to = small.at;
        if (find_last_state(args, small.work, small.sequence, to))
            tile.store(args.written.data, to, 0, rounding);
    } else if (args.write_states == FLASH_KDA_WRITE_EACH) {
#pragma unroll 1
        for (int i = 0; i < small.sequence.length; i++) {
            const long long after = find_slot_of_each(args, small.work.sequence, small.sequence, i);
            if (after != NO_SLOT)
                store_state_after(args, tile, small, i, find_state(args.written, after, small.work.head),
                                  rounding);
        }
    }
}

} // namespace fkda

#endif
