/*
 * The second launch: all gradients of a segment of a head. Segments are independent, because the first launch
 * has left the state before each of them and the gradient with respect to the state after it.
 *
 * Algorithm. Three walks over the segment's chunks:
 *
 *     forwards    finds the state before each chunk, and what it does not predict
 *     back        finds dR by rows of V, which is dv, and dbeta
 *     back again  finds dq, dk and dg by channels of K
 *
 * The walks leave what the next ones need in the CTA's records. Each has one state or gradient of a state in
 * registers. CTAs take one segment after the other, so that there is one set of records for each CTA that
 * runs.
 */
#ifndef FKDA_BACKWARD_GRADIENTS_CUH
#define FKDA_BACKWARD_GRADIENTS_CUH

#include "channels.cuh"
#include "columns.cuh"
#include "outputs.cuh"
#include "walk.cuh"

namespace fkda
{

struct Gradients {
    /* Where values begin in a record. */
    enum { MISSED = DIM * DIM, DR = MISSED + CHUNK * DIM };

    const fkda_bwd_args &args;
    Shared &s;
    const Outputs outputs;

    __device__ Gradients(const fkda_bwd_args &a, Shared &shared)
        : args(a), s(shared), outputs{a, shared.piece}
    {
    }

    /* ---- Memory ---- */

    /* The first chunk of the segment. No register keeps this number between uses. */
    __device__ int first_chunk() const
    {
        return s.piece.segment * chunks_of_segment(args);
    }

    __device__ float *record(int chunk_of_segment) const
    {
        return args.records +
               (static_cast<long long>(blockIdx.x) * chunks_of_segment(args) + chunk_of_segment) *
                   FKDA_BWD_RECORD;
    }

    __device__ static void store_values(float *to, const float (&x)[2][4], int thread)
    {
#pragma unroll
        for (int i = 0; i < 2; i++)
            store_four(to + 4 * (THREADS * i + thread), x[i][0], x[i][1], x[i][2], x[i][3]);
    }

