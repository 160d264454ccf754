/*
 * The solver: one warp that turns the products over channels of each own chunk into its small matrices,
 *
 *     T = (I + L)^-1 diag(b)   with L = tril(diag(b) K~ K^^T, -1)         P = tril(Q~ K^^T)
 *
 * Algorithm. L is cut into tiles of 8 x 8 tokens. The tiles on the diagonal are inverted by forward
 * substitution in fp32, one column to a lane. Everything below them is made of products on the tensor core
 * with fp16 operands, first inside each subchunk and then of the second subchunk with the first one. Operands
 * of fp16 do: T itself is rounded to fp16, so each of the two or three products adds an error of the size of
 * one that is there anyway, and the divisor below keeps all of them in fp16's range. See "Numbers it keeps"
 * in docs/hopper-kernel.md for the formats and docs/measurements.md for the errors.
 *
 * In a CTA pair the solver also sends the chunk to the other CTA (send.cuh).
 */
#ifndef FKDA_HOPPER_SOLVE_CUH
#define FKDA_HOPPER_SOLVE_CUH

#include "bad_tokens.cuh"
#include "send.cuh"

namespace fkda
{

/* ---- L and P from the products over channels ----------------------------------------------------------- */

/* A row of a tile of products: the sum of the partial sums that a team has left. */
template <class Block>
__device__ __forceinline__ void sum_partials(float (&x)[8], const Products<Block> &products, int which,
                                             int tile, int row)
{
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
        float4 s = *reinterpret_cast<const float4 *>(&products.partial[0][which][tile][row][j]);
#pragma unroll
        for (int w = 1; w < Block::PARTIALS; w++) {
            const float4 y = *reinterpret_cast<const float4 *>(&products.partial[w][which][tile][row][j]);
            s.x += y.x, s.y += y.y, s.z += y.z, s.w += y.w;
        }
        x[j] = s.x, x[j + 1] = s.y, x[j + 2] = s.z, x[j + 3] = s.w;
    }
}

__device__ __forceinline__ uint4 pack_eight(const float (&x)[8], float factor)
{
    return make_uint4(pack_half(x[0] * factor, x[1] * factor), pack_half(x[2] * factor, x[3] * factor),
                      pack_half(x[4] * factor, x[5] * factor), pack_half(x[6] * factor, x[7] * factor));
}

/*
 * The next three functions store L in the scratch and P in the stage. Tiles of L across subchunks are stored
 * without the factor b. b is the write strength of token lane % CHUNK.
 *
 * Lane 8 n + r has row r of the n-th tile, first of the tiles on the diagonal, then of the tiles below it
 * inside a subchunk, then of the tiles across subchunks. If L and P have no more than four tiles together,
 * one round does all of them, the tiles of L first.
 */

/* On the diagonal; with two subchunks L or P. */
template <class Block>
__device__ __forceinline__ void add_diagonal(SolverScratch<Block> &scratch, Stage<Block> &stage,
                                             const Products<Block> &products, bool of_queries, float b,
                                             int lane)
{
    constexpr int SUBCHUNKS = Block::SUBCHUNKS;
    constexpr float UNITS = PRODUCT_UNIT<Block>; /* of products in tf32 */
    const int n = lane / 8, r = lane % 8, tile = n % (2 * SUBCHUNKS);
    const bool outputs = SUBCHUNKS == 2 ? of_queries : n / 2;
    float x[8];
    if (Block::QUERIES || !outputs)
        sum_partials(x, products, outputs, Products<Block>::ON_DIAGONAL + tile, r);
    if (!outputs) {
#pragma unroll
        for (int j = 0; j < 8; j++) scratch.diagonal[tile][j][r] = j < r ? x[j] * (UNITS * b) : 0.0f;
    } else if (Block::QUERIES) {
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = j <= r ? x[j] : 0.0f;
        *stage.attend.at(8 * tile + r, 8 * tile) = pack_eight(x, UNITS);
    }
}

