/* The definition of decode_layer: convolution, recurrence and norm in fp64, one token after the other. It is
 * written to be read and believed, because every other implementation is held to it. The recurrence is that
 * of reference.c. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../errors.h"
#include "cpu.h"
#include "reference.h"

enum { D = FKDA_DIM, PARTS = FKDA_CONV_PARTS };

typedef struct job {
    const fkda_decode_layer_problem *problem;
    double *out;             /* [N, T, H, V] */
    double *states;          /* [N, T, H, V, K], or NULL */
    double (*scratch)[D][D]; /* a state for each worker */
} job;

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

static double number_of(const fkda_channel_view *c, int64_t begin, int part, int64_t channel, int64_t column)
{
    return fkda_reference_value(c->data, c->dtype, begin + fkda_channel_offset(c, part, channel, column));
}

/* Input x_t of a channel, for t from -3 on. The negative ones are in the window, which begins at `window`. */
static double input_at(const fkda_decode_layer_problem *p, const fkda_sequence *s, int64_t window, int part,
                       int64_t channel, int64_t t)
{
    if (t < 0) return number_of(&p->conv_state, window, part, channel, t + FKDA_WINDOW);
    return fkda_reference_value(p->x.data, p->x.dtype,
                                fkda_row_offset(&p->x, s->row, s->begin + t, 0) + part * p->x_part_stride +
                                    channel);
}

/* y_t of a channel. */
static double convolve(const fkda_decode_layer_problem *p, const fkda_sequence *s, int64_t window, int part,
                       int64_t channel, int64_t t)
{
    double sum = p->bias.data ? number_of(&p->bias, 0, part, channel, 0) : 0.0;
    for (int j = 0; j < FKDA_CONV_TAPS; j++)
        sum += number_of(&p->weight, 0, part, channel, j) *
               input_at(p, s, window, part, channel, t + j - FKDA_WINDOW);
    return sum * sigmoid(sum);
}

/* The norm over V and the output gate of one token. */
static void finish(const fkda_decode_layer_problem *p, const fkda_sequence *s, int64_t token, int64_t h,
                   double o[D])
{
    const fkda_token_view *gate = &p->output_gate;
    double sum = 0.0;
    for (int j = 0; j < D; j++) sum += o[j] * o[j];
    const double factor = 1.0 / sqrt(sum / D + (double)p->norm_eps);
    for (int j = 0; j < D; j++) {
        if (p->norm_weight) o[j] *= factor * fkda_reference_value(p->norm_weight, p->norm_weight_dtype, j);
        if (gate->data)
            o[j] *= sigmoid(
                fkda_reference_value(gate->data, gate->dtype, fkda_row_offset(gate, s->row, token, h) + j));
    }
}

/* What reference.c takes: q, k and v are the rows of `qkv`, whatever the token. */
static fkda_problem tokens_of(const fkda_decode_problem *p, double qkv[PARTS][D])
{
    const fkda_token_view q = {.data = qkv[0], .dtype = FLASH_KDA_F64},
                          k = {.data = qkv[1], .dtype = FLASH_KDA_F64},
                          v = {.data = qkv[2], .dtype = FLASH_KDA_F64};
    return (fkda_problem){.shape = {.heads = p->heads, .qk_heads = p->heads},
                          .q = q,
                          .k = k,
                          .v = v,
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

static bool run_head(void *context, int64_t index, int worker)
{
    const job *j = context;
    const fkda_decode_layer_problem *p = j->problem;
    const fkda_decode_problem *d = &p->decode;
    const int64_t n = index / d->heads, h = index % d->heads, from = fkda_decode_first_slot(d, n),
                  window_slot = fkda_window_slot(p, n, from),
                  window = window_slot * p->conv_slot_stride +
                           fkda_window_column(p, n) * p->conv_state.column_stride;
    const bool has_state = from != FKDA_NO_SLOT && window_slot != FKDA_NO_SLOT;
    const fkda_sequence s = fkda_decode_sequence_at(d, n);
    double qkv[PARTS][D], (*S)[D] = j->scratch[worker];
    const fkda_problem tokens = tokens_of(d, qkv);

    fkda_reference_load(&d->state, from, h, d->state_k_first, S);
    for (int64_t t = 0; t < s.end - s.begin; t++) {
        const int64_t token = s.begin + t, row = (s.row * d->tokens + token) * d->heads + h;
        double *out = j->out + row * D;
        if (fkda_is_interrupt(d->interrupt)) return false;
        if (!has_state) {
            memset(out, 0, D * sizeof *out);
            continue;
        }
        for (int part = 0; part < PARTS; part++)
            for (int i = 0; i < D; i++) qkv[part][i] = convolve(p, &s, window, part, h * D + i, t);
        fkda_reference_step(&tokens, s.row, token, h, S, out);
        finish(p, &s, token, h, out);
        if (j->states) fkda_reference_store(S, j->states + row * D * D);
    }
    return true;
}

flash_kda_status fkda_cpu_decode_layer_reference(const fkda_decode_layer_problem *p, double *out,
                                                 double *states)
{
    const int64_t heads = p->decode.sequences * p->decode.heads;
    int threads = p->decode.threads < FKDA_MAX_THREADS ? p->decode.threads : FKDA_MAX_THREADS;
    if (threads > heads) threads = (int)heads;
    const size_t bytes = (size_t)threads * sizeof(double[D][D]);
    void *memory = malloc(bytes);
    if (!memory)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR, "the reference could not allocate %zu bytes of memory",
                         bytes);
    job j = {.problem = p, .out = out, .states = states, .scratch = memory};
    const bool finished = fkda_parallel_for(threads, heads, run_head, &j);
    free(memory);
    return finished ? FLASH_KDA_OK : fkda_interruption();
}
