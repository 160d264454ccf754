/* How the relay cuts sequences: one launch for all segments (kernels/hopper/schedule/relay.cuh). */
#ifndef FKDA_HOPPER_RELAY_PLAN_H
#define FKDA_HOPPER_RELAY_PLAN_H

#include "plan.h"

typedef struct fkda_relay_plan {
    int64_t pairs;  /* CTA pairs; 0: no relay can run the segments */
    int64_t clocks; /* estimate, to be compared with fkda_clocks_passes() */
    fkda_relay relay;
} fkda_relay_plan;

/* The best relay for `heads` heads of equal sequences of `chunks` chunks, cut into `segments` segments. */
fkda_relay_plan fkda_plan_relay(int64_t heads, int64_t chunks, int64_t segments, int sms);

#endif
