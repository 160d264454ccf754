/*
 * decode_layer for compute capability 8.0 and newer: convolution, recurrence and norm of a few tokens of each
 * of many sequences, in one launch that reads and writes each state once.
 *
 * Algorithm. A CTA has a head of a sequence, because the norm over V needs all rows. Its threads load the
 * state into registers (tile.cuh), or for one token copy it to shared memory (parts.cuh), so that more CTAs
 * fit on an SM. They convolve meanwhile (layer_prepare.cuh), and take the tokens one after the other, with
 * the state decayed to each token:
 *
 *     p = S^T k,  r = S^T q         in one pass over the state
 *     u = b (v - p),  o = scale (r + u (k . q)),  S = S + k u^T
 *
 * k and q lie in shared memory as the convolution gives them. One over their norms, and k . q, are sums that
 * every eight lanes make for themselves beside p and r, so that no barrier stands between the convolution and
 * the recurrence but the one that hands the vectors over. At the end a warp has the outputs of a token and
 * makes the norm over V.
 */
#include "layer_prepare.cuh"
#include "ptx.cuh"

namespace fkda
{

/* ---- Recurrence ---- */

__device__ __forceinline__ float sum_over_eight(float x)
{
#pragma unroll
    for (int by = 4; by > 0; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

/* One token. */
template <class Tile>
__device__ __forceinline__ void step_layer(const fkda_decode_args &args, Work work, Tile &tile, int i)
{
    forget(work.sequence), forget(work.head);
    const float *key = layer_vector(LAYER_KEY, i), *query = layer_vector(LAYER_QUERY, i);
    float sums[2 * ROWS] = {}; /* p of each row, then r */
    float kk = 0.0f, qq = 0.0f, kq = 0.0f;
    tile.decay(layer_vector(LAYER_DECAY, i));
#pragma unroll
    for (int j = 0; j < CHANNELS / 4; j++) {
        const float4 k4 = tile.read(key, j), q4 = tile.read(query, j);
        const float k[4] = {k4.x, k4.y, k4.z, k4.w}, q[4] = {q4.x, q4.y, q4.z, q4.w};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            kk = __fmaf_rn(k[c], k[c], kk), qq = __fmaf_rn(q[c], q[c], qq), kq = __fmaf_rn(k[c], q[c], kq);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                sums[r] = __fmaf_rn(tile.x[r][4 * j + c], k[c], sums[r]);
                sums[ROWS + r] = __fmaf_rn(tile.x[r][4 * j + c], q[c], sums[ROWS + r]);
            }
        }
    }
    sum_and_scatter<8>(sums);
    kk = sum_over_eight(kk), qq = sum_over_eight(qq), kq = sum_over_eight(kq);
    const float key_factor = args.qk_is_normalised ? 1.0f : rsqrt_approx(kk + 1e-6f),
                query_factor = args.qk_is_normalised ? 1.0f : rsqrt_approx(qq + 1e-6f);
    /* Lanes r and ROWS + r of the eight have p and r of row r, for k and q with their norms. */
    const int lane = static_cast<int>(threadIdx.x) % 32, row = tile.row + tile.lane % ROWS;
    const float p = __shfl_sync(~0u, sums[0], lane & ~ROWS) * key_factor;
    const float u = layer_small().beta[i] * (layer_vector(LAYER_VALUE, i)[row] - p),
                of_raw_key = u * key_factor;
    if (tile.lane >= ROWS)
        layer_vector(LAYER_OUT, i)[row] = args.scale * query_factor * __fmaf_rn(of_raw_key, kq, sums[0]);
    else if (float *record = find_record(args, work, i, 2))
        record[row] = u;
    if (threadIdx.x == 0) layer_small().key_factor[i] = key_factor;
    float u_of_row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) u_of_row[r] = __shfl_sync(~0u, of_raw_key, (lane & ~7) | r);
    tile.add(key, u_of_row);
}

/* ---- Outputs ---- */

/* A warp writes the outputs of a token. Its lanes have channels lane + 32 j. */
template <class Tile>
__device__ __forceinline__ void finish_layer(const fkda_decode_layer_args &args, const Work &work,
                                             const Sequence &sequence, int i)
{
    constexpr int OUTPUTS = DIM / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float *out = layer_vector(LAYER_OUT, i), *factors = layer_vector(LAYER_FACTOR, i);
    float o[OUTPUTS], sum = 0.0f, factor = 1.0f;
#pragma unroll
    for (int j = 0; j < OUTPUTS; j++) o[j] = out[lane + 32 * j], sum = __fmaf_rn(o[j], o[j], sum);
    if (args.norm_weight) factor = rsqrt_approx(__fmaf_rn(sum_over_warp(sum), 1.0f / DIM, args.norm_eps));
#pragma unroll
    for (int j = 0; j < OUTPUTS; j++)
        store_output(args.decode, work, sequence, i, lane + 32 * j, o[j] * factor * factors[lane + 32 * j]);
    if (float *record = find_record(args.decode, work, i, 0)) {
        const float key_factor = layer_small().key_factor[i];
#pragma unroll
        for (int j = 0; j < OUTPUTS; j++) {
            const int channel = lane + 32 * j, place = Tile::place_of_four(channel / 4 * 4) + channel % 4;
            record[channel] = layer_vector(LAYER_DECAY, i)[place];
            record[DIM + channel] = layer_vector(LAYER_KEY, i)[place] * key_factor;
        }
    }
}

