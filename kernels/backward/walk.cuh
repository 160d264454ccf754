/* The first launch: a CTA carries the state of a head of a sequence forwards, or the gradient with respect to
 * it backwards, and stores what is at the borders between segments. The two need nothing of each other. */
#ifndef FKDA_BACKWARD_WALK_CUH
#define FKDA_BACKWARD_WALK_CUH

#include "prepare.cuh"
#include "rows.cuh"

namespace fkda
{

__device__ inline void walk_forwards(Shared &s, const fkda_bwd_args &args)
{
    const fkda_fwd_args &f = args.fwd;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first_row = threadIdx.x / 32 * 16;
    const int head = s.piece.task.head, of_segment = args.segment / CHUNK,
              last = (count_segments(args, s.piece.task) - 1) * of_segment;
    Rows state;
    state.clear();
    if (f.initial_state.data)
        state.load(
            state_memory(f.initial_state, args.initial_is_bf16, f.state_k_first, s.piece.sequence, head),
            first_row, g, t);
    Reader reader(s, args);
    reader.begin<FORWARDS>(0);
    for (int chunk = 0; chunk < last; chunk++) {
        float missed[2][4];
        const Raw &raw = reader.receive(chunk);
        const float beta = reader.beta;
        if (chunk + 1 < last) reader.request<FORWARDS>(chunk + 1);
        Preparation<FORWARDS>(s, args, raw).run(chunk, beta);
        find_missed(missed, state, s, raw, first_row, lane);
        write_state(state, missed, s, lane);
        if ((chunk + 1) % of_segment) continue;
        const long long slot = s.piece.slot + (chunk + 1) / of_segment;
        if (slot < args.slots) state.store(args.states + border_offset(args, slot, head), first_row, g, t);
    }
}

__device__ inline void walk_backwards(Shared &s, const fkda_bwd_args &args)
{
    const fkda_fwd_args &f = args.fwd;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first_row = threadIdx.x / 32 * 16;
    const int head = s.piece.task.head, of_segment = args.segment / CHUNK;
    Rows gradient;
    gradient.clear();
    if (args.dfinal_state.data)
        gradient.load(
            state_memory(args.dfinal_state, args.dfinal_is_bf16, f.state_k_first, s.piece.sequence, head),
            first_row, g, t);
    Reader reader(s, args);
    reader.begin<BACKWARDS>(s.piece.task.chunks - 1);
    for (int chunk = s.piece.task.chunks - 1; chunk >= of_segment; chunk--) {
        float dx[2][4], dout[2][4], dr[2][4];
        const Raw &raw = reader.receive(chunk);
        const float beta = reader.beta;
        if (chunk > of_segment) reader.request<BACKWARDS>(chunk - 1);
        Preparation<BACKWARDS>(s, args, raw).run(chunk, beta);
        find_dx(dx, dout, gradient, s, raw, first_row, lane);
        multiply_by_strengths(dr, dx, s, t);
        write_gradient(gradient, dout, dr, s, lane);
        if (chunk % of_segment) continue;
        const long long slot = s.piece.slot + chunk / of_segment - 1;
        if (slot < args.slots)
            gradient.store(args.gradients + border_offset(args, slot, head), first_row, g, t);
    }
}

/* CTAs 2 i and 2 i + 1 have head i % HV of sequence i / HV. */
__device__ inline void walk(const fkda_bwd_args &args)
{
    Shared &s = *reinterpret_cast<Shared *>(cta_memory());
    const int index = blockIdx.x / 2, head = index % args.fwd.heads;
    if (threadIdx.x == 0) find_piece(s.piece, args, index / args.fwd.heads, head);
    load_gate(s.gate, args.fwd, head);
    __syncthreads();
    if (count_segments(args, s.piece.task) < 2) return;
    if (blockIdx.x % 2)
        walk_backwards(s, args);
    else
        walk_forwards(s, args);
}

} // namespace fkda

#endif
