/* Stores of the gradients of a chunk, with the caller's strides. */
#ifndef FKDA_BACKWARD_OUTPUTS_CUH
#define FKDA_BACKWARD_OUTPUTS_CUH

#include "channels.cuh"

namespace fkda
{

/* The part of dbeta of 16 rows of V, whose dX and M a warp has transposed. */
__device__ __forceinline__ void add_dbeta(float (&to)[CHUNK], const float (&dx)[2][4],
                                          const float (&missed)[2][4], int g, int t)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int tile = i / 2, e = i % 2;
        float sum = __fmaf_rn(dx[tile][e], missed[tile][e], dx[tile][e + 2] * missed[tile][e + 2]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (g == 0) to[8 * tile + 2 * t + e] = sum;
    }
}

struct Outputs {
    const fkda_bwd_args &args;
    const Piece &piece;

    /* The row of a token of the chunk in a gradient of `heads` heads, which the caller wants. */
    __device__ char *row(void *tensor, const fkda_token_strides &strides, int token, int head,
                         int bytes) const
    {
        return static_cast<char *>(tensor) +
               find_row(args.fwd, strides, piece.sequence, piece.task.begin, head, bytes) +
               token * strides.token * bytes;
    }

    /* A lane has two tokens of one row of V; the transposes make two neighbouring rows of one token. */
    __device__ void store_dv(int chunk, const float (&dr)[2][4], int first, int g, int t) const
    {
        if (!args.dv) return;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t low = transpose_matrix(pack_bf16(dr[i][0], dr[i][1])),
                           high = transpose_matrix(pack_bf16(dr[i][2], dr[i][3]));
            const int token = chunk * CHUNK + 8 * i + g;
            if (token >= piece.task.length) continue;
            auto *to =
                reinterpret_cast<uint32_t *>(row(args.dv, args.dv_strides, token, piece.task.head, 2)) +
                first / 2 + t;
            to[0] = low;
            to[4] = high;
        }
    }

    /* `parts`: of each group of rows of V. */
    template <int groups>
    __device__ void store_dbeta(int chunk, int thread, const float (&parts)[groups][CHUNK],
                                const float (&slopes)[CHUNK]) const
    {
        const int token = chunk * CHUNK + thread;
        if (!args.dbeta || thread >= CHUNK || token >= piece.task.length) return;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < groups; w++) sum += parts[w][thread];
        sum *= slopes[thread];
        const int is_f32 = args.fwd.beta_is_f32;
        char *to = row(args.dbeta, args.dbeta_strides, token, piece.task.head, is_f32 ? 4 : 2);
        if (is_f32)
            *reinterpret_cast<float *>(to) = sum;
        else
            *reinterpret_cast<uint16_t *>(to) = static_cast<uint16_t>(pack_bf16(sum, 0.0f));
    }

    /* Four neighbouring elements of bf16. */
    static __device__ void store_bf16(void *to, float4 x)
    {
        *static_cast<uint2 *>(to) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
    }

    /* Stores a row of dq or dk, from the gradient x with respect to the normalised row, through the norm.
     * Each lane has four channels. */
    __device__ void store_row(void *tensor, const fkda_token_strides &strides, float *parts, int token,
                              float4 x, const uint16_t *raw, float scale, int lane) const
    {
        if (!tensor) return;
        if (!args.fwd.qk_is_normalised) {
            const uint2 two = *reinterpret_cast<const uint2 *>(raw + 4 * lane);
            const float4 n = make_float4(bf16_low(two.x) * scale, bf16_high(two.x) * scale,
                                         bf16_low(two.y) * scale, bf16_high(two.y) * scale);
            float along = __fmaf_rn(n.x, x.x, __fmaf_rn(n.y, x.y, __fmaf_rn(n.z, x.z, n.w * x.w)));
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2)
                along += __shfl_xor_sync(~0u, along, distance);
            x.x = __fmaf_rn(-n.x, along, x.x) * scale, x.y = __fmaf_rn(-n.y, along, x.y) * scale;
            x.z = __fmaf_rn(-n.z, along, x.z) * scale, x.w = __fmaf_rn(-n.w, along, x.w) * scale;
        }
        if (token >= piece.task.length) return;
        const int head = piece.task.head;
        if (parts)
            *reinterpret_cast<float4 *>(parts + ((piece.task.begin + token) * args.fwd.heads + head) * DIM +
                                        4 * lane) = x;
        else
            store_bf16(row(tensor, strides, token, head, 2) + 8 * lane, x);
    }

    /* dq, dk and dg of two tokens for each of eight warps. */
    template <class Raw>
    __device__ void store_rows(const Raw &raw, int chunk, const ChannelTiles &tiles, int warp, int lane) const
    {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int i = 2 * warp + e, token = chunk * CHUNK + i;
            store_row(args.dq, args.dq_strides, args.dq_parts, token, tiles.q.four(i, 4 * lane), raw.q[i],
                      tiles.q_scale[i], lane);
            store_row(args.dk, args.dk_strides, args.dk_parts, token, tiles.k.four(i, 4 * lane), raw.k[i],
                      tiles.k_scale[i], lane);
            if (!args.dg || token >= piece.task.length) continue;
            const int bytes = args.fwd.g_is_f32 ? 4 : 2;
            char *to = row(args.dg, args.dg_strides, token, piece.task.head, bytes) + 4 * bytes * lane;
            const float4 x = tiles.dg.four(i, 4 * lane);
            if (args.fwd.g_is_f32)
                *reinterpret_cast<float4 *>(to) = x;
            else
                store_bf16(to, x);
        }
    }
};

} // namespace fkda

#endif
