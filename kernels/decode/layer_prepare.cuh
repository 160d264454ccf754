/*
 * The preparation of decode_layer: the convolution, SiLU, the gates and the write strengths.
 *
 * A thread has two of 512 jobs: a channel of q, k or v, or the decay of a channel. It does its jobs for all
 * tokens, so that the window of a channel slides through registers. A channel belongs to one head and one
 * thread, which reads its window before it writes it.
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
enum LayerVector { LAYER_DECAY, LAYER_KEY, LAYER_QUERY, LAYER_VALUE, LAYER_OUT, LAYER_VECTORS };
static_assert(LAYER_VECTORS == FKDA_LAYER_VECTORS, "keep layer_shape.h in step");

__device__ __forceinline__ LayerSmall &layer_small()
{
    return *reinterpret_cast<LayerSmall *>(cta_memory());
}

/* Vector `which` of token i, for shared memory with `tokens` tokens. */
__device__ __forceinline__ float *layer_vector(int which, int tokens, int i)
{
    return reinterpret_cast<float *>(cta_memory() + FKDA_LAYER_SMALL_BYTES) + (which * tokens + i) * DIM;
}

__device__ __forceinline__ float load_number(const void *data, int is_f32, long long at)
{
    if (is_f32) return __ldg(static_cast<const float *>(data) + at);
    return bf16_low(__ldg(static_cast<const uint16_t *>(data) + at));
}

__device__ __forceinline__ float layer_sigmoid(float x)
{
    return rcp(1.0f + ex2(x * -LOG2_E));
}

__device__ __forceinline__ long long find_channel(const fkda_channel_args &c, int part, int channel)
{
    return part * c.part + channel * c.channel;
}

/* Where the window of a sequence is. */
struct WindowPlace {
    long long slot;
    int column; /* of its oldest input */
};

/* One channel of q, k or v. */
struct ConvJob {
    float weight[TAPS], bias;
    uint32_t window[WINDOW]; /* bits of bf16, the oldest first */
    uint32_t input;          /* of the next token */
    int part, channel;       /* of all heads */

    __device__ __forceinline__ const uint16_t *x_at(const fkda_decode_layer_args &args,
                                                    const Sequence &sequence, int i) const
    {
        return static_cast<const uint16_t *>(args.x) + part * args.x_part + channel +
               sequence.batch * args.x_strides.batch + (sequence.begin + i) * args.x_strides.token;
    }

    /* Begins to load what does not depend on the slot. */
    __device__ __forceinline__ void load(const fkda_decode_layer_args &args, const Sequence &sequence,
                                         int job_part, int job_channel)
    {
        part = job_part, channel = job_channel;
        const long long at = find_channel(args.weight, part, channel);
        input = __ldg(x_at(args, sequence, 0));
#pragma unroll
        for (int j = 0; j < TAPS; j++)
            weight[j] = load_number(args.weight.data, args.weight_is_f32, at + j * args.weight.column);
        bias = 0.0f;
        if (args.bias.data)
            bias = load_number(args.bias.data, args.bias_is_f32, find_channel(args.bias, part, channel));
    }

    __device__ __forceinline__ uint16_t *column_of(const fkda_channel_args &to, long long at, int column) const
    {
        return static_cast<uint16_t *>(to.data) + at + find_channel(to, part, channel) + column * to.column;
    }

    __device__ __forceinline__ void load_window(const fkda_decode_layer_args &args, const WindowPlace &place)
    {
#pragma unroll
        for (int j = 0; j < WINDOW; j++)
            window[j] = *column_of(args.conv_state, place.slot * args.conv_slot_stride, place.column + j);
    }

    __device__ __forceinline__ void store_window(const fkda_channel_args &to, long long at) const
    {
#pragma unroll
        for (int j = 0; j < WINDOW; j++) *column_of(to, at, j) = static_cast<uint16_t>(window[j]);
    }

    /* y of the next token, whose input moves into the window. */
    __device__ __forceinline__ float step()
    {
        float sum = bias;
#pragma unroll
        for (int j = 0; j < WINDOW; j++) sum = __fmaf_rn(weight[j], bf16_low(window[j]), sum);
        sum = __fmaf_rn(weight[WINDOW], bf16_low(input), sum);
#pragma unroll
        for (int j = 0; j < WINDOW - 1; j++) window[j] = window[j + 1];
        window[WINDOW - 1] = input;
        return sum * layer_sigmoid(sum);
    }

