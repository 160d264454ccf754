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
 * Maps keep the scale one: their rows start from one and never grow. What fades out of the range of fp16
 * there, maps leave out anyway (join/layouts.cuh).
 */
#ifndef FKDA_HOPPER_SCALED_ROWS_CUH
#define FKDA_HOPPER_SCALED_ROWS_CUH

#include "state_rows.cuh"

namespace fkda
{

template <class Block> struct ScaledRows : StateRows<Block> {
    using Base = StateRows<Block>;
    using Base::shared, Base::lane, Base::state, Base::scale, Base::is_map, Base::warp_row;
    static constexpr int CHUNK = Block::CHUNK, SUBCHUNKS = Block::SUBCHUNKS;
    static constexpr int TILES = CHUNK / 8; /* of eight tokens */
    /* Tiles that are read from the state: K~ S and, for outputs, Q~ S after them. */
    static constexpr int READ = Block::OUTPUTS ? 2 * TILES : TILES;
    int value_place; /* this lane's place in the rows of v, as ldmatrix wants it */
    bool look_again; /* the scales have just changed much: look at the next chunk too */
    bool faint;      /* a chunk had a divisor below one since the scales were chosen */

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
            if (Block::OUTPUTS || !is_map)
                load_matrices_transposed(x.pair[sub], tokens.v[0] + value_place + sub * SUBCHUNK_BYTES);
        return x;
    }

    /* v^T in fp32: rows as in the state; tile i has tokens 8 i + 2 t, + 1, + 0, + 1. */
    static __device__ void unpack_values(float (&v)[TILES][4], const Raw &x)
    {
#pragma unroll
        for (int i = 0; i < 4 * SUBCHUNKS; i++) {
            v[i / 2][i % 2 * 2] = bf16_low(x.pair[i / 4][i % 4]);
            v[i / 2][i % 2 * 2 + 1] = bf16_high(x.pair[i / 4][i % 4]);
        }
    }

    /* The largest |v| of this lane's tokens in row g + 8 r. Without their signs, bf16 compare as integers
     * do. */
    static __device__ float largest(const Raw &x, int r)
    {
        uint32_t most = 0;
#pragma unroll
        for (int i = r; i < 4 * SUBCHUNKS; i += 2)
            most = max_of_pairs(most, x.pair[i / 4][i % 4] & 0x7fff7fff);
        return fmaxf(bf16_low(most), bf16_high(most));
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
    __device__ void clear_past_end(float (&v)[TILES][4], int left) const
    {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) v[i][r] = 8 * i + 2 * (lane & 3) + r % 2 < left ? v[i][r] : 0.0f;
    }

    /* ---- Do values fit the scales? ---- `high` and `low` are the largest |v| of rows g and g + 8. */

    __device__ bool large(float high, float low) const
    {
        return (high > 16.0f * scale[0]) | (low > 16.0f * scale[1]);
    }

    __device__ bool small(float high, float low) const
    {
        return (high < 0x1p-9f * scale[0]) | (low < 0x1p-9f * scale[1]);
    }

    /* ---- Choosing scales ---- */

    /* Chooses the scales of both rows so that the largest number of the state and of the coming v is in [1/2,
     * 1), and scales the state and what was read from it. */
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

    /* Chooses scales for a work item's state and first chunk, once that chunk is ready. */
    __device__ void choose_first_scales(int left, const SlotCursor<Block> &place)
    {
        float v[TILES][4], nothing[READ][4] = {};
        mbarrier_wait(&shared.chunk_ring.ready[place.index()], place.parity());
        unpack_values(v, load_raw(shared.tokens[place.index()]));
        clear_past_end(v, left);
        const float divisor = shared.stage[place.index()].divisor;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) v[i][r] *= divisor;
        rescale(v, nothing);
    }

    /* Does what an unusual chunk needs before R is computed: clears values past the end, multiplies by a
     * divisor below one and chooses scales anew where the values do not fit. `look` is true in one chunk of
     * every 128 tokens; that chunk also looks for faded rows. */
    __device__ void adapt(float (&v)[TILES][4], float (&read)[READ][4], float divisor, int left, bool look)
    {
        if (left < CHUNK) clear_past_end(v, left);
        if (divisor < 1.0f) {
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int r = 0; r < 4; r++) v[i][r] *= divisor, read[i][r] *= divisor;
        }
        const float high = largest(v, 0), low = largest(v, 1);
        const bool act = large(high, low) | ((look | look_again) & small(high, low));
        look_again = false;
        if (__any_sync(~0u, act) || (look && faint)) rescale(v, read);
        faint |= divisor < 1.0f;
    }
};

} // namespace fkda

#endif
