/*
 * The KDA forward pass for Hopper (sm_90a), in one launch and one pass over memory. A block to each multiprocessor
 * walks through heads of sequences, chunk by chunk of 16 tokens, in four roles that hand chunks on through rings in
 * shared memory: a warp loads (load.cuh), six or eight prepare (prepare.cuh), one or two solve (solve.cuh), and one or two
 * warpgroups carry the state (recurrence.cuh).
 *
 * The chunk form is in docs/architecture.md, the layout in docs/hopper-kernel.md. Products run on tensor cores with fp32
 * sums: those with the state in fp16, which its scaling keeps in range, those over channels in tf32.
 */
#include "block.cuh"

#define FKDA_DEFINE_KERNEL(rows)                                                                             \
    extern "C" __global__ void __cluster_dims__(FKDA_HOPPER_SHARERS(rows, false), 1, 1)                      \
        __launch_bounds__(FKDA_HOPPER_THREADS(rows), 1)                                                      \
            fkda_hopper_fwd_##rows(const __grid_constant__ fkda_hopper_fwd_args args)                        \
    {                                                                                                        \
        fkda::run_block<rows, false>(args);                                                                  \
    }

FKDA_DEFINE_KERNEL(128)
FKDA_DEFINE_KERNEL(64)
