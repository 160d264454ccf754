/*
 * The recurrence role: the state through a sequence's chunks, in order. A warpgroup owns 64 rows of V and all of K, as the
 * transposed state S^T [V, K] in fp32 accumulators of wgmma; warp w of it has rows 16 w to 16 w + 15, lane (g, t) of that
 * rows g and g + 8. Accumulators serve as A operands as they are, B comes from the
 * tiles of the stage, and neither the state nor U passes through shared memory.
 */
#ifndef FKDA_HOPPER_RECURRENCE_CUH
#define FKDA_HOPPER_RECURRENCE_CUH

#include "../join/map.cuh"
#include "../join/relay_join.cuh"
#include "shared.cuh"

namespace fkda
{

template <class Block> struct Recurrence {
    static constexpr int CHUNK = Block::CHUNK, SUBCHUNKS = Block::SUBCHUNKS;
    static constexpr int TILES = CHUNK / 8; /* of eight tokens, */
    static constexpr int READ =
        Block::OUTPUTS ? 2 * TILES : TILES; /* in what is read from the state: K~ S, and Q~ S for outputs */
    using Stage = fkda::Stage<Block>;
    const fkda_hopper_fwd_args &all;
    const fkda_fwd_args &args;
    Shared<Block> &shared;
    int lane;
    int value_place, output_place; /* this lane's in the rows of v: for matrices of 8 x 8, for an output */
    /* state[s]: rows g, g, g + 8, g + 8 and channels 8 s + 2 t, + 1, + 0, + 1 */
    float state[DIM / 8][4];
    float scale[2]; /* of the two rows, powers of two: state, V and U are kept divided by them; of maps one */
    bool look_again; /* the scales have just changed */
    bool faint;      /* since they were chosen a chunk had a strength below one */
    bool is_map;     /* the item is one of a map: values are zeros */

    __device__ Recurrence(const fkda_hopper_fwd_args &a, Shared<Block> &s, int thread)
        : all(a), args(a.fwd), shared(s), lane(thread & 31)
    {
        const int warp_row = thread >> 5 << 4;
        const int half = (warp_row >> 6) * Block::HALF_TOKENS, first = (warp_row & 63) >> 3;
        output_place = half + ((lane >> 1) * ROW | ((lane & 1) ^ first ^ (lane >> 1 & 7)) * 16);
        value_place = half + (matrix_row_by_token(lane) ^ first * 16);
        keep_in_register(output_place), keep_in_register(value_place);
    }

    /* The warp's first row of V, of the item's. */
    static __device__ int warp_row()
    {
        return static_cast<int>(threadIdx.x) >> 5 << 4;
    }

    /* Where this lane's part of a item's state begins, in elements of the head's. */
    __device__ int state_begin(const WorkItem &item) const
    {
        return (item.first_row + warp_row() + (lane >> 2)) * DIM + 2 * (lane & 3);
    }

    /* Tiles s, s + 1, ... of the state as they are in memory, if it is fp32, or if it is bf16. */
    template <int s>
    static __device__ void load_tiles_fp32(float (&raw)[DIM / 8][4], const void *from, bool is_fp32)
    {
        float(&x)[4] = raw[s];
        load_two_if<8 * s>(x[0], x[1], from, is_fp32);
        load_two_if<8 * s + 8 * DIM>(x[2], x[3], from, is_fp32);
        if constexpr (s + 1 < DIM / 8) load_tiles_fp32<s + 1>(raw, from, is_fp32);
    }
    template <int s>
    static __device__ void load_tiles_bf16(float (&raw)[DIM / 8][4], const void *from, bool is_bf16)
    {
        float(&x)[4] = raw[s];
        load_pair_if<8 * s>(x[0], from, is_bf16);
        load_pair_if<8 * s + 8 * DIM>(x[2], from, is_bf16);
        if constexpr (s + 1 < DIM / 8) load_tiles_bf16<s + 1>(raw, from, is_bf16);
    }

    template <int s>
    static __device__ void load_tiles_kept(float (&raw)[DIM / 8][4], const void *from, bool is_kept)
    {
        load_four_if<s>(raw[s], from, is_kept);
        if constexpr (s + 1 < DIM / 8) load_tiles_kept<s + 1>(raw, from, is_kept);
    }

    /* The warp's rows among the head's in units of 16. */
    static __device__ int row_group(const WorkItem &item)
    {
        return (item.first_row + warp_row()) / 16;
    }

    /* All loads are under way before the first is waited for, which one to the same register would do, whether it loads or not: so those
     * of one type come first. Nothing branches: ptxas would put wgmma in order. Maps start from zeros or a is_map, where they are all that
     * blocks find. */
    __device__ void load_state(const WorkItem &item)
    {
        const bool is_bf16 = item.initial && item.attributes & INITIAL_BF16,
                   is_kept = item.initial && item.attributes & INITIAL_IMAGE,
                   is_fp32 = item.initial && !is_bf16 && !is_kept;
        const int begin = state_begin(item);
        const char *from = static_cast<const char *>(global_memory(item.initial));
        float raw[DIM / 8][4] = {};
        if constexpr (Block::OUTPUTS || Block::RELAYS) load_tiles_fp32<0>(raw, from + 4 * begin, is_fp32);
        if constexpr (Block::OUTPUTS)
            load_tiles_kept<0>(raw, from + row_group(item) * sizeof(StateImage::tile[0]) + 16 * lane,
                               is_kept);
        if constexpr (Block::OUTPUTS || Block::RELAYS) load_tiles_bf16<0>(raw, from + 2 * begin, is_bf16);
        const int diagonal = warp_row() + (lane >> 2) - 2 * (lane & 3); /* for a is_map: row less column */
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x = raw[s][2 * r], y = raw[s][2 * r + 1];
                if constexpr (Block::OUTPUTS || Block::RELAYS) {
                    y = is_bf16 ? bf16_high(__float_as_uint(x)) : y;
                    x = is_bf16 ? bf16_low(__float_as_uint(x)) : x;
                }
                if constexpr (!Block::OUTPUTS) {
                    x = is_map && diagonal == 8 * (s - r) ? 1.0f : x;
                    y = is_map && diagonal == 8 * (s - r) + 1 ? 1.0f : y;
                }
                state[s][2 * r] = x, state[s][2 * r + 1] = y;
            }
    }

