/*
 * The preparation role: what a chunk's tokens and channels go through one by one, ahead of the recurrence. Teams of
 * warps take turns with the chunks; a warp has all tokens of a chunk in its share of the channels, 16 of them at a time, and a block of
 * 16 tokens at a time. Lane (g, t) = (lane / 4, lane % 4) then owns tokens g and g + 8 of channels 2 t, 2 t + 1, 2 t + 8 and
 * 2 t + 9: the layout of the tensor core's fragments, so that elements go from ldmatrix through the products to
 * stmatrix without changing lanes.
 *
 * Decays are counted from a block's start, where exp(-G) stays in fp32's range (16 gates of -5), and what a tile needs besides,
 * the decay over the other block, is a factor at its end.
 */
#ifndef FKDA_HOPPER_PREPARE_CUH
#define FKDA_HOPPER_PREPARE_CUH

#include "norms.cuh"
#include "shared.cuh"

namespace fkda
{

template <class Block> struct Preparation {
    static constexpr int WARPS = Block::TEAM_WARPS, SUBCHUNKS = Block::SUBCHUNKS;
    static constexpr int SHARE = DIM / WARPS; /* channels of a warp */
    static_assert(SHARE <= 64 && SHARE % 16 == 0, "in one half of the channels, 16 at a time");
    static_assert(SUBCHUNKS <= 2, "the other block is one, if there is one");
    static constexpr uint32_t ONE = 0x3f80; /* in bf16 */
    const fkda_fwd_args &args;
    Shared<Block> &shared;
    int team, warp, lane, g, t;
    unsigned meetings; /* so far, for racecheck alone */
    HeadGate gate_here;

    /* A warp's part of the products over its channels: by block with itself, as tiles of 8 x 8 (0, 0), (1, 0), (1, 1) with K~
     * above Q~ or, for maps, (0, 0) above (1, 0) and what (1, 1) is in the lower half of; of the second block with the
     * first, by K~ and Q~ and by columns. */
    struct Sums {
        float within[SUBCHUNKS][3][4], across[2][2][4];
    };

    __device__ Preparation(const fkda_fwd_args &a, Shared<Block> &s) : args(a), shared(s), meetings(0)
    {
        find_place();
    }

    /* Where registers are short, for two blocks at a time, threads read their place anew for each chunk, and the gate's parameters for
     * each use: what is made from them need not be kept in between. */
    static constexpr bool SAVES_REGISTERS = SUBCHUNKS == 2;

    __device__ void find_place()
    {
        int cta, thread;
        read_indices(cta, thread);
        const unsigned id =
            static_cast<unsigned>(thread) / 32 - Block::RECURRENCE_WARPS; /* shifts and masks */
        team = static_cast<int>(id / WARPS), warp = static_cast<int>(id % WARPS);
        lane = thread & 31, g = lane >> 2, t = lane & 3;
    }

    /* The team's warps wait for each other. racecheck does not see the order of a named barrier between warps that met at different ones
     * before, as in the other part of a block that does it all (at_once.cuh). */
    __device__ void meet()
    {
        if constexpr (FOR_RACECHECK) {
            mbarrier_arrive_warp(&shared.meeting[team]);
            mbarrier_wait(&shared.meeting[team], meetings++ % 2);
        } else
            barrier_sync<TEAM_BARRIER, 32 * WARPS>(team);
    }

    __device__ void load_gate_parameters(int head)
    {
        float bias[SHARE / 32]; /* under way while the other is waited for */
#pragma unroll
        for (int i = 0; i < SHARE / 32; i++)
            bias[i] = __ldg(&args.dt_bias[head * DIM + warp * SHARE + 32 * i + lane]);
        const float slope = hopper_sigmoid_gate_slope(__ldg(&args.A_log[head]));
        __syncwarp();
#pragma unroll
        for (int i = 0; i < SHARE / 32; i++)
            shared.gate_offset[team][warp * SHARE + 32 * i + lane] = sigmoid_gate_offset(bias[i], slope);
        gate_here = {slope, hopper_sigmoid_gate_inverse_bound(args.lower_bound), head};
        if (lane == 0) shared.gate[team][warp] = gate_here;
        __syncwarp();
    }

    /* Tokens from `left` on: keys and queries of zeros, norms that leave them so, and gates that do not decay: -inf makes them exactly
     * zero. */
    __device__ void clear_past_end(int slot, int left)
    {
        Tokens<Block> &tokens = shared.tokens[slot];
        if (Block::LOADER_FINDS_NORMS && warp == 0 && lane >= left)
            shared.inverse_norm[slot][0][0][lane] = 0.0f;
        constexpr uint32_t none = 0xff80ff80;
        for (int i = 32 * warp + lane; i < (Block::CHUNK - left) * (DIM / 64) * (ROW / 16); i += 32 * WARPS) {
            auto &half = tokens.half[i / (ROW / 16) % 2];
            const int at = (left + i / (2 * ROW / 16)) * ROW + i % (ROW / 16) * 16;
            *reinterpret_cast<uint4 *>(&half.tile[G][at]) = make_uint4(none, none, none, none);
            *reinterpret_cast<uint4 *>(&half.tile[K][at]) = make_uint4(0, 0, 0, 0);
            if constexpr (Block::OUTPUTS)
                *reinterpret_cast<uint4 *>(&half.tile[Q][at]) = make_uint4(0, 0, 0, 0);
        }
        meet();
    }

    /* sum[b]: the running sums of the log2 decay of a block's tokens g, g, g + 8, g + 8 and channels c + 8 b + 2 t, + 1, + 0, + 1. Gates
     * are evaluated transposed, four tokens of one channel to a lane, and added up by the tensor core, which
     * transposes back, as sums of two bf16: what is left out is 2^-18 of a gate, and as often too much as too little.
     * `at`: this lane's row of the block's gates; `offset`: of the first of the channels. */
    __device__ void accumulate_gates(uint32_t at, const float *offset, float (&sum)[2][4]) const
    {
        const HeadGate gate_of_head = SAVES_REGISTERS ? shared.gate[team][warp] : gate_here;
        const uint32_t triangle = (2 * t <= g ? ONE : 0) | (2 * t + 1 <= g ? ONE << 16 : 0);
        uint32_t raw[4];
        load_matrices_transposed(raw, at);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float shift = offset[8 * b + g];
            float x[4]; /* tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9 */
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float gate = i % 2 ? bf16_high(raw[2 * b + i / 2]) : bf16_low(raw[2 * b + i / 2]);
                x[i] = hopper_sigmoid_gate(gate, gate_of_head, shift);
                sum[b][i] = 0.0f;
            }
            uint32_t high[2], low[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                high[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
                low[i] = pack_bf16(x[2 * i] - bf16_low(high[i]), x[2 * i + 1] - bf16_high(high[i]));
            }
            mma_bf16(sum[b], triangle, ONE << 16 | ONE, 0, triangle, low[0], low[1]);
            mma_bf16(sum[b], triangle, ONE << 16 | ONE, 0, triangle, high[0], high[1]);
        }
    }

