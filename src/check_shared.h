/* The checks that the forward pass and decode share, and the views that both make of tensors. */
#ifndef FKDA_CHECK_SHARED_H
#define FKDA_CHECK_SHARED_H

#include "check_tensor.h"

enum {
    /* Kernels count the columns of a tensor of integers in 32 bits. The room above lets a warp look past the
     * last one. */
    FKDA_MAX_COLUMNS = INT32_MAX - 64,
};

/* A caller built with an older header passes a shorter struct, of `least` bytes or more. `*params` then
 * becomes a copy in `complete`, in which the missing fields are zero. A struct begins with struct_size. */
flash_kda_status fkda_complete_struct(const void **params, void *complete, size_t least, size_t most,
                                      const char *name);

/* K, V, H and HV. The ranks of q and v were checked. q_name is what the call calls the tensor that has H
 * heads: "q", or "k" where there are no queries. */
flash_kda_status fkda_check_head_sizes(const flash_kda_tensor *q, const char *q_name,
                                       const flash_kda_tensor *v);

/* That the products of sizes fit what counts them. `rows` is the letter of the batch rows: "B". */
flash_kda_status fkda_check_counts(const char *q_name, const char *rows, int64_t batch, int64_t tokens,
                                   int64_t sequences, int64_t heads);
flash_kda_status fkda_check_states(int64_t sequences, int64_t heads);

/* The sizes B, T, H, HV and N of the forward or the backward pass, which become those of a zeroed shape. */
flash_kda_status fkda_check_sizes(const flash_kda_tensor *q, const char *q_name, const flash_kda_tensor *v,
                                  const flash_kda_tensor *cu_seqlens, bool has_cu_seqlens, fkda_shape *shape);

flash_kda_status fkda_check_flag(int32_t flag, const char *name);
flash_kda_status fkda_check_gate_kinds(int32_t gate, int32_t beta_kind);
flash_kda_status fkda_check_gate_tensors(int32_t gate, bool has_A_log, bool has_dt_bias);
flash_kda_status fkda_check_scale(float scale, int32_t gate, float lower_bound);
flash_kda_status fkda_check_first_slot(int64_t first_slot, bool has_state_indices);

flash_kda_status fkda_check_max_seqlen(int64_t max_seqlen, int64_t tokens);

/* cpu_threads and the address of interrupt. */
flash_kda_status fkda_check_host(int32_t cpu_threads, const volatile int32_t *interrupt);

/* The address of `saved`, of the forward and the backward pass. */
flash_kda_status fkda_check_saved_pointer(const void *saved, size_t size, fkda_purpose purpose);

/* The options of a forward or a backward pass that decide which arithmetic runs. */
typedef struct fkda_arithmetic_options {
    int32_t gate, beta_kind, qk_is_normalised, state_k_first, g_dtype, beta_dtype;
    bool has_A_log, has_dt_bias;
} fkda_arithmetic_options;

/* What of fkda_feature these options and the heads of the shape ask for. */
int32_t fkda_arithmetic_features(const fkda_arithmetic_options *options, const fkda_shape *shape);

/* That *interrupt is still 0 when the call begins. */
flash_kda_status fkda_check_interrupt(const volatile int32_t *interrupt);

/* check_indices.c: the numbers in cu_seqlens of `sequences` sequences that have `tokens` tokens in all, which
 * the caller's tensor calls `name_of_tokens`, and `longest` each at most. */
flash_kda_status fkda_check_borders(const fkda_index_view *cu_seqlens, int64_t sequences, int64_t tokens,
                                    const char *name_of_tokens, int64_t longest);

fkda_token_view fkda_token_view_of(const flash_kda_tensor *t);
fkda_state_view fkda_state_view_of(const flash_kda_tensor *t, bool present);
fkda_index_view fkda_index_view_of(const flash_kda_tensor *t);

#endif
