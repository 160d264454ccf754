/*
 * Decode for compute capability 8.0 and newer: a few tokens of each of many sequences, in one launch. Each
 * state crosses memory once in each direction, but what chunk.cuh says of the L2 cache.
 *
 * Algorithm. A CTA has some rows of V of one head of one sequence: all 128, or fewer. Smaller CTAs keep the
 * memory busier, and with few heads, CTAs of 128 rows would leave SMs idle. Rows do not depend on each other,
 * and a row is summed in one order in any case, so results do not depend on the division.
 *
 * Optimizations.
 * - A thread issues all loads of its part of the state before anything waits for them. The tokens are
 *   prepared meanwhile.
 * - One token has its own kernel, through which states stream (one.cuh), and so do records (apply.cuh).
 *   Tokens that follow each other are computed one after the other, with the state in registers (steps.cuh),
 *   or at once, and states stream there too (chunk.cuh), also with accepted tokens of earlier records applied
 *   to them (past.cuh). The host chooses: which_decode() in src/cuda/decode.c.
 * - A kernel starts before the previous one in the stream is over, and waits for its end before it touches
 *   memory (programmatic dependent launch).
 */
#include "apply.cuh"
#include "chunk.cuh"
#include "one.cuh"
#include "steps.cuh"

#define FKDA_DEFINE_KERNEL(name, arguments, threads, ctas_per_sm, call)                                      \
    extern "C" __global__ void __launch_bounds__(threads, ctas_per_sm)                                       \
        name(const __grid_constant__ arguments args)                                                         \
    {                                                                                                        \
        using namespace fkda;                                                                                \
        let_next_kernel_start();                                                                             \
        wait_for_previous_kernel();                                                                          \
        call(args);                                                                                          \
    }

/* A kernel with the state in registers, and one through which it streams. */
#define FKDA_DEFINE_USUAL(name, arguments, call)                                                             \
    FKDA_DEFINE_KERNEL(name, arguments, FKDA_DECODE_THREADS, FKDA_DECODE_CTAS_PER_SM, call)
#define FKDA_DEFINE_ONE(name, is_bf16, k_first)                                                              \
    FKDA_DEFINE_KERNEL(name, fkda_decode_args, FKDA_DECODE_THREADS_OF_ONE(is_bf16, k_first),                 \
                       FKDA_DECODE_CTAS_OF_ONE(is_bf16) * 32768 / FKDA_DECODE_BYTES_OF_ONE(is_bf16),         \
                       (decode_one<is_bf16, k_first>))
#define FKDA_DEFINE_CHUNK(name, is_bf16, k_first, each)                                                      \
    FKDA_DEFINE_KERNEL(name, fkda_decode_args, FKDA_DECODE_THREADS, FKDA_DECODE_CTAS_OF_CHUNK(is_bf16),      \
                       (decode_chunk<is_bf16, k_first, each>))
#define FKDA_DEFINE_PAST(name, is_bf16, k_first)                                                             \
    FKDA_DEFINE_KERNEL(name, fkda_decode_args, FKDA_DECODE_THREADS, FKDA_DECODE_CTAS_OF_PAST(is_bf16),       \
                       (decode_chunk<is_bf16, k_first, false, true>))
#define FKDA_DEFINE_APPLY(name, is_bf16, k_first)                                                            \
    FKDA_DEFINE_KERNEL(name, fkda_apply_args, FKDA_DECODE_THREADS_OF_ONE(is_bf16, k_first),                  \
                       FKDA_DECODE_CTAS_OF_APPLY * 32768 / FKDA_DECODE_BYTES_OF_ONE(is_bf16),                \
                       (apply<is_bf16, k_first>))

/* The kernels for a type and a layout of states. */
#define FKDA_DEFINE_KERNELS(suffix, is_bf16, k_first)                                                        \
    FKDA_DEFINE_ONE(fkda_decode_one_##suffix, is_bf16, k_first)                                              \
    FKDA_DEFINE_USUAL(fkda_decode_steps_##suffix, fkda_decode_args, (decode_steps<is_bf16, k_first>))        \
    FKDA_DEFINE_CHUNK(fkda_decode_chunk_##suffix, is_bf16, k_first, false)                                   \
    FKDA_DEFINE_CHUNK(fkda_decode_each_##suffix, is_bf16, k_first, true)                                     \
    FKDA_DEFINE_PAST(fkda_decode_past_##suffix, is_bf16, k_first)                                            \
    FKDA_DEFINE_APPLY(fkda_decode_apply_##suffix, is_bf16, k_first)

FKDA_DEFINE_KERNELS(f32, false, false)
FKDA_DEFINE_KERNELS(bf16, true, false)
FKDA_DEFINE_KERNELS(k_first_f32, false, true)
FKDA_DEFINE_KERNELS(k_first_bf16, true, true)