    /* Where nothing more comes into the place of tokens, nor goes from there to the other block, by a bulk copy. */
    __device__ void store_map_by_copy(MapRowGroup &to, const SlotCursor<Block> &after) const
    {
        const Slot<Block::OWN_SLOTS> last = after.last_own();
        mbarrier_wait(&shared.chunk_ring.empty[last.index], last.parity);
        barrier_sync<RECURRENCE_BARRIER, 32 * Block::RECURRENCE_WARPS>(0);
        MapRowGroup &here = reinterpret_cast<MapRowGroup *>(shared.tokens)[warp_row() >> 4];
#pragma unroll
        for (int s = 0; s < DIM / 8; s += 2) {
            uint32_t high[4], low[4]; /* of two tiles, rows g and g + 8 */
#pragma unroll
            for (int i = 0; i < 4; i++)
                MapRowGroup::split(high[i], low[i], state[s + i / 2][i % 2 * 2],
                                   state[s + i / 2][i % 2 * 2 + 1]);
            store_matrices(shared_address(here.unit(MapRowGroup::HIGH, lane & 15, s + (lane >> 4))), high);
            store_matrices(shared_address(here.unit(MapRowGroup::LOW, lane & 15, s + (lane >> 4))), low);
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) copy_bulk_to_global(&to, &here, sizeof here);
    }

