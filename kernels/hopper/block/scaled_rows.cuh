/*
 * Scales: each row of the state is kept divided by a power of two, and so are the row's V and U, so that all
 * of them stay in the range of fp16, in which products take them.
 *
 * Why this suffices. With normalised keys and decays of at most one, a row of the state grows by at most the
 * square root of the sum of its v^2. With |v| <= 16 scales and 2^20 tokens it stays below 2^14.1, and fp16
 * reaches 2^16.
 *
 * When scales change. Usually they do not: a warp only looks whether v fits. A row's scale is chosen anew if
 * v exceeds 16 scales; every 128 tokens, and after each large change, if v is below 2^-9 scales, since the
 * row may have faded; and every 128 tokens if a chunk since the last choice had a divisor below one
 * (Stage::divisor). This last rule is needed because such a chunk checks v * divisor, and not v, against 16
 * scales: a larger v passes, and the state could grow by 16 scales for each token.
 *
 * Where there are outputs, a token must change no bit of the tokens before it, and fp16 rounds small numbers
 * in another way in another scale. So a chunk whose v does not fit is computed in the scales there are, and
 * the next chunk chooses new ones, which depend on the state before that chunk and on its first token alone.
 * So does the first choice of all. Only v above ROOM scales, of which a chunk might leave the range of fp16,
 * is given a scale at once.
 *
 * These bounds are for keys that are normalised and for write strengths of at most 1. In a call without them
 * the state can grow by more than v. A row's scale is then chosen anew, too, if the state exceeds 16 scales
 * after 128 tokens.
 *
 * Backwards, what is carried is the gradient with respect to the state, and gradients of outputs are in the
 * place of values. Write strengths do not weaken what a gradient of an output adds, and the gradient can grow
 * by 16 scales for each token: its size is looked at every 128 tokens in every call, and at every chunk if
 * queries and keys are used as they are.
 *
 * Walks of the backward pass look for faded rows at every chunk, and not every 128 tokens.
 *
 * Values that are not finite are taken out of v before a product, and NaN is put where the values count. If a
 * value makes a row's scale leap, the tokens before the value are finished in the scale that fits them.
 *
 * Maps keep the scale one: their rows start from the identity and do not grow if the recurrence contracts,
 * which it does if b |k|^2 is at most 2. What fades out of the range of fp16 there, maps leave out anyway
 * (join/layouts.cuh).
 */
#ifndef FKDA_HOPPER_SCALED_ROWS_CUH
#define FKDA_HOPPER_SCALED_ROWS_CUH

#include "early_outputs.cuh"
#include "state_rows.cuh"

namespace fkda
{

template <class Block> struct ScaledRows : StateRows<Block> {
    using Base = StateRows<Block>;
    using Base::args, Base::shared, Base::lane, Base::state, Base::scale, Base::is_map, Base::warp_row;
    static constexpr int CHUNK = Block::CHUNK, SUBCHUNKS = Block::SUBCHUNKS;
    static constexpr int TILES = CHUNK / 8; /* of eight tokens */
    /* Tiles that are read from the state: K~ S and, for outputs, Q~ S after them. */
    static constexpr int READ = Block::OUTPUTS ? 2 * TILES : TILES;
    int value_place; /* this lane's place in the rows of v, as ldmatrix wants it */
    /* In how many scales v of the next chunk has to be for these scales to stay, as in every chunk that is
     * looked at: SMALL if they have just changed much, CHOOSE if they did not fit, so that no v is enough, or
     * 0. */
    float least_again;
    static constexpr float SMALL = 0x1p-9f, CHOOSE = INFINITY;
    /* FAINT: a chunk since the scales were chosen had a divisor below one. GROWS: v was too large for them.
     * An int takes fewer instructions than a bool. */
    int faint;
    static constexpr int FAINT = 1, GROWS = 2;
    /* In how many scales v is allowed to be for a chunk. A state of 16 * 2^10 scales and the writes of 32
     * tokens then stay in the range of fp16. */
    static constexpr float ROOM = 0x1p11f;

    __device__ ScaledRows(const fkda_hopper_fwd_args &a, Shared<Block> &s, int thread) : Base(a, s, thread)
    {
    }

    /* ---- Values ---- */

    /* v^T as it comes: in turn of rows g and g + 8, pairs of neighbouring tokens. */
    struct Raw {
        uint32_t pair[SUBCHUNKS][4];
    };
    __device__ Raw load_raw(const Tokens<Block> &tokens) const
    {
        Raw x = {};
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++)
            if ((!Block::MAPS || !is_map) && !lacks_values<Block>(args))
                load_matrices_transposed(x.pair[sub], tokens.v[0] + value_place + sub * SUBCHUNK_BYTES);
        return x;
    }

