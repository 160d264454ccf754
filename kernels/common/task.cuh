/* The size of a head, and which tokens a head of a sequence covers, for all kernels. */
#ifndef FKDA_TASK_CUH
#define FKDA_TASK_CUH

#include <stdint.h>

#include "fwd_args.h"

namespace fkda
{

constexpr int DIM = 128; /* channels of K and rows of V */

/* One head of one sequence. */
struct Task {
    int head;
    long long begin; /* first token, counted over the whole tensor */
    int length;      /* tokens */
    int chunks;
};

/* Where sequence n begins. Borders outside of the tensor, from a wrong cu_seqlens, are moved to its ends. */
__device__ inline long long sequence_border(const fkda_fwd_args &args, long long n)
{
    long long border = args.cu_seqlens_is_i32 ? static_cast<const int *>(args.cu_seqlens)[n]
                                              : static_cast<const long long *>(args.cu_seqlens)[n];
    return min(max(border, 0LL), args.tokens);
}

/* A head of a sequence, in chunks of `chunk` tokens. Each border is read once, so that the task lies within
 * the tensor even if cu_seqlens changes meanwhile. Two calls may then find different tasks: roles that must
 * agree take the task from one call. */
__device__ inline Task find_task(const fkda_fwd_args &args, int sequence, int head, int chunk)
{
    Task task;
    task.head = head;
    if (args.cu_seqlens) {
        task.begin = sequence_border(args, sequence);
        task.length = static_cast<int>(max(sequence_border(args, sequence + 1LL) - task.begin, 0LL));
    } else {
        task.begin = sequence * args.tokens;
        task.length = static_cast<int>(args.tokens);
    }
    task.chunks = (task.length + chunk - 1) / chunk;
    return task;
}

} // namespace fkda

#endif
