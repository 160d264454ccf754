/* What the two roles of the portable kernel share: the task, the tiles in shared memory, the barriers. */
#ifndef FKDA_PORTABLE_SHARED_CUH
#define FKDA_PORTABLE_SHARED_CUH

#include "../common/ptx.cuh"
#include "fwd_args.h"
#include "fwd_shape.h"

namespace fkda {

constexpr int CHUNK = 16; /* tokens */
constexpr int DIM = 128;  /* K and V */
constexpr int PREPARE_WARPS = FKDA_PORTABLE_PREPARE_WARPS;
constexpr int PREPARE_THREADS = 32 * PREPARE_WARPS;
constexpr int THREADS = FKDA_PORTABLE_THREADS;
constexpr int STAGES = 2;   /* prepared chunks */
constexpr int V_STAGES = 3; /* value tiles, loaded one chunk further ahead */

/* A prepared chunk, all in fp32 rounded to tf32. With G the running sum of the log decay, rows i, j:
 *   minus_k_decayed[i] = -k_i exp(G_i)           q_decayed[i] = scale q_i exp(G_i)
 *   k_rest: k_j exp(G_last - G_j), as the state update's B fragments: element [j / 2][8 * group + n] holds
 *           tokens j, j + 1 of channel c(n), then tokens j, j + 1 of channel c(n) + 2, where
 *           c(n) = 16 * group + 4 * (n / 2) + n % 2
 *   solve  = (I + L)^-1 diag(b)                  attend = tril(q_i k_j exp(G_i - G_j))
 *   gamma  = exp(G_last)
 * The row paddings make the fragment loads free of bank conflicts. */
struct Stage {
    float minus_k_decayed[CHUNK][DIM + 16];
    float q_decayed[CHUNK][DIM + 16];
    float4 k_rest[CHUNK / 2][DIM / 2 + 2];
    float solve[CHUNK][CHUNK + 8];
    float attend[CHUNK][CHUNK + 8];
    float gamma[DIM];
};

struct Shared {
    Stage stage[STAGES];
    __nv_bfloat16 v[V_STAGES][CHUNK][DIM + 8];
    /* scratch of the preparation: */
    float partial[PREPARE_WARPS][2][CHUNK][CHUNK]; /* K~ K^^T and Q~ K^^T over one warp's channels */
    float4 squares[PREPARE_WARPS][CHUNK / 2];      /* of q, k of an even token, then of the odd one after */
    float l_columns[CHUNK][CHUNK + 4];             /* L transposed */
    float beta[CHUNK];
};
static_assert(sizeof(Shared) == FKDA_PORTABLE_SHARED_BYTES, "keep fwd_shape.h in step");

/* Barriers 0 is __syncthreads'. A stage is full when both roles have reached FULL + stage, and empty again
 * when both have reached EMPTY + stage; on each, one role waits and the other only arrives. */
enum Barrier { PREPARE = 1, FULL = 2, EMPTY = FULL + STAGES };

/* One head of one sequence. */
struct Task {
    int head;
    long long index; /* sequence * heads + head */
    long long begin; /* first token, counted over the whole tensor */
    int length;      /* tokens */
    int chunks;
};

__device__ inline long long sequence_border(const fkda_portable_args &args, long long n)
{
    long long border = args.cu_seqlens_is_i32 ? static_cast<const int *>(args.cu_seqlens)[n]
                                              : static_cast<const long long *>(args.cu_seqlens)[n];
    return min(max(border, 0LL), args.tokens);
}

__device__ inline Task find_task(const fkda_portable_args &args)
{
    Task task;
    int sequence = blockIdx.x / args.heads;
    task.head = blockIdx.x % args.heads;
    task.index = blockIdx.x;
    if (args.cu_seqlens) {
        task.begin = sequence_border(args, sequence);
        task.length = static_cast<int>(max(sequence_border(args, sequence + 1LL) - task.begin, 0LL));
    } else {
        task.begin = sequence * args.tokens;
        task.length = static_cast<int>(args.tokens);
    }
    task.chunks = (task.length + CHUNK - 1) / CHUNK;
    return task;
}

} // namespace fkda

#endif