    /* The token of element r of tile i, counted from the chunk's first one. `pair` is from find_pair(). */
    static __device__ int token(int i, int r, int pair)
    {
        return 8 * i + 2 * pair + r % 2;
    }

    /* Which pair of a tile's tokens this lane has. The index is read again: otherwise the compiler would keep
     * the numbers of all tokens in registers. */
    static __device__ int find_pair()
    {
        int cta, thread;
        read_indices(cta, thread);
        return thread % 4;
    }

    /* Calls visit(i, r) for all elements of row g + 8 `row`. */
    template <class Visit> static __device__ void for_row(int row, Visit visit)
    {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) visit(i, 2 * row + e);
    }

    /* v^T in fp32. */
    static __device__ void unpack_values(float (&v)[TILES][4], const Raw &x)
    {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const uint32_t two = x.pair[i / 2][i % 2 * 2 + r / 2];
                v[i][r] = r % 2 ? bf16_high(two) : bf16_low(two);
            }
    }

    /* The largest |v| of this lane's tokens in row g + 8 r. Without their signs, bf16 compare as integers
     * do, and a NaN is larger than any number. */
    static __device__ float largest(const Raw &x, int r)
    {
        uint32_t most = 0;
#pragma unroll
        for (int i = r; i < 4 * SUBCHUNKS; i += 2)
            most = max_of_pairs(most, x.pair[i / 4][i % 4] & 0x7fff7fff);
        return __uint_as_float(max(most << 16, most & 0xffff0000u));
    }

    __device__ static float largest(const float (&v)[TILES][4], int r)
    {
        float most = 0.0f;
#pragma unroll
        for (int i = 0; i < TILES; i++) most = fmaxf(most, fmaxf(fabsf(v[i][2 * r]), fabsf(v[i][2 * r + 1])));
        return most;
    }

    /* Makes the values of tokens from `left` on zeros: behind the work item's end lie values of another
     * sequence, or anything. */
    __device__ void clear_past_end(float (&v)[TILES][4], int left, int pair) const
    {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (token(i, r, pair) >= left) v[i][r] = 0.0f;
    }

    /* The first token of row g + 8 r whose |v| is at least `bound` or NaN, or CHUNK. */
    __device__ int first_at_least(const float (&v)[TILES][4], int r, float bound, int pair) const
    {
        int first = CHUNK;
#pragma unroll
        for (int i = TILES - 1; i >= 0; i--)
#pragma unroll
            for (int e = 1; e >= 0; e--)
                if (!(fabsf(v[i][2 * r + e]) < bound)) first = token(i, e, pair);
        first = min(first, __shfl_xor_sync(~0u, first, 1));
        return min(first, __shfl_xor_sync(~0u, first, 2));
    }

    /* ---- Values that are not finite ---- */

    /* Takes values that are not finite out of v, puts NaN in place of what was read for the outputs of their
     * tokens and of the tokens after them, and makes their rows of the state NaN. A product would carry them
     * to earlier tokens, too, because it multiplies them by the zeros of a triangle. Returns whether there
     * are any. */
    __device__ bool spoil_rows(float (&v)[TILES][4], float (&read)[READ][4], int pair)
    {
        /* Where the state alone is asked for, it becomes NaN by itself. */
        if (!Block::OUTPUTS && !Block::BACKWARDS) return false;
        bool spoilt = false;
#pragma unroll
        for (int r = 0; r < 2; r++) { /* rows g and g + 8 */
            const int first = first_at_least(v, r, INFINITY, pair);
            if (!__any_sync(~0u, first < CHUNK)) continue;
            spoilt = true;
            for_row(r, [&](int i, int e) {
                if (!(fabsf(v[i][e]) < INFINITY)) v[i][e] = 0.0f;
                if (Block::OUTPUTS && token(i, e, pair) >= first) read[READ - TILES + i][e] = NAN;
            });
            if (first < CHUNK)
#pragma unroll
                for (int s = 0; s < DIM / 8; s++) state[s][2 * r] = state[s][2 * r + 1] = NAN;
        }
        return spoilt;
    }

    /* ---- Do values fit the scales? ---- `high` and `low` are the largest |v| of rows g and g + 8. */

    /* In how many scales v of a chunk has to be at least. In walks a row may fade within each chunk, and what
     * little is left of it may be all that a gradient has. */
    __device__ float least_of(bool look) const
    {
        return Block::IMAGES ? SMALL : fmaxf(look ? SMALL : 0.0f, least_again);
    }

    /* Whether a row's v is too large or NaN, or less than `least` scales. One chain of comparisons takes the
     * fewest instructions. So the comparison for small v is there always, often with a bound of 0, below
     * which no size is. */
    __device__ bool misfit(float high, float low, float least) const
    {
        return !(high <= 16.0f * scale[0]) | !(low <= 16.0f * scale[1]) | (high < least * scale[0]) |
               (low < least * scale[1]);
    }

    /* Whether the state may grow by more than v. */
    __device__ bool may_grow() const
    {
        return Block::BACKWARDS || (Block::OPTIONS && (args.beta_kind || args.qk_is_normalised));
    }

    /* Whether a number of this lane's state exceeds 16 scales. */
    __device__ bool has_grown() const
    {
        float most[2] = {};
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 4; r++) most[r % 2] = fmaxf(most[r % 2], fabsf(state[s][r]));
        return fmaxf(most[0], most[1]) > 16.0f;
    }

    /* Backwards: whether what is carried may outgrow fp16 within 128 tokens. Queries and keys that are used
     * as they are may be longer than 1. */
    __device__ bool may_leap() const
    {
        return Block::BACKWARDS && Block::OPTIONS && args.qk_is_normalised;
    }

    /* What a scale is chosen for, as a multiple of the largest value. Products with long queries and keys are
     * larger than values are. */
    __device__ float headroom() const
    {
        return may_leap() ? 16.0f : 1.0f;
    }

    /* Backwards: what the magnitude of a gradient of an output is multiplied by before it is compared with
     * scales. */
    __device__ float value_factor() const
    {
        return fabsf(args.scale) * headroom();
    }

    /* ---- Choosing scales ---- */

    /* The largest x >= 0 of the four lanes that share a row. */
    static __device__ float largest_in_row(float x)
    {
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
    }

    /* The scale for row g + 8 r with which the largest number of the row's state and of the coming v is in
     * [1/2, 1). `largest_value` is the largest |v| of this lane. */
    __device__ float fitting_scale(float largest_value, int r) const
    {
        float most = 0.0f;
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
            most = fmaxf(most, fmaxf(fabsf(state[s][2 * r]), fabsf(state[s][2 * r + 1])));
        most = largest_in_row(fmaxf(most * scale[r], largest_value));
        const float above = power_above(fminf(most, 0x1p126f));
        return fminf(fmaxf(above, fmaxf(scale[r] * 0x1p-100f, 0x1p-126f)), 0x1p126f);
    }

    /* Gives both rows new scales, and scales the state and what was read from it. */
    __device__ void rescale(const float (&next)[2], float (&read)[READ][4])
    {
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            factor[r] = scale[r] * inverse_power(next[r]);
            scale[r] = next[r];
        }
        const auto is_large = [](float x) { return x >= 16.0f || x <= 0.0625f; };
        least_again = __any_sync(~0u, is_large(factor[0]) || is_large(factor[1])) ? SMALL : 0.0f;
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

    /* Chooses scales for a work item's state and first chunk, once that chunk is ready. */
    __device__ void choose_first_scales(int left, const SlotCursor<Block> &place)
    {
        float nothing[READ][4] = {}, next[2];
        mbarrier_wait(&shared.chunk_ring.ready[place.index()], place.parity());
        const Raw x = load_raw(shared.tokens[place.index()]);
        const float divisor = shared.stage[place.index()].divisor;
        if constexpr (!Block::OUTPUTS) {
            const float factor = Block::BACKWARDS ? value_factor() : divisor;
#pragma unroll
            for (int r = 0; r < 2; r++)
                next[r] = fitting_scale(left < CHUNK ? 0.0f : largest(x, r) * factor, r);
        } else {
            fit_first_token(next, bf16_low(x.pair[0][0]) * divisor, bf16_low(x.pair[0][1]) * divisor, true);
        }
        rescale(next, nothing);
    }

    /* Scales for the state and for the chunk's first token, whose v in rows g and g + 8 the first lane of
     * each quad has in `top` and `low`. A v that is not finite counts as 0. with_others: v of the other
     * tokens is expected to be of the size that v of the first token has in the warp's rows, so that they
     * seldom get scales that do not fit them. */
    __device__ void fit_first_token(float (&next)[2], float top, float low, bool with_others) const
    {
        float first[2] = {top, low};
#pragma unroll
        for (float &x : first) {
            x = fabsf(__shfl_sync(~0u, x, lane & ~3));
            x = x < INFINITY ? x : 0.0f;
        }
        float most = fmaxf(first[0], first[1]); /* of the warp's rows */
#pragma unroll
        for (int by = 4; by <= 16; by *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, by));
        const float least = with_others ? 0.25f * most : 0.0f;