/* What a sequence without a state gets: zeros. */
__device__ __forceinline__ void clear_layer(const fkda_decode_layer_args &args, const Work &work,
                                            const Sequence &sequence)
{
    clear_sequence(args.decode, work, sequence);
    if (!args.windows.data) return;
    for (int i = 0; i < sequence.length && i < args.windows_columns; i++)
        for (int c = static_cast<int>(threadIdx.x); c < PARTS * DIM; c += FKDA_LAYER_THREADS)
            for (int j = 0; j < WINDOW; j++)
                *Channel{c / DIM, work.head * DIM + c % DIM}.column(
                    args.windows, work.sequence * args.windows_sequence + i * args.windows_token, j) = 0;
}

/* The element of state_indices that names the slot where a sequence's state is, as it is in memory. The
 * slot is looked at once other loads were issued too. */
struct StartIndex {
    uint32_t low, high;

    __device__ __forceinline__ void load(const fkda_decode_args &args, int n)
    {
        const fkda_index_args &indices = args.state_indices;
        long long column = 0;
        low = static_cast<uint32_t>(n), high = 0;
        if (!indices.data) return;
        if (args.num_accepted_tokens.data)
            column = clamp(read_index(args.num_accepted_tokens, n), 1, indices.columns) - 1;
        const long long i = static_cast<long long>(n) * indices.columns + column;
        const uint32_t *data = static_cast<const uint32_t *>(indices.data);
        if (indices.is_i32) {
            low = data[i];
        } else {
            const uint2 both = reinterpret_cast<const uint2 *>(data)[i];
            low = both.x, high = both.y;
        }
        forget(low), forget(high);
    }

    __device__ __forceinline__ long long slot(const fkda_decode_args &args) const
    {
        const unsigned long long bits = static_cast<unsigned long long>(high) << 32 | low;
        const long long index = args.state_indices.is_i32 ? static_cast<long long>(static_cast<int>(low))
                                                          : static_cast<long long>(bits);
        return check_slot(index, args.state_indices.data ? args.first_slot : 0, args.state);
    }
};

/* The window that a sequence starts from. `slot` is that of its state. */
__device__ __forceinline__ WindowPlace find_window(const fkda_decode_layer_args &args, int n, long long slot)
{
    const fkda_index_args &accepted = args.decode.num_accepted_tokens;
    if (!args.keeps_drafts) return {slot, 0};
    long long column = 0;
    if (accepted.data) column = clamp(read_index(accepted, n), 1, args.decode.state_indices.columns) - 1;
    return {find_slot_after(args.decode, n, 0), static_cast<int>(column)};
}

/* `single`: every sequence has one token. */
template <bool is_bf16, bool k_first, bool single>
__device__ __forceinline__ void decode_layer(const fkda_decode_layer_args &args)
{
    using State = Tile<is_bf16, k_first>;
    const fkda_decode_args &decode = args.decode;
    Work work = find_work(decode.heads, 0);
    const Sequence sequence =
        single ? Sequence{work.sequence, 0, 1, 0} : find_sequence(decode, work.sequence);
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = FKDA_LAYER_THREADS / 32;
    StartIndex start;
    LayerInputs inputs = {};
    start.load(decode, work.sequence);
    if (sequence.length > 0) inputs.load<single>(args, work, sequence);
    const long long slot = start.slot(decode);
    const WindowPlace window = find_window(args, work.sequence, slot);
    if (slot == NO_SLOT || window.slot == NO_SLOT) return clear_layer(args, work, sequence);
    if (sequence.left_out)
        clear_outputs(decode, work, sequence, sequence.length, sequence.length + sequence.left_out);
    if (sequence.length == 0) return;
    State tile(work.first_row);
    prepare_layer<single>(args, work, sequence, inputs, slot, window, tile);
    const Rounding rounding = find_rounding(is_bf16 ? decode.rounding : nullptr, work, decode.heads);
    forget(work.sequence), forget(work.head); /* addresses would occupy registers from here on */
#pragma unroll 1
    for (int i = 0; i < sequence.length; i++) {
        step_layer(decode, work, tile, i);
        if (decode.write_states != FLASH_KDA_WRITE_EACH) continue;
        const long long after = find_slot_of_each(decode, work.sequence, sequence, i);
        if (after != NO_SLOT)
            tile.store(decode.written.data, find_state(decode.written, after, work.head), i, rounding);
    }
    if (decode.write_states == FLASH_KDA_WRITE_LAST) {
        long long at = find_state(decode.state, slot, work.head);
        if (find_last_state(decode, work, sequence, at)) tile.store(decode.written.data, at, 0, rounding);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < sequence.length; i += warps) finish_layer<State>(args, work, sequence, i);
}

} // namespace fkda

#define FKDA_DEFINE_LAYER(name, is_bf16, k_first, single)                                                    \
    extern "C" __global__ void __launch_bounds__(FKDA_LAYER_THREADS, FKDA_LAYER_CTAS_PER_SM)                 \
        name(const __grid_constant__ fkda_decode_layer_args args)                                            \
    {                                                                                                        \
        using namespace fkda;                                                                                \
        let_next_kernel_start();                                                                             \
        wait_for_previous_kernel();                                                                          \
        decode_layer<is_bf16, k_first, single>(args);                                                        \
    }

/* The kernels for a type and a layout of states. */
#define FKDA_DEFINE_LAYERS(suffix, is_bf16, k_first)                                                         \
    FKDA_DEFINE_LAYER(fkda_layer_one_##suffix, is_bf16, k_first, true)                                       \
    FKDA_DEFINE_LAYER(fkda_layer_steps_##suffix, is_bf16, k_first, false)

FKDA_DEFINE_LAYERS(f32, false, false)
FKDA_DEFINE_LAYERS(bf16, true, false)
FKDA_DEFINE_LAYERS(k_first_f32, false, true)
FKDA_DEFINE_LAYERS(k_first_bf16, true, true)
