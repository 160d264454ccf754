/*
 * The arithmetic of the preparation of a slice: 16 channels of a subchunk, which a warp takes from raw inputs
 * to decayed tiles and products over channels.
 *
 * Why decays are counted from the subchunk's start. Even if all 16 gates are at the bound of -5, exp(-G) is
 * at most e^80, which fp32 and tf32 hold; and k exp(G) and q exp(G) are K~ and Q~ without another factor. The
 * portable kernel counts from the start of its chunk, which has 16 tokens, too. The CPU shifts G by a
 * constant (src/cpu/prepare.h).
 *
 * Lane (g, t) = (lane / 4, lane % 4) owns tokens g and g + 8 of channels 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
 * This is the layout of the tensor core's fragments, so elements go from ldmatrix through the products to
 * stmatrix without changing lanes.
 */
#ifndef FKDA_HOPPER_PREPARE_SLICE_CUH
#define FKDA_HOPPER_PREPARE_SLICE_CUH

#include "shared.cuh"

namespace fkda
{

template <class Block> struct SlicePreparation {
    static constexpr int WARPS = Block::TEAM_WARPS, SUBCHUNKS = Block::SUBCHUNKS;
    static_assert(SUBCHUNKS <= 2, "a subchunk has at most one other subchunk");
    static constexpr uint32_t ONE = 0x3f80; /* in bf16 */
    /* With two subchunks registers are short, and in a general block too. Threads then find their place anew
     * for each chunk, and read the gate's constants from shared memory for each use, so that what is made
     * from them need not be kept in between. */
    static constexpr bool SAVES_REGISTERS = SUBCHUNKS == 2 || Block::GENERAL;
    const fkda_fwd_args &args;
    Shared<Block> &shared;
    int team, warp, lane, g, t; /* warp: of the team */
    HeadGate gate_here;

    __device__ SlicePreparation(const fkda_fwd_args &a, Shared<Block> &s) : args(a), shared(s)
    {
        find_place();
    }

    __device__ void find_place()
    {
        int cta, thread;
        read_indices(cta, thread);
        const unsigned id =
            static_cast<unsigned>(thread) / 32 - Block::RECURRENCE_WARPS; /* unsigned: division by shifts */
        team = static_cast<int>(id / WARPS), warp = static_cast<int>(id % WARPS);
        lane = thread & 31, g = lane >> 2, t = lane & 3;
    }

    /*
     * The products over a warp's channels, in tiles of 8 x 8 tokens.
     *
     * within[i]: subchunk i with itself. With outputs the three products are tiles (0, 0), (1, 0) and (1, 1),
     * with the rows of K~ above the rows of Q~. Without outputs the first product is (0, 0) above (1, 0), and
     * the lower half of the second one is (1, 1). Tile (0, 1) lies above the diagonal, where L and P are
     * zeros, so it is not computed, or is the half of a product that is ignored.
     *
     * across[w][n]: the second subchunk with the first one; w is 0 for K~ and 1 for Q~, n numbers eight
     * columns.
     */
    struct Sums {
        float within[SUBCHUNKS][3][4], across[2][2][4];
    };

    /* Raw gates in fp32 come from global memory. A block that knows of them beforehand asks for those of the
     * first slice before it finds norms, and for those of the next slice while it works on a slice. */
    static constexpr bool GATES_AHEAD = Block::ARITHMETIC == Arithmetic::FP32_GATES;

    /* The channel of a slice whose gates a lane has in x[b] (find_decays). With GATES_AHEAD a lane has two
     * neighbours, which one load brings. */
    static __device__ int gate_channel(int lane, int b)
    {
        const int g = lane >> 2;
        return GATES_AHEAD ? g % 2 * 8 + g / 2 * 2 + b : 8 * b + g;
    }

    /* What a chunk's slices keep about gates. */
    struct Gates {
        float raw[2][4];   /* with GATES_AHEAD: those of the slice, as find_decays() has them */
        const float *next; /* with GATES_AHEAD and !SAVES_REGISTERS: the next slice's first one of this lane,
                            * or null */
        float least;       /* sum of log2 decays in a subchunk so far, where UNBOUNDED */
        bool wide;         /* the last careful preparation met wide elements */
    };

    /* Where a slice is, for what is not taken from the layout of fragments. */
    struct SlicePlace {
        const ChunkCursor<Block> &chunk;
        int sub;      /* the subchunk */
        int channel;  /* the slice's first */
        bool repairs; /* gates that are NaN do not decay: see bad_tokens.cuh */
    };

    /* Where this lane's first raw gate of a slice is, in fp32: that of token 2 t and of its first channel.
     * The lane's place is found anew, so that addresses are not kept from slice to slice. */
    __device__ const float *first_gate(const ChunkCursor<Block> &chunk, int sub, int channel) const
    {
        int cta, thread;
        read_indices(cta, thread);
        const int zero =
            thread / FKDA_HOPPER_THREADS; /* the compiler does not know, and finds no place ahead */
        return static_cast<const float *>(args.g) +
               token_place(args.g_strides, chunk.row + zero, chunk.token + sub * SUBCHUNK + thread % 4 * 2,
                           chunk.head + zero) +
               channel + gate_channel(thread % 32, 0);
    }

    /* Raw gates in fp32, from global memory: x[b] as find_decays() has it. */
    __device__ void load_gates(float (&x)[2][4], const SlicePlace &place) const
    {
        int cta, thread;
        read_indices(cta, thread);
        const float none = gate_of_call<Block>(args).neutral();
        const float *const from = first_gate(place.chunk, place.sub, place.channel);
        constexpr int NEXT = GATES_AHEAD ? 1 : 8; /* from a lane's first channel to its second */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int ahead = i / 2 * 8 + i % 2;
            const bool valid = place.sub * SUBCHUNK + thread % 4 * 2 + ahead < place.chunk.here();
#pragma unroll
            for (int b = 0; b < 2; b++)
                x[b][i] = valid ? load_ahead(from + ahead * args.g_strides.token + NEXT * b) : none;
        }
    }

