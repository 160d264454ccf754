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
 * A token by itself costs four multiply-adds for each element of the state (steps.cuh), and here two, and one
 * more if the last state is written. A tree costs no more than a chain.
 *
 * Decays are products of the decays of tokens. No division and no logarithm is needed, so that decays of
 * zero, and decays above 1, are as accurate as others.
 *
 * A token that is not an ancestor of another one does not touch it, even if it is NaN.
 */
#ifndef FKDA_DECODE_CHUNK_CUH
#define FKDA_DECODE_CHUNK_CUH

#include "prepare.cuh"
#include "tile.cuh"

namespace fkda
{

__device__ __forceinline__ float *chunk_vector(int which, int i)
{
    return vector_at<FKDA_DECODE_VECTORS_OF_A_CHUNK>(which, i);
}

/* Four neighbouring numbers of a vector in shared memory. */
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

/*
 * A warp walks from token i to the starting state: products with the ancestors, and the key and the query
 * with the decay from the start. The walk of the sequence's last token also leaves the keys with the decay to
 * the last token, and the decay of all tokens in `total`.
 *
 * Products with eight ancestors are 16 sums over the warp's lanes, of which every two lanes get one.
 */
__device__ __forceinline__ void walk(Small &small, int i, bool is_last, float *total)
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
#pragma unroll
        for (int s = 0; s < 8; s++) {
            if (j < 0) continue;
            float x[4], d[4];
            read_four(x, chunk_vector(KEY, j) + at);
            read_four(d, chunk_vector(DECAY, j) + at);
#pragma unroll
            for (int c = 0; c < 4; c++) x[c] *= decay[c], decay[c] *= d[c];
            if (is_last) store_four(chunk_vector(KEY_TO_LAST, j) + at, x[0], x[1], x[2], x[3]);
            sums[2 * s] = multiply_four(k, x), sums[2 * s + 1] = multiply_four(q, x);
            if (lane / 4 == s) mine = j;
            if (j != i) before |= 1u << j;
            j = small.parent[j];
        }
        sum_and_scatter<32>(sums);
        if (mine >= 0 && lane % 2 == 0) small.product[which][i][mine] = sums[0];
    }
    if (lane == 0) small.before[i] = before;
    store_four(chunk_vector(KEY_FROM_START, i) + at, k[0] * decay[0], k[1] * decay[1], k[2] * decay[2],
               k[3] * decay[3]);
    store_four(chunk_vector(QUERY, i) + at, q[0] * decay[0], q[1] * decay[1], q[2] * decay[2],
               q[3] * decay[3]);
    if (is_last) store_four(total + at, decay[0], decay[1], decay[2], decay[3]);
}

/* P and R of all tokens. Lanes r and ROWS + r of the eight get P and R of row r, and write P - v in the place
 * of v, and R, for themselves. */
template <class Tile> __device__ __forceinline__ void multiply_start(const Tile &tile, const Small &small)
{
#pragma unroll 1
    for (int i = 0; i < small.sequence.length; i += 2) {
        float sums[4 * ROWS] = {}; /* (P of each row, then R), each of two tokens */
#pragma unroll
        for (int j = 0; j < CHANNELS / 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float4 y = tile.read(chunk_vector(e < 2 ? KEY_FROM_START : QUERY, i + e % 2), j);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const float *x = &tile.x[r][4 * j];
                    float &sum = sums[2 * (e / 2 * ROWS + r) + e % 2];
                    sum = __fmaf_rn(x[0], y.x, sum), sum = __fmaf_rn(x[1], y.y, sum);
                    sum = __fmaf_rn(x[2], y.z, sum), sum = __fmaf_rn(x[3], y.w, sum);
                }
            }
        sum_and_scatter<8>(sums);
        const int row = tile.row + tile.lane % ROWS;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (tile.lane < ROWS)
                chunk_vector(VALUE, i + e)[row] = sums[e] - chunk_vector(VALUE, i + e)[row];
            else
                chunk_vector(OUTPUT, i + e)[row] = sums[e];
        }
    }
}

