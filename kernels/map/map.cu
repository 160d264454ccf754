/*
 * Maps of pieces of sequences, for compute capability 8.0 and newer:
 *
 *   fkda_states      writes the states from which a forward pass begins: identities, with which it makes maps
 *                    if v is zeros, or what a caller has in bf16 as fp32, since a forward pass has all states
 *                    in one type
 *   fkda_join_maps   carries a state through the maps of the pieces of a sequence
 *
 * Joining. With E_i the state that enters piece i as rows of V, M_i the map of piece i and S_i the state that
 * the piece makes of zeros,
 *
 *     E_(i+1) = E_i M_i + S_i            and backwards            E_(i-1) = E_i M_i^T + S_i
 *
 * Rows of E do not depend on each other, so a CTA carries 16 of them through all pieces, in fp32. A thread
 * has a column of the product. A piece's map comes to shared memory in parts of 32 depths. Depths are rows of
 * the matrix in memory or, with K first or backwards, its columns.
 */
#include "../common/elements.cuh"
#include "../common/ptx.cuh"
#include "../common/task.cuh"
#include "map_args.h"

namespace fkda
{

constexpr int JOIN_PART = 32;

struct JoinShared {
    float rows[FKDA_JOIN_MAP_ROWS][DIM];
    float part[DIM][JOIN_PART + 1]; /* column c of the product, depths of the part */
};
static_assert(sizeof(JoinShared) == FKDA_JOIN_MAP_SHARED_BYTES, "the host gives a CTA as much");

/* Where an element of a head's state lies. */
__device__ __forceinline__ int state_place(const fkda_join_args &args, int row, int column)
{
    return args.state_k_first ? column * DIM + row : row * DIM + column;
}

__device__ __forceinline__ long long place_of_piece(const fkda_piece_matrices &m, int piece, int head)
{
    return piece * m.stride + head * (static_cast<long long>(DIM) * DIM);
}

/* Depths `first` to `first` + 31 of the map. Neighbouring threads load neighbours in memory. */
__device__ __forceinline__ void load_part(JoinShared &s, const float *map, bool is_transposed, int first)
{
    const int thread = static_cast<int>(threadIdx.x);
    if (!is_transposed) {
        for (int d = 0; d < JOIN_PART; d++) s.part[thread][d] = map[(first + d) * DIM + thread];
        return;
    }
    for (int i = 0; i < DIM / (FKDA_JOIN_MAP_THREADS / JOIN_PART); i++) {
        const int column = i * (FKDA_JOIN_MAP_THREADS / JOIN_PART) + thread / JOIN_PART,
                  depth = thread % JOIN_PART;
        s.part[column][depth] = map[column * DIM + first + depth];
    }
}

/* The thread's column of rows times map. All threads meet. */
__device__ __forceinline__ void multiply(float (&sum)[FKDA_JOIN_MAP_ROWS], JoinShared &s, const float *map,
                                         bool is_transposed)
{
    for (int first = 0; first < DIM; first += JOIN_PART) {
        load_part(s, map, is_transposed, first);
        __syncthreads();
        for (int d = 0; d < JOIN_PART; d++) {
            const float x = s.part[threadIdx.x][d];
#pragma unroll
            for (int r = 0; r < FKDA_JOIN_MAP_ROWS; r++) sum[r] = __fmaf_rn(s.rows[r][first + d], x, sum[r]);
        }
        __syncthreads();
    }
}

/* CTA i has 16 rows of head i / 8. */
__device__ inline void join_maps(const fkda_join_args &args)
{
    constexpr int ROW_GROUPS = DIM / FKDA_JOIN_MAP_ROWS;
    JoinShared &s = *reinterpret_cast<JoinShared *>(cta_memory());
    const int head = static_cast<int>(blockIdx.x) / ROW_GROUPS,
              first_row = static_cast<int>(blockIdx.x) % ROW_GROUPS * FKDA_JOIN_MAP_ROWS,
              column = static_cast<int>(threadIdx.x);
    const long long of_head = head * (static_cast<long long>(DIM) * DIM);
    const bool is_transposed = (args.backwards != 0) != (args.state_k_first != 0);
    float own[FKDA_JOIN_MAP_ROWS];
#pragma unroll
    for (int r = 0; r < FKDA_JOIN_MAP_ROWS; r++) {
        const long long at = of_head + state_place(args, first_row + r, column);
        own[r] = !args.initial_state    ? 0.0f
                 : args.initial_is_bf16 ? bf16_low(static_cast<const uint16_t *>(args.initial_state)[at])
                                        : static_cast<const float *>(args.initial_state)[at];
    }
    for (int i = 0; i < args.pieces; i++) {
        const int piece = args.backwards ? args.pieces - 1 - i : i;
        const float *const states =
            static_cast<const float *>(args.states.data) + place_of_piece(args.states, piece, head);
        float *const entering = args.entering.data ? static_cast<float *>(args.entering.data) +
                                                         place_of_piece(args.entering, piece, head)
                                                   : nullptr;
        float sum[FKDA_JOIN_MAP_ROWS] = {};
#pragma unroll
        for (int r = 0; r < FKDA_JOIN_MAP_ROWS; r++) {
            s.rows[r][column] = own[r];
            if (entering) entering[state_place(args, first_row + r, column)] = own[r];
        }
        multiply(sum, s, static_cast<const float *>(args.maps.data) + place_of_piece(args.maps, piece, head),
                 is_transposed);
#pragma unroll
        for (int r = 0; r < FKDA_JOIN_MAP_ROWS; r++)
            own[r] = sum[r] + states[state_place(args, first_row + r, column)];
    }
    if (!args.final_state) return;
#pragma unroll
    for (int r = 0; r < FKDA_JOIN_MAP_ROWS; r++)
        args.final_state[of_head + state_place(args, first_row + r, column)] = own[r];
}

} // namespace fkda

extern "C" __global__ void __launch_bounds__(FKDA_JOIN_MAP_THREADS)
    fkda_join_maps(const __grid_constant__ fkda_join_args args)
{
    fkda::join_maps(args);
}

/* CTA i writes matrix i. */
extern "C" __global__ void __launch_bounds__(FKDA_STATES_THREADS)
    fkda_states(const __grid_constant__ fkda_states_args args)
{
    using fkda::DIM;
    constexpr long long MATRIX = DIM * DIM;
    const long long index = blockIdx.x;
    float *const to = args.to + index * MATRIX;
    const uint16_t *const from = static_cast<const uint16_t *>(args.from) +
                                 index / args.heads * args.from_stride + index % args.heads * MATRIX;
    for (int i = static_cast<int>(threadIdx.x); i < MATRIX; i += FKDA_STATES_THREADS)
        to[i] = args.from ? fkda::bf16_low(from[i]) : i / DIM == i % DIM ? 1.0f : 0.0f;
}
