/*
 * The KDA forward pass for Hopper (sm_90a), in one launch and one pass over memory. As many blocks as fit stay on the
 * GPU and walk through the heads of the sequences, chunk by chunk of 16 tokens, in two roles that meet at stages in shared
 * memory: eight warps prepare chunks (prepare.cuh), one or two warpgroups carry the state through them (recurrence.cuh).
 *
 * The chunk form is in docs/architecture.md, the layout in docs/hopper-kernel.md. Products run on tensor cores in
 * tf32 with fp32 sums, everything else in fp32.
 */
#include "prepare.cuh"
#include "recurrence.cuh"

/* A block for `rows` rows of V of a head: all 128, or 64 where there are too few heads to fill the GPU. */
template <int rows> static __device__ void forward(const fkda_fwd_args &args)
{
    using namespace fkda;
    extern __shared__ __align__(128) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const int thread = threadIdx.x;
    if (thread == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&shared.full[i], GROUP_WARPS);
            mbarrier_init(&shared.empty[i], Recurrence<rows>::WARPS);
        }
    }
    __syncthreads();
    if (thread < FKDA_HOPPER_PREPARE_THREADS) {
        if (rows == 128) give_registers<112>();
        Preparation<rows>(args, shared, thread).run();
    } else {
        if (rows == 128) take_registers<144>();
        Recurrence<rows>(args, shared, thread - FKDA_HOPPER_PREPARE_THREADS).run();
    }
}

#define FKDA_DEFINE_KERNEL(rows)                                                                             \
    extern "C" __global__ void __launch_bounds__(FKDA_HOPPER_THREADS(rows), 1)                               \
        fkda_hopper_fwd_##rows(const __grid_constant__ fkda_fwd_args args)                                   \
    {                                                                                                        \
        forward<rows>(args);                                                                                 \
    }

FKDA_DEFINE_KERNEL(128)
FKDA_DEFINE_KERNEL(64)
