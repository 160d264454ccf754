/* The shared memory of a CTA of the backward pass. All its threads meet at __syncthreads(). */
#ifndef FKDA_BACKWARD_SHARED_CUH
#define FKDA_BACKWARD_SHARED_CUH

#include "bwd_args.h"
#include "bwd_shape.h"
#include "gates.cuh"
#include "tiles.cuh"

namespace fkda
{

constexpr int THREADS = FKDA_BWD_THREADS, WARPS = THREADS / 32;

/* A chunk as it is in memory; zeros past the sequence's end. `values` are v on the way forwards and dout on
 * the way back, and eight of them are at value_column(). */
struct Raw {
    uint16_t q[CHUNK][DIM], k[CHUNK][DIM], values[CHUNK][DIM];
    union {
        uint16_t bf16[CHUNK][DIM];
        float f32[CHUNK][DIM];
    } g;
};

/* Keeps loads of eight tokens at one channel free of bank conflicts. */
__device__ __forceinline__ int value_column(int token, int channel)
{
    return channel ^ (token & 7) << 3;
}

/* The piece of a head that a CTA works on, and where its rows are. */
struct Piece {
    Task task; /* of the whole sequence */
    int sequence, segment;
    long long slot;
    const char *q, *k, *v, *g, *beta, *dout; /* the sequence's first token */
};

/* Where a walk goes: forwards with v, or backwards with q and dout. */
enum Way { FORWARDS, BACKWARDS };

/* The threads that prepare a chunk and go through its channels: here all of the CTA. */
struct WholeCta {
    static __device__ __forceinline__ void meet()
    {
        __syncthreads();
    }
};

/* A channel's decay over a chunk: x becomes x factor + x more. Slow channels have the factor 1, because a
 * decay near 1, rounded to fp32, would be off by one amount chunk after chunk. Fast channels have no `more`,
 * because x less nearly all of x is nothing but rounding errors. */
__device__ __forceinline__ void split_decay(float log2_decay, float &factor, float &more)
{
    const bool is_slow = log2_decay > -1.0f;
    factor = is_slow ? 1.0f : ex2(log2_decay);
    more = !is_slow ? 0.0f : log2_decay <= 0.0f ? ex2_minus_1(log2_decay) : ex2(log2_decay) - 1.0f;
}

struct Shared {
    typedef Raw RawChunk;
    typedef WholeCta Team;
    static constexpr bool HAS_UNITS = false; /* tf32 has the range of fp32 */

    Raw raw[2]; /* of a chunk and of the next one */
    /* A prepared chunk, with G the running sum of the log decay. Operands are rounded to tf32.
     *   k_read = k_i exp(G_i)   q_read = scale q_i exp(G_i)   k_rest = k_i exp(G_last - G_i)
     * Later the gradients with respect to them, without the factors exp(). */
    Tile k_read, q_read, k_rest;
    union {
        Tile k_up; /* k_i exp(-G_i) */
        Tile dr;   /* diag(b) dX, which is the gradient of v */
    };
    Tile u;
    Square inverse;                           /* (I + N)^-1 or (I + L)^-1 (prepare.cuh) */
    Square inverse_t;                         /* the transpose */
    Square attend_t;                          /* P^T, P = tril(Q~ K^^T) */
    float l_columns[CHUNK][CHUNK + 4];        /* L, transposed */
    float products[2][2][CHUNK][CHUNK + 2];   /* of two halves of the depth: two matrices between tokens */
    __align__(16) float2 pairs[CHUNK][CHUNK]; /* dP, and dL with the factors b_i */
    float totals[2][DIM];                     /* of log2 decays, over half a chunk */
    float factor[DIM], more[DIM];             /* of the decay */
    float kept[DIM];                          /* the sum over V of S D */
    float q_scale[CHUNK], k_scale[CHUNK];     /* 1 / |q|, 1 / |k| */
    float strength[CHUNK], strength_slope[CHUNK];
    float dbeta[WARPS][CHUNK];
    int is_out_of_range; /* exp(G) or exp(-G) is not in the range of fp32 */
    Piece piece;
    GateOfHead gate;

    /* What a preparation leaves. `up` is exp(G). */
    template <Way>
    __device__ __forceinline__ void put_key(Shared &, int token, int channel, float k, float up)
    {
        k_read.at(token, channel) = to_tf32(k * up);
    }
    template <Way> __device__ __forceinline__ void put_rest(int token, int channel, float x)
    {
        k_rest.at(token, channel) = to_tf32(x);
    }
    __device__ __forceinline__ void put_query(Shared &, int token, int channel, float q, float scale,
                                              float up)
    {
        q_read.at(token, channel) = to_tf32(q * scale * up);
    }
    __device__ __forceinline__ void put_decay(int channel, float log2_decay)
    {
        split_decay(log2_decay, factor[channel], more[channel]);
    }
    template <Way> __device__ __forceinline__ void put_inverse(int i, int j, float x)
    {
        inverse[i][j] = inverse_t[j][i] = to_tf32(x);
    }
};
static_assert(sizeof(Shared) == FKDA_BWD_SHARED_BYTES, "keep bwd_shape.h in step");

} // namespace fkda

#endif