    __device__ static void load_values(float (&x)[2][4], const float *from, int thread)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 four = *reinterpret_cast<const float4 *>(from + 4 * (THREADS * i + thread));
            x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
        }
    }

    /* ---- The walks ---- */

    /* Stores the state before each chunk, and what it does not predict. */
    __device__ void walk_forwards(Reader &reader, int begin, int end) const
    {
        const Place p = place();
        const fkda_fwd_args &f = args.fwd;
        const int head = s.piece.task.head;
        Rows state;
        if (s.piece.segment > 0) {
            const long long slot = s.piece.slot + s.piece.segment;
            state.load(args.states + border_offset(args, slot, head), p.first, p.g, p.t);
        } else if (f.initial_state.data) {
            state.load(
                state_memory(f.initial_state, args.initial_is_bf16, f.state_k_first, s.piece.sequence, head),
                p.first, p.g, p.t);
        } else {
            state.clear();
        }
        reader.begin<FORWARDS>(begin);
        for (int chunk = begin; chunk < end; chunk++) {
            float missed[2][4], *const to = record(chunk - begin);
            const Raw &raw = reader.receive(chunk);
            const float beta = reader.beta;
            if (chunk + 1 < end) reader.request<FORWARDS>(chunk + 1);
            Preparation<FORWARDS>(s, args, raw).run(chunk, beta);
            state.store(to, p.first, p.g, p.t);
            find_missed(missed, state, s, raw, p.first, p.lane);
            store_values(to + MISSED, missed, p.thread);
            if (chunk + 1 < end) write_state(state, missed, s, p.lane);
        }
    }

    /* By rows of V: dv and dbeta of each chunk. Records keep U, in place of what states do not predict, and
     * dR. */
    __device__ void walk_rows(Reader &reader, int end) const
    {
        Rows rows;
        load_gradient(rows);
        if (end > first_chunk()) reader.begin<BACKWARDS>(end - 1);
        for (int chunk = end - 1; chunk >= first_chunk(); chunk--) {
            const Raw &raw = reader.receive(chunk);
            const float beta = reader.beta;
            if (chunk > first_chunk()) reader.request<BACKWARDS>(chunk - 1);
            Preparation<BACKWARDS>(s, args, raw).run(chunk, beta);
            const Place p = place();
            float dx[2][4], dout[2][4], dr[2][4],
                missed[2][4], *const of_chunk = record(chunk - first_chunk());
            load_values(missed, of_chunk + MISSED, p.thread);
            find_dx<true>(dx, dout, rows, s, raw, p.first, p.lane);
            add_dbeta(s.dbeta[p.warp], dx, missed, p.g, p.t);
            multiply_by_strengths(dr, dx, s, p.t);
            multiply_by_strengths(missed, missed, s, p.t);
            store_values(of_chunk + MISSED, missed, p.thread);
            store_values(of_chunk + DR, dr, p.thread);
            outputs.store_dv(chunk, dr, p.first, p.g, p.t);
            write_gradient<true>(rows, dout, dr, s, p.lane);
            __syncthreads();
            outputs.store_dbeta(chunk, p.thread, s.dbeta, s.strength_slope);
        }
        const Place p = place();
        if (!args.fwd.state_k_first && dinitial_state()) rows.store(dinitial_state(), p.first, p.g, p.t);
    }

    __device__ void add_pairs() const
    {
        const Place p = place();
        const int i = p.thread / CHUNK, j = p.thread % CHUNK;
        s.pairs[i][j] = make_float2((s.products[0][0][i][j] + s.products[1][0][i][j]) * args.fwd.scale,
                                    -(s.products[0][1][i][j] + s.products[1][1][i][j]));
    }

    /* The gradient with respect to the state after the segment, into Rows or Columns. */
    template <class Part> __device__ void load_gradient(Part &part) const
    {
        const Place p = place();
        const int head = s.piece.task.head, segments = count_segments(args, s.piece.task);
        StateMemory from = state_memory(args.dfinal_state, args.dfinal_is_bf16, args.fwd.state_k_first,
                                        s.piece.sequence, head);
        if (s.piece.segment + 1 < segments) {
            const long long slot = s.piece.slot + s.piece.segment;
            from = {args.gradients, false, border_offset(args, slot, head), 1, DIM};
        }
        if (from.data)
            part.load(from, p.first, p.g, p.t);
        else
            part.clear();
    }

    /* Where the gradient with respect to the initial state goes, or null. */
    __device__ float *dinitial_state() const
    {
        if (s.piece.segment > 0 || !args.dinitial_state.data) return nullptr;
        return static_cast<float *>(args.dinitial_state.data) +
               s.piece.sequence * args.dinitial_state.slot_stride +
               s.piece.task.head * (static_cast<long long>(DIM) * DIM);
    }

    /* By channels of K: dq, dk and dg of each chunk, from the records. */
    __device__ void walk_columns(Reader &reader, int end, ParameterSums &sums) const
    {
        Columns columns;
        load_gradient(columns);
        if (end > first_chunk()) reader.begin<BACKWARDS>(end - 1);
        for (int chunk = end - 1; chunk >= first_chunk(); chunk--) {
            const Raw &raw = reader.receive(chunk);
            const Place p = place();
            const float *const of_chunk = record(chunk - first_chunk());
            if (chunk > first_chunk()) reader.request<BACKWARDS>(chunk - 1);
            float u[2][4], dr[2][4];
            load_values(u, of_chunk + MISSED, p.thread);
            load_values(dr, of_chunk + DR, p.thread);
            store_columns<true>(s.u, u, p.first, p.g, p.t);
            store_columns<true>(s.dr, dr, p.first, p.g, p.t);
            Preparation<BACKWARDS>(s, args, raw).run_without_products(chunk);
            columns.go_back(of_chunk, s, raw, args.fwd.scale, p.first, p.lane);
            multiply_by_writes(s, raw, p.warp, p.lane);
            __syncthreads();
            add_pairs();
            __syncthreads();
            const ChannelOfChunk<Raw> channel = {raw,
                                                 {args.fwd, s.gate, p.thread % DIM},
                                                 args.fwd.g_is_f32 != 0,
                                                 s.piece.task.length - chunk * CHUNK,
                                                 p.thread % DIM};
            const ChannelTiles tiles(s, s, s.u, s.dr);
            go_through_channels<WholeCta>(tiles, channel, p.thread, sums);
            __syncthreads();
            outputs.store_rows(raw, chunk, tiles, p.warp, p.lane);
        }
        const Place p = place();
        if (args.fwd.state_k_first && dinitial_state()) columns.store(dinitial_state(), p.first, p.g, p.t);
    }

    /* All of a segment. `slot` may be one that no sequence needs. */
    __device__ void run(long long slot, int head) const
    {
        const Place p = place();
        __syncthreads(); /* the previous segment is over */
        if (p.thread == 0) {
            find_piece(s.piece, args, sequence_of_slot(args, slot), head);
            s.piece.segment = static_cast<int>(slot - s.piece.slot);
        }
        load_gate(s.gate, args.fwd, head);
        __syncthreads();
        const int segment = s.piece.segment;
        ParameterSums sums = {};
        if (segment >= 0 && segment < count_segments(args, s.piece.task)) {
            const int begin = first_chunk(), end = min(begin + chunks_of_segment(args), s.piece.task.chunks);
            Reader reader(s, args);
            if (begin < end) walk_forwards(reader, begin, end);
            walk_rows(reader, end);
            walk_columns(reader, end, sums);
        }
        if (!args.sums || p.thread < DIM) return;
        float *to = args.sums +
                    ((s.piece.slot + s.piece.segment) * args.fwd.heads + s.piece.task.head) * (2 * DIM) +
                    p.thread % DIM;
        to[0] = sums.bias;
        to[DIM] = sums.rate;
    }
};

__device__ inline void find_gradients(const fkda_bwd_args &args)
{
    Shared &s = *reinterpret_cast<Shared *>(cta_memory());
    const Gradients gradients(args, s);
    long long i = blockIdx.x;
    while (i < args.slots * args.fwd.heads) {
        gradients.run(i / args.fwd.heads, static_cast<int>(i % args.fwd.heads));
        i = (s.piece.slot + s.piece.segment) * args.fwd.heads + s.piece.task.head + gridDim.x;
    }
}

} // namespace fkda

#endif
