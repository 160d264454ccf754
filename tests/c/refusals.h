/* What the tests of refused calls share. */
#ifndef TESTS_REFUSALS_H
#define TESTS_REFUSALS_H

#include "harness.h"

/* A sentence, which is valid until the next call of text(). */
const char *text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* New memory with these values. */
int64_t *copied(const int64_t *values, int64_t count);

/* The address of no int32_t. */
const volatile int32_t *unaligned_word(void);

/* A call, which has returned that status, was refused with that sentence. */
void expect_sentence(flash_kda_status got, flash_kda_status want, const char *sentence);

/* flash_kda_fwd() refuses the parameters with that sentence, and writes to no buffer of the call. */
void expect_refusal(const call *c, const flash_kda_fwd_params *params, flash_kda_status want,
                    const char *sentence);

/* REFUSED(call, status, sentence, changes): the call's parameters `p` after the changes are refused. The
 * sentence may depend on `p`. */
#define REFUSED(c, status, sentence, ...)                                                                    \
    do {                                                                                                     \
        flash_kda_fwd_params p = (c).params;                                                                 \
        __VA_ARGS__;                                                                                         \
        expect_refusal(&(c), &p, FLASH_KDA_##status, sentence);                                              \
    } while (0)

/* In what follows OF is a macro of the test, OF(sentence, changes): INVALID_VALUE for the parameters `p` of
 * some function after the changes. */

/* A tensor that was moved by some bytes. */
#define MISALIGNED(OF, name, by, alignment)                                                                  \
    OF(text("%s is at address %p; it must be aligned to %d bytes", #name, p.name.data, alignment),           \
       p.name.data = (char *)p.name.data + (by))

/* Numbers and flags that the forward pass, decode and decode_layer have. The call has the bounded gate. */
#define WRONG_OPTIONS(OF)                                                                                    \
    do {                                                                                                     \
        OF("gate is 3; it must be a flash_kda_gate, in [0, 2]", p.gate = 3);                                 \
        OF("gate is -1; it must be a flash_kda_gate, in [0, 2]", p.gate = -1);                               \
        OF("beta_kind is 3; it must be a flash_kda_beta, in [0, 2]", p.beta_kind = 3);                       \
        OF("beta_kind is -7; it must be a flash_kda_beta, in [0, 2]", p.beta_kind = -7);                     \
        OF("qk_is_normalised is 2; it must be 0 or 1", p.qk_is_normalised = 2);                              \
        OF("state_k_first is -1; it must be 0 or 1", p.state_k_first = -1);                                  \
        OF("scale is inf; it must be finite", p.scale = INFINITY);                                           \
        OF("lower_bound is -5.5; it must be in [-5, 0]", p.lower_bound = -5.5f);                             \
        OF("lower_bound is 0.25; it must be in [-5, 0]", p.lower_bound = 0.25f);                             \
        OF("cpu_threads is -2; it must be 0 (all) or more", p.cpu_threads = -2);                             \
        OF("first_slot is -1; it must be 0 or more", p.first_slot = -1);                                     \
        OF("first_slot is 2 without state_indices; it must be 0", p.first_slot = 2,                          \
           p.state_indices.data = NULL);                                                                     \
        OF("A_log is absent; it must be given with the gate FLASH_KDA_GATE_SOFTPLUS", p.A_log.data = NULL,   \
           p.gate = FLASH_KDA_GATE_SOFTPLUS);                                                                \
        OF("A_log is given with the gate FLASH_KDA_GATE_ACTIVATED, for which g is the log decay itself; it " \
           "must be absent",                                                                                 \
           p.gate = FLASH_KDA_GATE_ACTIVATED);                                                               \
        OF("dt_bias is given with the gate FLASH_KDA_GATE_ACTIVATED, for which g is the log decay itself; "  \
           "it must be absent",                                                                              \
           p.gate = FLASH_KDA_GATE_ACTIVATED, p.A_log.data = NULL);                                          \
        OF(text("interrupt is at address %p; it must be aligned to 4 bytes",                                 \
                (const void *)unaligned_word()),                                                             \
           p.interrupt = unaligned_word());                                                                  \
    } while (0)

/* And what decode and decode_layer have besides. The call writes its last states, and has no indices. */
#define WRONG_DECODE_OPTIONS(OF)                                                                             \
    do {                                                                                                     \
        OF("write_states is 3; it must be a flash_kda_write_states, in [0, 2]", p.write_states = 3);         \
        OF("write_states is -1; it must be a flash_kda_write_states, in [0, 2]", p.write_states = -1);       \
        OF("state_indices is absent; it must be given with FLASH_KDA_WRITE_EACH",                            \
           p.write_states = FLASH_KDA_WRITE_EACH);                                                           \
    } while (0)

#endif
