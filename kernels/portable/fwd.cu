/*
 * The KDA forward pass for sm_80 and newer, in one launch and one pass over memory. A block runs one head of one
 * sequence, chunk by chunk of 16 tokens, in two roles that meet at stages in shared memory: eight warps
 * prepare chunks (prepare.cuh), the others carry the state through them (recurrence.cuh).
 *
 * The chunk form is in docs/architecture.md, the layout in docs/portable-kernel.md. Products run on tensor cores in
 * tf32 with fp32 sums, everything else in fp32; tests/torch_ref.py does the same in PyTorch, bit for bit, which is
 * why multiplications and additions are not contracted here (-fmad=false).
 */
#include "prepare.cuh"
#include "recurrence.cuh"

/* A block for `rows` rows of V of one head: all 128, or fewer where there are too few heads to fill the GPU and it
 * pays that blocks prepare the same chunks. */
template <int rows> static __device__ void forward(const fkda_fwd_args &args)
{
    using namespace fkda;
    constexpr int blocks_per_head = DIM / rows;
    Shared &shared = *reinterpret_cast<Shared *>(cta_memory());
    const int index = blockIdx.x / blocks_per_head;
    const Task task = find_task(args, index / args.heads, index % args.heads, CHUNK);
    const int thread = threadIdx.x, first_row = blockIdx.x % blocks_per_head * rows;
    if (thread < FKDA_PORTABLE_PREPARE_THREADS)
        Preparation<rows>(args, task, shared, thread).run();
    else
        Recurrence<rows>(args, task, shared, thread - FKDA_PORTABLE_PREPARE_THREADS, first_row).run();
}

#define FKDA_DEFINE_KERNEL(rows)                                                                             \
    extern "C" __global__ void __launch_bounds__(FKDA_PORTABLE_THREADS(rows), 1)                             \
        fkda_portable_fwd_##rows(const __grid_constant__ fkda_fwd_args args)                                 \
    {                                                                                                        \
        forward<rows>(args);                                                                                 \
    }

FKDA_DEFINE_KERNEL(128)
FKDA_DEFINE_KERNEL(64)
FKDA_DEFINE_KERNEL(32)
