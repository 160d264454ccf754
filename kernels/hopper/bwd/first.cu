/*
 * The gradient with respect to the initial state of each head of a sequence, from the gradient with respect
 * to the state after its first chunk of 32 tokens. The walk over D has left that one as an image
 * (chunks/chunk_args.h), and a sequence without a token behind its first chunk has dfinal_state instead.
 *
 * The walk over D has decayed tiles in fp16, which lose what is smaller than 2^-24. If the tokens of a chunk
 * forget much, the whole gradient with respect to the initial state may be that small. The kernel here goes
 * through chunks of 16 tokens with tf32 products, which have the range of fp32, as the kernel "portable" does
 * (../../backward/rows.cuh).
 */
#include "../../backward/walk.cuh"
#include "../ptx/control.cuh"
#include "chunks/chunk_args.h"

namespace fkda
{

/* The warp's rows of an image. */
__device__ __forceinline__ void load_image(Rows &rows, const unsigned char *image, const Place &p)
{
    const float *const scales = reinterpret_cast<const float *>(image + 2 * DIM * DIM);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = p.first + p.g + 8 * i;
        const float scale = scales[row];
#pragma unroll
        for (int unit = 0; unit < DIM / 8; unit++) {
            const uint32_t two =
                *reinterpret_cast<const uint32_t *>(image + 2 * DIM * row + 16 * (unit ^ row % 8) + 4 * p.t);
            rows.x[unit][2 * i] = half_low(two) * scale;
            rows.x[unit][2 * i + 1] = half_high(two) * scale;
        }
    }
}

/* The gradient with respect to the state after the first chunk. */
__device__ __forceinline__ void load_gradient(Rows &rows, const fkda_hopper_chunk_args &args,
                                              const Piece &piece)
{
    const Place p = place();
    const fkda_bwd_args &b = args.bwd;
    if (piece.task.length > FKDA_HOPPER_BWD_CHUNK)
        load_image(rows,
                   args.gradients + (piece.slot * b.fwd.heads + piece.task.head) * FKDA_HOPPER_BORDER_IMAGE,
                   p);
    else if (b.dfinal_state.data)
        rows.load(state_memory(b.dfinal_state, b.dfinal_is_bf16, b.fwd.state_k_first, piece.sequence,
                               piece.task.head),
                  p.first, p.g, p.t);
    else
        rows.clear();
}

__device__ __forceinline__ void store_k_first(const Rows &rows, float *to, const Place &p)
{
    to += (p.first + p.g) + 2 * p.t * DIM;
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) to[(8 * (i / 4) + i % 2) * DIM + i % 4 / 2 * 8] = rows.x[i / 4][i % 4];
}

/* CTA i has head i % HV of sequence i / HV. The next kernel may start early: it computes chunks, beside these
 * few CTAs. */
__device__ inline void go_back_over_first_chunk(const fkda_hopper_chunk_args &args)
{
    let_next_kernel_start();
    Shared &s = *reinterpret_cast<Shared *>(cta_memory());
    const fkda_bwd_args &b = args.bwd;
    const int head = blockIdx.x % b.fwd.heads;
    if (threadIdx.x == 0) find_piece(s.piece, b, blockIdx.x / b.fwd.heads, head);
    load_gate(s.gate, b.fwd, head);
    __syncthreads();
    Rows gradient;
    load_gradient(gradient, args, s.piece);
    const int chunks = min(s.piece.task.chunks, FKDA_HOPPER_BWD_CHUNK / CHUNK);
    Reader reader(s, b);
    if (chunks) reader.begin<BACKWARDS>(chunks - 1);
    for (int chunk = chunks - 1; chunk >= 0; chunk--)
        step_back<true>(gradient, s, b, reader, chunk, chunk > 0);
    const Place p = place();
    float *const to = static_cast<float *>(b.dinitial_state.data) +
                      s.piece.sequence * b.dinitial_state.slot_stride +
                      head * (static_cast<long long>(DIM) * DIM);
    if (b.fwd.state_k_first)
        store_k_first(gradient, to, p);
    else
        gradient.store(to, p.first, p.g, p.t);
}

} // namespace fkda

extern "C" __global__ void __launch_bounds__(FKDA_BWD_THREADS, 1)
    fkda_hopper_bwd_first(const __grid_constant__ fkda_hopper_chunk_args args)
{
    fkda::go_back_over_first_chunk(args);
}