    /* Asks for the raw gates of a slice in fp32, all of whose tokens belong to the sequence. `from` is its
     * first_gate(). */
    __device__ void load_gates_ahead(float (&x)[2][4], const float *from) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 two = load_two_ahead(from + (i / 2 * 8 + i % 2) * args.g_strides.token);
            x[0][i] = two.x, x[1][i] = two.y;
        }
    }

    /* Asks for the raw gates in fp32 of the slice after this one of the chunk. */
    __device__ void ask_for_next_gates(const SlicePlace &place, Gates &gates) const
    {
        if constexpr (SAVES_REGISTERS) {
            constexpr int SHARE = DIM / WARPS;
            const int channel = place.channel + 16;
            const bool ends = channel % SHARE == 0; /* the subchunk */
            if (!ends || place.sub + 1 < SUBCHUNKS)
                load_gates_ahead(gates.raw,
                                 first_gate(place.chunk, place.sub + ends, channel - (ends ? SHARE : 0)));
        } else if (gates.next)
            load_gates_ahead(gates.raw, gates.next);
    }

    /* The log2 decays x[b] of channel gate_channel(b) of a slice, for tokens 2 t, 2 t + 1, 2 t + 8 and
     * 2 t + 9. `at` and `offset` are as in accumulate_gates(). With GATES_AHEAD x has the raw gates, unless
     * `careful`. */
    template <bool careful>
    __device__ void find_decays(float (&x)[2][4], uint32_t at, const float *offset,
                                const SlicePlace &place) const
    {
        const GateOfCall call = gate_of_call<Block>(args);
        const bool fp32 = has_fp32_gates<Block>(args);
        if (fp32) {
            if (careful || !GATES_AHEAD) load_gates(x, place);
        } else {
            uint32_t raw[4];
            load_matrices_transposed(raw, at);
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    x[b][i] = i % 2 ? bf16_high(raw[2 * b + i / 2]) : bf16_low(raw[2 * b + i / 2]);
        }
        if (GATES_AHEAD && call.is_activated()) {
            constexpr HeadGate NO_PARAMETERS = {LOG2_E, 0.0f, 0};
#pragma unroll
            for (int b = 0; b < 2; b++) activate_gates(x[b], call, NO_PARAMETERS, 0.0f);
        } else {
            const HeadGate gate_of_head =
                SAVES_REGISTERS || GATES_AHEAD ? shared.gate[team][warp] : gate_here;
#pragma unroll
            for (int b = 0; b < 2; b++)
                activate_gates(x[b], call, gate_of_head, offset[gate_channel(lane, b)]);
        }
#pragma unroll
        for (int b = 0; b < 2; b++) {
            if constexpr (careful) {
                if (Block::UNBOUNDED)
#pragma unroll
                    for (int i = 0; i < 4; i++) x[b][i] = hold_log2_decay(x[b][i]);
                if (fp32 && place.repairs)
#pragma unroll
                    for (int i = 0; i < 4; i++) x[b][i] = x[b][i] == x[b][i] ? x[b][i] : 0.0f;
            }
        }
    }

    /*
     * Finds the running sums of the log2 decays: sum[b][i] is that of the subchunk's token g + 8 (i / 2) and
     * of channel 8 b + 2 t + i % 2 of the slice.
     *
     * The gates are loaded transposed (ldmatrix.trans), so that a lane has four tokens of one channel and
     * needs one offset for them. The tensor core adds them up: a triangle of ones times the gates, which also
     * transposes back. Each gate enters as the sum of two bf16. That sum differs from the gate by at most
     * 2^-18 of the gate, upwards or downwards, so the errors do not all add up. Sums are fp32, of at most 16
     * gates.
     *
     * `at` is this lane's row of the subchunk's gates, `offset` the gate offset of the first of the channels,
     * and x the raw gates with GATES_AHEAD.
     */
    template <bool careful>
    __device__ void accumulate_gates(uint32_t at, const float *offset, const SlicePlace &place,
                                     float (&x)[2][4], float (&sum)[2][4]) const
    {
        if constexpr (Block::UNBOUNDED) {
            find_decays<careful>(x, at, offset, place);
#pragma unroll
            for (int b = 0; b < 2; b++) add_up(x[b], sum[b]);
            if constexpr (GATES_AHEAD) { /* sum[i][2 e + b] is that of channel 8 b + 2 t + i */
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float other = sum[0][2 * e + 1];
                    sum[0][2 * e + 1] = sum[1][2 * e];
                    sum[1][2 * e] = other;
                }
            }
            return;
        }
        const HeadGate gate_of_head = SAVES_REGISTERS ? shared.gate[team][warp] : gate_here;
        uint32_t raw[4];
        load_matrices_transposed(raw, at);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float shift = offset[8 * b + g];
            float decays[4]; /* tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9 */
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float gate = i % 2 ? bf16_high(raw[2 * b + i / 2]) : bf16_low(raw[2 * b + i / 2]);
                decays[i] = hopper_sigmoid_gate(gate, gate_of_head, shift);
            }
            add_up(decays, sum[b]);
        }
    }

    /* The running sums of one b. */
    __device__ void add_up(const float (&x)[4], float (&sum)[4]) const
    {
        const uint32_t triangle = (2 * t <= g ? ONE : 0) | (2 * t + 1 <= g ? ONE << 16 : 0);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = 0.0f;
        uint32_t high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            high[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
            low[i] = pack_bf16(x[2 * i] - bf16_low(high[i]), x[2 * i + 1] - bf16_high(high[i]));
        }
        mma_bf16(sum, triangle, ONE << 16 | ONE, 0, triangle, low[0], low[1]);
        mma_bf16(sum, triangle, ONE << 16 | ONE, 0, triangle, high[0], high[1]);
    }

    /* ---- Unbounded gates ---- */

    /*
     * If the sum of a token's and a channel's log2 decay is below -WIDEST, exp(-G) leaves the range of fp32
     * and tf32, and the element of this token and channel is *wide*. Wide elements are left out of the
     * products on the tensor core, and add_wide_elements() computes what a wide element's row gets in its
     * channel pair by pair, with exp(G_i - G_j), which is at most one. WIDEST is above the 115.4 that 16
     * gates at the bound of -5 reach.
     *
     * Only a `careful` preparation knows wide elements, and only it holds gates. A preparation that is not
     * careful keeps the `least` sum. If that is below -MAY_BE_WIDE, or if a sum is NaN because gates were not
     * held, the warp prepares the chunk once more and carefully (run() in block/prepare.cuh). Without wide
     * elements both give equal bits.
     *
     * Whether an element is wide depends on the tokens up to its own alone, so a token changes no bit of the
     * tokens before it. In K~ and Q~ wide elements are zeros, as they would be in fp16.
     */
    static constexpr float WIDEST = 116.0f;
    /* A subchunk whose least sum at its end is above -MAY_BE_WIDE has no wide element, however its sums are
     * rounded. */
    static constexpr float MAY_BE_WIDE = WIDEST - 0.25f;

    /* Whether the slice has wide elements: token g + 8 comes after token g. */
    static __device__ bool is_wide(const float (&sum)[2][4])
    {
        const float least = fminf(fminf(sum[0][2], sum[0][3]), fminf(sum[1][2], sum[1][3]));
        return __any_sync(~0u, least < -WIDEST);
    }

    /* Raw k or q of a token of the subchunk in channel c of the slice, of which `at` is a lane's row. */
    static __device__ float element(uint32_t at, int lane, int which, int token, int c)
    {
        const uint32_t tile = (at & ~0x70u) - lane % 16 * ROW,
                       unit = ((at >> 4 & 7) ^ (lane / 16) ^ (lane % 8)) + c / 8;
        return bf16_low(load_shared_16(tile + which * Block::HALF_TOKENS + token * ROW +
                                       (unit ^ token % 8) * 16 + c % 8 * 2));
    }

    /* Adds the products of wide elements to `within`, in the units of products in tf32. Written for little
     * code and few registers: places are found anew for each channel. */
    __device__ void add_wide_elements(float (&within)[3][4], const float (&sum)[2][4], uint32_t at,
                                      const float *first_factor) const
    {
#pragma unroll 1
        for (int c = 0; c < 16; c++) {
            int cta, thread;
            read_indices(cta, thread);
            const int lane_here = thread % 32, row = lane_here / 4, column = thread % 4 * 2,
                      of = c / 2 % 4; /* `of`: lane of a quad */
            float own[2];             /* of tokens g and g + 8 */
#pragma unroll
            for (int e = 0; e < 2; e++)
                own[e] = c < 8 ? (c % 2 ? sum[0][2 * e + 1] : sum[0][2 * e])
                               : (c % 2 ? sum[1][2 * e + 1] : sum[1][2 * e]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float row_sum = __shfl_sync(~0u, own[e], 4 * row + of);
                const float *factor = first_factor + 8 * e + row;
                const float row_k =
                    element(at, lane_here, K, 8 * e + row, c) * (*factor * (1.0f / PRODUCT_UNIT<Block>));
                float row_q;
                if (Block::QUERIES)
                    row_q = element(at, lane_here, Q, 8 * e + row, c) *
                            (factor[Block::CHUNK] * (1.0f / PRODUCT_UNIT<Block>));
#pragma unroll
                for (int f = 0; f <= e; f++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int token = 8 * f + column + j;
                        const float column_sum = __shfl_sync(~0u, own[f], 4 * (column + j) + of);
                        if (!(row_sum < -WIDEST)) continue;
                        float(&to)[4] = within[Block::QUERIES ? e + f : f];
                        const int n = Block::QUERIES ? j : 2 * e + j;
                        /* What is above the diagonal counts for nothing, and must be finite. */
                        const float column_k = element(at, lane_here, K, token, c) * first_factor[token] *
                                               ex2(fminf(row_sum - column_sum, 0.0f));
                        to[n] = __fmaf_rn(row_k, column_k, to[n]);
                        if (Block::QUERIES) to[2 + j] = __fmaf_rn(row_q, column_k, to[2 + j]);
                    }
            }
        }
    }

    /* ---- Tiles with more bits ---- */

    /* For gradients, whose products with a state may be small differences, keys keep more bits than fp16 has
     * (KEEPS_BITS): K~ and Kr are multiplied by key_scale(), and what they lack goes to tiles of its own.
     * What K~ lacks lies over q, and what Kr lacks over v. There is no Q~. */

    /* Keys that are normalised have elements of at most 1, others of at most 181 (norms.cuh). */
    static __device__ float key_scale(const fkda_fwd_args &args)
    {
        return Block::OPTIONS && args.qk_is_normalised ? 0x1p8f : 0x1p14f;
    }
    /* The same for keys that are multiplied by OPERAND_UNIT already. */
    static __device__ float operand_scale(const fkda_fwd_args &args)
    {
        return key_scale(args) * (1.0f / OPERAND_UNIT<Block>);
    }

    static __device__ void split(uint32_t &two, uint32_t &lack, float x, float y)
    {
        two = pack_half(x, y);
        lack = pack_half(x - half_low(two), y - half_high(two));
    }
    /* Multiplies two numbers that were split. */
    static __device__ void multiply_split(uint32_t &two, uint32_t &lack, float x, float y)
    {
        split(two, lack, (half_low(two) + half_low(lack)) * x, (half_high(two) + half_high(lack)) * y);
    }
    /* The place of what Kr lacks, for that of Kr. */
    static __device__ uint32_t rest_lack_place(uint32_t at, int channel)
    {
        constexpr int FROM_HALF = static_cast<int>(sizeof(typename Tokens<Block>::Half)) * (DIM / 64);
        return at + FROM_HALF -
               channel / 64 * static_cast<int>(sizeof(typename Tokens<Block>::Half) - Block::HALF_TOKENS);
    }

    /* ---- A slice ---- */

    /*
     * Prepares 16 channels of a subchunk: writes the decayed tiles K~, Q~ and Kr over k, q and g, and
     * adds the products over the 16 channels to `sums`. The products of the subchunk with itself go to the
     * last element of `within`. prepare_slices() in prepare.cuh moves those of the first subchunk from there
     * to within[0] before the second subchunk begins.
     *
     * Decays are counted from the subchunk's start. So when the second subchunk is done, its K~ and Q~ are
     * multiplied by the decay over the first subchunk, and the first one's Kr by the decay over the second.
     * The products of the second subchunk with the first one are taken before these multiplications, while
     * the decays in K~ and Q~ of the second and in Kr of the first are counted from the border between them.
     *
     * `at` is this lane's row of the slice's gates; `offset` is the gate offset of its first channel,
     * `factor` the inverse norm of this lane's first token, and `gamma` has the channels' sums over all
     * tokens so far.
     */
    template <bool careful>
    __device__ void prepare_slice(const SlicePlace &place, uint32_t at, const float *offset,
                                  const float *factor, float *gamma, Sums &sums, Gates &gates) const
    {
        constexpr bool KEEPS_BITS = Block::KEEPS_BITS, KNOWS_WIDE = Block::UNBOUNDED && careful,
                       RELOADS = Block::GENERAL || KNOWS_WIDE; /* k and q, which takes fewer registers */
        const bool second = SUBCHUNKS == 2 && place.sub == 1;
        float sum[2][4], over[2][2];   /* over: the decay over this subchunk */
        float over_first_scaled[2][2]; /* with KEEPS_BITS: over the first, times operand_scale() */
        uint32_t raw_k[4], raw_q[4], k_decayed[4], q_decayed[4], rest[4]; /* channel / 8, token / 8 */
        uint32_t k_lack[4], rest_lack[4], k_whole[4];
        accumulate_gates<careful>(at, offset, place, gates.raw, sum);
        if constexpr (GATES_AHEAD && !careful) ask_for_next_gates(place, gates);
        float(&within)[3][4] = sums.within[SUBCHUNKS - 1];
        bool wide = false;
        if constexpr (Block::UNBOUNDED && SUBCHUNKS == 2)
            gates.least = fminf(fminf(gates.least, fminf(sum[0][2], sum[0][3])), fminf(sum[1][2], sum[1][3]));
        if constexpr (KNOWS_WIDE) {
            wide = is_wide(sum);
            if (__builtin_expect(wide, 0)) add_wide_elements(within, sum, at, factor - g);
        }

        if constexpr (KEEPS_BITS) {
            if (second) {
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    const float2 first =
                        *reinterpret_cast<const float2 *>(&gamma[gamma_place(8 * b + 2 * t)]);
                    over_first_scaled[b][0] = ex2(first.x) * operand_scale(args);
                    over_first_scaled[b][1] = ex2(first.y) * operand_scale(args);
                }
            }
        }

        /* ---- Elements, and products of the subchunk with itself ---- */
