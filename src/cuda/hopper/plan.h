/*
 * The plan of the kernel "hopper": how the heads of a call are laid out over the GPU.
 *
 * A call runs by one of four strategies:
 *
 *   whole    one launch; no sequence is cut
 *   passes   several launches: first segments and maps, the join, all other segments
 *   relay    one launch for all segments, whose CTA pairs wait for each other
 *   mixed    one launch that finds out on the device which sequences are long, and cuts these
 *
 * plan.c chooses among them by the estimates of costs.c. Everything here depends on the shape and the number
 * of SMs alone.
 */
#ifndef FKDA_HOPPER_PLAN_H
#define FKDA_HOPPER_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../../../kernels/hopper/fwd_args.h"
#include "../../../kernels/hopper/fwd_shape.h"
#include "../../problem.h"

/* The options that concern arithmetic, those of them that concern gates, and those that concern states. The
 * general kernels know all of them; launch.c says which kernels know some. */
enum {
    FKDA_HOPPER_GATE_FEATURES = FKDA_SOFTPLUS | FKDA_ACTIVATED | FKDA_FP32_GATES,
    FKDA_HOPPER_GENERAL_FEATURES =
        FKDA_HOPPER_GATE_FEATURES | FKDA_NO_PARAMETER | FKDA_FP32_BETA | FKDA_BETA_KIND | FKDA_NORMALISED,
    FKDA_HOPPER_STATES_FEATURES = FKDA_CHECKPOINTS | FKDA_K_FIRST,
};

typedef enum fkda_hopper_strategy {
    FKDA_HOPPER_WHOLE,
    FKDA_HOPPER_PASSES,
    FKDA_HOPPER_RELAY,
    FKDA_HOPPER_MIXED,
} fkda_hopper_strategy;

/* How whole sequences are shared out. A worker is a solo CTA or a CTA pair. */
typedef struct fkda_hopper_whole {
    int64_t heads;   /* of all sequences */
    int64_t workers; /* that have something to do */
    int chunk;       /* tokens: FKDA_HOPPER_CHUNK_SOLO or FKDA_HOPPER_CHUNK_PAIR */
    bool divides;    /* a head may be divided between two workers */
    double clocks;   /* estimate, without the beginning and the end of work items */
} fkda_hopper_whole;

/* Offsets into the workspace, in bytes. */
typedef struct fkda_hopper_memory {
    size_t handoff;       /* flags and states of work items that two workers share; always first */
    size_t flags;         /* of the relay and the mixed schedule */
    size_t counts;        /* lengths of the lists */
    size_t inner, later;  /* lists of segments */
    size_t cut_sequences; /* list */
    size_t states, maps;  /* of each slot */
    size_t composed;      /* maps of groups */
    size_t piece_states;  /* states that CTA pairs go back to, for checkpoints inside chunks */
    size_t bytes;         /* of the whole workspace */
    int64_t relay_flags;  /* how many: flags of the relay or the mixed schedule */
    /* How many: handoff flags of a mixed launch, right behind its relay flags, so that one memset clears
     * both. */
    int64_t mixed_handoff_flags;
} fkda_hopper_memory;

typedef struct fkda_hopper_plan {
    int sms;
    fkda_hopper_strategy strategy;
    /* For the strategy whole, and for a mixed launch that the driver refuses. */
    fkda_hopper_whole whole;
    /* The members from here on are for the other strategies. A sequence of n tokens is cut into n / shortest
     * segments (with batch_invariant (n - 1) / shortest), if that is two or more. Segments end where chunks
     * end. For the strategy mixed: the tokens from which on a sequence is long. */
    int64_t shortest;
    int64_t slots;   /* segments of cut sequences, at most */
    int64_t groups;  /* of maps, at most */
    int relay_pairs; /* CTA pairs of the relay */
    fkda_relay relay;
    fkda_mixed mixed;
    fkda_hopper_memory memory;
} fkda_hopper_plan;

/* CTA pairs that run at the same time. */
static inline int64_t fkda_hopper_pairs(int sms)
{
    return sms / FKDA_HOPPER_PAIR_CTAS;
}

/* Workers of an even-shares launch of `items` work items in chunks of `chunk` tokens: as many CTA pairs, or
 * solo CTAs, as run at the same time, and at most one for each item. */
static inline int64_t fkda_hopper_workers(int chunk, int64_t items, int sms)
{
    const int64_t places = chunk == FKDA_HOPPER_CHUNK_PAIR ? fkda_hopper_pairs(sms) : sms;
    return items < places ? items : places;
}

/* The plan for a GPU with `sms` SMs, at least 2. */
fkda_hopper_plan fkda_hopper_plan_for(const fkda_shape *shape, int sms);

#endif
