/* NaN and infinities among a problem's inputs. */
#ifndef SUPPORT_NON_FINITE_H
#define SUPPORT_NON_FINITE_H

#include "problem.h"

typedef struct non_finite {
    const char *name; /* of the tensor */
    int64_t count;    /* its NaN and infinities; at least 1 */
    char first[64];   /* where the first one is: "[0, 17, 2, 5]" for batch row, token, head and channel */
} non_finite;

enum { NON_FINITE_TENSORS = 7 };

/* Looks at q, k, v, g, beta, A_log and dt_bias. Returns how many of them have such numbers. */
int find_non_finite(const problem *p, non_finite found[NON_FINITE_TENSORS]);

#endif
