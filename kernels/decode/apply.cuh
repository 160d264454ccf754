/*
 * Brings states up to date after drafts were verified: S = D S + sum over j of (D_j k_j) u_j^T, where D_j is
 * the decay from token j to the last accepted token. The state is read and written once.
 */
#ifndef FKDA_DECODE_APPLY_CUH
#define FKDA_DECODE_APPLY_CUH

#include "tile.cuh"

namespace fkda
{

/* What the CTA finds in the tensors of indices. One thread reads it for all. */
struct Accepted {
    int count;
    int token[MAX_TOKENS]; /* the record of each */
};
static_assert(sizeof(Accepted) <= FKDA_DECODE_SMALL_BYTES, "keep decode_shape.h in step");

/* How many tokens are accepted, before wrong tokens end the list. */
__device__ __forceinline__ int count_accepted(const fkda_apply_args &args, int n)
{
    long long most = args.record_columns;
    if (args.accepted.data && args.accepted.columns < most) most = args.accepted.columns;
    return static_cast<int>(clamp(read_index(args.num_accepted_tokens, n), 0, most));
}

/* The accepted tokens number `first` to `first` + 15. */
__device__ __forceinline__ void find_accepted(Accepted &to, const fkda_apply_args &args, int n, int first,
                                              int count)
{
    to.count = 0;
    while (to.count < MAX_TOKENS && first + to.count < count) {
        long long token = first + to.count;
        if (args.accepted.data) {
            token = read_index(args.accepted, static_cast<long long>(n) * args.accepted.columns + token);
            if (token < 0 || token >= args.record_columns) break;
        }
        to.token[to.count++] = static_cast<int>(token);
    }
}

/* The vectors of up to 16 accepted tokens, in shared memory. */
struct ToApply {
    float total[DIM];            /* the decay of all of them */
    float keys[MAX_TOKENS][DIM]; /* with the decay to the last of them */
    float us[MAX_TOKENS][DIM];   /* of the CTA's rows */
};
static_assert(FKDA_DECODE_SMALL_BYTES + sizeof(ToApply) == FKDA_DECODE_APPLY_BYTES,
              "keep decode_shape.h in step");

/* Reads the records of the next tokens. */
template <class Tile>
__device__ __forceinline__ void read_records(ToApply &to, Accepted &accepted, const fkda_apply_args &args,
                                             Work work, int done, int count)
{
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x),
              rows = threads / 2;
    if (thread == 0) find_accepted(accepted, args, work.sequence, done, count);
    __syncthreads();
    const int some = accepted.count;
    const long long step = static_cast<long long>(args.heads) * (3 * DIM);
    const float *records = args.records + static_cast<long long>(work.sequence) * args.record_columns * step +
                           work.head * (3 * DIM);
#pragma unroll 1
    for (int c = thread; c < DIM; c += threads) {
        const int place = Tile::place_of_four(c / 4 * 4) + c % 4;
        float decay = 1.0f;
#pragma unroll 4
        for (int j = some - 1; j >= 0; j--) {
            const float *record = records + accepted.token[j] * step + c;
            to.keys[j][place] = __ldg(record + DIM) * decay;
            decay *= __ldg(record);
        }
        to.total[place] = decay;
    }
#pragma unroll 2
    for (int i = thread; i < some * rows; i += threads) {
        const int j = i / rows, row = work.first_row + i % rows;
        to.us[j][row] = __ldg(records + accepted.token[j] * step + 2 * DIM + row);
    }
    __syncthreads();
}

template <class Tile> __device__ __forceinline__ void apply_tokens(Tile &tile, const ToApply &from, int some)
{
    tile.decay(from.total);
#pragma unroll 1
    for (int j = 0; j < some; j++) {
        const float4 four = *reinterpret_cast<const float4 *>(&from.us[j][tile.row]);
        const float u[ROWS] = {four.x, four.y, four.z, four.w};
        tile.add(from.keys[j], u);
    }
}

template <bool is_bf16, bool k_first> __device__ __forceinline__ void apply(const fkda_apply_args &args)
{
    using State = Tile<is_bf16, k_first>;
    const Work work = find_work(args.heads, args.split);
    long long slot = work.sequence;
    if (args.state_indices.data) slot = read_index(args.state_indices, work.sequence);
    slot = check_slot(slot, args.state_indices.data ? args.first_slot : 0, args.state);
    const int count = count_accepted(args, work.sequence);
    if (slot == NO_SLOT || count == 0) return;

    Accepted &accepted = *reinterpret_cast<Accepted *>(cta_memory());
    ToApply &tokens = *reinterpret_cast<ToApply *>(cta_memory() + FKDA_DECODE_SMALL_BYTES);
    State tile(work.first_row);
    typename State::Loaded loaded;
    const long long at = find_state(args.state, slot, work.head);
    tile.load(loaded, args.state.data, at);
    read_records<State>(tokens, accepted, args, work, 0, count);
    if (accepted.count == 0) return;
    tile.unpack(loaded);
    apply_tokens(tile, tokens, accepted.count);
    /* Only records that no call of decode fills have more than 16 tokens. */
    for (int done = MAX_TOKENS; accepted.count == MAX_TOKENS && done < count; done += MAX_TOKENS) {
        __syncthreads();
        read_records<State>(tokens, accepted, args, work, done, count);
        apply_tokens(tile, tokens, accepted.count);
    }
    tile.store(args.state.data, at, 0, find_rounding(is_bf16 ? args.rounding : nullptr, work, args.heads));
}

} // namespace fkda

#endif
