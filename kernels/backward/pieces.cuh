/* Which segment a CTA works on, where its rows are, and the copies of chunks to shared memory. */
#ifndef FKDA_BACKWARD_PIECES_CUH
#define FKDA_BACKWARD_PIECES_CUH

#include "../portable/addresses.cuh"
#include "shared.cuh"

namespace fkda
{

/* The slot of a sequence's first segment. */
__device__ inline long long first_slot(const fkda_bwd_args &args, int sequence)
{
    if (!args.fwd.cu_seqlens) return static_cast<long long>(sequence) * args.row_slots;
    return sequence_border(args.fwd, sequence) / args.segment + sequence;
}

/* The last sequence whose first slot is at or before a slot. */
__device__ inline int sequence_of_slot(const fkda_bwd_args &args, long long slot)
{
    if (!args.fwd.cu_seqlens) return static_cast<int>(slot / args.row_slots);
    int first = 0, end = args.fwd.sequences;
    while (first + 1 < end) {
        const int middle = first + (end - first) / 2;
        if (first_slot(args, middle) <= slot)
            first = middle;
        else
            end = middle;
    }
    return first;
}

/* Segments of a sequence; an empty sequence has one. */
__device__ inline int count_segments(const fkda_bwd_args &args, const Task &task)
{
    return max((task.length + args.segment - 1) / args.segment, 1);
}

/* `slot`: of the sequence's first segment. */
__device__ inline void find_piece(Piece &piece, const fkda_bwd_args &args, int sequence, int head)
{
    const fkda_fwd_args &f = args.fwd;
    const int qk_head = head / f.group;
    Piece p;
    p.task = find_task(f, sequence, head, CHUNK);
    p.sequence = sequence;
    p.segment = 0;
    const auto row = [&](const void *tensor, const fkda_token_strides &strides, int h, bool is_f32) {
        return static_cast<const char *>(tensor) +
               find_row(f, strides, sequence, p.task.begin, h, is_f32 ? 4 : 2);
    };
    /* Of the same border as the task, in case cu_seqlens changes. */
    p.slot = f.cu_seqlens ? p.task.begin / args.segment + sequence
                          : static_cast<long long>(sequence) * args.row_slots;
    p.q = row(f.q, f.q_strides, qk_head, false);
    p.k = row(f.k, f.k_strides, qk_head, false);
    p.v = row(f.v, f.v_strides, head, false);
    p.g = row(f.g, f.g_strides, head, f.g_is_f32);
    p.beta = row(f.beta, f.beta_strides, head, f.beta_is_f32);
    p.dout = args.dout ? row(args.dout, args.dout_strides, head, false) : nullptr;
    piece = p;
}

/* Where the head of a slot begins in the states or gradients between segments. */
__device__ inline long long border_offset(const fkda_bwd_args &args, long long slot, int head)
{
    return (slot * args.fwd.heads + head) * (static_cast<long long>(DIM) * DIM);
}

__device__ __forceinline__ float from_bf16_bits(uint16_t x)
{
    return __uint_as_float(static_cast<uint32_t>(x) << 16);
}

template <class Raw>
__device__ __forceinline__ float raw_gate(const Raw &raw, bool is_f32, int token, int channel)
{
    return is_f32 ? raw.g.f32[token][channel] : from_bf16_bits(raw.g.bf16[token][channel]);
}

/* Chunks on their way to shared memory, one ahead of the chunk that the CTA works on. */
struct Reader {
    Shared &s;
    const fkda_bwd_args &args;
    float beta; /* of token `thread` of the chunk that was requested last */

    __device__ Reader(Shared &shared, const fkda_bwd_args &a) : s(shared), args(a), beta(0.0f)
    {
    }

    __device__ __forceinline__ float load_beta(int chunk, int thread) const
    {
        const fkda_fwd_args &f = args.fwd;
        const long long token = chunk * CHUNK + thread, at = token * f.beta_strides.token;
        if (thread >= CHUNK || token >= s.piece.task.length) return 0.0f;
        return f.beta_is_f32 ? reinterpret_cast<const float *>(s.piece.beta)[at]
                             : from_bf16_bits(reinterpret_cast<const uint16_t *>(s.piece.beta)[at]);
    }

    /* Starts the copies of a chunk. Each thread has eight channels of a token. */
    template <Way way> __device__ __forceinline__ void request(int chunk)
    {
        const fkda_fwd_args &f = args.fwd;
        const Piece &piece = s.piece;
        Raw &raw = s.raw[chunk & 1];
        int cta, thread;
        read_indices(cta, thread);
        const int row = static_cast<unsigned>(thread) / (DIM / 8), channel = thread % (DIM / 8) * 8;
        const long long token = chunk * CHUNK + row;
        const bool valid = token < piece.task.length;
        const auto copy = [&](uint16_t *to, const char *from, const fkda_token_strides &strides) {
            const bool there = valid && from;
            copy_async_16(to, there ? from + 2 * (token * strides.token + channel) : piece.k, there);
        };
        copy(&raw.k[row][channel], piece.k, f.k_strides);
        uint16_t *const values = &raw.values[row][value_column(row, channel)];
        if (way == FORWARDS) {
            copy(values, piece.v, f.v_strides);
        } else {
            copy(&raw.q[row][channel], piece.q, f.q_strides);
            copy(values, piece.dout, args.dout_strides);
        }
        if (f.g_is_f32) {
            const char *from = valid ? piece.g + 4 * (token * f.g_strides.token + channel) : piece.g;
            copy_async_16(&raw.g.f32[row][channel], from, valid);
            copy_async_16(&raw.g.f32[row][channel + 4], valid ? from + 16 : from, valid);
        } else {
            copy(&raw.g.bf16[row][channel], piece.g, f.g_strides);
        }
        copy_async_commit();
        beta = load_beta(chunk, thread);
    }

    /* The first chunk of a walk. The CTA meets before. */
    template <Way way> __device__ __forceinline__ void begin(int chunk)
    {
        __syncthreads();
        request<way>(chunk);
    }

    /* A chunk that was requested. The CTA meets here. */
    __device__ __forceinline__ const Raw &receive(int chunk)
    {
        copy_async_wait<0>();
        __syncthreads();
        return s.raw[chunk & 1];
    }
};

} // namespace fkda

#endif
