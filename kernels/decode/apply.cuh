/*
 * Brings states up to date after drafts were verified: S = D S + sum over j of (D_j k_j) u_j^T, where D_j is the
 * decay from token j to the last accepted token. The state is read and written once.
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

template <bool is_bf16, bool k_first> __device__ __forceinline__ void apply(const fkda_apply_args &args)
{
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), rows = threads / 2;
    const Work work = find_work(args.heads);
    long long slot = work.sequence;
    if (args.state_indices.data) slot = read_index(args.state_indices, work.sequence);
    slot = check_slot(slot, args.state_indices.data ? args.first_slot : 0, args.state);
    const int count = count_accepted(args, work.sequence);
    if (slot == NO_SLOT || count == 0) return;

    using State = Tile<is_bf16, k_first>;
    State tile(work.first_row);
    typename State::Loaded loaded;
    const long long at = find_state(args.state, slot, work.head);
    tile.load(loaded, args.state.data, at);

    Accepted &accepted = *reinterpret_cast<Accepted *>(cta_memory());
    float *vectors = reinterpret_cast<float *>(cta_memory() + FKDA_DECODE_SMALL_BYTES), *total = vectors,
          *keys = vectors + DIM, *values = keys + MAX_TOKENS * DIM;
    const float *records = args.records + (static_cast<long long>(work.sequence) * args.record_columns *
                                               args.heads + work.head) * (3 * DIM);
    const long long record_step = static_cast<long long>(args.heads) * (3 * DIM);
    bool is_unpacked = false;
    int done = 0, some;
    do {
        if (thread == 0) find_accepted(accepted, args, work.sequence, done, count);
        __syncthreads();
        some = accepted.count;
        for (int c = thread; c < DIM; c += threads) {
            const int place = State::place_of_four(c / 4 * 4) + c % 4;
            float decay = 1.0f;
#pragma unroll 4
            for (int j = some - 1; j >= 0; j--) {
                const float *record = records + accepted.token[j] * record_step;
                keys[j * DIM + place] = __ldg(record + DIM + c) * decay;
                decay *= __ldg(record + c);
            }
            total[place] = decay;
        }
        for (int i = thread; i < some * rows; i += threads) {
            const int j = i / rows, row = work.first_row + i % rows;
            values[j * DIM + row] = __ldg(records + accepted.token[j] * record_step + 2 * DIM + row);
        }
        __syncthreads();
        if (!is_unpacked) tile.unpack(loaded);
        is_unpacked = true;
        tile.decay(total);
        for (int j = 0; j < some; j++) {
            const float4 four = *reinterpret_cast<const float4 *>(values + j * DIM + tile.row);
            const float u[ROWS] = {four.x, four.y, four.z, four.w};
            tile.add(keys + j * DIM, u);
        }
        done += some;
        __syncthreads(); /* before the next tokens take the places of these */
    } while (some == MAX_TOKENS && done < count);
    if (done == 0) return;
    tile.store(args.state.data, at, 0, find_rounding(is_bf16 ? args.rounding : nullptr, work, args.heads));
}

} // namespace fkda

#endif