/* u of all tokens, which takes the place of v in shared memory, and the outputs. */
template <class Tile>
__device__ __forceinline__ void solve(const fkda_decode_args &args, const Tile &tile, const Small &small)
{
    const int lane = static_cast<int>(threadIdx.x) % 32, row = tile.row + tile.lane % ROWS;
    const bool is_output = tile.lane >= ROWS;
    float u[MAX_TOKENS];
#pragma unroll
    for (int i = 0; i < MAX_TOKENS; i++) {
        if (i >= small.sequence.length) break;
        const float *product = small.product[is_output][i];
        const uint32_t before = small.before[i];
        float &value = chunk_vector(VALUE, i)[row];
        float sum = is_output ? chunk_vector(OUTPUT, i)[row] : value;
#pragma unroll
        for (int j = 0; j < i; j++)
            if (before >> j & 1) sum = __fmaf_rn(product[j], u[j], sum);
        u[i] = __shfl_sync(~0u, small.beta[i] * -sum, lane & ~ROWS);
        if (is_output) {
            store_output(args, small.work, small.sequence, i, row,
                         args.scale * __fmaf_rn(product[i], u[i], sum));
        } else {
            value = u[i];
            if (float *record = find_record(args, small.work, i, 2)) record[row] = u[i];
        }
    }
    __syncwarp(); /* the warp's lanes read each other's u */
}

/* u of token j, of the thread's rows. */
template <class Tile> __device__ __forceinline__ void read_u(float (&u)[ROWS], const Tile &tile, int j)
{
    read_four(u, chunk_vector(VALUE, j) + tile.row);
}

/* Stores the state after token i, made of the starting state, to element `at` of the pool. */
template <class Tile>
__device__ __forceinline__ void store_state_after(const fkda_decode_args &args, const Tile &tile,
                                                  const Small &small, int i, long long at,
                                                  const Rounding &rounding)
{
    constexpr int PART = Tile::PART;
#pragma unroll
    for (int part = 0; part < Tile::PARTS; part++) {
        float decay[PART], y[ROWS][PART] = {};
#pragma unroll
        for (int e = 0; e < PART; e++) decay[e] = 1.0f;
#pragma unroll 1
        for (int j = i; j >= 0; j = small.parent[j]) {
            float u[ROWS];
            read_u(u, tile, j);
#pragma unroll
            for (int four = 0; four < PART / 4; four++) {
                float k[4], d[4];
                read_four(k, chunk_vector(KEY, j) + 32 * (part * PART / 4 + four) + 4 * tile.lane);
                read_four(d, chunk_vector(DECAY, j) + 32 * (part * PART / 4 + four) + 4 * tile.lane);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int e = 4 * four + c;
                    const float key = k[c] * decay[e];
                    decay[e] *= d[c];
#pragma unroll
                    for (int r = 0; r < ROWS; r++) y[r][e] = __fmaf_rn(key, u[r], y[r][e]);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < PART; e++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) y[r][e] = __fmaf_rn(tile.x[r][part * PART + e], decay[e], y[r][e]);
        tile.store_part(args.state.data, at, part, y, i, rounding);
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
    prepare_and_load<FKDA_DECODE_VECTORS_OF_A_CHUNK, false>(args, work, sequence, at, tile, small);
    return true;
}

template <bool is_bf16, bool k_first>
__device__ __forceinline__ void decode_chunk(const fkda_decode_args &args)
{
    Small &small = *reinterpret_cast<Small *>(cta_memory());
    Tile<is_bf16, k_first> tile(0);
    if (!begin_chunk(args, small, tile)) return;
    {
        const int length = small.sequence.length;
        const bool writes_last = args.write_states == FLASH_KDA_WRITE_LAST;
        const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll 1
        for (int pass = 0; pass * warps < length; pass++) {
            /* Later tokens have longer walks: every other pass goes backwards. */
            const int i = pass * warps + (pass % 2 ? warps - 1 - warp : warp);
            if (i < length) walk(small, i, writes_last && i == length - 1, small.total);
        }
    }
    __syncthreads();
    multiply_start(tile, small);
    solve(args, tile, small);
    const int length = small.sequence.length;
    const Rounding rounding = find_rounding(is_bf16 ? args.rounding : nullptr, small.work, args.heads);
    if (args.write_states == FLASH_KDA_WRITE_LAST) {
        tile.decay(small.total);
#pragma unroll 1
        for (int j = 0; j < length; j++) {
            float u[ROWS];
            read_u(u, tile, j);
            tile.add(chunk_vector(KEY_TO_LAST, j), u);
        }
        tile.store(args.state.data, small.at, 0, rounding);
    } else if (args.write_states == FLASH_KDA_WRITE_EACH) {
#pragma unroll 1
        for (int i = 0; i < length; i++) {
            const long long after = find_slot_after(args, small.work.sequence, i);
            if (after != NO_SLOT)
                store_state_after(args, tile, small, i, find_state(args.state, after, small.work.head),
                                  rounding);
        }
    }
}

} // namespace fkda

#endif
