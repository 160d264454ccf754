/* The definition of decode: the recurrence in fp64, one token after the other. Every state after a token is
 * kept, because a later token of a tree may continue from it. */
#include <stdlib.h>
#include <string.h>

#include "../errors.h"
#include "cpu.h"
#include "reference.h"

enum { K = FKDA_DIM, V = FKDA_DIM, STATES = FLASH_KDA_MAX_DECODE_TOKENS + 1 };

typedef struct job {
    const fkda_decode_problem *problem;
    const fkda_problem *tokens;      /* what reference.c takes */
    double *out;                     /* [N, T, HV, V] */
    double *states;                  /* [N, T, HV, V, K] or NULL */
    double (*scratch)[STATES][K][V]; /* One for each worker: the starting state, then one after each token. */
} job;

static fkda_problem tokens_of(const fkda_decode_problem *p)
{
    return (fkda_problem){.shape = {.heads = p->heads, .qk_heads = p->qk_heads},
                          .q = p->q,
                          .k = p->k,
                          .v = p->v,
                          .g = p->g,
                          .beta = p->beta,
                          .gate = p->gate,
                          .beta_kind = p->beta_kind,
                          .A_log = p->A_log,
                          .dt_bias = p->dt_bias,
                          .qk_is_normalised = p->qk_is_normalised,
                          .scale = p->scale,
                          .lower_bound = p->lower_bound};
}

/* Applies the accepted tokens of earlier records to the state that sequence n starts from. */
static void apply_past(const fkda_apply_problem *past, int64_t n, int64_t h, double (*state)[V])
{
    const int64_t count = past->records ? fkda_apply_count(past, n) : 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t token = fkda_apply_token(past, n, i);
        if (token < 0) return;
        const float *record =
            past->records + fkda_record_offset(n, past->record_columns, token, past->heads, h);
        for (int c = 0; c < K; c++)
            for (int v = 0; v < V; v++)
                state[c][v] = record[FKDA_RECORD_DECAY * K + c] * state[c][v] +
                              (double)record[FKDA_RECORD_KEY * K + c] * record[FKDA_RECORD_U * K + v];
    }
}

static bool run_head(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_decode_problem *p = j->problem;
    const int64_t n = index / p->heads, h = index % p->heads;
    const fkda_sequence sequence = fkda_decode_sequence_at(p, n);
    const int64_t slot = fkda_decode_first_slot(p, n);
    double(*states)[K][V] = j->scratch[worker];

    const fkda_apply_problem past = fkda_past_of(p);
    fkda_reference_load(&p->state, slot, h, p->state_k_first, states[0]);
    apply_past(&past, n, h, states[0]);
    for (int64_t i = 0; i < sequence.end - sequence.begin; i++) {
        const int64_t token = sequence.begin + i, row = (sequence.row * p->tokens + token) * p->heads + h;
        double *out = j->out + row * V, (*after)[V] = states[i + 1];
        if (fkda_is_interrupt(p->interrupt)) return false;
        if (slot == FKDA_NO_SLOT) {
            memset(out, 0, V * sizeof *out);
            continue;
        }
        memcpy(after, states[fkda_decode_parent(p, n, i) + 1], sizeof(double[K][V]));
        fkda_reference_step(j->tokens, sequence.row, token, h, after, out);
        if (j->states) fkda_reference_store(after, j->states + row * V * K);
    }
    return true;
}

flash_kda_status fkda_cpu_decode_reference(const fkda_decode_problem *p, double *out, double *states)
{
    const int64_t heads = p->sequences * p->heads;
    int threads = p->threads < FKDA_MAX_THREADS ? p->threads : FKDA_MAX_THREADS;
    if (threads > heads) threads = (int)heads;
    const size_t bytes = (size_t)threads * sizeof(double[STATES][K][V]);
    double(*scratch)[STATES][K][V] = malloc(bytes);
    if (!scratch)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR, "the reference could not allocate %zu bytes of memory",
                         bytes);
    const fkda_problem tokens = tokens_of(p);
    job j = {.problem = p, .tokens = &tokens, .out = out, .states = states, .scratch = scratch};
    const bool finished = fkda_parallel_for(threads, heads, run_head, &j);
    free(scratch);
    return finished ? FLASH_KDA_OK : fkda_interruption();
}
