/* What every kernel shares about the problem: the size of a head, and which tokens a task covers. */
#ifndef FKDA_TASK_CUH
#define FKDA_TASK_CUH

#include <stdint.h>

#include "fwd_args.h"

namespace fkda
{

constexpr int DIM = 128; /* K and V */

/* One head of one sequence. */
struct Task {
    int head;
    long long begin; /* first token, counted over the whole tensor */
    int length;      /* tokens */
    int chunks;
};

__device__ inline long long sequence_border(const fkda_fwd_args &args, long long n)
{
    long long border = args.cu_seqlens_is_i32 ? static_cast<const int *>(args.cu_seqlens)[n]
                                              : static_cast<const long long *>(args.cu_seqlens)[n];
    return min(max(border, 0LL), args.tokens);
}

/* A head of a sequence; `chunk`: tokens of a chunk. */
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
