/*
 * The backward pass of a chunk, channel by channel of K: gradients of keys, queries and gates.
 *
 * Algorithm. With F_ij the decay of a channel between the writing of token j and the reading of token i, E_i
 * the one since the chunk's start, and the gradients that columns.cuh leaves:
 *
 *     z_ij = dP_ij q_i + b_i dL_ij k_i
 *     dq_i = E_i dQ~_i + sum over j <= i of F_ij dP_ij k_j
 *     dk_i = E_i dK~_i + sum over j < i of F_ij b_i dL_ij k_j + F_last,i dKr_i + sum over j >= i of F_ji z_ji
 *     dg_t = sum over j < t <= i of F_ij z_ij k_j + sum over i >= t of E_i (q_i dQ~_i + k_i dK~_i)
 *            + sum over j < t of F_last,j k_j dKr_j + E_last (sum over V of S D)
 *
 * Every term of dg has the decay of its token as a factor, and none is subtracted from another: a difference of
 * running sums of q dq and k dk would lose slow channels, and leave rounding errors where a gate forgets
 * everything. Decays are products of the decays of tokens, so no gate leaves the range of fp32.
 *
 * Two threads share a channel. One has the readers up to token 11, the other the rest, about as many pairs, and
 * the end of the chunk.
 */
#ifndef FKDA_BACKWARD_CHANNELS_CUH
#define FKDA_BACKWARD_CHANNELS_CUH

#include "pieces.cuh"

namespace fkda
{

constexpr int SHARE = 12; /* readers of the first thread */

template <int first, int last> struct ChannelPairs {
    float key[last], fade[last]; /* the decay since token j was written */
    float writer[last];          /* parts of dk and dg */
    float dg[last];
    float since_start;

    /* One reader and all that was written before it. */
    __device__ __forceinline__ void read(Shared &s, int i, int c, float decay, float k, float q)
    {
        const float from_k = since_start * s.k_read.at(i, c), from_q = since_start * s.q_read.at(i, c),
                    own = s.pairs[i][i].x;
        float dq = __fmaf_rn(own, k, from_q), dk = from_k, sum = __fmaf_rn(k, from_k, q * from_q);
        dg[0] += sum;
#pragma unroll
        for (int j = 0; j < i; j++) {
            const float2 pair = s.pairs[i][j];
            const float f = fade[j] * decay, faded = f * key[j], worth = __fmaf_rn(pair.x, q, pair.y * k) * f;
            fade[j] = f;
            dq = __fmaf_rn(pair.x, faded, dq);
            dk = __fmaf_rn(pair.y, faded, dk);
            writer[j] += worth;
            sum = __fmaf_rn(worth, key[j], sum);
            dg[j + 1] += sum;
        }
        writer[i] = own * q;
        s.q_read.at(i, c) = dq;
        s.k_read.at(i, c) = dk;
    }

    /* `count`: tokens of the chunk. */
    __device__ __forceinline__ void run(Shared &s, const ChannelGate &gate, bool g_is_f32, int count, int c)
    {
        since_start = 1.0f;
#pragma unroll
        for (int i = 0; i < last; i++) writer[i] = dg[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < last; i++) {
            const float decay = i < count ? ex2(gate.log2_decay(raw_gate(s.raw, g_is_f32, i, c))) : 1.0f,
                        k = from_bf16_bits(s.raw.k[i][c]) * s.k_scale[i];
            since_start *= decay;
            if (i >= first) {
                read(s, i, c, decay, k, from_bf16_bits(s.raw.q[i][c]) * s.q_scale[i]);
            } else {
#pragma unroll
                for (int j = 0; j < i; j++) fade[j] *= decay;
            }
            fade[i] = 1.0f;
            key[i] = k;
        }
    }

    /* The state before the chunk as a writer, and the state after it as a reader. */
    __device__ __forceinline__ void end(const Shared &s, int c)
    {
        float sum = since_start * s.kept[c];
        dg[0] += sum;
#pragma unroll
        for (int j = 0; j < last; j++) {
            const float to_end = fade[j] * s.k_rest.at(j, c);
            writer[j] += to_end;
            sum = __fmaf_rn(key[j], to_end, sum);
            if (j + 1 < last) dg[j + 1] += sum;
        }
    }
};

/* Sums over the tokens of a segment, of one channel. */
struct ParameterSums {
    float bias, rate;
};

/* Leaves dq in q_read and dk in k_read, of normalised queries and keys, and the gradient of g in u. The CTA has
 * met before, and meets afterwards. */
__device__ __forceinline__ void go_through_channels(Shared &s, const ChannelGate &gate, bool g_is_f32,
                                                    int count, int thread, ParameterSums &sums)
{
    const int c = thread % DIM;
    if (thread < DIM) {
        ChannelPairs<0, SHARE> p;
        p.run(s, gate, g_is_f32, count, c);
#pragma unroll
        for (int j = 0; j < SHARE; j++) s.dr.at(j, c) = p.writer[j], s.u.at(j, c) = p.dg[j];
        __syncthreads();
        return;
    }
    ChannelPairs<SHARE, CHUNK> p;
    p.run(s, gate, g_is_f32, count, c);
    p.end(s, c);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        const float writer = j < SHARE ? p.writer[j] + s.dr.at(j, c) : p.writer[j],
                    dg = j < SHARE ? p.dg[j] + s.u.at(j, c) : p.dg[j];
        float by_g, by_A_log;
        s.k_read.at(j, c) += writer;
        gate.differentiate(raw_gate(s.raw, g_is_f32, j, c), by_g, by_A_log);
        s.u.at(j, c) = dg * by_g;
        if (j >= count) continue;
        sums.bias += dg * by_g;
        sums.rate = __fmaf_rn(dg, by_A_log, sums.rate);
    }
}

} // namespace fkda

#endif
