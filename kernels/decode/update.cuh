/*
 * What tokens add to a state, on tensor cores: S = D S + sum over tokens j of k_j u_j^T, where D is the decay
 * of all of them, and each key has the decay to the last one.
 *
 * A tensor core takes eight tokens at a time. Operands are divided in a high part and a low part, and the
 * product is high high + high low + low high, which leaves out 2^-21 of it.
 */
#ifndef FKDA_DECODE_UPDATE_CUH
#define FKDA_DECODE_UPDATE_CUH

#include "ptx.cuh"
#include "tile.cuh"

namespace fkda
{

constexpr int TILE_TOKENS = 8; /* that a tensor core computes at a time */

/* Four neighbouring numbers in shared memory. */
__device__ __forceinline__ void read_four(float (&x)[4], const float *from)
{
    const float4 y = *reinterpret_cast<const float4 *>(from);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}

/* The bits of fp32 that a tensor core takes. */
constexpr uint32_t TF32_MASK = 0xffffe000u;

/* Divides x in a high part, which is rounded to tf32, and a low part. */
__device__ __forceinline__ void divide(float &high, float &low, float x)
{
    high = __uint_as_float((__float_as_uint(x) + 0x1000u) & TF32_MASK);
    low = x - high;
}

/*
 * Tokens has count(), which is at least 1 and at most 16; u(token, row) for a row of V; and key(token,
 * place), two neighbouring numbers of a key at an even place (tile.cuh). FILLED says that keys are zeros from
 * token number count() on, up to a multiple of eight tokens.
 */
template <class Tokens, class Tile> struct Update {
    static constexpr int PART = Tile::PART;
    Tokens tokens;
    int g, t;
    float u[2][4]; /* of eight tokens each, of which the lane has 2 t and 2 t + 1 */

    __device__ __forceinline__ Update(const Tokens &of, const Tile &tile)
        : tokens(of), g(static_cast<int>(threadIdx.x) % 32 / 4), t(tile.lane)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int token = i / 4 * TILE_TOKENS + 2 * t + i % 4 / 2;
            u[i / 4][i % 4] = token < tokens.count() ? tokens.u(token, tile.row + i % 2) : 0.0f;
        }
    }

    /* Adds to a part of the state. total: D, a vector over the channels. */
    __device__ __forceinline__ void apply(float (&x)[2][PART], const float *total, int part) const
    {
        const int count = tokens.count();
        int here = t; /* The compiler would keep addresses in registers from part to part. */
        if (Tokens::FILLED) forget(here);
#pragma unroll
        for (int four = 0; four < PART / 4; four++) {
            const int f = part * (PART / 4) + four;
            float added[2][4] = {}, d[4];
#pragma unroll
            for (int eight = 0; eight < 2; eight++) {
                if (eight * TILE_TOKENS >= count) break;
                const float(&a)[4] = u[eight];
                float low_a[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    low_a[i] = a[i] - __uint_as_float(__float_as_uint(a[i]) & TF32_MASK);
                /* Tokens that are not there have u = 0. */
                unsigned i0 = eight * TILE_TOKENS + 2 * here, i1 = i0 + 1;
                if (!Tokens::FILLED) {
                    const unsigned last = count - 1;
                    i0 = min(i0, last), i1 = min(i1, last);
                }
                const float2 k0 = *reinterpret_cast<const float2 *>(tokens.key(i0, 16 * f + 2 * g)),
                             k1 = *reinterpret_cast<const float2 *>(tokens.key(i1, 16 * f + 2 * g));
                const float k[2][2] = {{k0.x, k0.y}, {k1.x, k1.y}};
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float h0, l0, h1, l1;
                    divide(h0, l0, k[0][e]), divide(h1, l1, k[1][e]);
                    mma_tf32(added[e], low_a[0], low_a[1], low_a[2], low_a[3], h0, h1);
                    mma_tf32(added[e], a[0], a[1], a[2], a[3], l0, l1);
                    mma_tf32(added[e], a[0], a[1], a[2], a[3], h0, h1);
                }
            }
            read_four(d, total + 16 * f + 4 * t);
#pragma unroll
            for (int c = 0; c < 4; c++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float &y = x[r][4 * four + c];
                    y = __fmaf_rn(y, d[c], added[c % 2][2 * r + c / 2]);
                }
        }
    }
};

} // namespace fkda

#endif
