/*
 * The preparation of decode_layer: the convolution, SiLU, the gates and the write strengths.
 *
 * A thread has two or three jobs: a channel of q, k or v, the decay of a channel, or the factor of a channel
 * of the outputs. A thread does a job for all tokens, so that the window of a channel slides through
 * registers. A channel belongs to one head and one thread, which reads its window before it writes it.
 */
#ifndef FKDA_DECODE_LAYER_PREPARE_CUH
#define FKDA_DECODE_LAYER_PREPARE_CUH

#include "decode_layer_args.h"
#include "layer_shape.h"
#include "prepare.cuh"
#include "tile.cuh"

namespace fkda
{

constexpr int PARTS = 3, TAPS = 4, WINDOW = 3;

/* The small numbers of the tokens, at the start of the CTA's shared memory. The vectors follow. */
struct LayerSmall {
    float beta[MAX_TOKENS];
    float key_factor[MAX_TOKENS]; /* one over the norm of the key */
};
static_assert(sizeof(LayerSmall) <= FKDA_LAYER_SMALL_BYTES, "keep layer_shape.h in step");

/* The vectors of a token. Key and query are as the convolution gives them. */
enum LayerVector {
    LAYER_DECAY,
    LAYER_KEY,
    LAYER_QUERY,
    LAYER_VALUE,
    LAYER_OUT,
    LAYER_FACTOR, /* of the output: the weight of the norm, and the sigmoid of the output gate */
    LAYER_VECTORS
};
static_assert(LAYER_VECTORS == FKDA_LAYER_VECTORS, "keep layer_shape.h in step");

__device__ __forceinline__ LayerSmall &layer_small()
{
    return *reinterpret_cast<LayerSmall *>(cta_memory());
}

/* A vector of token i. */
__device__ __forceinline__ float *layer_vector(int which, int i)
{
    return reinterpret_cast<float *>(cta_memory() + FKDA_LAYER_SMALL_BYTES) +
           (i * LAYER_VECTORS + which) * DIM;
}

/* Begins to load an element of bf16 or fp32. The compiler would otherwise move the load to where its result
 * is used, or begin with that use, and wait for it, before it has issued the loads that follow. */
__device__ __forceinline__ uint32_t begin_load(const void *data, int is_f32, long long at)
{
    uint32_t bits;
    if (is_f32)
        bits = __ldg(static_cast<const uint32_t *>(data) + at);
    else
        bits = __ldg(static_cast<const uint16_t *>(data) + at);
    forget(bits);
    return bits;
}

/* What begin_load() has loaded. */
__device__ __forceinline__ float number_of(uint32_t bits, int is_f32)
{
    return __uint_as_float(is_f32 ? bits : bits << 16);
}

__device__ __forceinline__ float layer_sigmoid(float x)
{
    return rcp(1.0f + ex2(x * -LOG2_E));
}

/* Where the window of a sequence is. */
struct WindowPlace {
    long long slot;
    int column; /* of its oldest input */
};

/* A channel of q, k or v. */
struct Channel {
    int part, channel; /* of all heads */

    __device__ __forceinline__ const uint16_t *input(const fkda_decode_layer_args &args,
                                                     const Sequence &sequence, int i) const
    {
        return static_cast<const uint16_t *>(args.x) + part * args.x_part + channel +
               sequence.batch * args.x_strides.batch + (sequence.begin + i) * args.x_strides.token;
    }

    __device__ __forceinline__ long long find(const fkda_channel_args &c) const
    {
        return part * c.part + channel * c.channel;
    }

    /* A column of a window that begins at element `at`. */
    __device__ __forceinline__ uint16_t *column(const fkda_channel_args &to, long long at, int j) const
    {
        return static_cast<uint16_t *>(to.data) + at + find(to) + j * to.column;
    }
};

/* The convolution of one channel. */
struct ConvJob {
    uint32_t weight[TAPS], bias;
    uint32_t window[WINDOW]; /* bf16, the oldest first */
    uint32_t input;          /* of the next token */

    /* Begins to load what does not depend on the slot. */
    __device__ __forceinline__ void load(const fkda_decode_layer_args &args, const Sequence &sequence,
                                         const Channel &c)
    {
        const long long at = c.find(args.weight);
        input = begin_load(c.input(args, sequence, 0), false, 0);
#pragma unroll
        for (int j = 0; j < TAPS; j++)
            weight[j] = begin_load(args.weight.data, args.weight_is_f32, at + j * args.weight.column);
        bias = 0;
        if (args.bias.data) bias = begin_load(args.bias.data, args.bias_is_f32, c.find(args.bias));
    }

    __device__ __forceinline__ void load_window(const fkda_decode_layer_args &args, const Channel &c,
                                                const WindowPlace &place)
    {
        const long long at = place.slot * args.conv_slot_stride + place.column * args.conv_state.column;
#pragma unroll
        for (int j = 0; j < WINDOW; j++) {
            window[j] = *c.column(args.conv_state, at, j);
            forget(window[j]);
        }
    }

