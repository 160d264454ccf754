/* The solving role, a warp: adds up a team's products and turns them into the small matrices of a chunk. */
#ifndef FKDA_HOPPER_SOLVE_CUH
#define FKDA_HOPPER_SOLVE_CUH

#include "shared.cuh"

namespace fkda
{

/* A row of a tile of products. */
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

/* L = tril(diag(b) K~ K^^T, -1) in tiles of 8 x 8, across scratch without b; for outputs tril(Q~ K^^T). b: of token lane % CHUNK. In
 * turn the lanes have rows of tiles on the diagonal, below it in a block, and across scratch: lane 8 n + r row r of the n-th, those of L
 * first and then those for outputs if there are no more than four. */
template <class Block>
__device__ __forceinline__ void add_products(SolverScratch<Block> &scratch, Stage<Block> &stage,
                                             const Products<Block> &products, float b, int lane)
{
    constexpr int SUBCHUNKS = Block::SUBCHUNKS;
    constexpr float UNITS = UNTRUNCATE; /* of products in tf32 */
    const int n = lane / 8, r = lane % 8;
    float x[8];
#pragma unroll
    for (int which = 0; which < (Block::OUTPUTS && SUBCHUNKS == 2 ? 2 : 1); which++) {
        const bool outputs = SUBCHUNKS == 2 ? which : n / 2;
        const int tile = n % (2 * SUBCHUNKS);
        if (Block::OUTPUTS || !outputs)
            sum_partials(x, products, outputs, Products<Block>::ON_DIAGONAL + tile, r);
        if (!outputs) {
#pragma unroll
            for (int j = 0; j < 8; j++) scratch.diagonal[tile][j][r] = j < r ? x[j] * (UNITS * b) : 0.0f;
        } else if (Block::OUTPUTS) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = j <= r ? x[j] : 0.0f;
            *stage.attend.at(8 * tile + r, 8 * tile) = pack_eight(x, UNITS);
        }
    }
    const int sub = n % SUBCHUNKS;
    const float b_below = __shfl_sync(~0u, b, 8 + SUBCHUNK * sub + r);
    if (n < (Block::OUTPUTS ? 2 : 1) * SUBCHUNKS) {
        sum_partials(x, products, n / SUBCHUNKS, Products<Block>::BELOW_IT + sub, r);
        *(n < SUBCHUNKS ? reinterpret_cast<uint4 *>(scratch.lower[sub][r])
                        : stage.attend.at(8 + SUBCHUNK * sub + r, SUBCHUNK * sub)) =
            pack_eight(x, n < SUBCHUNKS ? UNITS * b_below : UNITS);
    }
    if constexpr (SUBCHUNKS == 2) {
        sum_partials(x, products, 0, Products<Block>::ACROSS + n, r);
        *reinterpret_cast<uint4 *>(&scratch.across[n / 2 * 8 + r][n % 2 * 8]) = pack_eight(x, 1.0f);
        if constexpr (Block::OUTPUTS) {
            sum_partials(x, products, 1, Products<Block>::ACROSS + n, r);
            *stage.attend.at(SUBCHUNK + n / 2 * 8 + r, n % 2 * 8) = pack_eight(x, 1.0f);
        }
    }
}

/* The last of these. */
template <class Block>
__device__ __forceinline__ void solve_across(SolverScratch<Block> &scratch, Stage<Block> &stage,
                                             float strength, int lane)
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
            operand[2 * n + i] = pack_half(half[n][2 * i] * -strength, half[n][2 * i + 1] * -strength);
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

/* T = (I + L)^-1 diag(b) / strength; own_b: of column lane % CHUNK, divided by the strength. Tiles on the diagonal by forward
 * substitution in fp32, a column to a lane. What is below is made of products on the tensor core, of transposes, so that rows of the
 * one's accumulators are the next one's operand:
 *   in a block, with tiles A and C on the diagonal   - C^-1 lower A^-1 diag(b), for both scratch in one product
 *   of the second block with the first               - T_1 across T_0, with T of each block for itself */
template <class Block>
__device__ __forceinline__ void solve_blocks(SolverScratch<Block> &scratch, Stage<Block> &stage, float own_b,
                                             float strength, int lane)
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
    if constexpr (SUBCHUNKS == 2) solve_across(scratch, stage, strength, lane);
}

