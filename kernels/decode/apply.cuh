/*
 * Brings states up to date after drafts were verified: S = D S + sum over j of (D_j k_j) u_j^T, where D_j is
 * the decay from token j to the last accepted token. The state is read and written once.
 *
 * Optimizations.
 * - The state streams through shared memory as in one.cuh, so that many small CTAs fit on an SM.
 * - A CTA waits for indices once. All copies of records and of the state begin then, records first, and the
 *   decays are multiplied while the state is still on its way.
 */
#ifndef FKDA_DECODE_APPLY_CUH
#define FKDA_DECODE_APPLY_CUH

#include "accepted.cuh"
#include "one.cuh"

namespace fkda
{

/* The records of the accepted tokens, in shared memory behind the CTA's part of the state. The vectors
 * over channels lie in the order in which the lanes have them (tile.cuh). */
template <bool is_bf16, bool k_first> struct Records {
    using State = Stream<is_bf16, k_first>;
    using Order = Tile<is_bf16, k_first, State::LANES>;
    static constexpr int SIDE = State::SIDE;

    float *total;  /* the decay of all of them; a decay and a key of each follow */
    float *us;     /* of the CTA's rows */
    int rows;      /* of the CTA */
    int first_row; /* of V */

    __device__ __forceinline__ Records(int tokens, int split, int row) : rows(DIM >> split), first_row(row)
    {
        total = reinterpret_cast<float *>(cta_memory() + (FKDA_DECODE_BYTES_OF_ONE(is_bf16) >> split));
        us = decay(tokens);
    }

    __device__ __forceinline__ float *decay(int j) const
    {
        return total + DIM + 2 * DIM * j;
    }

    /* With the decay to the last of the tokens, once join() is through. */
    __device__ __forceinline__ float *key(int j) const
    {
        return decay(j) + DIM;
    }

    /* Begins to copy the records of `some` tokens. */
    __device__ __forceinline__ void copy(const fkda_apply_args &args, const Work &work, int record,
                                         int some) const
    {
        constexpr int FOURS = DIM / 4; /* of a vector */
        const long long step = static_cast<long long>(args.heads) * (3 * DIM);
        const float *from = args.past.records +
                            static_cast<long long>(work.sequence) * args.past.columns * step +
                            work.head * (3 * DIM);
#pragma unroll 1
        for (int j = 0; j < some; j++) {
            const float *of_token = from + __shfl_sync(~0u, record, j) * step;
#pragma unroll 1
            for (int i = static_cast<int>(threadIdx.x); i < 2 * FOURS + rows / 4;
                 i += static_cast<int>(blockDim.x)) {
                const int channel = i % FOURS * 4;
                if (i < 2 * FOURS)
                    copy_async(decay(j) + i / FOURS * DIM + Order::place_of_four(channel), of_token + 4 * i,
                               true);
                else
                    copy_async(us + j * rows + channel, of_token + 4 * i + first_row, true);
            }
        }
    }

    /* Multiplies the keys by the decays behind them. */
    __device__ __forceinline__ void join(int some) const
    {
#pragma unroll 1
        for (int c = static_cast<int>(threadIdx.x); c < DIM; c += static_cast<int>(blockDim.x)) {
            float product = 1.0f;
#pragma unroll 4
            for (int j = some - 1; j >= 0; j--) {
                key(j)[c] *= product;
                product *= decay(j)[c];
            }
            total[c] = product;
        }
    }

    /* What the lane needs of a vector over channels, for a square. */
    __device__ __forceinline__ void read_channels(float (&x)[SIDE], const float *vector, const State &state,
                                                  int square) const
    {
#pragma unroll
        for (int i = 0; i < SIDE / 4; i++) {
            const float4 y = *reinterpret_cast<const float4 *>(
                vector + 4 * State::LANES * (SIDE / 4 * square + i) + 4 * state.lane);
            x[4 * i] = y.x, x[4 * i + 1] = y.y, x[4 * i + 2] = y.z, x[4 * i + 3] = y.w;
        }
    }

    /* u of token j in the lane's rows. */
    __device__ __forceinline__ void read_rows(float (&x)[SIDE], const State &state, int j) const
    {
#pragma unroll
        for (int i = 0; i < SIDE / 4; i++) {
            const float4 y = *reinterpret_cast<const float4 *>(us + j * rows + state.row - first_row + 4 * i);
            x[4 * i] = y.x, x[4 * i + 1] = y.y, x[4 * i + 2] = y.z, x[4 * i + 3] = y.w;
        }
    }

    /* Applies the tokens to some squares, from square number `first` on. x is square, piece and element. */
    template <int squares>
    __device__ __forceinline__ void apply(float (&x)[squares][SIDE][SIDE], const State &state, int first,
                                          int some) const
    {
#pragma unroll
        for (int s = 0; s < squares; s++) {
            float d[SIDE];
            read_channels(d, total, state, first + s);
#pragma unroll
            for (int piece = 0; piece < SIDE; piece++)
#pragma unroll
                for (int i = 0; i < SIDE; i++) x[s][piece][i] *= d[State::channel_of(piece, i)];
        }
#pragma unroll 1
        for (int j = 0; j < some; j++) {
            float u[SIDE];
            read_rows(u, state, j);
#pragma unroll
            for (int s = 0; s < squares; s++) {
                float k[SIDE];
                read_channels(k, key(j), state, first + s);
#pragma unroll
                for (int piece = 0; piece < SIDE; piece++)
#pragma unroll
                    for (int i = 0; i < SIDE; i++)
                        x[s][piece][i] = __fmaf_rn(k[State::channel_of(piece, i)], u[State::row_of(piece, i)],
                                                   x[s][piece][i]);
            }
        }
    }
};

template <bool is_bf16, bool k_first> __device__ __forceinline__ void apply(const fkda_apply_args &args)
{
    using State = Stream<is_bf16, k_first>;
    constexpr int SIDE = State::SIDE, AT_ONCE = is_bf16 ? 1 : 2; /* squares */
    const Work work = find_work(args.heads, args.split);
    const fkda_index_args &indices = args.state_indices;
    const int count = count_accepted(args.past, work.sequence);
    const long long index =
        load_index_if(indices.data, work.sequence, indices.is_i32, indices.data != nullptr, work.sequence);
    const long long slot = check_slot(index, indices.data ? args.first_slot : 0, args.state);
    int record;
    const int some = find_accepted(record, args.past, work.sequence, count);
    if (slot == NO_SLOT || some == 0) return;

    const State state(work.first_row);
    const Records<is_bf16, k_first> records(min(args.past.columns, MAX_TOKENS), args.split, work.first_row);
    const long long at = find_state(args.state, slot, work.head);
    records.copy(args, work, record, some);
    copy_async_commit();
    state.copy(args.state.data, at, true);
    copy_async_commit();
    const Rounding rounding = find_rounding(is_bf16 ? args.rounding : nullptr, work, args.heads);
    copy_async_wait<1>();
    __syncthreads();
    records.join(some);
    __syncthreads();
    copy_async_wait<0>();

    const uint64_t random = fkda_random_place(work.sequence, 0, args.heads, work.head, 0, 0);
    char *to = state.first_address(args.state.data, at);
#pragma unroll 1
    for (int square = 0; square < State::SQUARES; square += AT_ONCE) {
        float x[AT_ONCE][SIDE][SIDE];
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++)
#pragma unroll
            for (int piece = 0; piece < SIDE; piece++) state.read(x[s][piece], square + s, piece);
        records.apply(x, state, square, some);
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++) {
            typename State::RandomBlocks blocks;
            if (is_bf16 && rounding.at_random) {
                state.draw(blocks, rounding, random, square + s);
#pragma unroll
                for (int piece = 0; piece < SIDE; piece++)
                    state.template store_piece<is_bf16>(to, square + s, piece, x[s][piece], blocks, rounding,
                                                        random);
            } else {
#pragma unroll
                for (int piece = 0; piece < SIDE; piece++)
                    state.template store_piece<false>(to, square + s, piece, x[s][piece], blocks, rounding,
                                                      random);
            }
        }
    }
}

} // namespace fkda

#endif