    __device__ __forceinline__ void store_window(const fkda_channel_args &to, const Channel &c,
                                                 long long at) const
    {
#pragma unroll
        for (int j = 0; j < WINDOW; j++) *c.column(to, at, j) = static_cast<uint16_t>(window[j]);
    }

    /* y of the next token, whose input moves into the window. */
    __device__ __forceinline__ float step(const fkda_decode_layer_args &args)
    {
        float sum = number_of(bias, args.bias_is_f32);
#pragma unroll
        for (int j = 0; j < TAPS; j++)
            sum = __fmaf_rn(number_of(weight[j], args.weight_is_f32),
                            bf16_low(j < WINDOW ? window[j] : input), sum);
#pragma unroll
        for (int j = 0; j < WINDOW - 1; j++) window[j] = window[j + 1];
        window[WINDOW - 1] = input;
        return sum * layer_sigmoid(sum);
    }

    /* Keeps the window after token i where the call asks for it. */
    __device__ __forceinline__ void keep(const fkda_decode_layer_args &args, const Channel &c,
                                         const WindowPlace &from, int n, int i) const
    {
        const fkda_channel_args &pool = args.conv_state;
        if (args.windows.data && i < args.windows_columns)
            store_window(args.windows, c, n * args.windows_sequence + i * args.windows_token);
        if (args.write_windows != FLASH_KDA_WRITE_EACH) return;
        if (args.keeps_drafts) {
            if (i + WINDOW - 1 < args.window_columns)
                *c.column(pool, from.slot * args.conv_slot_stride, i + WINDOW - 1) =
                    static_cast<uint16_t>(window[WINDOW - 1]);
            return;
        }
        const long long after = find_slot_after(args.decode, n, i);
        if (after != NO_SLOT) store_window(pool, c, after * args.conv_slot_stride);
    }

    /* All tokens, to vector `which` of each: `place` is the channel's in a vector. */
    __device__ __forceinline__ void run(const fkda_decode_layer_args &args, const Sequence &sequence,
                                        Channel c, const WindowPlace &from, int n, int which, int place)
    {
        const long long at = from.slot * args.conv_slot_stride;
        if (args.keeps_drafts) {
#pragma unroll
            for (int j = 1; j < WINDOW; j++)
                *c.column(args.conv_state, at, j - 1) = static_cast<uint16_t>(window[j]);
        }
#pragma unroll 1 /* there are no registers for more */
        for (int i = 0; i < sequence.length; i++) {
            forget(c.channel); /* addresses would occupy registers from token to token */
            if (i > 0) input = __ldg(c.input(args, sequence, i));
            layer_vector(which, i)[place] = step(args);
            keep(args, c, from, n, i);
        }
        if (args.write_windows == FLASH_KDA_WRITE_LAST) store_window(args.conv_state, c, at);
    }
};

/* The decay of one channel. */
struct DecayJob {
    uint32_t a_log, dt_bias;
    uint32_t input; /* of the next token */

    static __device__ __forceinline__ uint32_t load_gate(const fkda_decode_args &args, const Work &work,
                                                         const Sequence &sequence, int channel, int i)
    {
        return begin_load(args.g, args.g_is_f32, find_row(args.g_strides, sequence, i, work.head) + channel);
    }

    __device__ __forceinline__ void load(const fkda_decode_args &args, const Work &work,
                                         const Sequence &sequence, int channel)
    {
        input = load_gate(args, work, sequence, channel, 0);
        a_log = dt_bias = 0;
        if (args.A_log) a_log = begin_load(args.A_log, true, work.head);
        if (args.dt_bias) dt_bias = begin_load(args.dt_bias, true, work.head * DIM + channel);
    }

    /* The decay of the next token. */
    __device__ __forceinline__ float step(const fkda_decode_args &args) const
    {
        const float slope = sigmoid_gate_slope(__uint_as_float(a_log)), bias = __uint_as_float(dt_bias),
                    g = number_of(input, args.g_is_f32);
        if (args.gate == FLASH_KDA_GATE_BOUNDED)
            return decay_from_log2(sigmoid_gate(g, slope, sigmoid_gate_offset(bias, slope),
                                                sigmoid_gate_bound(args.lower_bound)));
        return decay_from_log2(args.gate == FLASH_KDA_GATE_SOFTPLUS ? softplus_gate(g, slope, bias)
                                                                    : activated_gate(g));
    }

    __device__ __forceinline__ void run(const fkda_decode_args &args, const Work &work,
                                        const Sequence &sequence, int channel, int place)
    {
#pragma unroll 1
        for (int i = 0; i < sequence.length; i++) {
            if (i > 0) input = load_gate(args, work, sequence, channel, i);
            layer_vector(LAYER_DECAY, i)[place] = step(args);
        }
    }
};

/* The factor of one channel of the outputs. */
struct FactorJob {
    uint32_t weight;
    uint32_t gate; /* of the next token */

