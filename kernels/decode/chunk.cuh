/*
 * Decode all tokens of a sequence at once, also where they are a tree.
 *
 * Algorithm. Let D_ij be the decay of each channel from token j to token i, along the tokens between them,
 * and D_i the decay from the starting state S0. With "j < i" for "token j is an ancestor of token i",
 *
 *     P_i = S0^T (D_i k_i),  R_i = S0^T (D_i q_i)                      for eight tokens in one pass over S0
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
 * - The state streams through shared memory in parts: few registers hold elements, so that more warps fit on
 *   an SM, and copies are on their way while tokens are prepared. With more than eight tokens, and for the
 *   last state, it is copied once more, mostly from the L2 cache.
 * - Tensor cores compute P, R and what is added to the last state, for eight tokens at a time. A tensor core
 *   takes 11 bits of the mantissa of an operand, so that operands are divided in a high part and a low part,
 *   and the product is high high + high low + low high. That leaves out 2^-21 of it. A state of bf16 has no
 *   low part.
 * - The sum over the channels may be in any order. The order is such that what a lane copies of a state is
 *   what the tensor core expects from it (tile.cuh).
 */
#ifndef FKDA_DECODE_CHUNK_CUH
#define FKDA_DECODE_CHUNK_CUH

#include "one.cuh"
#include "parts.cuh"
#include "past.cuh"
#include "update.cuh"