    /* Where another item's chunks come into the place of tokens. Word by word: registers are dear. */
    __device__ void store_map_by_words(MapRowGroup &to) const
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t high, low;
                MapRowGroup::split(high, low, state[s][2 * r], state[s][2 * r + 1]);
                uint32_t *at =
                    reinterpret_cast<uint32_t *>(to.unit(MapRowGroup::HIGH, (lane >> 2) + 8 * r, s)) +
                    (lane & 3);
                at[0] = high;
                at[sizeof to.part[0] / 4] = low;
            }
    }

    /* A lane then has tile 4 j + t of its rows: eight neighbours. */
    __device__ void store_map(MapRowGroup &to) const
    {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < DIM / 32; j++) {
                uint32_t high[4], low[4];
#pragma unroll
                for (int n = 0; n < 4; n++)
                    MapRowGroup::split(high[n], low[n], state[4 * j + n][2 * r], state[4 * j + n][2 * r + 1]);
                transpose_in_quad(high, lane);
                transpose_in_quad(low, lane);
                const int row = (lane >> 2) + 8 * r, u = 4 * j + (lane & 3);
                *to.unit(MapRowGroup::HIGH, row, u) = make_uint4(high[0], high[1], high[2], high[3]);
                *to.unit(MapRowGroup::LOW, row, u) = make_uint4(low[0], low[1], low[2], low[3]);
            }
    }

    __device__ void store_kept(float4 (&to)[DIM / 8][32]) const
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
            to[s][lane] = make_float4(state[s][0] * scale[0], state[s][1] * scale[0], state[s][2] * scale[1],
                                      state[s][3] * scale[1]);
    }

    __device__ void store_state(const WorkItem &item, const SlotCursor<Block> &after) const
    {
        void *to = global_memory(item.final);
        if constexpr (!Block::OUTPUTS)
            if (is_map) {
                MapRowGroup &rows = static_cast<MapImage *>(to)->row_group[row_group(item)];
                if constexpr (!Block::RELAYS)
                    store_map(rows);
                else if (!Block::MIXED && item.attributes & NOT_LAST) /* pairs of a mixture have one */
                    store_map_by_words(rows);
                else
                    store_map_by_copy(rows, after);
                return;
            }
        if (!Block::OUTPUTS || item.attributes & FINAL_IMAGE)
            return store_kept(static_cast<StateImage *>(to)->tile[row_group(item)]);
        const bool is_bf16 = item.attributes & FINAL_BF16;
        const int begin = state_begin(item);
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int at = begin + 8 * r * DIM + 8 * s;
                const float x = state[s][2 * r] * scale[r], y = state[s][2 * r + 1] * scale[r];
                if (is_bf16)
                    *reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(to) + at) = pack_bf16(x, y);
                else
                    store_two(static_cast<float *>(to) + at, x, y);
            }
    }

    /* v^T as it comes: of rows g and g + 8 in turn, pairs of tokens. */
    struct Raw {
        uint32_t pair[SUBCHUNKS][4];
    };
    __device__ Raw load_raw(const Tokens<Block> &tokens) const
    {
        Raw x = {};
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++)
            if (Block::OUTPUTS || !is_map)
                load_matrices_transposed(x.pair[sub], tokens.v[0] + value_place + sub * SUBCHUNK_BYTES);
        return x;
    }

    /* v^T: rows as in the state, tile i has tokens 8 i + 2 t, + 1, + 0, + 1. */
    static __device__ void unpack_values(float (&v)[TILES][4], const Raw &x)
    {
#pragma unroll
        for (int i = 0; i < 4 * SUBCHUNKS; i++) {
            v[i / 2][i % 2 * 2] = bf16_low(x.pair[i / 4][i % 4]);
            v[i / 2][i % 2 * 2 + 1] = bf16_high(x.pair[i / 4][i % 4]);
        }
    }

    /* The largest |v| of this lane's tokens in row g + 8 r, compared as integers. */
    static __device__ float largest(const Raw &x, int r)
    {
        uint32_t most = 0;
#pragma unroll
        for (int i = r; i < 4 * SUBCHUNKS; i += 2)
            most = max_of_pairs(most, x.pair[i / 4][i % 4] & 0x7fff7fff);
        return fmaxf(bf16_low(most), bf16_high(most));
    }

    /* The largest |v| of this lane's tokens in row r. */
    __device__ static float largest(const float (&v)[TILES][4], int r)
    {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < TILES; i++) most = fmaxf(most, fmaxf(fabsf(v[i][2 * r]), fabsf(v[i][2 * r + 1])));
        return most;
    }

    /* Chooses both rows' scales anew, so that the largest of the state and the coming v is in [1/2, 1), and scales
     * the state and what was computed from it. */
    __device__ void rescale(const float (&v)[TILES][4], float (&read)[READ][4])
    {
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = 0.0f;
#pragma unroll
            for (int s = 0; s < DIM / 8; s++)
                most = fmaxf(most, fmaxf(fabsf(state[s][2 * r]), fabsf(state[s][2 * r + 1])));
            most = fmaxf(most * scale[r], largest(v, r));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            most = fminf(most, 0x1p126f);
            const float above = power_above(most);
            const float next = fminf(fmaxf(above, fmaxf(scale[r] * 0x1p-100f, 0x1p-126f)), 0x1p126f);
            factor[r] = scale[r] * inverse_power(next);
            scale[r] = next;
        }
        const auto is_large = [](float x) { return x >= 16.0f || x <= 0.0625f; };
        look_again = __any_sync(~0u, is_large(factor[0]) || is_large(factor[1]));
        faint = false;
        if (!__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int s = 0; s < DIM / 8; s++) state[s][2 * r] *= factor[r], state[s][2 * r + 1] *= factor[r];
