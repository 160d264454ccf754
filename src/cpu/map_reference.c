/* The definition of flash_kda_map(): the recurrence in fp64, one token after the other, from the initial
 * state for `state`, and from the identity with values of zeros for `map`. */
#include <stdlib.h>
#include <string.h>

#include "../errors.h"
#include "cpu.h"
#include "reference.h"

enum { K = FKDA_DIM, V = FKDA_DIM };

typedef struct job {
    const fkda_map_problem *problem;
    /* The same tokens with values of zeros. */
    fkda_problem without_values;
    double *map, *state;
    double (*states)[K][V]; /* one for each worker */
} job;

/* S becomes what the piece leaves of it. */
static bool pass_piece(const fkda_problem *p, int64_t n, int64_t h, double S[K][V])
{
    const fkda_sequence sequence = fkda_sequence_at(p, n);
    double out[V];
    for (int64_t token = sequence.begin; token < sequence.end; token++) {
        if (fkda_interrupted(p)) return false;
        fkda_reference_step(p, sequence.row, token, h, S, out);
    }
    return !fkda_interrupted(p);
}

static bool run_head(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_problem *p = &j->problem->fwd;
    const int64_t heads = p->shape.heads, n = index / heads, h = index % heads;
    double(*S)[V] = j->states[worker];
    if (j->state) {
        fkda_reference_load(&p->initial_state, fkda_slot_of(p, &p->initial_state, n), h, p->state_k_first, S);
        if (!pass_piece(p, n, h, S)) return false;
        fkda_reference_store(S, j->state + index * V * K);
    }
    if (j->map) {
        memset(S, 0, sizeof *j->states);
        for (int i = 0; i < K; i++) S[i][i] = 1.0;
        if (!pass_piece(&j->without_values, n, h, S)) return false;
        fkda_reference_store(S, j->map + index * K * K);
    }
    return true;
}

flash_kda_status fkda_cpu_map_reference(const fkda_map_problem *problem, double *map, double *state)
{
    static uint16_t zeros[V];
    const fkda_shape *shape = &problem->fwd.shape;
    const int64_t count = shape->sequences * shape->heads;
    int threads = shape->threads < FKDA_MAX_THREADS ? shape->threads : FKDA_MAX_THREADS;
    if (threads > count) threads = count > 0 ? (int)count : 1;
    const size_t bytes = (size_t)threads * sizeof(double[K][V]);
    job j = {.problem = problem, .without_values = problem->fwd, .map = map, .state = state};
    j.without_values.v = (fkda_token_view){.data = zeros, .dtype = FLASH_KDA_BF16}; /* all strides are 0 */
    j.states = malloc(bytes);
    if (!j.states)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR, "the reference could not allocate %zu bytes of memory",
                         bytes);
    const bool finished = fkda_parallel_for(threads, count, run_head, &j);
    free(j.states);
    return finished ? FLASH_KDA_OK : fkda_interruption();
}
