/*
 * The recurrence: carries the state through a sequence's chunks, in order.
 *
 * Algorithm. For each chunk, with the matrices of its stage (shared.cuh) and S the state:
 *
 *     R = V - K~ S      U = T R      O = Q~ S + P U      S = diag(gamma) S + Kr^T U
 *
 * Layout. Warp w owns rows 16 w to 16 w + 15 of V and all of K, as the transposed state S^T [V, K] in fp32
 * accumulators, and needs nothing of other warps. An accumulator tile serves unchanged as an A operand: lane
 * t of a quad holds columns 2 t and 2 t + 1, which the product takes as its depths t and t + 4. B operands
 * are stored in that order.
 */
#ifndef FKDA_PORTABLE_RECURRENCE_CUH
#define FKDA_PORTABLE_RECURRENCE_CUH

#include "bad_tokens.cuh"
#include "state_memory.cuh"

namespace fkda
{

/* d += tile (b0, b1), with an accumulator tile as the A operand. */
__device__ __forceinline__ void multiply(float (&d)[4], const float (&tile)[4], float b0, float b1)
{
    mma_tf32(d, tile[0], tile[2], tile[1], tile[3], b0, b1);
}

/* The recurrence of a CTA that carries `rows` rows of V. `general`: the call may have every option; else its
 * states have V first, and there are no checkpoints. */
template <int rows, bool general> struct Recurrence {
    const fkda_fwd_args &args;
    const Task &task;
    Shared &shared;
    int thread, lane, g, t; /* thread: of the recurrence */
    int first_row;          /* of V, of this warp */
    /* state[j][h]: rows g, g, g + 8, g + 8 and channels 16 j + 4 t + 2 h, + 1, + 0, + 1 */
    float state[DIM / 16][2][4];

    __device__ Recurrence(const fkda_fwd_args &a, const Task &k, Shared &s, int id)
        : args(a), task(k), shared(s), thread(id), lane(id % 32), g(lane / 4), t(lane % 4),
          first_row(cta_row() + id / 32 * FKDA_PORTABLE_ROWS_PER_WARP)
    {
    }

    /* The first row of the CTA. */
    static __device__ int cta_row()
    {
        return rows == DIM ? 0 : blockIdx.x % (DIM / rows) * rows;
    }

    /* Finds the lane's place again. What is made of it then does not occupy registers from one step to the
     * next, where the general kernels have too few. */
    __device__ void find_place()
    {
        if (!general) return;
        forget(thread);
        const unsigned id = static_cast<unsigned>(thread); /* never negative, which saves instructions */
        lane = id % 32, g = id % 32 / 4, t = id % 4;
        first_row = cta_row() + id / 32 * FKDA_PORTABLE_ROWS_PER_WARP;
    }

    /* The stage of a chunk. Its address, too, is made again in the general kernels. */
    __device__ const Stage &stage_of(int chunk) const
    {
        if (general) forget(chunk);
        return shared.stage[slot<STAGES>(chunk)];
    }

    /* ---- The state from and to memory ---- */

    /* Where channel 4 t of row g of this warp is in a state, in elements; and how far channels and rows are
     * apart. The indices are read again, so that none of this occupies registers from chunk to chunk. */
    struct Place {
        int at, channel, row;
    };

    __device__ Place place() const
    {
        int cta, id;
        read_indices(cta, id);
        const int warp = (id - FKDA_PORTABLE_PREPARE_THREADS) / 32, channel = id % 4 * 4;
        const int row = cta % (DIM / rows) * rows + warp * FKDA_PORTABLE_ROWS_PER_WARP + id % 32 / 4;
        if (general && args.state_k_first) return {channel * DIM + row, DIM, 1};
        return {row * DIM + channel, 1, DIM};
    }

    __device__ void load_state()
    {
        const long long begin = shared.addresses.initial_state;
        const void *states = args.initial_state.data;
        const Place p = place();
#pragma unroll
        for (int j = 0; j < DIM / 16; j++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const long long at = begin + p.at + 16 * j * p.channel + 8 * r * p.row;
                float4 x = make_float4(0, 0, 0, 0);
                if (begin == NO_SLOT) {
                } else if (general && args.state_k_first) {
                    x = load_channels_k_first(states, args.state_is_bf16, at);
                } else {
                    x = load_channels(states, args.state_is_bf16, at);
                }
                state[j][0][2 * r] = x.x, state[j][0][2 * r + 1] = x.y;
                state[j][1][2 * r] = x.z, state[j][1][2 * r + 1] = x.w;
            }
    }

    /* `begin`: where the head's state begins, in elements of `states`. */
    __device__ void store_state(void *states, bool is_bf16, long long begin) const
    {
        const Place p = place();
#pragma unroll
        for (int j = 0; j < DIM / 16; j++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const long long at = begin + p.at + 16 * j * p.channel + 8 * r * p.row;
                const float4 x = make_float4(state[j][0][2 * r], state[j][0][2 * r + 1], state[j][1][2 * r],
                                             state[j][1][2 * r + 1]);
                if (general && args.state_k_first)
                    store_channels_k_first(states, is_bf16, at, x);
                else
                    store_channels(states, is_bf16, at, x);
            }
    }

    /* Stores the state after `offset` tokens to its checkpoints. */
    __device__ void store_checkpoints(int offset) const
    {
        const fkda_checkpoint_args &c = args.checkpoints;
        const Addresses &a = shared.addresses;
        int column = 0;
        for (;;) {
            const long long row =
                next_checkpoint_row(args, a.sequence, offset, a.first_checkpoint_row, column);
            if (row == NO_SLOT) break;
            store_state(c.states.data, c.is_bf16, row * c.states.slot_stride + task.head * (128LL * 128));
        }
    }

    /* ---- One chunk ---- */

    /* u = V^T of this warp's rows; tile i has tokens 8 i to 8 i + 7. */
    __device__ void load_values(int chunk, float (&u)[2][4]) const
    {
        uint32_t v[4];
        int token = lane % 8 + 8 * (lane / 16), row = first_row + lane / 8 % 2 * 8;
        load_matrices_transposed(v, &shared.v[slot<V_STAGES>(chunk)][token][value_column(token, row)]);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                u[i][2 * r] = bf16_low(v[2 * i + r]);
                u[i][2 * r + 1] = bf16_high(v[2 * i + r]);
            }
    }