namespace fkda
{

/*
 * The vectors of token i. `each`: the state after each token is written, so decays and keys are kept.
 *
 * START are operands of tensor cores: the key and the query with the decay from the start, side by side.
 * Those of place p are numbers 2 p and 2 p + 1, but with bit 2 flipped in odd tokens. LAST is the key with
 * the decay to the last token, with bits 3 and 4 of a place flipped by bits 1 and 2 of i. The flips are for
 * lanes that read several tokens, which find them in different banks.
 */
template <bool each> struct Vectors {
    static constexpr int COUNT = FKDA_DECODE_VECTORS_OF_A_CHUNK(each), START = each ? VALUE + 1 : KEY,
                         LAST = VALUE + 1, OUTPUT = each ? QUERY : DECAY;

    static __device__ __forceinline__ float *at(int which, int i)
    {
        return vector_at<COUNT>(which, i);
    }
};

__device__ __forceinline__ float multiply_four(const float (&x)[4], const float (&y)[4])
{
    float sum = x[0] * y[0];
#pragma unroll
    for (int c = 1; c < 4; c++) sum = __fmaf_rn(x[c], y[c], sum);
    return sum;
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
template <bool each, bool is_tree>
__device__ __forceinline__ void walk(float (&k)[4], float (&q)[4], Small &small, int i)
{
    const int lane = static_cast<int>(threadIdx.x) % 32, at = 4 * lane, which = lane / 2 % 2;
    float decay[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    uint32_t before = 0;
    read_four(k, Vectors<each>::at(KEY, i) + at);
    read_four(q, Vectors<each>::at(QUERY, i) + at);
#pragma unroll 1
    for (int j = i; j >= 0;) {
        float sums[16] = {};
        int mine = -1; /* the token of this lane's sum */
        if (!is_tree) mine = j - lane / 4;
#pragma unroll
        for (int s = 0; s < 8; s++) {
            if (j < 0) continue;
            float x[4], d[4];
            read_four(x, Vectors<each>::at(KEY, j) + at);
            read_four(d, Vectors<each>::at(DECAY, j) + at);
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
}

/* Place p of the key of token i with the decay to the last token. */
__device__ __forceinline__ float *last_key(unsigned i, unsigned p)
{
    return Vectors<false>::at(Vectors<false>::LAST, static_cast<int>(i)) + (p ^ i / 2 % 4 * 8);
}

/* A warp writes the key of token i with the decay to the last token, and for token 0 the decay of all
 * tokens. */
__device__ __forceinline__ void make_last_key(Small &small, int i)
{
    const int at = 4 * (static_cast<int>(threadIdx.x) % 32), length = small.sequence.length;
    float key[4], decay[4] = {1.0f, 1.0f, 1.0f, 1.0f}, d[4];
#pragma unroll 4
    for (int j = length - 1; j > i; j--) {
        read_four(d, Vectors<false>::at(DECAY, j) + at);
#pragma unroll
        for (int c = 0; c < 4; c++) decay[c] *= d[c];
    }
    read_four(key, Vectors<false>::at(KEY, i) + at);
    store_four(last_key(i, at), key[0] * decay[0], key[1] * decay[1], key[2] * decay[2], key[3] * decay[3]);
    if (i != 0) return;
    read_four(d, Vectors<false>::at(DECAY, 0) + at);
    store_four(small.total + at, decay[0] * d[0], decay[1] * d[1], decay[2] * d[2], decay[3] * d[3]);
}

template <bool each, bool is_tree> __device__ __forceinline__ void walk_all(Small &small, bool writes_last)
{
    const int length = small.sequence.length, warp = static_cast<int>(threadIdx.x) / 32,
              lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
    /* The last tokens first: their keys are overwritten, and tokens before them do not need these. */
#pragma unroll 1
    for (int top = length - 1; top >= 0; top -= warps) {
        const int i = top - warp;
        float k[4], q[4];
        if (i >= 0) {
            if (!each && writes_last) make_last_key(small, i);
            walk<each, is_tree>(k, q, small, i);
        }
        __syncthreads();
        if (i >= 0) {
            float *start = Vectors<each>::at(Vectors<each>::START, i);
#pragma unroll
            for (int c = 0; c < 4; c += 2)
                store_four(start + ((8 * lane + 2 * c) ^ (i % 2 * 4)), k[c], q[c], k[c + 1], q[c + 1]);
        }
    }
    __syncthreads();
}

/* The starting state. There are places for some parts of it, or for all where it is read again after it may
 * have been overwritten. */
template <bool each, class Tile>
using ChunkState = Parts<Tile, each ? Tile::PARTS : FKDA_DECODE_PLACES_OF_A_CHUNK>;

template <bool each, class Tile>
__device__ __forceinline__ ChunkState<each, Tile> chunk_state(const fkda_decode_args &args, const Tile &tile,
                                                              long long at)
{
    return {reinterpret_cast<unsigned char *>(Vectors<each>::at(0, args.room)), tile, args.state.data, at};
}

/* A part of a state of bf16, as it is stored. */
template <class Tile>
__device__ __forceinline__ void round_as_stored(float (&x)[2][Tile::PART], const Tile &tile, int part,
                                                const Rounding &rounding)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        uint32_t word[Tile::PART / 2];
        tile.round(word, x[r], r, part, 0, rounding);
#pragma unroll
        for (int e = 0; e < Tile::PART; e += 2)
            x[r][e] = bf16_low(word[e / 2]), x[r][e + 1] = bf16_high(word[e / 2]);
    }
}

/* The same state with accepted tokens of earlier records applied. Parts are stored when they are taken for
 * the last time. */
template <class Tile> struct BroughtState {
    static constexpr int PART = Tile::PART, PARTS = Tile::PARTS;
    static constexpr int PARTS_AT_ONCE = 2; /* there are no registers for more */
    const ChunkState<false, Tile> &state;
    const Tile &tile;
    const fkda_decode_args &args;
    const Small &small;
    Update<PastTokens<Tile::IS_BF16>, Tile> update;

    __device__ __forceinline__ BroughtState(const ChunkState<false, Tile> &s, const Tile &t,
                                            const fkda_decode_args &a, const Small &b)
        : state(s), tile(t), args(a), small(b), update({a, b}, t)
    {
    }

    __device__ __forceinline__ void take(float (&x)[2][Tile::PART], int part, bool again) const
    {
        state.take(x, part, again);
        if (small.past == 0) return;
        update.apply(x, small.total, part);
        /* Found anew for each part, so that it does not occupy registers. */
        const Rounding rounding =
            find_rounding(Tile::IS_BF16 ? args.rounding : nullptr, small.work, args.heads);
        if (!again) tile.store_part(args.state.data, small.at, part, x, 0, rounding);
        if constexpr (Tile::IS_BF16) round_as_stored(x, tile, part, rounding);
    }
};

/* P - v, which takes the place of v in shared memory, and R of all tokens, in the warp's rows. The state is
 * taken even if there are no tokens, for it may have to be stored. */
template <bool each, class State, class Tile>
__device__ __forceinline__ void multiply_start(const State &state, const Tile &tile, const Small &small,
                                               bool writes_last)
{
    constexpr int PARTS = Tile::PARTS, PART = Tile::PART, AT_ONCE = State::PARTS_AT_ONCE;
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = tile.lane;
    int first = 0;
#pragma unroll 1
    do {
        const bool again = writes_last || first + TILE_TOKENS < small.sequence.length;
        const int token = first + g, of = max(min(token, small.sequence.length - 1), 0), flip = of % 2 * 4;
        const float *parts = Vectors<each>::at(Vectors<each>::START, of) + 8 * t;
        float sums[2][4] = {}, small_sums[2][4] = {}; /* of rows of V 2 n and 2 n + 1 */
#pragma unroll(AT_ONCE)
        for (int part = 0; part < PARTS; part++) {
            float x[2][PART];
            state.take(x, part, again);
#pragma unroll
            for (int c = 0; c < PART; c += 2) {
                float a[4], high[4], low[4];
                read_four(a, parts + (part * (PART / 4) + c / 4) * 32 + (c % 4 ? 4 - flip : flip));
#pragma unroll
                for (int e = 0; e < 4; e++) divide(high[e], low[e], a[e]);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    mma_tf32(sums[r], high[0], high[1], high[2], high[3], x[r][c], x[r][c + 1]);
                    mma_tf32(small_sums[r], low[0], low[1], low[2], low[3], x[r][c], x[r][c + 1]);
                    if (!Tile::IS_BF16)
                        mma_tf32(small_sums[r], high[0], high[1], high[2], high[3],
                                 x[r][c] - __uint_as_float(__float_as_uint(x[r][c]) & TF32_MASK),
                                 x[r][c + 1] - __uint_as_float(__float_as_uint(x[r][c + 1]) & TF32_MASK));
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[r][i] += small_sums[r][i];
        const int row = tile.row - 2 * g + 4 * t;
        if (token < small.sequence.length) {
            float *value = Vectors<each>::at(VALUE, token) + row, v[4];
            read_four(v, value);
            store_four(value, sums[0][0] - v[0], sums[1][0] - v[1], sums[0][1] - v[2], sums[1][1] - v[3]);
            store_four(Vectors<each>::at(Vectors<each>::OUTPUT, token) + row, sums[0][2], sums[1][2],
                       sums[0][3], sums[1][3]);
        }
        first += TILE_TOKENS;
    } while (first < small.sequence.length);
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
template <bool each, bool is_tree>
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
            x[e] = Vectors<each>::at(VALUE, first + e)[row];
            if (is_tree) before[e] = small.before[first + e];
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            out[e] = Vectors<each>::at(Vectors<each>::OUTPUT, first + 2 * e + is_odd)[row];
            if (is_tree) before_out[e] = small.before[first + 2 * e + is_odd];
        }
        const float *product = small.product[0][first], *product_out = small.product[1][first + is_odd];
#pragma unroll 1
        for (int four = 0; four < first; four += 4) {
#pragma unroll
            for (int e = 0; e < 4; e++) u[e] = Vectors<each>::at(VALUE, four + e)[row];
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
            for (int e = 0; e < 4; e++) Vectors<each>::at(VALUE, first + e)[row] = u[e];
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
    float *record = find_record(args, small.work, is_odd, 2);
#pragma unroll 1
    for (int i = is_odd; i < min(length, args.record_columns); i += 2) {
        record[row] = Vectors<each>::at(VALUE, i)[row];
        record += args.heads * (2LL * 3 * DIM);
    }
}

/* The tokens of the call, as what is written to the last state (update.cuh). */
struct CallTokens {
    static constexpr bool FILLED = false;
    const Small &small;

    __device__ __forceinline__ int count() const
    {
        return small.sequence.length;
    }
    __device__ __forceinline__ float u(int token, int row) const
    {
        return Vectors<false>::at(VALUE, token)[row];
    }
    __device__ __forceinline__ const float *key(unsigned token, int place) const
    {
        return last_key(token, place);
    }
};

/* Makes the last state and stores it to element `to` of args.written. Tokens follow each other. */
template <class Tile>
__device__ __forceinline__ void store_last_state(const fkda_decode_args &args,
                                                 const ChunkState<false, Tile> &state, const Tile &tile,
                                                 const Small &small, long long to, const Rounding &rounding)
{
    const Update<CallTokens, Tile> update({small}, tile);
#pragma unroll
    for (int part = 0; part < Tile::PARTS; part++) {
        float x[2][Tile::PART];
        state.take(x, part, false);
        update.apply(x, small.total, part);
        tile.store_part(args.written.data, to, part, x, 0, rounding);
    }
}

/* Stores the state after token i, made of the starting state, to element `at` of args.written. */
template <class Tile>
__device__ __forceinline__ void
store_state_after(const fkda_decode_args &args, const ChunkState<true, Tile> &state, const Tile &tile,
                  const Small &small, int i, long long at, const Rounding &rounding)
{
    constexpr int PART = Tile::PART;
#pragma unroll
    for (int part = 0; part < Tile::PARTS; part++) {
        float x[2][PART], decay[PART], y[2][PART] = {};
#pragma unroll
        for (int e = 0; e < PART; e++) decay[e] = 1.0f;
#pragma unroll 1
        for (int j = i; j >= 0; j = small.parent[j]) {
            float u[2];
#pragma unroll
            for (int r = 0; r < 2; r++) u[r] = Vectors<true>::at(VALUE, j)[tile.row + r];
#pragma unroll
            for (int four = 0; four < PART / 4; four++) {
                const float4 k = tile.read(Vectors<true>::at(KEY, j), part * PART / 4 + four),
                             d = tile.read(Vectors<true>::at(DECAY, j), part * PART / 4 + four);
                const float ks[4] = {k.x, k.y, k.z, k.w}, ds[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int e = 4 * four + c;
                    const float key = ks[c] * decay[e];
                    decay[e] *= ds[c];
#pragma unroll
                    for (int r = 0; r < 2; r++) y[r][e] = __fmaf_rn(key, u[r], y[r][e]);
                }
            }
        }
        state.take(x, part, true);
#pragma unroll
        for (int e = 0; e < PART; e++)
#pragma unroll
            for (int r = 0; r < 2; r++) y[r][e] = __fmaf_rn(x[r][e], decay[e], y[r][e]);
        tile.store_part(args.written.data, at, part, y, i, rounding);
    }
}

/* Finds the CTA's work, begins to copy the state and prepares the tokens. Returns false if there is nothing
 * left to do. `past`: tokens of earlier records are applied, and a sequence may have these alone. */
template <bool each, bool past, class Tile>
__device__ __forceinline__ bool begin_chunk(const fkda_decode_args &args, Small &small)
{
    const Work work = find_work(args.heads, args.split);
    const long long index = read_start_index(args, work.sequence);
    int count = 0; /* of past tokens, at most */
    if constexpr (past) count = count_accepted(args.past, work.sequence);
    const Sequence sequence = find_sequence(args, work.sequence);
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    Preparation preparation(args, work, sequence);
    Inputs inputs = {};
    float a_log = 0.0f;
    float4 dt_bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (warp < sequence.length) {
        inputs = preparation.load(warp);
        preparation.load_gate(a_log, dt_bias);
    }
    const long long slot = check_slot(index, args.state_indices.data ? args.first_slot : 0, args.state);
    if (slot == NO_SLOT) {
        clear_sequence(args, work, sequence);
        return false;
    }
    if (sequence.left_out)
        clear_outputs(args, work, sequence, sequence.length, sequence.length + sequence.left_out);
    int record = 0, some = 0;
    if constexpr (past) some = find_accepted(record, args.past, work.sequence, count);
    if (sequence.length == 0 && some == 0) return false;
    const long long at = find_state(args.state, slot, work.head);
    if constexpr (past) {
        PastTokens<Tile::IS_BF16>{args, small}.template copy<Tile>(work, some, record);
        copy_async_commit();
    }
    chunk_state<each>(args, Tile(work.first_row), at).begin();
    if (threadIdx.x == 0) small.work = work, small.sequence = sequence, small.at = at, small.past = some;
    preparation.set_gate(a_log, dt_bias);
    const int place = Tile::place_of_four(preparation.channel);
#pragma unroll 1 /* there are no registers for more */
    for (int i = warp; i < sequence.length; i += warps) {
        forget_addresses(preparation.work, preparation.sequence);
        if (i != warp) inputs = preparation.load(i);
        preparation.finish<Vectors<each>::COUNT>(inputs, small, i, place);
    }
    if constexpr (past) copy_async_wait<FKDA_DECODE_PLACES_OF_A_CHUNK>(); /* for all but the state */
    __syncthreads();
    if constexpr (past) PastTokens<Tile::IS_BF16>{args, small}.join(small.total);
    return true;
}

/* `each`: the state after each token of a tree is written. `past`: accepted tokens of earlier records are
 * applied to the state first, and the state is written then; no state after a new token is. */
template <bool is_bf16, bool k_first, bool each, bool past = false>
__device__ __forceinline__ void decode_chunk(const fkda_decode_args &args)
{
    using State = Tile<is_bf16, k_first, 4>;
    Small &small = *reinterpret_cast<Small *>(cta_memory());
    const bool writes_last = !each && !past && args.write_states == FLASH_KDA_WRITE_LAST;
    if (!begin_chunk<each, past, State>(args, small)) return;
    const bool is_tree = each || args.parents.data;
    if (is_tree)
        walk_all<each, true>(small, false);
    else
        walk_all<each, false>(small, writes_last);
    State tile(0);
    tile.find_place_again(small.work.first_row);
    if constexpr (past) {
        const ChunkState<false, State> stored = chunk_state<false>(args, tile, small.at);
        const BroughtState<State> brought(stored, tile, args, small);
        multiply_start<false>(brought, tile, small, false);
    } else {
        multiply_start<each>(chunk_state<each>(args, tile, small.at), tile, small, writes_last);
    }
    if (is_tree)
        solve<each, true>(args, small);
    else
        solve<each, false>(args, small);
    if (!each && !writes_last) return;
    tile.find_place_again(small.work.first_row);
    const ChunkState<each, State> state = chunk_state<each>(args, tile, small.at);
    const Rounding rounding = find_rounding(is_bf16 ? args.rounding : nullptr, small.work, args.heads);
    if constexpr (each) {
#pragma unroll 1
        for (int i = 0; i < small.sequence.length; i++) {
            const long long after = find_slot_of_each(args, small.work.sequence, small.sequence, i);
            if (after != NO_SLOT)
                store_state_after(args, state, tile, small, i,
                                  find_state(args.written, after, small.work.head), rounding);
        }
    } else {
        long long to = small.at;
        if (find_last_state(args, small.work, small.sequence, to))
            store_last_state(args, state, tile, small, to, rounding);
    }
}

} // namespace fkda

#endif
