/* The first launch: a CTA carries the state of a head of a sequence forwards, or the gradient with respect to
 * it backwards, and stores what is at the borders between segments. The two need nothing of each other. */
#ifndef FKDA_BACKWARD_WALK_CUH
#define FKDA_BACKWARD_WALK_CUH

#include "prepare.cuh"
#include "rows.cuh"

namespace fkda
{

/* Chunks of a segment. */
__device__ __forceinline__ int chunks_of_segment(const fkda_bwd_args &args)
{
    return static_cast<int>(static_cast<unsigned>(args.segment) / CHUNK);
}

/* Stores a state or a gradient of the segment that is `segment` after the first one. */
__device__ __forceinline__ void store_border(const Shared &s, const fkda_bwd_args &args, const Rows &rows,
                                             float *to, int segment)
{
    const Place p = place();
    const long long slot = s.piece.slot + segment;
    if (slot < args.slots) rows.store(to + border_offset(args, slot, s.piece.task.head), p.first, p.g, p.t);
}

__device__ inline void walk_forwards(Shared &s, const fkda_bwd_args &args)
{
    const fkda_fwd_args &f = args.fwd;
    const int last = (count_segments(args, s.piece.task) - 1) * chunks_of_segment(args);
    Rows state;
    if (f.initial_state.data) {
        const Place p = place();
        state.load(state_memory(f.initial_state, args.initial_is_bf16, f.state_k_first, s.piece.sequence,
                                s.piece.task.head),
                   p.first, p.g, p.t);
    } else {
        state.clear();
    }
    Reader reader(s, args);
    reader.begin<FORWARDS>(0);
    for (int chunk = 0; chunk < last; chunk++) {
        const Raw &raw = reader.receive(chunk);
        const float beta = reader.beta;
        if (chunk + 1 < last) reader.request<FORWARDS>(chunk + 1);
        Preparation<FORWARDS>(s, args, raw).run(chunk, beta);
        const Place p = place();
        float missed[2][4];
        find_missed(missed, state, s, raw, p.first, p.lane);
        write_state(state, missed, s, p.lane);
        if ((chunk + 1) % chunks_of_segment(args) == 0)
            store_border(s, args, state, args.states, (chunk + 1) / chunks_of_segment(args));
    }
}

/* `gradient` goes back over a chunk that was requested. wants_more: the chunk before it is requested, too.
 * all_bits: as in find_dx() and write_gradient(). */
template <bool all_bits>
__device__ __forceinline__ void step_back(Rows &gradient, Shared &s, const fkda_bwd_args &args,
                                          Reader &reader, int chunk, bool wants_more)
{
    const Raw &raw = reader.receive(chunk);
    const float beta = reader.beta;
    if (wants_more) reader.request<BACKWARDS>(chunk - 1);
    Preparation<BACKWARDS>(s, args, raw).run(chunk, beta);
    const Place p = place();
    float dx[2][4], dout[2][4], dr[2][4];
    find_dx<all_bits>(dx, dout, gradient, s, raw, p.first, p.lane);
    multiply_by_strengths(dr, dx, s, p.t);
    write_gradient<all_bits>(gradient, dout, dr, s, p.lane);
}

__device__ inline void walk_backwards(Shared &s, const fkda_bwd_args &args)
{
    Rows gradient;
    if (args.dfinal_state.data) {
        const Place p = place();
        gradient.load(state_memory(args.dfinal_state, args.dfinal_is_bf16, args.fwd.state_k_first,
                                   s.piece.sequence, s.piece.task.head),
                      p.first, p.g, p.t);
    } else {
        gradient.clear();
    }
    Reader reader(s, args);
    reader.begin<BACKWARDS>(s.piece.task.chunks - 1);
    for (int chunk = s.piece.task.chunks - 1; chunk >= chunks_of_segment(args); chunk--) {
        /* The kernel of the walks has no registers for products with all bits. */
        step_back<false>(gradient, s, args, reader, chunk, chunk > chunks_of_segment(args));
        if (chunk % chunks_of_segment(args) == 0)
            store_border(s, args, gradient, args.gradients, chunk / chunks_of_segment(args) - 1);
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