    /* All tokens, to the vectors of the part: `place` is the channel's in a vector. */
    __device__ __forceinline__ void run(const fkda_decode_layer_args &args, const Sequence &sequence,
                                        const WindowPlace &from, int n, int tokens, int which, int place)
    {
        const fkda_channel_args &pool = args.conv_state;
        const int write = args.decode.write_states;
        if (args.keeps_drafts) {
            const long long at = from.slot * args.conv_slot_stride;
#pragma unroll
            for (int j = 1; j < WINDOW; j++)
                *column_of(pool, at, j - 1) = static_cast<uint16_t>(window[j]);
        }
        for (int i = 0; i < sequence.length; i++) {
            if (i > 0) input = __ldg(x_at(args, sequence, i));
            layer_vector(which, tokens, i)[place] = step();
            if (args.windows.data && i < args.windows_columns)
                store_window(args.windows, n * args.windows_sequence + i * args.windows_token);
            if (write != FLASH_KDA_WRITE_EACH) continue;
            if (args.keeps_drafts) {
                if (i + WINDOW - 1 < args.window_columns)
                    *column_of(pool, from.slot * args.conv_slot_stride, i + WINDOW - 1) =
                        static_cast<uint16_t>(input);
                continue;
            }
            const long long after = find_slot_after(args.decode, n, i);
            if (after != NO_SLOT) store_window(pool, after * args.conv_slot_stride);
        }
        if (write == FLASH_KDA_WRITE_LAST) store_window(pool, from.slot * args.conv_slot_stride);
    }
};

/* The decay of one channel. */
struct DecayJob {
    float a_log, dt_bias;
    float input; /* of the next token */

    static __device__ __forceinline__ float load_gate(const fkda_decode_args &args, const Work &work,
                                                      const Sequence &sequence, int channel, int i)
    {
        return load_number(args.g, args.g_is_f32,
                           find_row(args.g_strides, sequence, i, work.head) + channel);
    }

    __device__ __forceinline__ void load(const fkda_decode_args &args, const Work &work,
                                         const Sequence &sequence, int channel)
    {
        input = load_gate(args, work, sequence, channel, 0);
        a_log = args.A_log ? __ldg(args.A_log + work.head) : 0.0f;
        dt_bias = args.dt_bias ? __ldg(args.dt_bias + work.head * DIM + channel) : 0.0f;
    }

    __device__ __forceinline__ void run(const fkda_decode_args &args, const Work &work,
                                        const Sequence &sequence, int channel, int tokens, int place)
    {
        Gate gate;
        gate.slope = sigmoid_gate_slope(a_log);
        gate.bound = sigmoid_gate_bound(args.lower_bound);
        gate.dt_bias[0] =
            args.gate == FLASH_KDA_GATE_BOUNDED ? sigmoid_gate_offset(dt_bias, gate.slope) : dt_bias;
        Preparation preparation(args, work, sequence);
        preparation.gate = gate;
        for (int i = 0; i < sequence.length; i++) {
            if (i > 0) input = load_gate(args, work, sequence, channel, i);
            layer_vector(LAYER_DECAY, tokens, i)[place] = preparation.decay_of(input, 0);
        }
    }
};

/* Loads the starting state and prepares all tokens meanwhile. Only LAYER_OUT is not filled. */
template <class Tile>
__device__ __forceinline__ void prepare_layer(const fkda_decode_layer_args &args, const Work &work,
                                              const Sequence &sequence, long long slot,
                                              const WindowPlace &window, Tile &tile, int tokens)
{
    const fkda_decode_args &decode = args.decode;
    const int thread = static_cast<int>(threadIdx.x), channel = thread % DIM, of_heads = work.head * DIM + channel,
              place = Tile::place_of_four(channel / 4 * 4) + channel % 4;
    const bool is_second_half = thread >= DIM; /* k and decays, else q and v */
    ConvJob first, second;
    DecayJob decay;
    float beta = 0.0f;
    typename Tile::Loaded loaded;

    first.load(args, sequence, is_second_half ? 1 : 0, of_heads);
    if (is_second_half)
        decay.load(decode, work, sequence, channel);
    else
        second.load(args, sequence, 2, of_heads);
    if (thread < sequence.length)
        beta = load_number(decode.beta, decode.beta_is_f32,
                           find_row(decode.beta_strides, sequence, thread, work.head));
    first.load_window(args, window);
    if (!is_second_half) second.load_window(args, window);
    tile.load(loaded, decode.state.data, find_state(decode.state, slot, work.head));

    first.run(args, sequence, window, work.sequence, tokens, is_second_half ? LAYER_KEY : LAYER_QUERY, place);
    if (is_second_half)
        decay.run(decode, work, sequence, channel, tokens, place);
    else
        second.run(args, sequence, window, work.sequence, tokens, LAYER_VALUE, channel);
    if (thread < sequence.length)
        layer_small().beta[thread] = Preparation(decode, work, sequence).write_strength(beta);
    __syncthreads();
    tile.unpack(loaded);
}

} // namespace fkda

#endif