#pragma unroll
        for (int b = 0; b < 2; b++) {
            if (b == 0 || (RELOADS && SUBCHUNKS == 2)) {
                load_matrices(raw_k, at + K * Block::HALF_TOKENS);
                if (Block::QUERIES) load_matrices(raw_q, at + Q * Block::HALF_TOKENS);
            }
            float k_up[2][2], q_up[2][2], k_down[2][2]; /* token / 8, channel */
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t pair_k = raw_k[2 * b + e];
                    const float k =
                        (i ? bf16_high(pair_k) : bf16_low(pair_k)) * (factor[8 * e] * OPERAND_UNIT<Block>);
                    const float up = ex2(sum[b][2 * e + i]);
                    k_up[e][i] = k * up;
                    if (Block::QUERIES) {
                        const uint32_t pair_q = raw_q[2 * b + e];
                        const float q = (i ? bf16_high(pair_q) : bf16_low(pair_q)) *
                                        (factor[Block::CHUNK + 8 * e] * OPERAND_UNIT<Block>);
                        q_up[e][i] = q * up;
                    }
                    k_down[e][i] = k * ex2(-sum[b][2 * e + i]);
                    if (e == 1) over[b][i] = __shfl_sync(~0u, up, 4 * 7 + t);
                }
            if (KNOWS_WIDE && __builtin_expect(wide, 0))
