/*
 * Decode for compute capability 8.0 and newer: a few tokens of each of many sequences, in one launch that
 * reads and writes each state once.
 *
 * Algorithm. A CTA has some rows of V of one head of one sequence: all 128, or fewer, because CTAs in smaller
 * pieces keep the memory busier, and because few heads alone would leave SMs idle. Rows do not depend on each
 * other, and a row is computed by eight lanes in any case, so results do not depend on the division.
 *
 * Optimizations.
 * - A thread issues all loads of its part of the state before anything waits for them. The tokens are
 *   prepared meanwhile. Registers hold the state, two CTAs of 256 threads fit on an SM, and then 128 KB of
 *   states are on their way to or from each SM.
 * - Tokens that follow each other are computed one after the other (steps.cuh) or at once (chunk.cuh). The
 *   host chooses.
 */
#include "apply.cuh"
#include "chunk.cuh"
#include "steps.cuh"

#define FKDA_DEFINE_KERNEL(name, arguments, call)                                                            \
    extern "C" __global__ void __launch_bounds__(FKDA_DECODE_THREADS, FKDA_DECODE_CTAS_PER_SM)               \
        name(const __grid_constant__ arguments args)                                                         \
    {                                                                                                        \
        using namespace fkda;                                                                                \
        call(args);                                                                                          \
    }

/* The kernels for a type and a layout of states. */
#define FKDA_DEFINE_KERNELS(suffix, is_bf16, k_first)                                                        \
    FKDA_DEFINE_KERNEL(fkda_decode_one_##suffix, fkda_decode_args, (decode_steps<is_bf16, k_first, true>))   \
    FKDA_DEFINE_KERNEL(fkda_decode_steps_##suffix, fkda_decode_args,                                         \
                       (decode_steps<is_bf16, k_first, false>))                                              \
    FKDA_DEFINE_KERNEL(fkda_decode_chunk_##suffix, fkda_decode_args, (decode_chunk<is_bf16, k_first>))       \
    FKDA_DEFINE_KERNEL(fkda_decode_apply_##suffix, fkda_apply_args, (apply<is_bf16, k_first>))

FKDA_DEFINE_KERNELS(f32, false, false)
FKDA_DEFINE_KERNELS(bf16, true, false)
FKDA_DEFINE_KERNELS(k_first_f32, false, true)
FKDA_DEFINE_KERNELS(k_first_bf16, true, true)