#pragma unroll
            for (int i = 0; i < READ; i++) read[i][2 * r] *= factor[r], read[i][2 * r + 1] *= factor[r];
        }
    }

    /* Products take the state, R and U as fp16. A row of the state grows by at most the square root of the sum of its v^2
     * (normalised keys, decays below 1), so that with |v| <= 16 scales and 2^20 tokens it stays below 2^14.1 of
     * fp16's 2^16. */
    __device__ bool large(float high, float low) const /* what `largest` has for both rows */
    {
        return (high > 16.0f * scale[0]) | (low > 16.0f * scale[1]);
    }

    /* Against scales that rows have faded away from. */
    __device__ bool small(float high, float low) const
    {
        return (high < 0x1p-9f * scale[0]) | (low < 0x1p-9f * scale[1]);
    }

    /* Zeros for the tokens from `left` on: what follows is of another sequence, or anything. */
    __device__ void clear_past_end(float (&v)[TILES][4], int left) const
    {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) v[i][r] = 8 * i + 2 * (lane & 3) + r % 2 < left ? v[i][r] : 0.0f;
    }

    /* Scales for a item's state and its first chunk, once that is ready. */
    __device__ void choose_first_scales(int left, const SlotCursor<Block> &place)
    {
        float v[TILES][4], nothing[READ][4] = {};
        mbarrier_wait(&shared.chunk_ring.ready[place.index()], place.parity());
        unpack_values(v, load_raw(shared.tokens[place.index()]));
        clear_past_end(v, left);
        const float strength = shared.stage[place.index()].strength;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) v[i][r] *= strength;
        rescale(v, nothing);
    }

    /* What chunks need that are not just like the one before. Rows that fade are scaled up again: every 128 tokens, and in the chunk
     * after each large change, if v is small there. Rows of maps start from one and never grow, and keep the scale one: what fades out of
     * fp16's range there, maps leave out anyway (map.cuh). With a strength below one it is v * strength that is held to the range, and the
     * state could grow by 16 scales a token: so every 128 tokens scales are chosen, if such a chunk came by. */
    __device__ void adapt(float (&v)[TILES][4], float (&read)[READ][4], float strength, int left, bool look)
    {
        if (left < CHUNK) clear_past_end(v, left);
        if (strength < 1.0f) {
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int r = 0; r < 4; r++) v[i][r] *= strength, read[i][r] *= strength;
        }
        const float high = largest(v, 0), low = largest(v, 1);
        const bool act = large(high, low) | ((look | look_again) & small(high, low));
        look_again = false;
        if (__any_sync(~0u, act) || (look && faint)) rescale(v, read);
        faint |= strength < 1.0f;
    }

    /* Two tiles of accumulators side by side as an A operand. */
    __device__ static void pack_operand(uint32_t (&a)[4], const float (&x)[4], const float (&y)[4])
    {
        a[0] = pack_half(x[0], x[1]), a[1] = pack_half(x[2], x[3]);
        a[2] = pack_half(y[0], y[1]), a[3] = pack_half(y[2], y[3]);
    }

    /* A chunk's outputs turn through shared memory, of which tile i of the sum has tokens 8 i to 8 i + 7. With room of their
     * own they are stored while the next chunk's product with T is on its way; else they go where the warp's v was, and
     * at once. */
    static constexpr bool STORED_LATER = Block::ROOM_FOR_OUTPUTS;

    __device__ unsigned char *output_tile(int index) const
    {
        if constexpr (STORED_LATER)
            return shared.outputs;
        else
            return shared.tokens[index].v[0];
    }

    __device__ void put_output(int index, const float (&x)[TILES][4], const float (*y)[4]) const
    {
        const float top = args.scale * scale[0], low = args.scale * scale[1];
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++) {
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int tile = 2 * sub + i;
                pairs[2 * i] = pack_bf16((x[tile][0] + y[tile][0]) * top, (x[tile][1] + y[tile][1]) * top);
                pairs[2 * i + 1] =
                    pack_bf16((x[tile][2] + y[tile][2]) * low, (x[tile][3] + y[tile][3]) * low);
            }
            store_matrices_transposed(shared_address(output_tile(index) + value_place + sub * SUBCHUNK_BYTES),
                                      pairs);
        }
        if (!STORED_LATER) fence_async_proxy(); /* later copies overwrite this */
    }

    /* Of so many tokens: lane 2 i + h takes rows 8 h to 8 h + 7 of token i of each block, which go to `to`. */
    __device__ void store_output(int index, char *to, int tokens) const
    {
        __syncwarp();
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++) {
            const uint4 row =
                *reinterpret_cast<const uint4 *>(output_tile(index) + output_place + sub * SUBCHUNK_BYTES);
            store_16_if(to + sub * args.chunk_bytes, row, lane / 2 + sub * SUBCHUNK < tokens);
        }
    }

    /* The chunk's decay less one, of the channels of this lane's accumulators: of two tiles each. */
    __device__ void load_gamma(float4 (&gamma_minus_1)[DIM / 16], const Stage &stage) const
    {
#pragma unroll
        for (int i = 0; i < DIM / 16; i++)
            gamma_minus_1[i] = load_shared_four(&stage.gamma_minus_1[16 * i + 4 * (lane & 3)]);
    }

    /* S^T = S^T diag(gamma) */
    __device__ void decay(const float4 (&gamma_minus_1)[DIM / 16])
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s += 2) {
            const float4 x = gamma_minus_1[s / 2];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                state[s][r] = __fmaf_rn(state[s][r], r % 2 ? x.y : x.x, state[s][r]);
                state[s + 1][r] = __fmaf_rn(state[s + 1][r], r % 2 ? x.w : x.z, state[s + 1][r]);
            }
        }
    }

    /* Tokens of block i, of the stage at this descriptor_address. */
    static __device__ uint64_t solve_operand(uint32_t stage_place, int i)
    {
        return decltype(Stage::solve)::operand(stage_place + offsetof(Stage, solve) / 16, i);
    }
    static __device__ uint64_t attend_operand(uint32_t stage_place, int i)
    {
        return decltype(Stage::attend)::operand(stage_place + offsetof(Stage, attend) / 16, i);
    }

    /* One chunk, with `left` tokens of the item from its first on. Leaves the update of the state in flight and, for outputs, (Q~ S)^T in
     * the last tiles of `read` and, in flight too, what the chunk's own tokens add to it in `own`. On the way `store_before` stores
     * the outputs of the chunk before. */
    template <class Store>
    __device__ void step(int index, int left, float (&read)[READ][4], float (&own)[TILES][4],
                         Store store_before)
    {
        const bool look = (left & (128 - CHUNK)) == 0 && (Block::OUTPUTS || !is_map), whole = left >= CHUNK;
        const Stage &stage = shared.stage[index];
        const uint32_t tokens_place =
            descriptor_address(shared.tokens) + index * static_cast<int>(sizeof(Tokens<Block>) / 16);
        const uint32_t stage_place =
            descriptor_address(shared.stage) + index * static_cast<int>(sizeof(Stage) / 16);
        float v[TILES][4], u[TILES][4]; /* u: R^T = (V - K~ S)^T, then U^T */
        uint32_t a[DIM / 16][4];
        const Raw raw =
            load_raw(shared.tokens[index]); /* behind products with the state it would take 200 clocks */
#pragma unroll
        for (int s = 0; s < DIM / 16; s++) pack_operand(a[s], state[2 * s], state[2 * s + 1]);
        wgmma_fence();
        wgmma<false, false>(read, a[0], Tokens<Block>::decayed(tokens_place, 0));
#pragma unroll
        for (int s = 1; s < DIM / 16; s++)
            wgmma<true, false>(read, a[s], Tokens<Block>::decayed(tokens_place, s));
        wgmma_commit();
        const float high = largest(raw, 0), low = largest(raw, 1);
        const bool act = large(high, low) | ((look | look_again) & small(high, low));
        /* An address that depends on v, or the compiler would look at v only after the wait. */
        const float strength = load_shared(__any_sync(~0u, act) ? &stage.zero : &stage.strength);
        const bool usual = strength == 1.0f && whole && !(look && faint);
        unpack_values(v, raw);
        wgmma_wait<0>();
        if (__builtin_expect(!usual, 0))
            adapt(v, read, stage.strength, left, look);
        else
            look_again = false;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                u[i][r] = __fmaf_rn(v[i][r], inverse_power(scale[r / 2]), -read[i][r]);
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++) pack_operand(a[i], u[2 * i], u[2 * i + 1]);
        float4 gamma_minus_1[DIM / 16];
        load_gamma(gamma_minus_1, stage); /* there when it is needed */
        wgmma_fence();
        wgmma<false, true>(u, a[0], solve_operand(stage_place, 0));