    static __device__ bool all_finite(const float (&x)[2][4])
    {
        float zero = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) zero = __fmaf_rn(x[i / 4][i % 4], 0.0f, zero);
        return zero == 0.0f;
    }

    /* Makes bad rows of the state NaN. */
    __device__ void spoil_state(const bool (&is_bad)[2])
    {
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (is_bad[r])
#pragma unroll
                for (int i = 0; i < DIM / 8; i++)
                    state[i / 2][i % 2][2 * r] = state[i / 2][i % 2][2 * r + 1] = NAN;
    }

    /* d += u M^T for a lower triangular M of 16 x 16, whose upper right tile of 8 x 8 is zero. */
    __device__ void multiply_lower(float (&d)[2][4], const float (&u)[2][4],
                                   const float (&m)[CHUNK][CHUNK + 8]) const
    {
        float2 top = *reinterpret_cast<const float2 *>(&m[g][2 * t]);
        float2 left = *reinterpret_cast<const float2 *>(&m[g + 8][2 * t]);
        float2 right = *reinterpret_cast<const float2 *>(&m[g + 8][2 * t + 8]);
        multiply(d[0], u[0], top.x, top.y);
        multiply(d[1], u[0], left.x, left.y);
        multiply(d[1], u[1], right.x, right.y);
    }

    /* x = x gamma, given gamma - 1. */
    __device__ static void decay(float &x, float gamma_minus_1)
    {
        x = __fmaf_rn(x, gamma_minus_1, x);
    }

    /* S^T = S^T diag(gamma) + U^T Kr */
    __device__ void update_state(const Stage &stage, const float (&u)[2][4])
    {
#pragma unroll
        for (int j = 0; j < DIM / 16; j++) {
            float4 gamma_1 = *reinterpret_cast<const float4 *>(&stage.gamma_minus_1[16 * j + 4 * t]);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                decay(state[j][0][2 * r], gamma_1.x);
                decay(state[j][0][2 * r + 1], gamma_1.y);
                decay(state[j][1][2 * r], gamma_1.z);
                decay(state[j][1][2 * r + 1], gamma_1.w);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float4 k = stage.k_rest[4 * i + t][9 * j + g];
                multiply(state[j][0], u[i], k.x, k.y);
                multiply(state[j][1], u[i], k.z, k.w);
            }
        }
    }

    /* Stores the outputs of a chunk. A lane has two tokens of one row of V; the transposes make two
     * neighbouring rows of one token of them. */
    __device__ void store_output(int chunk, const float (&o)[2][4]) const
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t low = transpose_matrix(pack_bf16(o[i][0] * args.scale, o[i][1] * args.scale));
            uint32_t high = transpose_matrix(pack_bf16(o[i][2] * args.scale, o[i][3] * args.scale));
            int token = chunk * CHUNK + 8 * i + g;
            if (token >= task.length) continue;
            const int step = static_cast<int>(args.out_strides.token);
            uint16_t *out = global_memory(reinterpret_cast<uint16_t *>(shared.addresses.out));
            uint32_t *to =
                reinterpret_cast<uint32_t *>(out + static_cast<long long>(token) * step + first_row + 2 * t);
            to[0] = low;
            to[4] = high;
        }
    }

    /* Makes elements of x that are not finite zeros, and sets bit 4 i + e of `bad` where x[i][e] was one. */
    static __device__ void take_out(float (&x)[2][4], uint32_t &bad)
    {
        if (__builtin_expect(!__any_sync(~0u, !all_finite(x)), 1)) return;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (!(fabsf(x[i / 4][i % 4]) < INFINITY)) x[i / 4][i % 4] = 0.0f, bad |= 1u << i;
    }

    /* From the first element on that take_out() has found in a row, outputs are NaN. So is what the row
     * writes to the state, and thereby its state. */
    static __device__ void spoil(float (&u)[2][4], float (&o)[2][4], uint32_t bad, int t)
    {
        if (__builtin_expect(!__any_sync(~0u, bad != 0), 1)) return;
        float marks[2][4];
        bool is_bad[2];
#pragma unroll
        for (int i = 0; i < 8; i++) marks[i / 4][i % 4] = bad >> i & 1 ? NAN : 0.0f;
        spoil_outputs(marks, o, is_bad, t);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (is_bad[i % 4 / 2]) u[i / 4][i % 4] = NAN;
    }

    /* ---- The role ---- */

    __device__ void run()
    {
        load_state();
        for (int chunk = 0; chunk < task.chunks; chunk++) {
            find_place();
            const Stage &decayed = stage_of(chunk);
            float r[2][4], u[2][4] = {}, o[2][4] = {};
            barrier_sync<FULL, STAGE_THREADS<rows>>(slot<STAGES>(chunk));
            load_values(chunk, r);
            bool is_bad[2] = {};
            const bool any_bad = !general && __any_sync(~0u, !all_finite(r));
            if (__builtin_expect(any_bad, 0)) spoil_outputs(r, o, is_bad, t);
#pragma unroll
            for (int j = 0; j < DIM / 16; j++) { /* r = (V - K~ S)^T, o = (Q~ S)^T */
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = 8 * i + g, column = 16 * j + decayed_column(g, 4 * t);
                    float4 k = *reinterpret_cast<const float4 *>(&decayed.minus_k_decayed[row][column]);
                    float4 q = *reinterpret_cast<const float4 *>(&decayed.q_decayed[row][column]);
                    multiply(r[i], state[j][0], k.x, k.y);
                    multiply(o[i], state[j][0], q.x, q.y);
                    multiply(r[i], state[j][1], k.z, k.w);
                    multiply(o[i], state[j][1], q.z, q.w);
                }
            }
            if (__builtin_expect(any_bad, 0)) spoil_state(is_bad);
            /* With keys and betas as they are, and gates above zero, numbers may leave the range of fp32. */
            const Stage &stage = stage_of(chunk);
            uint32_t out_of_range = 0;
            if (general) take_out(r, out_of_range);
            multiply_lower(u, r, stage.solve);
            if (general) take_out(u, out_of_range);
            multiply_lower(o, u, stage.attend);
            if (general) spoil(u, o, out_of_range, t);
            find_place();
            update_state(stage, u);
            const bool is_checkpoint = general && stage.is_checkpoint;
            if (chunk + STAGES < task.chunks) barrier_arrive<EMPTY, STAGE_THREADS<rows>>(slot<STAGES>(chunk));
            store_output(chunk, o);
            if (is_checkpoint) store_checkpoints((chunk + 1) * CHUNK);
        }
        if (shared.addresses.final_state != NO_SLOT)
            store_state(args.final_state.data, args.state_is_bf16, shared.addresses.final_state);
    }
};

} // namespace fkda

#endif
