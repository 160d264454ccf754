/* Which tokens a sequence of a decode call has, and where its states are. The tensors of indices may hold
 * anything: what they say is clamped where it is used, so that wrong contents never touch other memory. */
#ifndef FKDA_DECODE_SEQUENCE_CUH
#define FKDA_DECODE_SEQUENCE_CUH

#include "../../include/flash_kda.h"
#include "../common/elements.cuh"
#include "decode_args.h"
#include "decode_shape.h"

namespace fkda
{

constexpr int DIM = 128; /* channels of K and rows of V */
constexpr int MAX_TOKENS = FKDA_DECODE_MAX_TOKENS;
constexpr long long NO_SLOT = -1;

__device__ __forceinline__ long long read_index(const fkda_index_args &tensor, long long i)
{
    return tensor.is_i32 ? static_cast<const int *>(tensor.data)[i]
                         : static_cast<const long long *>(tensor.data)[i];
}

/* Some rows of V of one head of one sequence: the work of a CTA. */
struct Work {
    int sequence, head;
    int first_row; /* of V */
};

__device__ __forceinline__ Work find_work(int heads, int split)
{
    const unsigned cta = blockIdx.x, index = cta >> split, n = index / static_cast<unsigned>(heads),
                   part = cta & ((1u << split) - 1);
    return {static_cast<int>(n), static_cast<int>(index - n * static_cast<unsigned>(heads)),
            static_cast<int>(part * (DIM >> split))};
}

struct Sequence {
    long long batch, begin; /* its first token in the tensors */
    int length;             /* tokens, at most 16 */
    long long left_out;     /* tokens behind these */
};

__device__ __forceinline__ long long clamp(long long x, long long least, long long most)
{
    return x < least ? least : x > most ? most : x;
}

__device__ __forceinline__ Sequence find_sequence(const fkda_decode_args &args, int n)
{
    if (!args.cu_seqlens.data) return {n, 0, static_cast<int>(clamp(args.tokens, 0, MAX_TOKENS)), 0};
    const long long begin = clamp(read_index(args.cu_seqlens, n), 0, args.tokens),
                    end = clamp(read_index(args.cu_seqlens, n + 1LL), begin, args.tokens);
    const int length = static_cast<int>(clamp(end - begin, 0, MAX_TOKENS));
    return {0, begin, length, end - begin - length};
}

/* Makes the compiler find addresses again where it needs them. It would keep them in registers otherwise, and
 * the state leaves none for that. */
__device__ __forceinline__ void forget_addresses(Work &work, Sequence &sequence)
{
    forget(work.sequence), forget(work.head);
    forget(sequence.batch), forget(sequence.begin);
}

/* Where a head's row of token i of a sequence begins, in elements of the tensor. */
__device__ __forceinline__ long long find_row(const fkda_token_strides &strides, const Sequence &sequence,
                                              long long i, int head)
{
    return sequence.batch * strides.batch + (sequence.begin + i) * strides.token + head * strides.head;
}

__device__ __forceinline__ long long check_slot(long long slot, long long first, const fkda_state_args &state)
{
    return slot >= first && slot >= 0 && slot < state.slots ? slot : NO_SLOT;
}

/* Where a head's state of a slot begins, in elements of the pool. */
__device__ __forceinline__ long long find_state(const fkda_state_args &state, long long slot, int head)
{
    return slot * state.slot_stride + head * (static_cast<long long>(DIM) * DIM);
}

/* The slot that sequence n starts from, or NO_SLOT: the sequence has no state. */
__device__ __forceinline__ long long find_start_slot(const fkda_decode_args &args, int n)
{
    const fkda_index_args &indices = args.state_indices;
    if (!indices.data) return check_slot(n, 0, args.state);
    long long column = 0;
    if (args.num_accepted_tokens.data)
        column = clamp(read_index(args.num_accepted_tokens, n), 1, indices.columns) - 1;
    return check_slot(read_index(indices, static_cast<long long>(n) * indices.columns + column),
                      args.first_slot, args.state);
}

/* The slot that gets the state after token i of sequence n with FLASH_KDA_WRITE_EACH, or NO_SLOT. */
__device__ __forceinline__ long long find_slot_after(const fkda_decode_args &args, int n, int i)
{
    const fkda_index_args &indices = args.state_indices;
    if (i >= indices.columns) return NO_SLOT;
    return check_slot(read_index(indices, static_cast<long long>(n) * indices.columns + i), args.first_slot,
                      args.state);
}

/* With written_states: their slot that gets the state after token i of sequence n, or NO_SLOT. With
 * FLASH_KDA_WRITE_LAST token i is the last one. */
__device__ __forceinline__ long long find_written_slot(const fkda_decode_args &args, int n,
                                                       const Sequence &sequence, int i)
{
    const fkda_index_args &indices = args.written_indices;
    const bool each = args.write_states == FLASH_KDA_WRITE_EACH;
    long long slot = n;
    if (indices.data) {
        if (each && i >= indices.columns) return NO_SLOT;
        slot = read_index(indices, static_cast<long long>(n) * indices.columns + (each ? i : 0));
    } else if (each) {
        slot = sequence.batch * args.tokens + sequence.begin + i;
    }
    return check_slot(slot, 0, args.written);
}

/* The slot of args.written that gets the state after token i of sequence n, with FLASH_KDA_WRITE_EACH, or
 * NO_SLOT. */
__device__ __forceinline__ long long find_slot_of_each(const fkda_decode_args &args, int n,
                                                       const Sequence &sequence, int i)
{
    return args.has_written_states ? find_written_slot(args, n, sequence, i) : find_slot_after(args, n, i);
}

/* Where a head's last state goes, in elements of args.written, with FLASH_KDA_WRITE_LAST. Without
 * written_states it is where the starting state begins, which is `at`. Returns false if it goes nowhere. */
__device__ __forceinline__ bool find_last_state(const fkda_decode_args &args, const Work &work,
                                                const Sequence &sequence, long long &at)
{
    if (!args.has_written_states) return true;
    const long long slot = find_written_slot(args, work.sequence, sequence, 0);
    at = find_state(args.written, slot, work.head);
    return slot != NO_SLOT;
}

/* The token before token i of sequence n, which is less than i; below 0: the starting state. */
__device__ __forceinline__ int find_parent(const fkda_decode_args &args, int n, int i)
{
    if (!args.parents.data || i >= args.parents.columns) return i - 1;
    return static_cast<int>(
        clamp(read_index(args.parents, static_cast<long long>(n) * args.parents.columns + i), -1, i - 1));
}

/* One of the three rows of the record of token i of sequence n, or null: there is no record. */
__device__ __forceinline__ float *find_record(const fkda_decode_args &args, const Work &work, int i, int row)
{
    if (!args.records || i >= args.record_columns) return nullptr;
    const long long token = static_cast<long long>(work.sequence) * args.record_columns + i;
    return args.records + ((token * args.heads + work.head) * 3 + row) * DIM;
}

/* Writes one output of token i. */
__device__ __forceinline__ void store_output(const fkda_decode_args &args, const Work &work,
                                             const Sequence &sequence, int i, int row, float x)
{
    static_cast<uint16_t *>(args.out)[find_row(args.out_strides, sequence, i, work.head) + row] =
        static_cast<uint16_t>(pack_bf16(x, 0.0f));
}

/* Writes zeros as the outputs of tokens from token `first` to token `end` - 1, in the CTA's rows. */
__device__ __forceinline__ void clear_outputs(const fkda_decode_args &args, const Work &work,
                                              const Sequence &sequence, long long first, long long end)
{
    const int rows = DIM >> args.split, threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (long long i = first; i < end; i++)
#pragma unroll 1
        for (int row = static_cast<int>(threadIdx.x); row < rows; row += threads)
            static_cast<uint16_t *>(
                args.out)[find_row(args.out_strides, sequence, i, work.head) + work.first_row + row] = 0;
}

/* What a sequence without a state gets: zeros as outputs and records. */
__device__ __forceinline__ void clear_sequence(const fkda_decode_args &args, const Work &work,
                                               const Sequence &sequence)
{
    clear_outputs(args, work, sequence, 0, sequence.length + sequence.left_out);
#pragma unroll 1
    for (int i = 0; i < sequence.length && work.first_row == 0; i++)
        if (float *record = find_record(args, work, i, 0))
            for (int at = static_cast<int>(threadIdx.x); at < 3 * DIM; at += static_cast<int>(blockDim.x))
                record[at] = 0.0f;
}

} // namespace fkda

#endif
