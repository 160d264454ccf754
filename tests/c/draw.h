/* Draws calls with every option of the forward pass: problems, and how they lie in memory. */
#ifndef TESTS_DRAW_H
#define TESTS_DRAW_H

#include "harness.h"
#include "kinds.h"

/* What a call may have beyond the plainest one, as the library's kernels name it. */
typedef enum option {
    OPTION_STRIDES,
    OPTION_POOL,
    OPTION_CHECKPOINTS,
    OPTION_GROUPED,
    OPTION_SOFTPLUS,
    OPTION_ACTIVATED,
    OPTION_NO_PARAMETER,
    OPTION_F32,
    OPTION_BETA,
    OPTION_NORMALISED,
    OPTION_K_FIRST,
    OPTIONS,
} option;
enum { ALL_OPTIONS = (1 << OPTIONS) - 1 };
extern const char *const option_names[OPTIONS];

/* What is drawn. */
typedef struct drawing {
    int options;    /* a bit for each option that may be drawn */
    int64_t tokens; /* of all heads of v together, at most; a single long sequence may have a little more */
    bool is_long;   /* sequences of 300 tokens and more, which may be cut, instead of short ones */
} drawing;

/* All options, a single one or some, of those in `options`. */
int draw_subset(rng *r, int options);

int64_t below(rng *r, int64_t count);
bool one_in(rng *r, int64_t count);

/* A problem with any shape, gate, beta, norm, pool and checkpoints. */
problem *draw_problem(rng *r, drawing how);

/* Fills a problem of any shape: gates, betas, norms and numbers. */
void draw_contents(rng *r, drawing how, problem *p);

void shuffle(rng *r, int64_t *values, int64_t count);

void draw_pool(rng *r, problem *p);
void draw_checkpoints(rng *r, problem *p);

/* Any options and layouts that the device under test takes for that problem. */
call_options draw_options(rng *r, drawing how, const problem *p);

/* The same options with contiguous tensors. */
call_options without_layouts(call_options options);

enum { DESCRIPTION = 200 }; /* bytes of a description */

/* What a drawn call is, for a message. */
const char *describe(const problem *p, const call_options *options, char text[DESCRIPTION]);

#endif