#pragma unroll
        for (int r = 0; r < 2; r++) next[r] = fitting_scale(fmaxf(first[r], least), r);
    }

    /* ---- Values that dwarf the tokens before them ---- */

    /* If a row's scale grows by this much within a chunk, the tokens before the large value would keep only a
     * few bits of their R in the new scale. */
    static constexpr float LEAP = 0x1p13f;

    /*
     * Before the rows get the scales `next`: in rows whose scale leaps, computes the outputs of the early
     * tokens, which come before the first value of the new size, in a scale that fits them. It adds them to
     * what was read for outputs, and takes the early tokens out of v and of what was read for R. The state
     * misses them, at less than 1 / LEAP of its new size.
     */
    __device__ void finish_early_tokens(float (&v)[TILES][4], float (&read)[READ][4], const float (&next)[2],
                                        unsigned char *values, Stage<Block> &stage, int pair)
    {
        int early[2]; /* how many tokens are early */
#pragma unroll
        for (int r = 0; r < 2; r++) {
            early[r] = first_at_least(v, r, next[r] * (0.5f / LEAP), pair);
            if (next[r] < LEAP * scale[r]) early[r] = 0;
        }
        if (!__any_sync(~0u, early[0] > 0 || early[1] > 0)) return;

        float fitting[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = 0.0f;
            for_row(r, [&](int i, int e) {
                if (token(i, e, pair) < early[r]) most = fmaxf(most, fabsf(v[i][e]));
            });
            fitting[r] = fitting_scale(most, r);
            if (early[r] == 0) fitting[r] = scale[r];
        }
        rescale(fitting, read);
        values += value_place;
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++) { /* R^T of early tokens takes the place of v */
            uint32_t pairs[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int i = 2 * sub + k / 2, r = k % 2;
                float two[2] = {};
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = v[i][2 * r + e], &y = read[i][2 * r + e];
                    if (token(i, e, pair) < early[r]) two[e] = x * inverse_power(scale[r]) - y, x = y = 0.0f;
                }
                pairs[k] = pack_half(two[0], two[1]);
            }
            store_matrices_transposed(shared_address(values + sub * SUBCHUNK_BYTES), pairs);
        }
        const int top = __shfl_sync(~0u, early[0], lane % 8 * 4),
                  low = __shfl_sync(~0u, early[1], lane % 8 * 4);
        compute_early_outputs<Block>(values - value_place, stage, lane < 8 ? top : lane < 16 ? low : 0);
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++) {
            uint32_t pairs[4];
            load_matrices_transposed(pairs, values + sub * SUBCHUNK_BYTES);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int i = 2 * sub + k / 2, r = k % 2;
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (token(i, e, pair) < early[r])
                        read[READ - TILES + i][2 * r + e] += (e ? half_high(pairs[k]) : half_low(pairs[k]));
            }
        }
        fence_async_proxy(); /* copies of later chunks overwrite the place of v */
    }

    /* ---- An unusual chunk ---- */

    /* Does what an unusual chunk needs before R is computed: clears values past the end, takes out values
     * that are not finite, multiplies by a divisor below one and chooses scales anew where the values do not
     * fit. `look` is true in one chunk of every 128 tokens; that chunk also looks for faded rows. */
    __device__ void adapt(float (&v)[TILES][4], float (&read)[READ][4], unsigned char *values,
                          Stage<Block> &stage, int left, bool look)
    {
        const float divisor = stage.divisor;
        const int pair = find_pair();
        if (left < CHUNK) clear_past_end(v, left, pair);
        const bool spoilt = spoil_rows(v, read, pair);
        if (!Block::BACKWARDS && divisor < 1.0f)
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int r = 0; r < 4; r++) v[i][r] *= divisor, read[i][r] *= divisor;
        const float high = largest(v, 0) * headroom(), low = largest(v, 1) * headroom();
        /* With values taken out, v says nothing about rows that have faded. */
        const float least = spoilt ? 0.0f : least_of(look);
        bool at_once, is_late = false;
        float next[2] = {scale[0], scale[1]};
        if constexpr (!Block::OUTPUTS) {
            at_once = misfit(high, low, least) || (look && faint);
        } else {
            is_late = __any_sync(~0u, least_again == CHOOSE || (look & faint));
            if (is_late) choose_late_scales(next, v);
            const float room = divisor < 1.0f ? 16.0f : ROOM;
            at_once = !(high <= room * next[0]) | !(low <= room * next[1]);
        }
        at_once = __any_sync(~0u, at_once);
        least_again = spoilt ? SMALL : 0.0f;
        if (at_once || is_late) {
            if (at_once) next[0] = fitting_scale(high, 0), next[1] = fitting_scale(low, 1);
            if (at_once && Block::OUTPUTS) finish_early_tokens(v, read, next, values, stage, pair);
            rescale(next, read);
        }
        if constexpr (Block::OUTPUTS) {
            const bool grows = __any_sync(~0u, misfit(high, low, 0.0f)),
                       shrinks = !is_late && __any_sync(~0u, misfit(high, low, least));
            if (grows || shrinks) least_again = CHOOSE;
            if (grows) faint |= GROWS;
        }
        if (!Block::BACKWARDS && divisor < 1.0f) faint |= FAINT;
    }

    /* The scales that an earlier chunk has asked for. */
    __device__ void choose_late_scales(float (&next)[2], const float (&v)[TILES][4]) const
    {
        const bool grows = faint & GROWS;
        fit_first_token(next, v[0][0], v[0][2], grows);
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (grows) next[r] = fmaxf(next[r], scale[r]);
    }
};

} // namespace fkda

#endif
