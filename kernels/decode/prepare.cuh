/*
 * The preparation: everything of a token that does not depend on the state. A warp prepares a token, so that
 * the sums over channels stay in the warp. Lane l has channels 4 l to 4 l + 3.
 */
#ifndef FKDA_DECODE_PREPARE_CUH
#define FKDA_DECODE_PREPARE_CUH

#include "../common/gate.cuh"
#include "sequence.cuh"

namespace fkda
{

/* The small numbers of the tokens, at the start of the CTA's shared memory. The vectors follow. */
struct Small {
    float beta[MAX_TOKENS];      /* the write strength */
    float kq[MAX_TOKENS];        /* the product of key and query */
    int parent[MAX_TOKENS];      /* the token before this one; below 0: the starting state */
    uint32_t before[MAX_TOKENS]; /* bit j: token j is an ancestor */
    /* Of token i and its ancestor j, with the decay from j to i: k_i . k_j and q_i . k_j, the latter also
     * with j = i. */
    __align__(16) float product[2][MAX_TOKENS][MAX_TOKENS];
    __align__(16) float total[DIM]; /* the decay of all tokens */
    /* Where the CTA's work is. Read from here, it does not occupy registers in a chunk kernel. */
    Work work;
    Sequence sequence;
    long long at; /* where the starting state begins, in elements of the pool */
    int past;     /* tokens of earlier records that are applied to it (past.cuh) */
};
static_assert(sizeof(Small) <= FKDA_DECODE_SMALL_BYTES, "keep decode_shape.h in step");

/* The vectors of a token. A chunk has more of them (chunk.cuh). */
enum Vector { DECAY, KEY, QUERY, VALUE };

/* A vector of token i, where each token has that many. */
template <int vectors> __device__ __forceinline__ float *vector_at(int which, int i)
{
    return reinterpret_cast<float *>(cta_memory() + FKDA_DECODE_SMALL_BYTES) + (i * vectors + which) * DIM;
}

__device__ __forceinline__ float sum_over_warp(float x)
{
#pragma unroll
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

/* The product of two vectors over the channels, of which each lane has four. */
__device__ __forceinline__ float sum_of_products(const float (&x)[4], const float (&y)[4])
{
    return sum_over_warp(__fmaf_rn(x[0], y[0], x[1] * y[1]) + __fmaf_rn(x[2], y[2], x[3] * y[3]));
}

/* The decay, which is 2^x. Slow channels have decays so near to 1 that the error of ex2 would add up over
 * thousands of tokens; 1 plus a small number with a small relative error is rounded once. */
__device__ __forceinline__ float decay_from_log2(float x)
{
    return fabsf(x) < 0.25f ? 1.0f + ex2_minus_1(x) : ex2(x);
}

/* Four neighbouring elements of bf16, as numbers. */
__device__ __forceinline__ void unpack_four(float (&x)[4], uint2 bits)
{
    x[0] = bf16_low(bits.x), x[1] = bf16_high(bits.x), x[2] = bf16_low(bits.y), x[3] = bf16_high(bits.y);
}

/* What a lane has of a token's inputs, as in memory. */
struct Inputs {
    uint2 q, k, v;
    uint4 g;       /* fp32, or bf16 in x and y */
    uint32_t beta; /* the bits of fp32 or bf16 */
};

/* What a lane keeps of the gate of the head. */
struct Gate {
    float slope, bound;
    float dt_bias[4];
};

struct Preparation {
    const fkda_decode_args &args;
    Work work;
    Sequence sequence;
    int channel; /* the first of four */
    Gate gate;

    __device__ __forceinline__ Preparation(const fkda_decode_args &a, const Work &w, const Sequence &s)
        : args(a), work(w), sequence(s), channel(static_cast<int>(threadIdx.x) % 32 * 4)
    {
    }

    __device__ __forceinline__ void load_gate(float &a_log, float4 &dt_bias) const
    {
        a_log = args.A_log ? __ldg(args.A_log + work.head) : 0.0f;
        dt_bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (args.dt_bias)
            dt_bias = __ldg(reinterpret_cast<const float4 *>(args.dt_bias + work.head * DIM + channel));
    }

    __device__ __forceinline__ void set_gate(float a_log, const float4 &dt_bias)
    {
        const float bias[4] = {dt_bias.x, dt_bias.y, dt_bias.z, dt_bias.w};
        gate.slope = sigmoid_gate_slope(a_log);
        gate.bound = sigmoid_gate_bound(args.lower_bound);
#pragma unroll
        for (int i = 0; i < 4; i++)
            gate.dt_bias[i] =
                args.gate == FLASH_KDA_GATE_BOUNDED ? sigmoid_gate_offset(bias[i], gate.slope) : bias[i];
    }

    __device__ __forceinline__ uint2 load_four(const void *tensor, const fkda_token_strides &strides, int i,
                                               int head) const
    {
        const uint16_t *from =
            static_cast<const uint16_t *>(tensor) + find_row(strides, sequence, i, head) + channel;
        return __ldg(reinterpret_cast<const uint2 *>(from));
    }

    __device__ __forceinline__ Inputs load(int i) const
    {
        Inputs x;
        const int qk_head = work.head / args.group;
        x.q = load_four(args.q, args.q_strides, i, qk_head);
        x.k = load_four(args.k, args.k_strides, i, qk_head);
        x.v = load_four(args.v, args.v_strides, i, work.head);
        if (args.g_is_f32) {
            const float *from = static_cast<const float *>(args.g) +
                                find_row(args.g_strides, sequence, i, work.head) + channel;
            x.g = __ldg(reinterpret_cast<const uint4 *>(from));
        } else {
            const uint2 g = load_four(args.g, args.g_strides, i, work.head);
            x.g = make_uint4(g.x, g.y, 0, 0);
        }
        const long long at = find_row(args.beta_strides, sequence, i, work.head);
        if (args.beta_is_f32)
            x.beta = __ldg(static_cast<const uint32_t *>(args.beta) + at);
        else
            x.beta = __ldg(static_cast<const uint16_t *>(args.beta) + at);
        return x;
    }

    __device__ __forceinline__ void read_gates(float (&g)[4], const Inputs &inputs) const
    {
        if (args.g_is_f32) {
            const uint32_t bits[4] = {inputs.g.x, inputs.g.y, inputs.g.z, inputs.g.w};
#pragma unroll
            for (int c = 0; c < 4; c++) g[c] = __uint_as_float(bits[c]);
        } else {
            unpack_four(g, make_uint2(inputs.g.x, inputs.g.y));
        }
    }

    /* Makes decays of four elements of g. */
    __device__ __forceinline__ void find_decays(float (&g)[4]) const
    {
        if (args.gate == FLASH_KDA_GATE_BOUNDED) {
#pragma unroll
            for (int c = 0; c < 4; c++) g[c] = sigmoid_gate(g[c], gate.slope, gate.dt_bias[c], gate.bound);
        } else if (args.gate == FLASH_KDA_GATE_SOFTPLUS) {
#pragma unroll
            for (int c = 0; c < 4; c++) g[c] = softplus_gate(g[c], gate.slope, gate.dt_bias[c]);
        } else {
#pragma unroll
            for (int c = 0; c < 4; c++) g[c] = activated_gate(g[c]);
        }
#pragma unroll
        for (int c = 0; c < 4; c++) g[c] = decay_from_log2(g[c]);
    }

    __device__ __forceinline__ float write_strength(uint32_t bits) const
    {
        const float beta = args.beta_is_f32 ? __uint_as_float(bits) : bf16_low(bits);
        if (args.beta_kind == FLASH_KDA_BETA_ACTIVATED) return beta;
        const float strength = rcp(1.0f + ex2(beta * -LOG2_E));
        return args.beta_kind == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.0f * strength : strength;
    }

    /* Divides a row by its norm. Squares of elements above 2^60 overflow, so that a row whose sum is not
     * finite is made smaller first. */
    __device__ __forceinline__ void normalise(float (&x)[4]) const
    {
        constexpr float SMALLER = 0x1p-68f;
        if (args.qk_is_normalised) return;
        float sum = sum_of_products(x, x) + 1e-6f;
        if (!(sum < INFINITY)) {
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] *= SMALLER;
            sum = sum_of_products(x, x);
        }
        const float factor = rsqrt_approx(sum);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] *= factor;
    }

