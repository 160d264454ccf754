/*
 * Decode token by token, for few tokens that follow each other.
 *
 * Algorithm. The state is in registers (tile.cuh). For each token, with the state decayed to it:
 *
 *     p = S^T k,  r = S^T q         in one pass over the state
 *     u = b (v - p),  out = scale (r + u (k . q)),  S = S + k u^T
 *
 * p and r of four rows are eight sums over eight lanes, of which each lane gets one.
 */
#ifndef FKDA_DECODE_STEPS_CUH
#define FKDA_DECODE_STEPS_CUH

#include "prepare.cuh"
#include "tile.cuh"

namespace fkda
{

__device__ __forceinline__ float *step_vector(int which, int i)
{
    return vector_at<FKDA_DECODE_VECTORS_OF_A_STEP>(which, i);
}

/* One token. */
template <class Tile>
__device__ __forceinline__ void step(const fkda_decode_args &args, Work work, Sequence sequence, Tile &tile,
                                     const Small &small, int i)
{
    forget_addresses(work, sequence);
    const float *key = step_vector(KEY, i), *query = step_vector(QUERY, i);
    float sums[2 * ROWS] = {}; /* p of each row, then r */
    tile.decay(step_vector(DECAY, i));
#pragma unroll
    for (int j = 0; j < CHANNELS / 4; j++) {
        const float4 k = tile.read(key, j), q = tile.read(query, j);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float *x = &tile.x[r][4 * j];
            float &p = sums[r], &o = sums[ROWS + r];
            p = __fmaf_rn(x[0], k.x, p), o = __fmaf_rn(x[0], q.x, o);
            p = __fmaf_rn(x[1], k.y, p), o = __fmaf_rn(x[1], q.y, o);
            p = __fmaf_rn(x[2], k.z, p), o = __fmaf_rn(x[2], q.z, o);
            p = __fmaf_rn(x[3], k.w, p), o = __fmaf_rn(x[3], q.w, o);
        }
    }
    sum_and_scatter<8>(sums);
    /* Lanes r and ROWS + r of the eight have p and r of row r. */
    const int lane = static_cast<int>(threadIdx.x) % 32, row = tile.row + tile.lane % ROWS;
    const float p = __shfl_sync(~0u, sums[0], lane & ~ROWS);
    const float u = small.beta[i] * (step_vector(VALUE, i)[row] - p);
    if (tile.lane >= ROWS)
        store_output(args, work, sequence, i, row, args.scale * __fmaf_rn(u, small.kq[i], sums[0]));
    else if (float *record = find_record(args, work, i, 2))
        record[row] = u;
    float u_of_row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) u_of_row[r] = __shfl_sync(~0u, u, (lane & ~7) | r);
    tile.add(key, u_of_row);
}

/* The tokens of a sequence follow each other: there is no tree. */
template <bool is_bf16, bool k_first>
__device__ __forceinline__ void decode_steps(const fkda_decode_args &args)
{
    const Work work = find_work(args.heads, args.split);
    const Sequence sequence = find_sequence(args, work.sequence);
    const long long slot = find_start_slot(args, work.sequence);
    if (slot == NO_SLOT) return clear_sequence(args, work, sequence);
    if (sequence.left_out)
        clear_outputs(args, work, sequence, sequence.length, sequence.length + sequence.left_out);
    if (sequence.length == 0) return;
    Small &small = *reinterpret_cast<Small *>(cta_memory());
    Tile<is_bf16, k_first> tile(work.first_row);
    const long long at = find_state(args.state, slot, work.head);
    if (threadIdx.x == 0) small.work = work, small.sequence = sequence, small.at = at;
    prepare_and_load<FKDA_DECODE_VECTORS_OF_A_STEP>(args, work, sequence, at, tile, small);
    const bool writes_each = args.write_states == FLASH_KDA_WRITE_EACH;
#pragma unroll 1
    for (int i = 0; i < small.sequence.length; i++) {
        step(args, small.work, small.sequence, tile, small, i);
        long long to = small.at;
        if (writes_each) {
            const long long after = find_slot_of_each(args, small.work.sequence, small.sequence, i);
            if (after == NO_SLOT) continue;
            to = find_state(args.written, after, small.work.head);
        } else if (args.write_states == FLASH_KDA_WRITE_NONE || i + 1 < small.sequence.length ||
                   !find_last_state(args, small.work, small.sequence, to)) {
            continue;
        }
        tile.store(args.written.data, to, writes_each ? i : 0,
                   find_rounding(is_bf16 ? args.rounding : nullptr, small.work, args.heads));
    }
}

} // namespace fkda

#endif
