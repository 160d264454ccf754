/*
 * The KDA forward pass for sm_80 and newer, in one launch and one pass over memory. A block runs one head of one
 * sequence, chunk by chunk of 16 tokens, in two roles that meet at stages in shared memory: half of its
 * warps prepare chunks (prepare.cuh), the other half carry the state through them (recurrence.cuh).
 *
 * The chunk form is in docs/algorithm.md. Products run on tensor cores in tf32 with fp32 sums, everything else in
 * fp32; tests/torch_ref.py does the same in PyTorch, bit for bit, which is why multiplications and additions
 * are not contracted here (-fmad=false).
 */
#include "prepare.cuh"
#include "recurrence.cuh"

extern "C" __global__ void __launch_bounds__(FKDA_PORTABLE_THREADS, 1)
    fkda_portable_fwd(const __grid_constant__ fkda_portable_args args)
{
    extern __shared__ __align__(16) unsigned char memory[];
    fkda::Shared &shared = *reinterpret_cast<fkda::Shared *>(memory);
    const fkda::Task task = fkda::find_task(args);
    const int thread = threadIdx.x;
    if (thread < fkda::PREPARE_THREADS) {
        if (task.chunks > 0) fkda::Preparation(args, task, shared, thread).run();
    } else {
        fkda::Recurrence(args, task, shared, thread - fkda::PREPARE_THREADS).run();
    }
}