    /* Writes the vectors of token i. `place` is where the lane's four channels are in a vector. */
    template <int vectors>
    __device__ __forceinline__ void finish(const Inputs &inputs, Small &small, int i, int place) const
    {
        float q[4], k[4], v[4], decay[4];
        unpack_four(q, inputs.q);
        unpack_four(k, inputs.k);
        unpack_four(v, inputs.v);
        read_gates(decay, inputs);
        find_decays(decay);
        normalise(q);
        normalise(k);
        constexpr bool has_steps = vectors == FKDA_DECODE_VECTORS_OF_A_STEP;
        const float kq = has_steps ? sum_of_products(k, q) : 0.0f;
        store_four(vector_at<vectors>(DECAY, i) + place, decay[0], decay[1], decay[2], decay[3]);
        store_four(vector_at<vectors>(KEY, i) + place, k[0], k[1], k[2], k[3]);
        store_four(vector_at<vectors>(QUERY, i) + place, q[0], q[1], q[2], q[3]);
        store_four(vector_at<vectors>(VALUE, i) + channel, v[0], v[1], v[2], v[3]);
        if (channel == 0) {
            small.beta[i] = write_strength(inputs.beta);
            if (has_steps) small.kq[i] = kq;
            small.parent[i] = find_parent(args, work.sequence, i);
        }
        if (work.first_row != 0)
            return; /* the first CTA of a head writes the record's vectors over channels */
        if (float *record = find_record(args, work, i, 0)) {
            store_four(record + channel, decay[0], decay[1], decay[2], decay[3]);
            store_four(record + DIM + channel, k[0], k[1], k[2], k[3]);
        }
    }
};

/* Loads the starting state, which begins at element `at` of the pool, and prepares all tokens meanwhile. */
template <int vectors, class Tile>
__device__ __forceinline__ void prepare_and_load(const fkda_decode_args &args, const Work &work,
                                                 const Sequence &sequence, long long at, Tile &tile,
                                                 Small &small)
{
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    Preparation preparation(args, work, sequence);
    Inputs inputs = {};
    float a_log = 0.0f;
    float4 dt_bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (warp < sequence.length) {
        inputs = preparation.load(warp);
        preparation.load_gate(a_log, dt_bias);
    }
    typename Tile::Loaded loaded;
    tile.load(loaded, args.state.data, at);
    preparation.set_gate(a_log, dt_bias);
    const int place = Tile::place_of_four(preparation.channel);
#pragma unroll 1 /* there are no registers for more */
    for (int i = warp; i < sequence.length; i += warps) {
        forget_addresses(preparation.work, preparation.sequence);
        if (i != warp) inputs = preparation.load(i);
        preparation.finish<vectors>(inputs, small, i, place);
    }
    __syncthreads();
    tile.unpack(loaded);
}

} // namespace fkda

#endif
