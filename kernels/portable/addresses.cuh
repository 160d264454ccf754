/*
 * Where a head of a sequence is in the tensors of a call. One thread of a CTA finds this before the roles
 * begin, and the roles read it from shared memory where they need it, so that no address occupies registers
 * from the first chunk to the last one.
 */
#ifndef FKDA_PORTABLE_ADDRESSES_CUH
#define FKDA_PORTABLE_ADDRESSES_CUH

#include "../common/checkpoints.cuh"
#include "../common/slots.cuh"
#include "../common/task.cuh"

namespace fkda
{

struct Addresses {
    /* The head's row of the task's first token. */
    const char *q, *k, *v, *g, *beta;
    char *out;
    /* In elements of the tensors; or NO_SLOT. */
    long long initial_state, final_state;
    long long first_checkpoint_row; /* with checkpoint_every */
    int sequence;
};

/* Bytes from the start of a tensor to a head's row of the first token of a task. */
__device__ inline long long find_row(const fkda_fwd_args &args, const fkda_token_strides &strides,
                                     int sequence, long long begin, int head, int element_bytes)
{
    /* With cu_seqlens there is one row of the batch. */
    const long long token = args.cu_seqlens ? begin * strides.token : sequence * strides.batch;
    return (token + head * strides.head) * element_bytes;
}

__device__ inline Addresses find_addresses(const fkda_fwd_args &args, const Task &task, int sequence)
{
    const auto row = [&](const void *tensor, const fkda_token_strides &strides, int head, bool is_f32) {
        return static_cast<const char *>(tensor) +
               find_row(args, strides, sequence, task.begin, head, is_f32 ? 4 : 2);
    };
    const int head = task.head, qk_head = head / args.group;
    Addresses a;
    a.q = row(args.q, args.q_strides, qk_head, false);
    a.k = row(args.k, args.k_strides, qk_head, false);
    a.v = row(args.v, args.v_strides, head, false);
    a.g = row(args.g, args.g_strides, head, args.g_is_f32);
    a.beta = row(args.beta, args.beta_strides, head, args.beta_is_f32);
    a.out = const_cast<char *>(row(args.out, args.out_strides, head, false));
    a.initial_state = find_initial_state(args, sequence, head);
    a.final_state = find_final_state(args, sequence, head);
    a.first_checkpoint_row = 0;
    if (args.checkpoints.states.data && args.checkpoints.every)
        a.first_checkpoint_row = first_checkpoint_row(args, sequence);
    a.sequence = sequence;
    return a;
}

} // namespace fkda

#endif