template <class Block>
__device__ __forceinline__ void add_below_diagonal(SolverScratch<Block> &scratch, Stage<Block> &stage,
                                                   const Products<Block> &products, float b, int lane)
{
    constexpr int SUBCHUNKS = Block::SUBCHUNKS;
    constexpr float UNITS = PRODUCT_UNIT<Block>;
    const int n = lane / 8, r = lane % 8;
    float x[8];

    /* ---- Inside a subchunk ---- */
    const int sub = n % SUBCHUNKS;
    const float b_below = __shfl_sync(~0u, b, 8 + SUBCHUNK * sub + r);
    if (n < (Block::QUERIES ? 2 : 1) * SUBCHUNKS) {
        sum_partials(x, products, n / SUBCHUNKS, Products<Block>::BELOW_IT + sub, r);
        *(n < SUBCHUNKS ? reinterpret_cast<uint4 *>(scratch.lower[sub][r])
                        : stage.attend.at(8 + SUBCHUNK * sub + r, SUBCHUNK * sub)) =
            pack_eight(x, n < SUBCHUNKS ? UNITS * b_below : UNITS);
    }

    /* ---- The second subchunk with the first one ---- */
    if constexpr (SUBCHUNKS == 2) {
        sum_partials(x, products, 0, Products<Block>::ACROSS + n, r);
        *reinterpret_cast<uint4 *>(&scratch.across[n / 2 * 8 + r][n % 2 * 8]) = pack_eight(x, 1.0f);
        if constexpr (Block::QUERIES) {
            sum_partials(x, products, 1, Products<Block>::ACROSS + n, r);
            *stage.attend.at(SUBCHUNK + n / 2 * 8 + r, n % 2 * 8) = pack_eight(x, 1.0f);
        }
    }
}

template <class Block>
__device__ __forceinline__ void add_products(SolverScratch<Block> &scratch, Stage<Block> &stage,
                                             const Products<Block> &products, float b, int lane)
{
#pragma unroll
    for (int which = 0; which < (Block::QUERIES && Block::SUBCHUNKS == 2 ? 2 : 1); which++)
        add_diagonal(scratch, stage, products, which, b, lane);
    add_below_diagonal(scratch, stage, products, b, lane);
}

/* ---- T ------------------------------------------------------------------------------------------------- */

