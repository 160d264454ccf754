/*
 * The gradients of chunks: each CTA has one chunk of 32 tokens of one head, with the state before it and the
 * gradient with respect to the state after it, which other kernels have found. So no chunk waits for another
 * one. docs/backward-kernel.md has the algorithm.
 *
 * The kernel may start early, beside the kernel for initial states (../first.cu). It needs nothing of that
 * one, but must not be over before it: the next launch waits for this kernel alone.
 */
#include "channels.cuh"
#include "prepare.cuh"

namespace fkda
{

template <Arithmetic arithmetic> __device__ __forceinline__ void run_chunk(const fkda_hopper_chunk_args &args)
{
    using Block = ChunkBlock<arithmetic>;
    auto &shared = *reinterpret_cast<Shared<Block> *>(cta_memory());
    ChunkPreparation<Block> preparation(args, shared);
    const bool copies = threadIdx.x == 0;
    if (copies) {
        preparation.find_place(blockIdx.x);
        mbarrier_init(&shared.inputs_there, 1);
        mbarrier_init(&shared.dout_there, 1);
        mbarrier_init(&shared.state_there, 1);
        mbarrier_init(&shared.gradient_there, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (shared.at.left == 0) { /* the slot has no chunk */
        float *const sums = args.bwd.sums;
        if (sums) sums[blockIdx.x * (2LL * DIM) + threadIdx.x] = 0.0f;
        return;
    }
    /* Several warps begin copies, so that none waits long for its turn. */
    if (copies) preparation.copy_inputs(shared.tokens[0].half);
    if (threadIdx.x == 32)
        preparation.copy_image(shared.state, preparation.image(args.states), &shared.state_there);
    if (threadIdx.x == 64 && args.bwd.dout) preparation.copy_dout();
    if (!args.bwd.dout)
        for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof shared.dout / 16);
             i += FKDA_HOPPER_CHUNK_THREADS)
            reinterpret_cast<uint4 *>(shared.dout)[i] = make_uint4(0, 0, 0, 0);
    const Beta<Block> beta = preparation.run();

    const ChunkValues<Block> by_rows(args, shared);
    const auto values = by_rows.load_v(); /* on their way while two warps solve */
    preparation.solve(beta);
    const float2 units = by_rows.run(values, [&] {
        if (copies)
            preparation.copy_image(shared.gradient, preparation.image(args.gradients),
                                   &shared.gradient_there);
    });
    ChannelSums sums;
    {
        const ChunkSums<Block> over_v(shared, args.bwd.fwd.scale, units);
        over_v.sum_channels(sums);
        over_v.sum_between_tokens();
    }
    fence_async_proxy();
    __syncthreads();
    if (copies) preparation.copy_inputs(shared.raw);

    /* The sum for b of each token, over the warps' rows. */
    if (threadIdx.x < CHUNK_TOKENS && static_cast<int>(threadIdx.x) < shared.at.left && args.bwd.dbeta) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < CHUNK_WARPS; w++) sum += shared.dbeta[w][threadIdx.x];
        sum *= shared.slope[threadIdx.x];
        const long long at = shared.at.place_of_beta(args.bwd.dbeta_strides, static_cast<int>(threadIdx.x));
        if (Block::OPTIONS && args.bwd.fwd.beta_is_f32)
            static_cast<float *>(args.bwd.dbeta)[at] = sum;
        else
            static_cast<uint16_t *>(args.bwd.dbeta)[at] = static_cast<uint16_t>(pack_bf16(sum, 0.0f));
    }
    ChunkChannels<Block>(args, shared).run(sums);
}

/* One CTA waits for the kernel before this one, so that all others make room for the next CTA. */
__device__ __forceinline__ void end_launch()
{
    if (blockIdx.x == gridDim.x - 1) wait_for_previous_kernel();
}

} // namespace fkda

extern "C" __global__ void __launch_bounds__(FKDA_HOPPER_CHUNK_THREADS, 2)
    fkda_hopper_bwd_chunks(const __grid_constant__ fkda_hopper_chunk_args args)
{
    fkda::run_chunk<fkda::Arithmetic::USUAL>(args);
    fkda::end_launch();
}

extern "C" __global__ void __launch_bounds__(FKDA_HOPPER_CHUNK_THREADS, 2)
    fkda_hopper_bwd_bounded_chunks(const __grid_constant__ fkda_hopper_chunk_args args)
{
    fkda::run_chunk<fkda::Arithmetic::BOUNDED>(args);
    fkda::end_launch();
}

extern "C" __global__ void __launch_bounds__(FKDA_HOPPER_CHUNK_THREADS, 2)
    fkda_hopper_bwd_general_chunks(const __grid_constant__ fkda_hopper_chunk_args args)
{
    fkda::run_chunk<fkda::Arithmetic::GENERAL>(args);
    fkda::end_launch();
}