#pragma unroll
        for (int i = 1; i < SUBCHUNKS; i++) wgmma<true, true>(u, a[i], solve_operand(stage_place, i));
        wgmma_commit();
        store_before();
        decay(gamma_minus_1);
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++) pack_operand(a[SUBCHUNKS + i], u[2 * i], u[2 * i + 1]);
        wgmma_fence();
        if constexpr (Block::OUTPUTS) {
            wgmma<false, false>(own, a[SUBCHUNKS], attend_operand(stage_place, 0));
#pragma unroll
            for (int i = 1; i < SUBCHUNKS; i++)
                wgmma<true, false>(own, a[SUBCHUNKS + i], attend_operand(stage_place, i));
            wgmma_commit();
        }
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++)
            wgmma<true, true>(state, a[SUBCHUNKS + i], Tokens<Block>::k_rest(tokens_place, i));
        wgmma_commit();
    }

    __device__ void compute_item(const WorkItem &item, SlotCursor<Block> &place)
    {
        char *to =
            static_cast<char *>(args.out) + 2 * (((item.begin + lane / 2) * args.heads + item.head) * DIM +
                                                 item.first_row + warp_row() + lane % 2 * 8);
        float read[READ][4] = {}, own[TILES][4] = {};
        is_map = item.attributes & IS_MAP;
        if (item.attributes & AWAITS_INITIAL) await_flag(&item.flags[warp_row() >> 4]);
        load_state(item);
        scale[0] = scale[1] = 1.0f;
        look_again = faint = false;
        bool ready = item.length > 0 && (Block::OUTPUTS || !is_map);
        if (ready) choose_first_scales(item.length, place);
        const long long stride = SUBCHUNKS * args.chunk_bytes;
        for (int left = item.length; left > 0; left -= CHUNK) {
            const int slot = uniform(place.index());
            if (!ready) mbarrier_wait(&shared.chunk_ring.ready[slot], place.parity());
            step(slot, left, read, own, [&] {
                if constexpr (STORED_LATER) store_output(0, to - stride, left == item.length ? 0 : CHUNK);
            });
            SlotCursor<Block> next = place;
            next.advance();
            ready = mbarrier_test(&shared.chunk_ring.ready[next.index()], next.parity());
            if constexpr (Block::OUTPUTS) {
                wgmma_wait<1>();
                put_output(slot, own, &read[TILES]);
                if constexpr (!STORED_LATER) store_output(slot, to, left);
                to += stride;
            }
            wgmma_wait<0>();
            release(place);
            place = next;
        }
        if (STORED_LATER && item.length > 0) store_output(0, to - stride, (item.length - 1) % CHUNK + 1);
        if (item.final) store_state(item, place);
        if (item.attributes & SIGNALS_FINAL) set_flag(&item.flags[warp_row() >> 4]);
    }

    /* The warp has read all it needs of a chunk. */
    __device__ void release(const SlotCursor<Block> &place) const
    {
        mbarrier_arrive_warp(&shared.chunk_ring.empty[place.index()]);
        if (Block::CTAS == 2 && !place.is_own())
            mbarrier_arrive_warp_in_other_cta(&shared.chunk_ring.empty[place.own.index]);
    }

    __device__ void run()
    {
        SlotCursor<Block> place(pair_rank<Block>());
        WorkCursor walk(shared.work);
        if (Block::OUTPUTS)
            wait_for_previous_kernel(); /* for states that it left: nothing else of it is read */
        int joins = 0;                  /* before the first item, or after it */
        if constexpr (Block::JOINS) joins = shared.join.begins;
        for (;; walk.finish()) {
            if constexpr (Block::JOINS)
                if (joins-- == 1) RelayJoin<Block>(all, shared).carry_rows();
            const WorkItem &item = walk.current(); /* read again where it is needed: registers are dear */
            if (item.attributes & NO_WORK) break;
            compute_item(item, place);
        }
    }
};

} // namespace fkda

#endif