    /* 16 channels of a block of tokens: their decayed tiles, and the products over these channels, which go to the last of `within`. Of
     * the second block: the decay over the first goes into K~ and Q~, but not into the products with the first, which take Kr
     * as that has left it; then the decay over the second goes into it. `at`: this lane's row of their gates; of factors, the lane's
     * tokens; `gamma`: the channels' sums over all tokens so far. */
    __device__ void prepare_slice(int sub, uint32_t at, const float *offset, const float *factor,
                                  float *gamma, Sums &sums) const
    {
        const bool second = SUBCHUNKS == 2 && sub == 1;
        float sum[2][4], over[2][2];                                      /* over: the decay over this sub */
        uint32_t raw_k[4], raw_q[4], k_decayed[4], q_decayed[4], rest[4]; /* channel / 8, token / 8 */
        accumulate_gates(at, offset, sum);
        load_matrices(raw_k, at + K * Block::HALF_TOKENS);
        if (Block::OUTPUTS) load_matrices(raw_q, at + Q * Block::HALF_TOKENS);
        float(&within)[3][4] = sums.within[SUBCHUNKS - 1];
#pragma unroll
        for (int b = 0; b < 2; b++) {
            float k_up[2][2], q_up[2][2], k_down[2][2]; /* token / 8, channel */
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t pair_k = raw_k[2 * b + e];
                    const float k = (i ? bf16_high(pair_k) : bf16_low(pair_k)) * factor[8 * e];
                    const float up = ex2(sum[b][2 * e + i]);
                    k_up[e][i] = k * up;
                    if (Block::OUTPUTS) {
                        const uint32_t pair_q = raw_q[2 * b + e];
                        q_up[e][i] =
                            (i ? bf16_high(pair_q) : bf16_low(pair_q)) * factor[Block::CHUNK + 8 * e] * up;
                    }
                    k_down[e][i] = k * ex2(-sum[b][2 * e + i]);
                    if (e == 1) over[b][i] = __shfl_sync(~0u, up, 4 * 7 + t);
                }
            if constexpr (Block::OUTPUTS) {
                mma_tf32(within[0], k_up[0][0], q_up[0][0], k_up[0][1], q_up[0][1], k_down[0][0],
                         k_down[0][1]);
                mma_tf32(within[1], k_up[1][0], q_up[1][0], k_up[1][1], q_up[1][1], k_down[0][0],
                         k_down[0][1]);
                mma_tf32(within[2], k_up[1][0], q_up[1][0], k_up[1][1], q_up[1][1], k_down[1][0],
                         k_down[1][1]);
            } else {
                mma_tf32(within[0], k_up[0][0], k_up[1][0], k_up[0][1], k_up[1][1], k_down[0][0],
                         k_down[0][1]);
                mma_tf32(within[1], k_up[0][0], k_up[1][0], k_up[0][1], k_up[1][1], k_down[1][0],
                         k_down[1][1]);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                k_decayed[2 * b + e] = pack_half(k_up[e][0], k_up[e][1]);
                if (Block::OUTPUTS) q_decayed[2 * b + e] = pack_half(q_up[e][0], q_up[e][1]);
                rest[2 * b + e] = pack_half(k_down[e][0] * over[b][0], k_down[e][1] * over[b][1]);
            }
        }
        store_matrices(at, rest);
        if (second) {
            uint32_t k_rest[4];
            load_matrices(k_rest, at - SUBCHUNK_BYTES);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                mma_half(sums.across[0][n], k_decayed[0], k_decayed[1], k_decayed[2], k_decayed[3], k_rest[n],
                         k_rest[2 + n]);
                if (Block::OUTPUTS)
                    mma_half(sums.across[1][n], q_decayed[0], q_decayed[1], q_decayed[2], q_decayed[3],
                             k_rest[n], k_rest[2 + n]);
            }
#pragma unroll
            for (int b = 0; b < 2; b++) {
                float2 &all = *reinterpret_cast<float2 *>(&gamma[gamma_place(8 * b + 2 * t)]);
                const float2 first = all;
                const uint32_t over_first = pack_half(ex2(first.x), ex2(first.y)),
                               over_second = pack_half(over[b][0], over[b][1]);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int i = 2 * b + e;
                    k_rest[i] = multiply_halves(k_rest[i], over_second);
                    k_decayed[i] = multiply_halves(k_decayed[i], over_first);
                    if (Block::OUTPUTS) q_decayed[i] = multiply_halves(q_decayed[i], over_first);
                }
                sum[b][2] += first.x, sum[b][3] += first.y;
            }
            store_matrices(at - SUBCHUNK_BYTES, k_rest);
        }
        store_matrices(at + K * Block::HALF_TOKENS, k_decayed);
        if (Block::OUTPUTS) store_matrices(at + Q * Block::HALF_TOKENS, q_decayed);
        __syncwarp(); /* before others read these sums, and after they have */
        if (g == 7)
