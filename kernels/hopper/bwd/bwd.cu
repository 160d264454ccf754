/*
 * The KDA backward pass for Hopper, in three launches like that of ../../backward/backward.cu: states and
 * their gradients at the borders between segments, all gradients of each segment, and sums over heads and
 * segments. docs/backward-kernel.md has the algorithm and the layout.
 *
 * Products with the state run on tensor cores in fp16 with fp32 sums, products between tokens in tf32, and
 * everything else is fp32.
 */
#include "../../backward/reduce.cuh"
#include "row_role.cuh"

namespace fkda
{

/* Of a thread. Four warps of a quarter of an SM share 512, and two of them are of each team. */
constexpr int CHANNEL_REGISTERS = 104, ROW_REGISTERS = 152;
static_assert(2 * (CHANNEL_REGISTERS + ROW_REGISTERS) == 512, "");

struct HopperBackward {
    const fkda_hopper_bwd_args &args;
    HopperShared &s;

    __device__ HopperBackward(const fkda_hopper_bwd_args &a)
        : args(a), s(*reinterpret_cast<HopperShared *>(cta_memory()))
    {
    }

    static __device__ __forceinline__ bool is_channel_warp()
    {
        return ChannelRole::thread() < TEAM_THREADS;
    }

    /* ---- The first launch ---- */

    /* CTAs 2 i and 2 i + 1 have head i % HV of sequence i / HV: one goes forwards, the other one back. */
    __device__ void walk() const
    {
        const fkda_bwd_args &a = args.bwd;
        const int index = blockIdx.x / 2, head = index % a.fwd.heads;
        if (threadIdx.x == 0) {
            s.barriers.set_up();
            find_piece(s.piece, a, index / a.fwd.heads, head);
        }
        load_gate(s.gate, a.fwd, head);
        __syncthreads();
        const int segments = count_segments(a, s.piece.task), chunks = s.piece.task.chunks,
                  of_segment = chunks_of_segment(a);
        const bool back = blockIdx.x % 2;
        if (segments < 2) return;
        if (is_channel_warp()) {
            ParameterSums none = {};
            ChannelRole role(s, a);
            give_registers<CHANNEL_REGISTERS>();
            if (back)
                role.go_back<false>({of_segment, chunks}, none);
            else
                role.go_forwards({0, (segments - 1) * of_segment});
        } else {
            RowRole role(s, args);
            take_registers<ROW_REGISTERS>();
            if (back)
                role.walk_back(chunks);
            else
                role.walk_forwards((segments - 1) * of_segment);
        }
    }

    /* The same, with a border image for each chunk of 32 tokens. Leaves the gradients of initial states. */
    __device__ void walk_over_chunks() const
    {
        const fkda_bwd_args &a = args.bwd;
        const int index = blockIdx.x / 2, head = index % a.fwd.heads;
        if (threadIdx.x == 0) {
            s.barriers.set_up();
            find_piece(s.piece, a, index / a.fwd.heads, head);
        }
        load_gate(s.gate, a.fwd, head);
        __syncthreads();
        const int chunks = s.piece.task.chunks;
        const bool back = blockIdx.x % 2;
        if (is_channel_warp()) {
            ParameterSums none = {};
            ChannelRole role(s, a);
            give_registers<CHANNEL_REGISTERS>();
            if (back)
                role.go_back<false>({0, chunks}, none);
            else
                role.go_forwards({0, (chunks - 1) / 2 * 2});
        } else {
            RowRole role(s, args);
            take_registers<ROW_REGISTERS>();
            if (back)
                role.walk_back_over_chunks();
            else
                role.walk_forwards_over_chunks();
        }
    }

    /* ---- The second launch ---- */

    __device__ ChunkRange chunk_range() const
    {
        const int first = s.piece.segment * chunks_of_segment(args.bwd);
        return {first, min(first + args.record_chunks, s.piece.task.chunks)};
    }

    /* Whether the slot that the CTA has is a segment of a sequence. */
    __device__ bool has_segment() const
    {
        return s.piece.segment >= 0 && s.piece.segment < count_segments(args.bwd, s.piece.task);
    }