    static __device__ __forceinline__ uint32_t load_gate(const fkda_decode_layer_args &args, const Work &work,
                                                         const Sequence &sequence, int channel, int i)
    {
        return begin_load(args.output_gate, args.output_gate_is_f32,
                          find_row(args.output_gate_strides, sequence, i, work.head) + channel);
    }

    __device__ __forceinline__ void load(const fkda_decode_layer_args &args, const Work &work,
                                         const Sequence &sequence, int channel)
    {
        weight = gate = 0;
        if (args.norm_weight) weight = begin_load(args.norm_weight, args.norm_weight_is_f32, channel);
        if (args.output_gate) gate = load_gate(args, work, sequence, channel, 0);
    }

    __device__ __forceinline__ void run(const fkda_decode_layer_args &args, const Work &work,
                                        const Sequence &sequence, int channel)
    {
#pragma unroll 1
        for (int i = 0; i < sequence.length; i++) {
            if (i > 0 && args.output_gate) gate = load_gate(args, work, sequence, channel, i);
            float factor = args.norm_weight ? number_of(weight, args.norm_weight_is_f32) : 1.0f;
            if (args.output_gate) factor *= layer_sigmoid(number_of(gate, args.output_gate_is_f32));
            layer_vector(LAYER_FACTOR, i)[channel] = factor;
        }
    }
};

/* The jobs of a thread: k, a decay and a factor in the upper half of the CTA, else q and v. */
struct LayerJobs {
    Channel first, second;
    int channel; /* of the head */
    bool has_decay;

    __device__ __forceinline__ LayerJobs(const Work &work, int thread)
        : channel(thread % DIM), has_decay(thread >= DIM)
    {
        first = {has_decay ? 1 : 0, work.head * DIM + channel};
        second = {2, first.channel};
    }
};

/* The inputs of a thread's jobs. */
struct LayerInputs {
    ConvJob first, second;
    DecayJob decay;
    FactorJob factor;
    uint32_t beta;

    __device__ __forceinline__ void load_second(const fkda_decode_layer_args &args, const Work &work,
                                                const Sequence &sequence, const LayerJobs &jobs)
    {
        if (jobs.has_decay) {
            decay.load(args.decode, work, sequence, jobs.channel);
            factor.load(args, work, sequence, jobs.channel);
        } else {
            second.load(args, sequence, jobs.second);
        }
    }

    /* Begins to load what does not depend on the slot. `single`: there is one token. With more tokens there
     * are no registers for the inputs of all jobs beside the state. */
    template <bool single>
    __device__ __forceinline__ void load(const fkda_decode_layer_args &args, const Work &work,
                                         const Sequence &sequence)
    {
        const fkda_decode_args &decode = args.decode;
        const int thread = static_cast<int>(threadIdx.x);
        const LayerJobs jobs(work, thread);
        first.load(args, sequence, jobs.first);
        beta = 0;
        if (thread < sequence.length)
            beta = begin_load(decode.beta, decode.beta_is_f32,
                              find_row(decode.beta_strides, sequence, thread, work.head));
        if (single) load_second(args, work, sequence, jobs);
    }
};

/* Loads the starting state and prepares all tokens meanwhile. Only LAYER_OUT is not filled. */
template <bool single, class Tile>
__device__ __forceinline__ void prepare_layer(const fkda_decode_layer_args &args, const Work &work,
                                              const Sequence &sequence, LayerInputs &inputs, long long slot,
                                              const WindowPlace &window, Tile &tile)
{
    const fkda_decode_args &decode = args.decode;
    int thread = static_cast<int>(threadIdx.x);
    typename Tile::Loaded loaded;
    {
        const LayerJobs jobs(work, thread);
        inputs.first.load_window(args, jobs.first, window);
        if (single && !jobs.has_decay) inputs.second.load_window(args, jobs.second, window);
    }
    tile.load(loaded, decode.state.data, find_state(decode.state, slot, work.head));
    forget(thread);
    /* The compiler does not know that there is one token, so jobs are loops. It would otherwise begin with
     * the convolution, which waits for its inputs, before it has issued the loads of the state. */
    Sequence tokens = sequence;
    forget(tokens.length);
    {
        const LayerJobs jobs(work, thread);
        const int place = Tile::place_of_four(jobs.channel / 4 * 4) + jobs.channel % 4;
        inputs.first.run(args, tokens, jobs.first, window, work.sequence,
                         jobs.has_decay ? LAYER_KEY : LAYER_QUERY, place);
        if (!single) {
            inputs.load_second(args, work, sequence, jobs);
            if (!jobs.has_decay) inputs.second.load_window(args, jobs.second, window);
        }
        if (jobs.has_decay) {
            inputs.decay.run(decode, work, tokens, jobs.channel, place);
            inputs.factor.run(args, work, tokens, jobs.channel);
        } else {
            inputs.second.run(args, tokens, jobs.second, window, work.sequence, LAYER_VALUE, jobs.channel);
        }
    }
    if (thread < sequence.length)
        layer_small().beta[thread] = Preparation(decode, work, sequence).write_strength(inputs.beta);
    __syncthreads();
    tile.unpack(loaded);
}

} // namespace fkda

#endif
