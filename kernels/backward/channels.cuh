/*
 * The backward pass of a chunk, channel by channel of K: gradients of keys, queries and gates.
 *
 * Algorithm. With F_ij the decay of a channel between the writing of token j and the reading of token i, E_i
 * the one since the chunk's start, and the gradients that columns.cuh leaves:
 *
 *     w_j  = F_last,j dKr_j + sum over i > j of F_ij (dP_ij q_i + b_i dL_ij k_i)
 *     dq_i = E_i dQ~_i + sum over j <= i of F_ij dP_ij k_j
 *     dk_i = E_i dK~_i + sum over j < i of F_ij b_i dL_ij k_j + w_i + dP_ii q_i
 *     dg_t = sum over j < t of k_j w_j(t) + sum over i >= t of E_i (q_i dQ~_i + k_i dK~_i)
 *            + E_last (sum over V of S D)
 *
 * where w_j(t) has the readers i >= t alone. Readers are taken from the last to the first, so that w_j is
 * w_j(t) when dg_t is summed.
 *
 * Every term of dg has the decay of its token as a factor, and none is subtracted from another: a difference
 * of running sums of q dq and k dk would lose slow channels, and leave rounding errors where a gate forgets
 * everything. Decays are products of the decays of tokens, so no gate leaves the range of fp32.
 *
 * Two threads share a channel. One has the readers up to token 11, the other the rest and the end of the
 * chunk, which are about as many pairs.
 */
#ifndef FKDA_BACKWARD_CHANNELS_CUH
#define FKDA_BACKWARD_CHANNELS_CUH

#include "pieces.cuh"

namespace fkda
{

constexpr int SHARE = 12; /* readers of the first thread */

/* What the sums over V have left of a chunk, in shared memory, and where gradients go. */
struct ChannelTiles {
    Tile &q, &k, &k_rest;          /* gradients of Q~, K~ and Kr without exp(); the first two become dq, dk */
    Tile &dg, &w;                  /* of no meaning before */
    float2 (&pairs)[CHUNK][CHUNK]; /* dP, and dL with the factors b_i */
    float (&kept)[DIM];            /* the sum over V of S D */
    float (&q_scale)[CHUNK], (&k_scale)[CHUNK];

    template <class Results, class Prepared>
    __device__ __forceinline__ ChannelTiles(Results &r, Prepared &p, Tile &gate, Tile &writers)
        : q(r.q_read), k(r.k_read), k_rest(r.k_rest), dg(gate), w(writers), pairs(r.pairs), kept(r.kept),
          q_scale(p.q_scale), k_scale(p.k_scale)
    {
    }
};

/* A channel of a chunk: raw inputs, gate, and the number of the chunk's tokens. */
template <class Raw> struct ChannelOfChunk {
    const Raw &raw;
    const ChannelGate gate;
    bool g_is_f32;
    int count, c;
};

/* Readers first to last - 1, and all that was written before them. */
template <int first, int last> struct ChannelPairs {
    static constexpr bool is_late = last == CHUNK;

    float decay[last], key[last], w[last];
    float from_state; /* the part of dg of the state before the chunk */

    template <class Raw>
    __device__ __forceinline__ void load(const ChannelTiles &s, const ChannelOfChunk<Raw> &x)
    {
#pragma unroll
        for (int i = 0; i < last; i++) {
            const float g = raw_gate(x.raw, x.g_is_f32, i, x.c);
            decay[i] = i < x.count ? ex2(x.gate.log2_decay(g)) : 1.0f;
            key[i] = from_bf16_bits(x.raw.k[i][x.c]) * s.k_scale[i];
            w[i] = 0.0f;
        }
        from_state = 0.0f;
    }

    /* The state after the chunk as a reader. */
    __device__ __forceinline__ void read_last(const ChannelTiles &s, int c)
    {
        float f = 1.0f;
#pragma unroll
        for (int j = last - 1; j >= 0; j--) {
            w[j] = f * s.k_rest.at(j, c);
            f *= decay[j];
        }
        from_state = f * s.kept[c];
    }

    __device__ __forceinline__ void read(const ChannelTiles &s, int i, float q, int c)
    {
        const float k = key[i], own = s.pairs[i][i].x;
        float f = 1.0f, dq = own * k, dk = 0.0f;
#pragma unroll
        for (int j = i - 1; j >= 0; j--) {
            const float4 two = *reinterpret_cast<const float4 *>(&s.pairs[i][j / 2 * 2]);
            const float by_p = j % 2 ? two.z : two.x, by_l = j % 2 ? two.w : two.y;
            f *= decay[j + 1];
            const float faded = f * key[j];
            w[j] = __fmaf_rn(__fmaf_rn(by_p, q, by_l * k), f, w[j]);
            dq = __fmaf_rn(by_p, faded, dq);
            dk = __fmaf_rn(by_l, faded, dk);
        }
        f *= decay[0];
        const float from_k = f * s.k.at(i, c), from_q = f * s.q.at(i, c);
        from_state = __fmaf_rn(k, from_k, __fmaf_rn(q, from_q, from_state));
        float dg = from_state;
#pragma unroll
        for (int j = 0; j < i; j++) dg = __fmaf_rn(key[j], w[j], dg);
        w[i] = __fmaf_rn(own, q, w[i]); /* no gate acts on it */
        s.q.at(i, c) = dq + from_q;
        s.k.at(i, c) = dk + from_k;
        s.dg.at(i, c) = dg;
    }

    /* Leaves dq in q, the part of dk of a reader in k, that of a writer in w, and dg in dg. */
    template <class Raw>
    __device__ __forceinline__ void run(const ChannelTiles &s, const ChannelOfChunk<Raw> &x)
    {
        load(s, x);
        if (is_late) read_last(s, x.c);
#pragma unroll
        for (int i = last - 1; i >= first; i--)
            read(s, i, from_bf16_bits(x.raw.q[i][x.c]) * s.q_scale[i], x.c);
    }
};

/* Sums over the tokens of a segment, of one channel. */
struct ParameterSums {
    float bias, rate;
};

/* Leaves dq in q and dk in k, of normalised queries and keys, and the gradient of g in dg. The team has met
 * before, and meets afterwards. */
template <class Team, class Raw>
__device__ __forceinline__ void go_through_channels(const ChannelTiles &s, const ChannelOfChunk<Raw> &x,
                                                    int thread, ParameterSums &sums)
{
    const int c = x.c;
    if (thread < DIM) {
        ChannelPairs<0, SHARE> p = {};
        p.run(s, x);
#pragma unroll
        for (int j = 0; j < SHARE; j++) s.w.at(j, c) = p.w[j];
        Team::meet();
        return;
    }
    ChannelPairs<SHARE, CHUNK> p = {};
    p.run(s, x);
    Team::meet();
    float late = p.from_state; /* what the late readers add to dg of an early token */
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        float dg = s.dg.at(j, c), w = p.w[j], by_g, by_A_log;
        if (j < SHARE) {
            dg += late, w += s.w.at(j, c);
            late = __fmaf_rn(p.key[j], p.w[j], late);
        }
        s.k.at(j, c) += w;
        x.gate.differentiate(raw_gate(x.raw, x.g_is_f32, j, c), by_g, by_A_log);
        s.dg.at(j, c) = dg * by_g;
        if (j >= x.count) continue;
        sums.bias += dg * by_g;
        sums.rate = __fmaf_rn(dg, by_A_log, sums.rate);
    }
}

} // namespace fkda

#endif
