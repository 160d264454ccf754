/*
 * The KDA forward pass for compute capability 8.0 and newer: one launch that reads every input once.
 *
 * Algorithm. A CTA computes one head of one sequence, in chunks of 16 tokens, with two roles that meet at
 * stages in shared memory: eight warps prepare chunks (prepare.cuh), and the other warps carry the state
 * through them (recurrence.cuh).
 *
 * Products run on tensor cores in tf32 with fp32 sums, and everything else is fp32. tests/torch_ref.py does
 * the same operations in PyTorch and is equal to the bit. For this reason multiplications and additions are
 * not contracted here (-fmad=false). docs/overview.md has the chunk form, and docs/portable-kernel.md has
 * the layout.
 */
#include "prepare.cuh"
#include "recurrence.cuh"

/* A CTA carries `rows` rows of V of one head: all 128, or fewer if there are too few heads to fill the GPU.
 * CTAs that share a head all prepare the same chunks. */
template <int rows, bool general> static __device__ void forward(const fkda_fwd_args &args)
{
    using namespace fkda;
    constexpr int ctas_per_head = DIM / rows;
    Shared &shared = *reinterpret_cast<Shared *>(cta_memory());
    const int index = blockIdx.x / ctas_per_head;
    const int thread = threadIdx.x;
    /* One thread reads cu_seqlens for all: if it changed meanwhile, threads with different numbers of chunks
     * would wait for each other for ever. */
    if (thread == 0) {
        const int sequence = index / args.heads;
        shared.task = find_task(args, sequence, index % args.heads, CHUNK);
        shared.addresses = find_addresses(args, shared.task, sequence);
    }
    __syncthreads();
    /* The general kernels have no registers for it. */
    const Task copy = shared.task, &task = general ? shared.task : copy;
    if (thread < FKDA_PORTABLE_PREPARE_THREADS)
        Preparation<rows, general>(args, task, shared, thread).run();
    else
        Recurrence<rows, general>(args, task, shared, thread - FKDA_PORTABLE_PREPARE_THREADS).run();
}

/* `general` kernels take every option of a call. The others take what costs nothing: strides, state pools,
 * grouped heads, gates without parameters. */
#define FKDA_DEFINE_KERNEL(name, rows, general)                                                              \
    extern "C" __global__ void __launch_bounds__(FKDA_PORTABLE_THREADS(rows), 1)                             \
        name##_##rows(const __grid_constant__ fkda_fwd_args args)                                            \
    {                                                                                                        \
        forward<rows, general>(args);                                                                        \
    }

FKDA_DEFINE_KERNEL(fkda_portable_fwd, 128, false)
FKDA_DEFINE_KERNEL(fkda_portable_fwd, 64, false)
FKDA_DEFINE_KERNEL(fkda_portable_fwd, 32, false)
FKDA_DEFINE_KERNEL(fkda_portable_general, 128, true)
FKDA_DEFINE_KERNEL(fkda_portable_general, 64, true)
FKDA_DEFINE_KERNEL(fkda_portable_general, 32, true)
