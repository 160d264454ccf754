/*
 * The shared memory of the portable kernel, and the barriers at which its two roles meet.
 *
 * Named barriers, for stage s in 0 .. STAGES - 1:
 *
 *   barrier    arrives                waits                  what may happen then
 *   ---------  ---------------------  ---------------------  ----------------------------------------------
 *   0          all threads            all threads            the task and its addresses are read
 *   TEAM + s   team s                 team s                 the team goes on to its next step
 *   FULL + s   team s                 recurrence             stage s and its values are read
 *   EMPTY + s  recurrence             team s                 stage s and its values are overwritten
 */
#ifndef FKDA_PORTABLE_SHARED_CUH
#define FKDA_PORTABLE_SHARED_CUH

#include "../../include/flash_kda.h"
#include "../common/elements.cuh"
#include "../common/gate.cuh"
#include "../common/task.cuh"
#include "addresses.cuh"
#include "fwd_shape.h"

namespace fkda
{

constexpr int CHUNK = 16; /* tokens */
constexpr int STAGES = 2; /* prepared chunks; each stage has a team of warps that fills it */
constexpr int TEAM_WARPS = FKDA_PORTABLE_PREPARE_THREADS / 32 / STAGES;
constexpr int TEAM_THREADS = 32 * TEAM_WARPS;
constexpr int V_STAGES = 2 * STAGES; /* tiles of values, which are loaded one round of the stages ahead */

/*
 * A prepared chunk in fp32. With G the running sum of the log decay, and tokens i, j:
 *
 *   minus_k_decayed[i] = -k_i exp(G_i)           q_decayed[i] = q_i exp(G_i)
 *   k_rest             = k_j exp(G_last - G_j), in the order of the state update's B fragments: element [j /
 *                        2][9 s + n] holds tokens j and j + 1 of channel c(n), then tokens j and j + 1 of
 *                        channel c(n) + 2, where c(n) = 16 s + 4 * (n / 2) + n % 2
 *   solve              = T = (I + L)^-1 diag(b)
 *   attend             = P = tril(q_i k_j exp(G_i - G_j))
 *   gamma_minus_1      = exp(G_last) - 1
 *
 * All but gamma_minus_1 carry the factor UNTRUNCATE. The padding of rows and the three functions below keep
 * the loads of the recurrence free of bank conflicts, and the stores of the preparation to two wavefronts
 * more than the fewest.
 */
struct Stage {
    float minus_k_decayed[CHUNK][DIM + 16];
    float q_decayed[CHUNK][DIM + 16];
    float4 k_rest[CHUNK / 2][DIM / 16 * 9 + 2];
    float solve[CHUNK][CHUNK + 8];
    float attend[CHUNK][CHUNK + 8];
    float gamma_minus_1[DIM];
    int is_checkpoint; /* the state after the chunk is one */
};

/* The scratch of a team. */
struct Scratch {
    float products[TEAM_WARPS][2][CHUNK][CHUNK]; /* K~ K^^T and Q~ K^^T over each warp's channels */
    float4 squares[TEAM_WARPS][CHUNK / 2]; /* sums: q, k of an even token, q, k of the odd token after it */
    float l_columns[CHUNK][CHUNK + 4];     /* L, transposed */
    float beta[CHUNK];
    float gate_slope[TEAM_WARPS]; /* each warp has its own */
    int first_bad[TEAM_WARPS];    /* the first bad token (bad_tokens.cuh) that each warp knows of */
    float gate_offset[DIM];
    int checkpoint; /* the next one after the team's last chunk, in tokens, or NO_CHECKPOINT */
};

/* The column of four channels of a row in minus_k_decayed and q_decayed. */
__device__ __forceinline__ int decayed_column(int row, int channel)
{
    return channel ^ ((row & 6) << 1);
}

/* The column of eight rows of V of a token in v. */
__device__ __forceinline__ int value_column(int token, int row)
{
    return row ^ ((token & 7) << 3);
}

/* The row of a token in products. */
__device__ __forceinline__ int product_row(int row)
{
    return row ^ (row >> 1 & 1);
}

struct Shared {
    Stage stage[STAGES];
    Scratch scratch[STAGES];
    __nv_bfloat16 v[V_STAGES][CHUNK][DIM];
    __align__(16) Task task; /* of the CTA */
    Addresses addresses;
};
static_assert(sizeof(Shared) == FKDA_PORTABLE_SHARED_BYTES, "keep fwd_shape.h in step");

/* The first named barriers of the three sorts, see the table above. */
enum Barrier { TEAM = 1, FULL = TEAM + STAGES, EMPTY = FULL + STAGES };

/* The threads that meet at FULL and EMPTY: a team and the recurrence. */
template <int rows>
constexpr int STAGE_THREADS = TEAM_THREADS + FKDA_PORTABLE_THREADS(rows) - FKDA_PORTABLE_PREPARE_THREADS;

/* Which of n slots a chunk uses. */
template <int n> __device__ __forceinline__ int slot(int chunk)
{
    return static_cast<unsigned>(chunk) % n;
}

} // namespace fkda

#endif