#pragma unroll
                for (int e = 0; e < 2; e++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (sum[b][2 * e + i] < -WIDEST) k_up[e][i] = q_up[e][i] = k_down[e][i] = 0.0f;
            if constexpr (Block::QUERIES) {
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
                if (Block::QUERIES) q_decayed[2 * b + e] = pack_half(q_up[e][0], q_up[e][1]);
                if constexpr (KEEPS_BITS) {
                    const float by = operand_scale(args);
                    if (second) {
                        k_decayed[2 * b + e] =
                            pack_half(k_up[e][0] * by, k_up[e][1] * by); /* from the border */
                        split(k_whole[2 * b + e], k_lack[2 * b + e], k_up[e][0] * over_first_scaled[b][0],
                              k_up[e][1] * over_first_scaled[b][1]);
                    } else
                        split(k_decayed[2 * b + e], k_lack[2 * b + e], k_up[e][0] * by, k_up[e][1] * by);
                    split(rest[2 * b + e], rest_lack[2 * b + e], k_down[e][0] * (over[b][0] * by),
                          k_down[e][1] * (over[b][1] * by));
                } else {
                    k_decayed[2 * b + e] = pack_half(k_up[e][0], k_up[e][1]);
                    rest[2 * b + e] = pack_half(k_down[e][0] * over[b][0], k_down[e][1] * over[b][1]);
                }
            }
            if (KNOWS_WIDE && __builtin_expect(wide, 0)) {
                const float last[2] = {__shfl_sync(~0u, sum[b][2], 4 * 7 + t),
                                       __shfl_sync(~0u, sum[b][3], 4 * 7 + t)};
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const uint32_t pair_k = raw_k[2 * b + e];
                    const float x = bf16_low(pair_k) * factor[8 * e] * ex2(last[0] - sum[b][2 * e]),
                                y = bf16_high(pair_k) * factor[8 * e] * ex2(last[1] - sum[b][2 * e + 1]);
                    if constexpr (KEEPS_BITS)
                        split(rest[2 * b + e], rest_lack[2 * b + e], x * key_scale(args),
                              y * key_scale(args));
                    else
                        rest[2 * b + e] = pack_half(x, y);
                }
            }
        }
        store_matrices(at, rest);
        if constexpr (KEEPS_BITS) store_matrices(rest_lack_place(at, place.channel), rest_lack);

        /* ---- The second subchunk with the first one ---- */
        if (second) {
            uint32_t k_rest[4], first_lack[4];
            load_matrices(k_rest, at - SUBCHUNK_BYTES);
            if constexpr (KEEPS_BITS)
                load_matrices(first_lack, rest_lack_place(at, place.channel) - SUBCHUNK_BYTES);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                mma_half(sums.across[0][n], k_decayed[0], k_decayed[1], k_decayed[2], k_decayed[3], k_rest[n],
                         k_rest[2 + n]);
                if (Block::QUERIES)
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
                    if constexpr (KEEPS_BITS) {
                        multiply_split(k_rest[i], first_lack[i], over[b][0], over[b][1]);
                        k_decayed[i] = k_whole[i];
                    } else {
                        k_rest[i] = multiply_halves(k_rest[i], over_second);
                        k_decayed[i] = multiply_halves(k_decayed[i], over_first);
                        if (Block::QUERIES) q_decayed[i] = multiply_halves(q_decayed[i], over_first);
                    }
                }
                sum[b][2] += first.x, sum[b][3] += first.y;
            }
            store_matrices(at - SUBCHUNK_BYTES, k_rest);
            if constexpr (KEEPS_BITS)
                store_matrices(rest_lack_place(at, place.channel) - SUBCHUNK_BYTES, first_lack);
        }

        /* ---- Tiles and sums to shared memory ---- */
        store_matrices(at + K * Block::HALF_TOKENS, k_decayed);
        if constexpr (KEEPS_BITS)
            store_matrices(at + Q * Block::HALF_TOKENS, k_lack);
        else if (Block::QUERIES)
            store_matrices(at + Q * Block::HALF_TOKENS, q_decayed);
        __syncwarp(); /* all lanes have read the sums of the first subchunk */
        if (g == 7)
#pragma unroll
            for (int b = 0; b < 2; b++)
                *reinterpret_cast<float2 *>(&gamma[gamma_place(8 * b + 2 * t)]) =
                    make_float2(sum[b][2], sum[b][3]);
    }
};

} // namespace fkda

#endif