    __device__ void compute_channels(ChannelRole &role) const
    {
        ParameterSums sums = {};
        if (has_segment()) {
            role.go_forwards(chunk_range());
            role.go_back<true>(chunk_range(), sums);
        }
        const int thread = ChannelRole::thread();
        if (!args.bwd.sums || thread < DIM) return;
        float *to = args.bwd.sums +
                    ((s.piece.slot + s.piece.segment) * args.bwd.fwd.heads + s.piece.task.head) * (2 * DIM) +
                    thread % DIM;
        to[0] = sums.bias;
        to[DIM] = sums.rate;
    }

    __device__ void compute_rows(RowRole &role) const
    {
        if (!has_segment()) return;
        const ChunkRange chunks = chunk_range();
        const int segment = s.piece.segment;
        if (chunks.first < chunks.end) {
            Rows x;
            if (segment > 0 && args.states)
                role.load_border(x, args.states, args.state_units, segment);
            else
                role.load_initial_state(x);
            role.record_segment(x, chunks);
        }
        Rows x;
        if (segment + 1 < count_segments(args.bwd, s.piece.task) && args.states)
            role.load_border(x, args.gradients, args.gradient_units, segment + 1);
        else
            role.load_final_gradient(x);
        if (chunks.first < chunks.end) role.go_back_over_segment(x, chunks);
        if (segment == 0) role.store_initial_gradient(x);
    }

    /* Item `i` is head i % HV of slot i / HV. */
    __device__ bool take(long long i) const
    {
        const fkda_bwd_args &a = args.bwd;
        const long long slot = i / a.fwd.heads;
        const int head = static_cast<int>(i % a.fwd.heads);
        if (slot >= a.slots) return false;
        __syncthreads(); /* the previous segment is over */
        if (ChannelRole::thread() == 0) {
            find_piece(s.piece, a, sequence_of_slot(a, slot), head);
            s.piece.segment = static_cast<int>(slot - s.piece.slot);
        }
        load_gate(s.gate, a.fwd, head);
        __syncthreads();
        return true;
    }

    /* The item after the one that the CTA has. No register keeps it. */
    __device__ long long next() const
    {
        return (s.piece.slot + s.piece.segment) * args.bwd.fwd.heads + s.piece.task.head + gridDim.x;
    }

    __device__ void find_gradients() const
    {
        if (ChannelRole::thread() == 0) s.barriers.set_up();
        if (is_channel_warp()) {
            ChannelRole role(s, args.bwd);
            give_registers<CHANNEL_REGISTERS>();
            for (long long i = blockIdx.x; take(i); i = next()) compute_channels(role);
        } else {
            RowRole role(s, args);
            take_registers<ROW_REGISTERS>();
            for (long long i = blockIdx.x; take(i); i = next()) compute_rows(role);
        }
    }
};

} // namespace fkda

extern "C" __global__ void __launch_bounds__(FKDA_HOPPER_BWD_THREADS, 1)
    fkda_hopper_bwd_walk(const __grid_constant__ fkda_hopper_bwd_args args)
{
    fkda::HopperBackward(args).walk();
}

extern "C" __global__ void __launch_bounds__(FKDA_HOPPER_BWD_THREADS, 1)
    fkda_hopper_bwd_walk_chunks(const __grid_constant__ fkda_hopper_bwd_args args)
{
    fkda::HopperBackward(args).walk_over_chunks();
}

extern "C" __global__ void __launch_bounds__(FKDA_HOPPER_BWD_THREADS, 1)
    fkda_hopper_bwd_gradients(const __grid_constant__ fkda_hopper_bwd_args args)
{
    fkda::HopperBackward(args).find_gradients();
}

extern "C" __global__ void __launch_bounds__(FKDA_BWD_REDUCE_THREADS)
    fkda_hopper_bwd_reduce(const __grid_constant__ fkda_hopper_bwd_args args)
{
    fkda::reduce(args.bwd);
}
