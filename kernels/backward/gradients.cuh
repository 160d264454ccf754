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
#include "walk.cuh"

namespace fkda
{

struct Gradients {
    /* Where values begin in a record. */
    enum { MISSED = DIM * DIM, DR = MISSED + CHUNK * DIM };

    const fkda_bwd_args &args;
    Shared &s;

    __device__ Gradients(const fkda_bwd_args &a, Shared &shared) : args(a), s(shared)
    {
    }

    /* ---- Memory ---- */

    /* The row of a token of the chunk in a gradient of `heads` heads, which the caller wants. */
    __device__ char *row(void *tensor, const fkda_token_strides &strides, int token, int head,
                         int bytes) const
    {
        return static_cast<char *>(tensor) +
               find_row(args.fwd, strides, s.piece.sequence, s.piece.task.begin, head, bytes) +
               token * strides.token * bytes;
    }

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

    /* A lane has two tokens of one row of V; the transposes make two neighbouring rows of one token. */
    __device__ void store_dv(int chunk, const float (&dr)[2][4]) const
    {
        const Place p = place();
        if (!args.dv) return;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t low = transpose_matrix(pack_bf16(dr[i][0], dr[i][1])),
                           high = transpose_matrix(pack_bf16(dr[i][2], dr[i][3]));
            const int token = chunk * CHUNK + 8 * i + p.g;
            if (token >= s.piece.task.length) continue;
            auto *to =
                reinterpret_cast<uint32_t *>(row(args.dv, args.dv_strides, token, s.piece.task.head, 2)) +
                p.first / 2 + p.t;
            to[0] = low;
            to[4] = high;
        }
    }

    __device__ void store_dbeta(int chunk) const
    {
        const Place p = place();
        const int token = chunk * CHUNK + p.thread;
        if (!args.dbeta || p.thread >= CHUNK || token >= s.piece.task.length) return;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += s.dbeta[w][p.thread];
        sum *= s.strength_slope[p.thread];
        const int is_f32 = args.fwd.beta_is_f32;
        char *to = row(args.dbeta, args.dbeta_strides, token, s.piece.task.head, is_f32 ? 4 : 2);
        if (is_f32)
            *reinterpret_cast<float *>(to) = sum;
        else
            *reinterpret_cast<uint16_t *>(to) = static_cast<uint16_t>(pack_bf16(sum, 0.0f));
    }

    /* Four neighbouring elements of bf16. */
    static __device__ void store_bf16(void *to, float4 x)
    {
        *static_cast<uint2 *>(to) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
    }

    /* Stores a row of dq or dk, from the gradient x with respect to the normalised row, through the norm.
     * Each lane has four channels. */
    __device__ void store_row(void *tensor, const fkda_token_strides &strides, float *parts, int token,
                              float4 x, const uint16_t *raw, float scale) const
    {
        const Place p = place();
        if (!tensor) return;
        if (!args.fwd.qk_is_normalised) {
            const uint2 two = *reinterpret_cast<const uint2 *>(raw + 4 * p.lane);
            const float4 n = make_float4(bf16_low(two.x) * scale, bf16_high(two.x) * scale,
                                         bf16_low(two.y) * scale, bf16_high(two.y) * scale);
            float along = __fmaf_rn(n.x, x.x, __fmaf_rn(n.y, x.y, __fmaf_rn(n.z, x.z, n.w * x.w)));
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2)
                along += __shfl_xor_sync(~0u, along, distance);
            x.x = __fmaf_rn(-n.x, along, x.x) * scale, x.y = __fmaf_rn(-n.y, along, x.y) * scale;
            x.z = __fmaf_rn(-n.z, along, x.z) * scale, x.w = __fmaf_rn(-n.w, along, x.w) * scale;
        }
        if (token >= s.piece.task.length) return;
        const int head = s.piece.task.head;
        if (parts)
            *reinterpret_cast<float4 *>(parts + ((s.piece.task.begin + token) * args.fwd.heads + head) * DIM +
                                        4 * p.lane) = x;
        else
            store_bf16(row(tensor, strides, token, head, 2) + 8 * p.lane, x);
    }

    __device__ void store_rows(const Raw &raw, int chunk) const
    {
        const Place p = place();
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int i = 2 * p.warp + e, token = chunk * CHUNK + i;
            store_row(args.dq, args.dq_strides, args.dq_parts, token, s.q_read.four(i, 4 * p.lane), raw.q[i],
                      s.q_scale[i]);
            store_row(args.dk, args.dk_strides, args.dk_parts, token, s.k_read.four(i, 4 * p.lane), raw.k[i],
                      s.k_scale[i]);
            if (!args.dg || token >= s.piece.task.length) continue;
            const int bytes = args.fwd.g_is_f32 ? 4 : 2;
            char *to = row(args.dg, args.dg_strides, token, s.piece.task.head, bytes) + 4 * bytes * p.lane;
            const float4 x = s.u.four(i, 4 * p.lane);
            if (args.fwd.g_is_f32)
                *reinterpret_cast<float4 *>(to) = x;
            else
                store_bf16(to, x);
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

    /* The part of dbeta of the warp's rows. */
    __device__ void add_dbeta(const float (&dx)[2][4], const float (&missed)[2][4]) const
    {
        const Place p = place();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int tile = i / 2, e = i % 2;
            float sum = __fmaf_rn(dx[tile][e], missed[tile][e], dx[tile][e + 2] * missed[tile][e + 2]);
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            if (p.g == 0) s.dbeta[p.warp][8 * tile + 2 * p.t + e] = sum;
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
            find_dx(dx, dout, rows, s, raw, p.first, p.lane);
            add_dbeta(dx, missed);
            multiply_by_strengths(dr, dx, s, p.t);
            multiply_by_strengths(missed, missed, s, p.t);
            store_values(of_chunk + MISSED, missed, p.thread);
            store_values(of_chunk + DR, dr, p.thread);
            store_dv(chunk, dr);
            write_gradient(rows, dout, dr, s, p.lane);
            __syncthreads();
            store_dbeta(chunk);
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
            const ChannelOfChunk channel = {raw,
                                            {args.fwd, s.gate, p.thread % DIM},
                                            args.fwd.g_is_f32 != 0,
                                            s.piece.task.length - chunk * CHUNK,
                                            p.thread % DIM};
            go_through_channels(s, channel, p.thread, sums);
            __syncthreads();
            store_rows(raw, chunk);
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
