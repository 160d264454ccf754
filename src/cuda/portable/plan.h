/* How the portable kernel divides a call among CTAs. */
#ifndef FKDA_PORTABLE_PLAN_H
#define FKDA_PORTABLE_PLAN_H

#include <stdbool.h>
#include <stdint.h>

typedef struct fkda_portable_plan {
    int split;       /* log2 of the CTAs that a head is divided among: 0, 1 or 2 */
    int rows;        /* of V that a CTA carries: 128, 64 or 32 */
    bool is_general; /* the kernel is one of those that take every option */
    int threads;
    int64_t ctas;
    int sms;
} fkda_portable_plan;

#endif