/* The logit of b of token lane % CHUNK, zero past the end. */
template <class Block>
__device__ __forceinline__ uint16_t load_beta(const fkda_fwd_args &args, const ChunkCursor<Block> &at,
                                              int lane)
{
    const int token = lane % Block::CHUNK;
    const uint16_t *beta = static_cast<const uint16_t *>(args.beta);
    return token < at.left ? __ldg(beta + (at.token + token) * args.heads + at.head) : 0;
}

/* 1, or if all of the warp's b are below 2^-6 a power of two above them: what keeps small ones in fp16's range. */
__device__ __forceinline__ float strength_above(float b)
{
    const uint32_t most = __reduce_max_sync(~0u, __float_as_uint(b)); /* as integers: none is negative */
    const float above = power_above(__uint_as_float(most));
    return above > 0x1p-6f ? 1.0f : fmaxf(above, 0x1p-100f);
}

/* Sends chunk after chunk to the other block, which has fewer slots for that than chunks are under way. */
template <class Block> struct Sender {
    Shared<Block> &shared;
    Slot<Block::RECEIVED_SLOTS + (Block::CTAS == 1)> to;
    Slot<Block::OWN_SLOTS> last; /* the chunk that was sent to that slot before */
    bool used;                   /* there is such a chunk */

    __device__ explicit Sender(Shared<Block> &s) : shared(s), to(0), last(0), used(false)
    {
    }

    __device__ uint64_t *released() const /* by the recurrences of both scratch */
    {
        return &shared.chunk_ring.empty[last.index];
    }

    __device__ bool has_room() const
    {
        return !used || mbarrier_test(released(), last.parity);
    }

    __device__ void wait_for_room() const
    {
        mbarrier_wait(released(), last.parity);
    }

    /* What is prepared, and what is solved, which ends the chunk. */
    __device__ void send_tokens(int from) const
    {
        Tokens<Block> &there = shared.tokens[Block::OWN_SLOTS + to.index];
        if (elect_lane())
            copy_to_other_cta(there.half, shared.tokens[from].half, sizeof there.half,
                              &shared.chunk_ring.ready[Block::OWN_SLOTS + to.index]);
        __syncwarp();
    }

    __device__ void send_stage(int from)
    {
        const int slot = Block::OWN_SLOTS + to.index;
        if (elect_lane())
            copy_to_other_cta(&shared.stage[slot], &shared.stage[from], sizeof(Stage<Block>),
                              &shared.chunk_ring.ready[slot]);
        __syncwarp();
        if (used) last.advance(1);
        to.advance(1);
        used |= to.index == 0;
    }
};

/* What is above diagonals stays zero. Received stages come whole. */
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
    uint16_t logit = at.done() ? 0 : load_beta(args, at, lane);
    while (!at.done()) {
        Stage<Block> &stage = shared.stage[slot.index];
        const float x = __uint_as_float(static_cast<uint32_t>(logit) << 16);
        const float b = lane % Block::CHUNK < at.left ? rcp(1.0f + ex2(x * -LOG2_E)) : 0.0f;
        /* The next logit is loaded ahead within a item. The next item may be published out only after this chunk is solved. */
        const bool ahead = at.left > Block::CTAS * Block::CHUNK;
        if (ahead) {
            at.advance(Block::CTAS);
            logit = load_beta(args, at, lane);
        }
        mbarrier_wait(&shared.product_ring.full[in.index], in.parity);
        const bool sends = Block::CTAS == 2, at_once = sends && sender.has_room();
        if (at_once) sender.send_tokens(slot.index);
        add_products<Block>(shared.scratch, stage, shared.products[in.index], b, lane);
        mbarrier_arrive_warp(&shared.product_ring.empty[in.index]); /* all of `scratch` is there too */
        const float strength = strength_above(b);
        if (lane == 0) stage.strength = strength;
        solve_blocks(shared.scratch, stage, b * inverse_power(strength), strength, lane);
        fence_async_proxy();
        mbarrier_arrive_warp(&shared.chunk_ring.ready[slot.index]);
        if (sends && !at_once) {
            sender.wait_for_room();
            sender.send_tokens(slot.index);
        }
        if (sends) sender.send_stage(slot.index);
        slot.advance(1);
        in.advance(1);
        if (!ahead) {
            at.advance(Block::CTAS);
            if (!at.done()) logit = load_beta(args, at, lane);
        }
    }
}

} // namespace fkda

#endif
