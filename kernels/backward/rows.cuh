/*
 * A state, or the gradient with respect to one, as a CTA carries it from chunk to chunk: transposed to [V, K]
 * in fp32 accumulators. Each warp has 16 rows of V, which need nothing of other rows.
 *
 *     forwards     M  = (I + N)^-1 (V - K~ S)          U  = diag(b) M
 *                  S  = diag(gamma) S + Kr^T U
 *     backwards    dX = (I + L)^-T (Kr D + P^T dO)     dR = diag(b) dX
 *                  D  = diag(gamma) D + Q~^T dO - K~^T dR
 *
 * Q~ and P have the factor `scale`.
 */
#ifndef FKDA_BACKWARD_ROWS_CUH
#define FKDA_BACKWARD_ROWS_CUH

#include "shared.cuh"

namespace fkda
{

/* Where a thread is. */
struct Place {
    int thread, warp, lane, g, t;
    int first; /* row of V, or channel of K, of the warp */
};

/* The index is read again at each call, so that what is made of it occupies no registers from one step to the
 * next. */
__device__ __forceinline__ Place place()
{
    int cta, id;
    read_indices(cta, id);
    const unsigned thread = static_cast<unsigned>(id), lane = thread % 32; /* never negative */
    return {id,
            static_cast<int>(thread / 32),
            static_cast<int>(lane),
            static_cast<int>(lane / 4),
            static_cast<int>(lane % 4),
            static_cast<int>(thread / 32 * 16)};
}

/* Where an element is in a state in memory: at + channel * channel_step + row * row_step. */
struct StateMemory {
    const void *data;
    bool is_bf16;
    long long at;
    int channel_step, row_step;

    __device__ float load(int channel, int row) const
    {
        const long long i = at + channel * channel_step + row * row_step;
        return is_bf16 ? __uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t *>(data)[i]) << 16)
                       : static_cast<const float *>(data)[i];
    }
};

struct Rows {
    /* x[j]: rows g, g, g + 8, g + 8 and channels 8 j + 2 t, + 1, + 0, + 1 */
    float x[DIM / 8][4];

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) x[i / 4][i % 4] = 0.0f;
    }

    __device__ __forceinline__ void load(StateMemory from, int first_row, int g, int t)
    {
        from.at += 2 * t * from.channel_step + (first_row + g) * from.row_step;
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) {
            forget(from.at); /* so that addresses are made one after the other */
#pragma unroll
            for (int r = 0; r < 4; r++) x[j][r] = from.load(8 * j + r % 2, r / 2 * 8);
        }
    }

    /* From and to [V, K] in fp32. */
    __device__ __forceinline__ void load(const float *from, int first_row, int g, int t)
    {
#pragma unroll
        for (int i = 0; i < DIM / 4; i++) {
            const float2 two = *reinterpret_cast<const float2 *>(from + (first_row + g + i % 2 * 8) * DIM +
                                                                 8 * (i / 2) + 2 * t);
            x[i / 2][i % 2 * 2] = two.x, x[i / 2][i % 2 * 2 + 1] = two.y;
        }
    }
    __device__ __forceinline__ void store(float *to, int first_row, int g, int t) const
    {
#pragma unroll
        for (int i = 0; i < DIM / 4; i++)
            store_two(to + (first_row + g + i % 2 * 8) * DIM + 8 * (i / 2) + 2 * t, x[i / 2][i % 2 * 2],
                      x[i / 2][i % 2 * 2 + 1]);
    }

    /* d = x A^T for a tile A of tokens. All bits of A count: where keys are nearly alike, what they read
     * is nearly alike too, and the inverse takes their differences. All bits of x, or those of tf32. */
    template <bool all_bits>
    __device__ __forceinline__ void read(float (&d)[2][4], const Tile &a, int lane) const
    {
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) {
            forget(lane); /* addresses are made anew for each tile, for lack of registers */
            const unsigned id = static_cast<unsigned>(lane);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float2 b = a.two(8 * i + id / 4, 8 * j + 2 * (id % 4));
                if (all_bits)
                    multiply_all_bits(d[i], x[j], b);
                else
                    multiply(d[i], x[j], b);
                multiply(d[i], x[j], rest_of_tf32(b.x), rest_of_tf32(b.y));
            }
        }
    }

    __device__ __forceinline__ void decay(const Shared &s, int j, int t)
    {
        const float2 factor = *reinterpret_cast<const float2 *>(&s.factor[8 * j + 2 * t]),
                     more = *reinterpret_cast<const float2 *>(&s.more[8 * j + 2 * t]);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float &y = x[j][r];
            y = __fmaf_rn(y, r % 2 ? more.y : more.x, y * (r % 2 ? factor.y : factor.x));
        }
    }

    /* Tile j of channels: x += u A, with all bits of u or with those of tf32. */
    template <bool all_bits>
    __device__ __forceinline__ void write(int j, const float (&u)[2][4], const Tile &a, int g, int t)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float2 b = make_float2(a.at(8 * i + 2 * t, 8 * j + g), a.at(8 * i + 2 * t + 1, 8 * j + g));
            if (all_bits)
                multiply_all_bits(x[j], u[i], b);
            else
                multiply(x[j], u[i], b);
        }
    }
};

