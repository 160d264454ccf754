/* The checks of the arguments of flash_kda_decode() and flash_kda_apply(). */
#ifndef FKDA_CHECK_DECODE_H
#define FKDA_CHECK_DECODE_H

#include "decode_problem.h"

/* Turn a caller's struct into a problem, or refuse it in a sentence. The reference needs neither out nor
 * records, and writes to no tensor. */
flash_kda_status fkda_check_decode(const flash_kda_decode_params *params, bool for_reference,
                                   fkda_decode_problem *problem);
flash_kda_status fkda_check_apply(const flash_kda_apply_params *params, fkda_apply_problem *problem);

/* What of these checks needs no memory. The problem's pointers may lead nowhere. */
flash_kda_status fkda_check_decode_shapes(const flash_kda_decode_params *params,
                                          fkda_decode_problem *problem);
flash_kda_status fkda_check_apply_shapes(const flash_kda_apply_params *params, fkda_apply_problem *problem);

/* check_decode_indices.c: the numbers in tensors of integers, for a call on the CPU. */
flash_kda_status fkda_check_decode_indices(const fkda_decode_problem *problem);
flash_kda_status fkda_check_apply_indices(const fkda_apply_problem *problem);

/* ---- What decode_layer has too ---- */

/* That the tensor's second size, its number of columns, is enough for `tokens` tokens, and small enough for a
 * count in 32 bits. `letter` is what the tensor's documentation calls that size. */
flash_kda_status fkda_check_columns(const flash_kda_tensor *tensor, const char *name, const char *letter,
                                    int64_t tokens);

/* That there are enough slots if there are no state_indices: sequence n then has slot n. */
flash_kda_status fkda_check_slots(const flash_kda_tensor *state, bool has_state_indices, int64_t sequences);

/* N and T, from a tensor [N, T, ..] with that name or, with cu_seqlens, [1, total, ..]. */
flash_kda_status fkda_check_sequences(const flash_kda_tensor *tensor, const char *name,
                                      const flash_kda_tensor *cu_seqlens, int64_t *sequences);

/* The numbers and flags, and which optional tensors go with them. */
flash_kda_status fkda_check_decode_options(const flash_kda_decode_params *params);

/* written_states and written_indices, for the sequences and tokens of the problem. */
flash_kda_status fkda_check_written(const flash_kda_decode_params *params,
                                    const fkda_decode_problem *problem);

/* Whether state_indices has a slot for each token. */
bool fkda_has_slots_of_tokens(const flash_kda_decode_params *params);

/* What follows from the arguments but sizes and the kernel, once everything was checked. */
void fkda_fill_decode(const flash_kda_decode_params *params, fkda_decode_problem *problem);

#endif
