/* What the two roles of the portable kernel share: the task, the tiles in shared memory, the barriers. */
#ifndef FKDA_PORTABLE_SHARED_CUH
#define FKDA_PORTABLE_SHARED_CUH

#include "../common/elements.cuh"
#include "../common/task.cuh"
#include "fwd_shape.h"

namespace fkda
{

constexpr int CHUNK = 16; /* tokens */
constexpr int STAGES = 2; /* prepared chunks, each with a group of warps that prepares it */
constexpr int GROUP_WARPS = FKDA_PORTABLE_PREPARE_THREADS / 32 / STAGES;
constexpr int GROUP_THREADS = 32 * GROUP_WARPS;
constexpr int V_STAGES = 2 * STAGES; /* value tiles, loaded ahead by a turn of the stages */

/* A prepared chunk in fp32. With G the running sum of the log decay, rows i, j:
 *   minus_k_decayed[i] = -k_i exp(G_i)           q_decayed[i] = q_i exp(G_i)
 *   k_rest: k_j exp(G_last - G_j), as the state update's B fragments: element [j / 2][9 * group + n] holds
 *           tokens j, j + 1 of channel c(n), then tokens j, j + 1 of channel c(n) + 2, where
 *           c(n) = 16 * group + 4 * (n / 2) + n % 2
 *   solve  = (I + L)^-1 diag(b)                  attend = tril(q_i k_j exp(G_i - G_j))
 *   gamma_minus_1 = exp(G_last) - 1
 * All but the last carry UNTRUNCATE. Row paddings and the column functions below make both the stores of the
 * preparation and the fragment loads of the recurrence free of bank conflicts. */
struct Stage {
    float minus_k_decayed[CHUNK][DIM + 16];
    float q_decayed[CHUNK][DIM + 16];
    float4 k_rest[CHUNK / 2][DIM / 16 * 9 + 2];
    float solve[CHUNK][CHUNK + 8];
    float attend[CHUNK][CHUNK + 8];
    float gamma_minus_1[DIM];
};

/* Scratch of a group of preparing warps. */
struct Scratch {
    float products[GROUP_WARPS][2][CHUNK][CHUNK]; /* K~ K^^T and Q~ K^^T over one warp's channels */
    float4 squares[GROUP_WARPS][CHUNK / 2];       /* of q, k of an even token, then of the odd one after */
    float l_columns[CHUNK][CHUNK + 4];            /* L transposed */
    float beta[CHUNK];
    float gate_factor[GROUP_WARPS]; /* -exp(A_log) log2(e), to each warp its own */
    float gate_offset[DIM];         /* that times dt_bias */
};

/* Where four channels of a row are in minus_k_decayed and q_decayed. */
__device__ __forceinline__ int decayed_column(int row, int channel)
{
    return channel ^ ((row & 6) << 1);
}

/* Where eight rows of V of a token are in v. */
__device__ __forceinline__ int value_column(int token, int row)
{
    return row ^ ((token & 7) << 3);
}

/* Where a row of a product over channels is. */
__device__ __forceinline__ int product_row(int row)
{
    return row ^ (row >> 1 & 1);
}

struct Shared {
    Stage stage[STAGES];
    Scratch scratch[STAGES];
    __nv_bfloat16 v[V_STAGES][CHUNK][DIM];
};
static_assert(sizeof(Shared) == FKDA_PORTABLE_SHARED_BYTES, "keep fwd_shape.h in step");

/* Named barriers; 0 is __syncthreads'. A stage is full when its group and the recurrence have both reached
 * FULL + stage, and empty again when both have reached EMPTY + stage; one of them waits, the other only
 * arrives. GROUP + stage is the group's own. */
enum Barrier { GROUP = 1, FULL = GROUP + STAGES, EMPTY = FULL + STAGES };
template <int rows>
constexpr int STAGE_THREADS = GROUP_THREADS + FKDA_PORTABLE_THREADS(rows) - FKDA_PORTABLE_PREPARE_THREADS;

/* Which of n slots a chunk uses. */
template <int n> __device__ __forceinline__ int slot(int chunk)
{
    return static_cast<unsigned>(chunk) % n;
}

} // namespace fkda

#endif
