/* The forward pass and the backward pass of a head, and decode and apply of a head, compiled once for each
 * instruction set. */
#ifndef FKDA_CPU_VARIANT_H
#define FKDA_CPU_VARIANT_H

#include "../bwd_problem.h"
#include "../decode_layer_problem.h"
#include "../map_problem.h"
#include "../problem.h"
#include "decode_piece.h"

/* What one call of run_bwd() computes: some sequences of one head of q and k with all value heads that share
 * it. */
typedef struct fkda_bwd_piece {
    int64_t first, last; /* sequences first to last - 1 */
    int64_t qk_head;
    /* FKDA_BWD_SUMS numbers for each of these value heads, written: the sums over tokens for ddt_bias, then
     * the sum for dA_log. NULL if they are not wanted. */
    double *sums;
} fkda_bwd_piece;
enum { FKDA_BWD_SUMS = FKDA_DIM + 1 };

typedef struct fkda_cpu_variant {
    const char *kernel;  /* the name that asks for it: "cpu-avx512", ... */
    const char *arch;    /* "x86-64 avx512", ... */
    size_t scratch_size; /* of one worker, a multiple of 64 bytes */
    /* Computes all tokens of sequence n and head h, for value channels v_begin to v_end - 1, which are
     * multiples of 32. first_rows is from fkda_checkpoint_rows() where it is needed (checkpoints.h). The
     * scratch is 64-byte aligned. Returns false if the call was interrupted. */
    bool (*run_head)(const fkda_problem *problem, const int64_t *first_rows, int64_t n, int64_t h,
                     int v_begin, int v_end, void *scratch);
    /* Computes a piece of a backward pass in stretches of that many tokens, a multiple of 16. The memory has
     * as many bytes as bwd_memory() says, and is 64-byte aligned. Returns false if interrupted. */
    size_t (*bwd_memory)(const fkda_bwd_problem *problem, int64_t stretch);
    bool (*run_bwd)(const fkda_bwd_problem *problem, const fkda_bwd_piece *piece, int64_t stretch,
                    void *memory);
    /* Computes a range of the columns of sequence n and head h of a call of map. Columns 0 to 127 are the
     * value channels of the state, and columns 128 to 255 those of the map. The range begins and ends at
     * multiples of 32. The memory has map_memory bytes, a multiple of 64, and is 64-byte aligned. Returns
     * false if the call was interrupted. */
    size_t map_memory;
    bool (*run_map)(const fkda_map_problem *problem, int64_t n, int64_t h, int first, int last, void *memory);
    /* Computes head h of a call of join. The memory has join_memory bytes and is 64-byte aligned. */
    size_t join_memory;
    void (*run_join)(const fkda_join_problem *problem, int64_t h, void *memory);
    /* Computes sequence n and head h of a call of decode_layer. */
    void (*run_layer_head)(const fkda_decode_layer_problem *problem, int64_t n, int64_t h);
    /* Compute a piece of a call of decode and of apply. */
    void (*decode)(const fkda_decode_problem *problem, const fkda_decode_piece *piece);
    void (*apply)(const fkda_apply_problem *problem, const fkda_apply_piece *piece);
} fkda_cpu_variant;

extern const fkda_cpu_variant fkda_cpu_portable;
#if defined(__x86_64__)
extern const fkda_cpu_variant fkda_cpu_avx2, fkda_cpu_avx512;
#endif

/* dispatch.c: the variant that a kernel's name asks for, for "cpu" the best one that this machine can run.
 * NULL if this machine cannot run it. */
const fkda_cpu_variant *fkda_cpu_find_variant(const char *kernel);

#endif