/* d becomes the transpose [V, tokens] of a warp's rows of v or dout. */
__device__ __forceinline__ void load_transposed(float (&d)[2][4], const uint16_t (&from)[CHUNK][DIM],
                                                int first_row, int lane)
{
    uint32_t v[4];
    const int token = lane % 8 + 8 * (lane / 16), row = first_row + lane / 8 % 2 * 8;
    load_matrices_transposed(v, &from[token][value_column(token, row)]);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            d[i][2 * r] = bf16_low(v[2 * i + r]);
            d[i][2 * r + 1] = bf16_high(v[2 * i + r]);
        }
}

/* Multiplies the columns of tokens by their write strengths. */
template <class Prepared>
__device__ __forceinline__ void multiply_by_strengths(float (&to)[2][4], const float (&x)[2][4],
                                                      const Prepared &s, int t)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float2 b = *reinterpret_cast<const float2 *>(&s.strength[8 * i + 2 * t]);
#pragma unroll
        for (int r = 0; r < 4; r++) to[i][r] = x[i][r] * (r % 2 ? b.y : b.x);
    }
}

/* What the state does not predict of the values of a chunk: M. */
__device__ __forceinline__ void find_missed(float (&missed)[2][4], const Rows &state, const Shared &s,
                                            const Raw &raw, int first_row, int lane)
{
    const int g = lane / 4, t = lane % 4;
    float predicted[2][4] = {}, rest[2][4];
    state.read<false>(predicted, s.k_read, lane);
    load_transposed(rest, raw.values, first_row, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) rest[i / 4][i % 4] -= predicted[i / 4][i % 4], missed[i / 4][i % 4] = 0.0f;
    multiply_by_inverse(missed, rest, s.inverse, g, t);
}

/* S becomes the state after the chunk. */
__device__ __forceinline__ void write_state(Rows &state, const float (&missed)[2][4], const Shared &s,
                                            int lane)
{
    float u[2][4];
    multiply_by_strengths(u, missed, s, lane % 4);
#pragma unroll
    for (int j = 0; j < DIM / 8; j++) {
        forget(lane);
        const unsigned id = static_cast<unsigned>(lane);
        const int g = id / 4, t = id % 4;
        state.decay(s, j, t);
        /* All bits, because one token may have written nearly all of the state. */
        state.write<true>(j, u, s.k_rest, g, t);
    }
}

/* dX, and dO transposed. With all bits of D, or those of tf32. */
template <bool all_bits>
__device__ __forceinline__ void find_dx(float (&dx)[2][4], float (&dout)[2][4], const Rows &gradient,
                                        const Shared &s, const Raw &raw, int first_row, int lane)
{
    const int g = lane / 4, t = lane % 4;
    float du[2][4] = {};
    gradient.read<all_bits>(du, s.k_rest, lane);
    load_transposed(dout, raw.values, first_row, lane);
    multiply_upper(du, dout, s.attend_t, g, t);
#pragma unroll
    for (int i = 0; i < 8; i++) dx[i / 4][i % 4] = 0.0f;
    multiply_by_inverse_t(dx, du, s.inverse_t, g, t);
}

/* D becomes the gradient with respect to the state before the chunk. With all bits of dR, or those of tf32: a
 * chunk may take away most of D, the keys' part of it, if write strengths are near 1. */
template <bool all_bits>
__device__ __forceinline__ void write_gradient(Rows &gradient, const float (&dout)[2][4],
                                               const float (&dr)[2][4], const Shared &s, int lane)
{
    float minus_dr[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) minus_dr[i / 4][i % 4] = -dr[i / 4][i % 4];
#pragma unroll
    for (int j = 0; j < DIM / 8; j++) {
        forget(lane);
        const unsigned id = static_cast<unsigned>(lane);
        const int g = id / 4, t = id % 4;
        gradient.decay(s, j, t);
        gradient.write<false>(j, dout, s.q_read, g, t);
        gradient.write<all_bits>(j, minus_dr, s.k_read, g, t);
    }
}

/* The initial state of a sequence's head, as Rows load it. data is null if there is none. */
__device__ inline StateMemory state_memory(const fkda_state_args &states, bool is_bf16, bool k_first,
                                           int sequence, int head)
{
    return {states.data, is_bf16, sequence * states.slot_stride + head * (128LL * 128), k_first ? DIM : 1,
            k_first ? 1 : DIM};
}

} // namespace fkda

#endif