#pragma unroll
            for (int b = 0; b < 2; b++)
                *reinterpret_cast<float2 *>(&gamma[gamma_place(8 * b + 2 * t)]) =
                    make_float2(sum[b][2], sum[b][3]);
    }

    /* Turns the sums over all tokens into the state's decay over the chunk, less one: rounded to fp32 itself, the decay
     * of a slow channel would be off by the same amount chunk after chunk. */
    __device__ void finish_gamma(float *gamma) const
    {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < SHARE / 32; i++) {
            float &x = gamma[32 * i + lane];
            x = ex2_minus_1(x);
        }
    }

    /* visit(0: of K~, 1: of Q~; tile; two numbers of row g, from column 2 t on) for all sums. */
    template <class Visit> __device__ void for_each_tile(const Sums &sums, Visit visit) const
    {
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++) {
            const float(&x)[3][4] = sums.within[sub];
            const int diagonal = Products<Block>::ON_DIAGONAL + 2 * sub,
                      below = Products<Block>::BELOW_IT + sub;
            if constexpr (Block::OUTPUTS) {
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    visit(which, diagonal, x[0][2 * which], x[0][2 * which + 1]);
                    visit(which, below, x[1][2 * which], x[1][2 * which + 1]);
                    visit(which, diagonal + 1, x[2][2 * which], x[2][2 * which + 1]);
                }
            } else {
                visit(0, diagonal, x[0][0], x[0][1]);
                visit(0, below, x[0][2], x[0][3]);
                visit(0, diagonal + 1, x[1][2], x[1][3]);
            }
        }
        if constexpr (SUBCHUNKS == 2) {
#pragma unroll
            for (int which = 0; which < (Block::OUTPUTS ? 2 : 1); which++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const float(&x)[4] = sums.across[which][n % 2];
                    visit(which, Products<Block>::ACROSS + n, x[n / 2 * 2], x[n / 2 * 2 + 1]);
                }
        }
    }

    /* Two warps leave their sums; if there are more, the others add theirs. */
    __device__ void store_sums(const Sums &sums)
    {
        constexpr int PARTIALS = Block::PARTIALS;
        static_assert(WARPS == PARTIALS || WARPS == 2 * PARTIALS, "one or two warps to a part");
        auto &to = shared.products[team].partial[warp % PARTIALS];
        float *const place = &to[0][0][g][2 * t];
        const auto at = [=](int which, int tile) {
            return place + 64 * (Products<Block>::TILES * which + tile);
        };
        if (warp < PARTIALS)
            for_each_tile(sums,
                          [=](int which, int tile, float x, float y) { store_two(at(which, tile), x, y); });
        if (WARPS == PARTIALS) return;
        meet();
        if (warp >= PARTIALS)
            for_each_tile(sums, [=](int which, int tile, float x, float y) {
                const float2 other = *reinterpret_cast<const float2 *>(at(which, tile));
                store_two(at(which, tile), x + other.x, y + other.y);
            });
    }

    /* A chunk whose inputs have come, and norms too unless it finds them, up to its products over channels. */
    __device__ void prepare(int slot, int round, bool finds_norms)
    {
        Tokens<Block> &tokens = shared.tokens[slot];
        float *gamma = shared.stage[slot].gamma_minus_1;
        Sums sums = {};
        const int place = Block::LOADER_FINDS_NORMS ? slot : team,
                  norms = WARPS == Block::PARTIALS ? round : 0;
        if (finds_norms) {
            store_norms<Block, WARPS>(shared.inverse_norm[place][norms], tokens, warp, lane);
            meet();
        }
        const int first = warp * SHARE; /* channel */
        const uint32_t half = shared_address(&tokens.half[first / 64]) + matrix_row(lane);
        const float *factor = &shared.inverse_norm[place][norms][0][g];
        /* SolverScratch and channels in loops that stay loops: what all roles do has to fit in the instruction cache. */
#pragma unroll 1
        for (int sub = 0; sub < SUBCHUNKS; sub++) {
            if (sub == 1) {
                __syncwarp();
#pragma unroll
                for (int i = 0; i < 12; i++) {
                    sums.within[0][i / 4][i % 4] = sums.within[SUBCHUNKS - 1][i / 4][i % 4];
                    sums.within[SUBCHUNKS - 1][i / 4][i % 4] = 0.0f;
                }
            }
#pragma unroll 1
            for (int c = 0; c < SHARE; c += 16)
                prepare_slice(sub, (half ^ 2 * (first % 64 + c)) + sub * SUBCHUNK_BYTES,
                              &shared.gate_offset[team][first + c], factor + sub * SUBCHUNK,
                              gamma + first + c, sums);
        }
        if (SAVES_REGISTERS) find_place();
        finish_gamma(&shared.stage[slot].gamma_minus_1[warp * SHARE]);
        fence_async_proxy();
        mbarrier_wait(&shared.product_ring.empty[team], round ^ 1);
        store_sums(sums);
    }

    __device__ void run()
    {
        constexpr int RING = Block::OWN_SLOTS;
        Slot<RING> slot(team);
        constexpr bool TOLD_BY_SLOT = RING % (2 * Block::TEAMS) == 0;
        int count =
            0; /* of the team's chunks; its parity is that of the team's round in the ring of products */
        if (lane == 0) shared.gate[team][warp].head = -1;
        __syncwarp();
        for (ChunkCursor<Block> at(shared.work, Block::CTAS * team + pair_rank<Block>()); !at.done();
             at.advance(Block::CTAS * Block::TEAMS)) {
            if (SAVES_REGISTERS) find_place();
            if (at.head != shared.gate[team][warp].head) load_gate_parameters(at.head);
            /* Where another team had the slot before, its inputs might not even have come: then parities would deceive. */
            static_assert(RING >= Block::TEAMS, "so that it was asked for before this team's last chunk");
            if (RING % Block::TEAMS) mbarrier_wait(&shared.chunk_ring.empty[slot.index], slot.parity ^ 1);
            const bool finds_norms = !Block::LOADER_FINDS_NORMS || count == 0;
            if (finds_norms) mbarrier_wait(&shared.chunk_ring.loaded[slot.index], slot.parity);
            if (Block::LOADER_FINDS_NORMS) mbarrier_wait(&shared.chunk_ring.normed[slot.index], slot.parity);
            if (at.left < Block::CHUNK) clear_past_end(slot.index, at.left);
            prepare(slot.index, (TOLD_BY_SLOT ? slot.index / Block::TEAMS : count) % 2, finds_norms);
            mbarrier_arrive_warp(&shared.product_ring.full[team]);
            mbarrier_arrive_warp(&shared.chunk_ring.ready[slot.index]);
            slot.advance(Block::TEAMS);
            count++;
        }
    }
};

} // namespace fkda

#endif
