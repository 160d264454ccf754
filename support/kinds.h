/* Gate tensors, betas and normalised keys for every kind that a call can ask for. */
#ifndef SUPPORT_KINDS_H
#define SUPPORT_KINDS_H

#include "problem.h"

/* How much the channels of tokens forget. Nats are those of one token. */
typedef enum decays {
    DECAYS_SLOW,            /* 1e-6 to 1e-2 nats */
    DECAYS_ORDINARY,        /* 1e-2 to 3 nats */
    DECAYS_FAST,            /* 3 to 100 nats */
    DECAYS_MIXED,           /* from 1e-6 nats in the first channel to 300 in the last */
    DECAYS_ISOLATED_TOKENS, /* every eighth token forgets 300 nats in all channels, and the others 1e-6 */
    DECAYS_ISOLATED,        /* the same, but each channel of a token for itself */
    DECAYS_NONE,            /* 0 nats, or as little as the gate can give */
    DECAYS_EXTREME,         /* from 1e-30 to 1e38 nats */
} decays;
enum { DECAY_KINDS = 8 };
extern const char *const decays_names[DECAY_KINDS];

/* Sets A_log, dt_bias and g, or g_f32, so that a problem with the softplus or the activated gate forgets that
 * much, up to roundings of g. With gate, without_A_log and without_dt_bias set before. */
void fill_decays(problem *p, decays how, bool is_f32, uint64_t seed);

/* Replaces g and beta, filled before, by fp32 tensors of nearly the same numbers, which bf16 does not have.
 */
void widen_gates(problem *p, uint64_t seed);
void widen_betas(problem *p, uint64_t seed);

/* Makes the logits in beta what beta_kind says. */
void activate_betas(problem *p);

/* Divides each q and k by its norm, and sets qk_is_normalised. */
void normalise_keys(problem *p);

#endif