/* T across subchunks: - T_1 across T_0, where T_i is T of subchunk i alone. */
template <class Block>
__device__ __forceinline__ void solve_across(SolverScratch<Block> &scratch, Stage<Block> &stage,
                                             float divisor, int lane)
{
    const int g = lane / 4, t = lane % 4;
    __syncwarp();
    uint32_t first[4], across[4], second[4];
    load_matrices(first, stage.solve.at(lane / 16 * 8, lane % 16));
    load_matrices(across, &scratch.across[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    load_matrices_transposed(second, stage.solve.at(SUBCHUNK + lane / 16 * 8, SUBCHUNK + lane % 16));
    float half[2][4] = {}, whole[2][4] = {};
    uint32_t operand[4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        mma_half(half[n], first[0], first[1], first[2], first[3], across[2 * n], across[2 * n + 1]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            operand[2 * n + i] = pack_half(half[n][2 * i] * -divisor, half[n][2 * i + 1] * -divisor);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        mma_half(whole[n], operand[0], operand[1], operand[2], operand[3], second[2 * n], second[2 * n + 1]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            reinterpret_cast<uint32_t *>(stage.solve.at(SUBCHUNK + 8 * n, 8 * i + g))[t] =
                pack_half(whole[n][2 * i], whole[n][2 * i + 1]);
    }
}

/*
 * Writes T / divisor to stage.solve. own_b is b of column lane % CHUNK, divided by the divisor.
 *
 * Tiles on the diagonal are inverted by forward substitution in fp32, one column in each lane. With A and C
 * the tiles of I + L on a subchunk's diagonal and `lower` the tile of L below A, which has b of its rows, the
 * tile of T below the diagonal is - C^-1 lower A^-1 diag(b), where diag(b) has b of its columns. One product
 * does this for both subchunks. All products are made of transposes, so that rows of one product's
 * accumulators are the next product's operand.
 */
template <class Block>
__device__ __forceinline__ void invert_diagonal(SolverScratch<Block> &scratch, Stage<Block> &stage,
                                                float own_b, int lane)
{
    constexpr int SUBCHUNKS = Block::SUBCHUNKS;
    const int j = lane % 8, tile = lane / 8 % (2 * SUBCHUNKS), column = lane % Block::CHUNK;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = i == j ? 1.0f : 0.0f;
#pragma unroll
    for (int m = 0; m < 7; m++) {
        float below[8];
#pragma unroll
        for (int i = (m + 1) / 4 * 4; i < 8; i += 4) {
            float4 four = *reinterpret_cast<const float4 *>(&scratch.diagonal[tile][m][i]);
            below[i] = four.x, below[i + 1] = four.y, below[i + 2] = four.z, below[i + 3] = four.w;
        }
#pragma unroll
        for (int i = m + 1; i < 8; i++) x[i] = __fmaf_rn(-below[i], x[m], x[i]);
    }
    if (lane == column) *stage.solve.at(8 * tile, column) = pack_eight(x, own_b);
    if (tile % 2) *reinterpret_cast<uint4 *>(scratch.inverse[tile / 2][j]) = pack_eight(x, 1.0f);
    __syncwarp();
}

template <class Block>
__device__ __forceinline__ void invert_below_diagonal(SolverScratch<Block> &scratch, Stage<Block> &stage,
                                                      float divisor, int lane)
{
    constexpr int SUBCHUNKS = Block::SUBCHUNKS;

    /* ---- Inside each subchunk ---- */
    const int j = lane % 8;
    const int matrix = lane / 8, sub = matrix % SUBCHUNKS;
    uint32_t first[4], second[4];
    load_matrices(first, matrix < 2
                             ? static_cast<const void *>(stage.solve.at(SUBCHUNK * sub, SUBCHUNK * sub + j))
                             : scratch.lower[sub][j]);
    load_matrices_transposed(second, scratch.inverse[sub][j]);
    float product[4] = {}, below[4] = {};
    mma_half(product, first[0], 0, 0, first[1], first[2], first[3]);
    mma_half(below, pack_half(-product[0], -product[1]), 0, 0, pack_half(-product[2], -product[3]), second[0],
             second[1]);
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < SUBCHUNKS; n++)
        reinterpret_cast<uint32_t *>(stage.solve.at(SUBCHUNK * n + 8, SUBCHUNK * n + g))[t] =
            pack_half(below[2 * n], below[2 * n + 1]);

    /* ---- The second subchunk with the first one ---- */
    if constexpr (SUBCHUNKS == 2) solve_across(scratch, stage, divisor, lane);
}

template <class Block>
__device__ __forceinline__ void solve_chunk(SolverScratch<Block> &scratch, Stage<Block> &stage, float own_b,
                                            float divisor, int lane)
{
    invert_diagonal(scratch, stage, own_b, lane);
    invert_below_diagonal(scratch, stage, divisor, lane);
}

/* ---- Write strengths ----------------------------------------------------------------------------------- */

/* beta of a token, as it is in memory: bf16, or with options fp32. */
template <class Block> using Beta = std::conditional_t<Block::OPTIONS, uint32_t, uint16_t>;

/* beta of token lane % CHUNK; zero past the end of the sequence. */
template <class Block>
__device__ __forceinline__ Beta<Block> load_beta(const fkda_fwd_args &args, const ChunkCursor<Block> &at,
                                                 int lane)
{
    const int token = lane % Block::CHUNK;
    const uint16_t *beta = static_cast<const uint16_t *>(args.beta);
    const long long from = at.place_of_beta(args.beta_strides, token);
    if (Block::OPTIONS && token < at.here() && args.beta_is_f32)
        return __ldg(static_cast<const uint32_t *>(args.beta) + from);
    return token < at.here() ? __ldg(beta + from) : 0;
}

/* Strengths in fp16 must not overflow, also where they meet zeros of a triangle. */
constexpr float STRONGEST = 0x1p15f;

/* The write strength that beta stands for; NaN if it is not below STRONGEST. */
template <class Block>
__device__ __forceinline__ float write_strength(const fkda_fwd_args &args, Beta<Block> beta)
{
    float x = __uint_as_float(static_cast<uint32_t>(beta) << 16);
    if constexpr (!Block::OPTIONS) return rcp(1.0f + ex2(x * -LOG2_E));
    constexpr int TWICE_SIGMOID = 1, ACTIVATED = 2; /* flash_kda_beta */
    if (args.beta_is_f32) x = __uint_as_float(beta);
    if (args.beta_kind == ACTIVATED) return fabsf(x) < STRONGEST ? x : NAN;
    const float b = rcp(1.0f + ex2(x * -LOG2_E));
    return args.beta_kind == TWICE_SIGMOID ? 2.0f * b : b;
}

/* The bits of the largest |b| of the warp. Bits of numbers that are not negative compare as the numbers do,
 * and a NaN is larger than any number. */
template <class Block> __device__ __forceinline__ uint32_t largest_of_warp(float b)
{
    return __reduce_max_sync(~0u, __float_as_uint(Block::OPTIONS ? fabsf(b) : b));
}
constexpr uint32_t INFINITY_BITS = 0x7f800000;

/* The factor that T is divided by, so that T and U of small write strengths stay in the range of fp16: 1, or
 * a power of two above the largest b if that is below 2^-6. */
__device__ __forceinline__ float divisor_above(uint32_t most)
{
    const float above = power_above(__uint_as_float(most));
    return above > 0x1p-6f ? 1.0f : fmaxf(above, 0x1p-100f);
}

/* ---- The role ------------------------------------------------------------------------------------------ */

/* Clears the stages of own slots: what is above the diagonals of T and P then stays zero. Received stages
 * come whole. */
template <class Block> __device__ __forceinline__ void clear_stages(Shared<Block> &shared, int lane)
{
    constexpr int UNITS = offsetof(Stage<Block>, gamma_minus_1) / 16;
#pragma unroll 1
    for (int i = 0; i < Block::OWN_SLOTS; i++) {
        for (int unit = lane; unit < UNITS; unit += 32)
            reinterpret_cast<uint4 *>(&shared.stage[i])[unit] = make_uint4(0, 0, 0, 0);
        if (lane == 0) shared.stage[i].zero = 0.0f;
    }
    __syncwarp();
}

template <class Block>
__device__ __forceinline__ void solve(const fkda_fwd_args &args, Shared<Block> &shared, int lane)
{
    const int first = pair_rank<Block>();
    clear_stages(shared, lane);
    Slot<Block::OWN_SLOTS> slot(0);
    Slot<Block::TEAMS> in(0);
    ChunkCursor<Block> at(shared.work, first);
    Sender<Block> sender(shared);
    Beta<Block> beta = at.done() ? 0 : load_beta(args, at, lane);
    while (!at.done()) {
        /* ---- Write strengths ---- */
        Stage<Block> &stage = shared.stage[slot.index];
        float b = lane % Block::CHUNK < at.here() ? write_strength<Block>(args, beta) : 0.0f;
        uint32_t most = largest_of_warp<Block>(b);
        /* The next chunk's beta is loaded ahead, unless that chunk belongs to the next work item: if the
         * loader is waiting for this chunk's slot, it publishes that item only after this chunk is solved. */
        const bool ahead = at.has_more_than(Block::CTAS);
        if (ahead) {
            at.advance(Block::CTAS);
            beta = load_beta(args, at, lane);
        }

        /* ---- Products, and the prepared tokens to the other CTA if it has room now ---- */
        mbarrier_wait(&shared.product_ring.full[in.index], in.parity);
        const bool sends = Block::CTAS == 2, sends_now = sends && sender.has_room();
        if (sends_now) sender.send_tokens(slot.index);
        Products<Block> &products = shared.products[in.index];
        int first_bad = NO_TOKEN;
        if (__builtin_expect(most > INFINITY_BITS || products.first_bad != NO_TOKEN, 0)) {
            first_bad = take_first_bad_token<Block>(products, b, lane);
            most = largest_of_warp<Block>(b == b ? b : 0.0f); /* of all tokens, as without the bad token */
            if (lane % Block::CHUNK >= first_bad) b = 0.0f;
            spoil_decay(stage, lane);
        }
        add_products<Block>(shared.scratch, stage, products, b, lane);
        mbarrier_arrive_warp(
            &shared.product_ring.empty[in.index]); /* its __syncwarp also orders the scratch */

        /* ---- T ---- */
        const float divisor = divisor_above(most);
        if (lane == 0) stage.divisor = divisor;
        if (Block::QUERIES && __builtin_expect(first_bad != NO_TOKEN, 0))
            spoil_outputs(stage, first_bad, lane);
        solve_chunk(shared.scratch, stage, b * inverse_power(divisor), divisor, lane);
        fence_async_proxy();
        mbarrier_arrive_warp(&shared.chunk_ring.ready[slot.index]);

        /* ---- To the other CTA ---- */
        if (sends && !sends_now) {
            sender.wait_for_room();
            sender.send_tokens(slot.index);
        }
        if (sends) sender.send_stage(slot.index);
        slot.advance(1);
        in.advance(1);
        if (!ahead) {
            at.advance(Block::CTAS);
            if (!at.done()) beta = load_beta(args, at, lane);
        }
    }
}

} // namespace fkda

#endif
