/*
 * Calls of flash_kda_decode() and flash_kda_apply() with every option, drawn from a seed: one to sixteen
 * tokens, packed sequences, grouped heads, gates, betas, strides, pools, trees, records, past records and
 * both kinds of rounding. Every output, every state that is written and every record is held to the fp64
 * recurrence, and every byte that is no element of one must be as before.
 *
 * FLASH_KDA_TEST_PROBLEMS says how many calls are tried, and FLASH_KDA_TEST_SEED where they begin:
 *
 *     FLASH_KDA_TEST_PROBLEMS=1 FLASH_KDA_TEST_SEED=71 build/tests/test_decode --device cpu drawn
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../kernels/decode/rounding.h"
#include "decode_compare.h"
#include "draw_decode.h"

enum { RECORD = FLASH_KDA_RECORD_ROWS * DIM };

/* fp32 arithmetic, and an output that is rounded to bf16. */
static const double OUT_BAR = 2.2e-3, STATE_BAR = 1e-5, BF16_STATE_BAR = 2.2e-3;
/* In all draws of a group together the roundings of outputs average out. */
static const double ALL_OUT_BAR = 1.75e-3;

/* An element that lies between two neighbours, a part f of their distance from one of them, is off by a mean
 * square of f (1 - f) of it if it is rounded at random: 1/6 on average, and 1/12 with rounding to the
 * nearest. */
static double bf16_state_bar(bool at_random)
{
    return at_random ? BF16_STATE_BAR * sqrt(2.0) : BF16_STATE_BAR;
}

/* ---- Errors -------------------------------------------------------------------------------------------- */

typedef struct sums {
    double wrong, all;
    long elements;
} sums;

static double error_of(sums s)
{
    if (isnan(s.wrong) || isnan(s.all)) return INFINITY;
    return s.all > 0.0 ? sqrt(s.wrong / s.all) : s.wrong > 0.0 ? INFINITY : 0.0;
}

static sums total_out;

/* ---- One draw ------------------------------------------------------------------------------------------ */

typedef struct draw {
    const decode_problem *d;
    const decode_problem *allowed; /* the same with numbers that are allowed */
    const decode_options *options;
    decode_answer truth;
    uint16_t *out;
    void *pool, *written; /* the latter is NULL without written_states */
    float *records;
    sums out_sums, state_sums;
    long unlike; /* bf16 elements that are not what rounding.h makes of the truth */
} draw;

static bool is_bf16(const draw *w)
{
    return w->options->tokens.bf16_state;
}

static int64_t begin_of(const draw *w, int64_t n)
{
    int64_t begin, end;
    problem_sequence(w->d->tokens, n, &begin, &end);
    return begin;
}

/* The truth about one head's state after token i of sequence n. */
static const double *truth_after(const draw *w, int64_t n, int64_t i, int64_t h)
{
    return w->truth.states + ((begin_of(w, n) + i) * w->d->tokens->heads + h) * DIM * DIM;
}

/* How often a state was rounded on its way to token i: a kernel may take the state of a parent that is not
 * the token before from the slot it went to. */
static int roundings_to(const decode_problem *d, int64_t n, int64_t i)
{
    int count = 1;
    for (; i >= 0; i = decode_parent(d, n, i)) {
        const int64_t parent = decode_parent(d, n, i);
        if (d->write_states == FLASH_KDA_WRITE_EACH && parent >= 0 && parent != i - 1) count++;
    }
    return count;
}

static int most_roundings(const draw *w)
{
    int most = 1;
    for (int64_t n = 0; is_bf16(w) && n < w->d->tokens->sequences; n++)
        for (int64_t i = 0; i < decode_length(w->d, n); i++)
            if (roundings_to(w->d, n, i) > most) most = roundings_to(w->d, n, i);
    return most;
}

/* The size that elements of a row of out have if the query is random, since its length is 1: where it happens
 * to be nearly orthogonal to the state, the output is smaller, but what fp32 makes of it is not. 0 without a
 * state. */
static double usual_size(const draw *w, int64_t row)
{
    const double *state = w->truth.states + row * DIM * DIM;
    return isnan(state[0]) ? 0.0 : fabs((double)w->d->tokens->scale) * rms_of(state, DIM * DIM);
}

static void check_out(draw *w)
{
    const problem *p = w->d->tokens;
    for (int64_t row = 0; row < problem_rows(p); row++) {
        const double *truth = w->truth.out + row * DIM, size = usual_size(w, row);
        double worst = 0.0;
        for (int i = 0; i < DIM; i++) {
            const double got = float_from_bf16(w->out[row * DIM + i]), off = got - truth[i];
            const double excess = decode_excess(truth[i], got, size, DECODE_TO_NEAREST);
            worst = excess <= worst ? worst : excess; /* true for NaN */
            w->out_sums.wrong += off * off;
            w->out_sums.all += truth[i] * truth[i];
            w->out_sums.elements++;
        }
        CHECK(worst <= 1.0 || most_roundings(w) > 1,
              "row %lld of out has an element %.3g times as far off as "
              "it may be",
              (long long)row, worst);
    }
    const double bar = OUT_BAR * sqrt(most_roundings(w));
    check_error("out", error_of(w->out_sums), bar);
    total_out.wrong += most_roundings(w) > 1 ? 0.0 : w->out_sums.wrong;
    total_out.all += most_roundings(w) > 1 ? 0.0 : w->out_sums.all;
    total_out.elements += most_roundings(w) > 1 ? 0 : w->out_sums.elements;
}

/* The bits that rounding.h makes of the truth in row v and channel k. */
static uint16_t rounded_at_random(const draw *w, int64_t n, int token, int64_t h, int v, int k, double truth)
{
    const fkda_random_block block = fkda_random(
        (uint64_t)w->d->rounding[0], (uint64_t)w->d->rounding[1],
        fkda_random_place(n, token, w->d->tokens->heads, h, v, k / FKDA_CHANNELS_OF_A_RANDOM_BLOCK));
    const float x = (float)truth;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return fkda_round_at_random(bits, fkda_random_bits(&block, k % FKDA_CHANNELS_OF_A_RANDOM_BLOCK));
}

/* Holds one head's state in a slot of a pool to the truth. `token` is the one that rounding.h knows. */
static void check_state(draw *w, const void *pool, int64_t slot, int64_t n, int64_t i, int64_t h, int token,
                        int roundings)
{
    const double *truth = truth_after(w, n, i, h), size = rms_of(truth, DIM * DIM);
    const int64_t first = (slot * w->d->tokens->heads + h) * DIM * DIM;
    const double steps = !is_bf16(w) ? 0.0 : w->d->rounding ? DECODE_AT_RANDOM : DECODE_TO_NEAREST;
    double worst = 0.0;
    for (int e = 0; e < DIM * DIM; e++) {
        const uint16_t bits = is_bf16(w) ? ((const uint16_t *)pool)[first + e] : 0;
        const double got = is_bf16(w) ? float_from_bf16(bits) : ((const float *)pool)[first + e],
                     off = got - truth[e], excess = decode_excess(truth[e], got, size, steps);
        worst = excess <= worst ? worst : excess;
        w->state_sums.wrong += off * off;
        w->state_sums.all += truth[e] * truth[e];
        w->state_sums.elements++;
        if (is_bf16(w) && w->d->rounding && roundings == 1)
            w->unlike += bits != rounded_at_random(w, n, token, h, e / DIM, e % DIM, truth[e]);
    }
    CHECK(
        worst <= 1.0 || roundings > 1,
        "the state of sequence %lld after token %lld, head %lld, has an element %.3g times as far off as it "
        "may be",
        (long long)n, (long long)i, (long long)h, worst);
}

static void check_state_sums(draw *w)
{
    const double error = error_of(w->state_sums);
    if (w->state_sums.elements == 0) return;
    if (is_bf16(w))
        check_error("bf16 state", error, bf16_state_bar(w->d->rounding) * sqrt(most_roundings(w)));
    else
        check_error("state", error, STATE_BAR);
    CHECK((double)w->unlike <= 0.02 * (double)w->state_sums.elements,
          "%ld of %ld elements are not rounded by the numbers of rounding.h", w->unlike,
          w->state_sums.elements);
    w->state_sums = (sums){0};
    w->unlike = 0;
}

static void check_states(draw *w)
{
    for (int64_t n = 0; n < w->d->tokens->sequences; n++) {
        const int64_t length = decode_length(w->d, n);
        for (int64_t i = 0; i < length; i++) {
            const int64_t slot = decode_slot_after(w->d, n, i, length),
                          written = decode_written_slot(w->d, n, i, length);
            const int token = w->d->write_states == FLASH_KDA_WRITE_EACH ? (int)i : 0;
            for (int64_t h = 0; slot >= 0 && h < w->d->tokens->heads; h++)
                check_state(w, w->pool, slot, n, i, h, token, roundings_to(w->d, n, i));
            for (int64_t h = 0; written >= 0 && h < w->d->tokens->heads; h++)
                check_state(w, w->written, written, n, i, h, token, roundings_to(w->d, n, i));
        }
    }
    check_state_sums(w);
}

/* ---- Records ------------------------------------------------------------------------------------------- */

/* The key that the recurrence takes. */
static void true_key(const problem *p, int64_t token, int64_t h, double k[DIM])
{
    const uint16_t *row = p->k + (token * p->qk_heads + h / (p->heads / p->qk_heads)) * DIM;
    double sum = 1e-6;
    for (int i = 0; i < DIM; i++) k[i] = float_from_bf16(row[i]), sum += k[i] * k[i];
    for (int i = 0; i < DIM && !p->qk_is_normalised; i++) k[i] /= sqrt(sum);
}

/* The element of the state that token i of sequence n, or its beginning, continues from. */
static double parent_element(const draw *w, int64_t n, int64_t i, int64_t h, int e)
{
    const int64_t parent = decode_parent(w->d, n, i);
    if (parent >= 0) return truth_after(w, n, parent, h)[e];
    return w->d->tokens
        ->initial_state[(decode_first_slot(w->d, n) * w->d->tokens->heads + h) * DIM * DIM + e];
}

/* A record must lead from the true state before a token to the true one after it. */
static void check_record(const draw *w, int64_t n, int64_t i, int64_t h, const float *record)
{
    const float *decay = record, *key = record + DIM, *u = record + 2 * DIM;
    const double *truth = truth_after(w, n, i, h);
    double k[DIM], made, wrong = 0.0, all = 0.0, keys = 0.0;
    true_key(w->d->tokens, begin_of(w, n) + i, h, k);
    for (int e = 0; e < DIM; e++) keys += pow(key[e] - k[e], 2.0);
    for (int e = 0; e < DIM * DIM; e++) {
        made = decay[e % DIM] * parent_element(w, n, i, h, e) + (double)key[e % DIM] * u[e / DIM];
        wrong += pow(made - truth[e], 2.0);
        all += truth[e] * truth[e];
    }
    const double bar = most_roundings(w) > 1 ? BF16_STATE_BAR * most_roundings(w) : STATE_BAR;
    CHECK(sqrt(keys) <= 1e-5 * (rms_of(k, DIM) * sqrt(DIM)), "the key of token %lld is off by %.3g",
          (long long)i, sqrt(keys));
    CHECK(sqrt(wrong) <= bar * sqrt(all), "the record of token %lld of sequence %lld makes an error of %.3g",
          (long long)i, (long long)n, sqrt(wrong / all));
}

static void check_records(const draw *w)
{
    const problem *p = w->d->tokens;
    for (int64_t n = 0; n < p->sequences; n++)
        for (int64_t i = 0; i < decode_length(w->d, n); i++)
            for (int64_t h = 0; h < p->heads; h++) {
                const float *record = w->records + ((n * w->d->record_columns + i) * p->heads + h) * RECORD;
                if (decode_first_slot(w->d, n) >= 0) {
                    check_record(w, n, i, h, record);
                    continue;
                }
                bool zeros = true;
                for (int e = 0; e < RECORD; e++) zeros = zeros && record[e] == 0.0f;
                CHECK(zeros, "the record of a token without a state is not zeros");
            }
}

/* After the tokens that the draw says were applied: each sequence must have come to the true state after the
 * last of them, and nothing else may have been written. */
static void check_applied(draw *w, decode_call *c)
{
    const char *damaged = decode_call_damage(c, true);
    CHECK(!damaged, "bytes of %s, or around it, were written that may not be", damaged);
    float *records = decode_call_read_records(c);
    const int64_t numbers = w->d->tokens->sequences * w->d->record_columns * w->d->tokens->heads * RECORD;
    CHECK(first_difference(records, w->records, sizeof *records, numbers) < 0, "a record has changed");
    free(records);
    free(w->pool);
    w->pool = decode_call_read_pool(c);
    for (int64_t n = 0; n < w->d->tokens->sequences; n++) {
        int64_t last = -1;
        for (int64_t i = 0, token; (token = decode_applied_token(w->d, n, i)) >= 0; i++) last = token;
        const int64_t slot = decode_first_slot(w->d, n);
        for (int64_t h = 0; last >= 0 && slot >= 0 && h < w->d->tokens->heads; h++)
            check_state(w, w->pool, slot, n, last, h, 0, most_roundings(w));
    }
    check_state_sums(w);
}

static void check_apply(draw *w, decode_call *c)
{
    decode_call_restore_pool(c);
    const flash_kda_status status = decode_call_apply(c);
    if (CHECK(status == FLASH_KDA_OK, "apply: %s", flash_kda_last_error())) check_applied(w, c);
}

/* ---- Past records -------------------------------------------------------------------------------------- */

/* Puts the states of the pool in the place of those that a problem starts from. */
static void start_from_pool(const draw *w, problem *p)
{
    for (int64_t i = 0; i < p->slots * p->heads * DIM * DIM; i++)
        p->initial_state[i] =
            is_bf16(w) ? float_from_bf16(((const uint16_t *)w->pool)[i]) : ((const float *)w->pool)[i];
}

/* Holds what the call has left in out and in its own records to what its tokens make of the states in the
 * pool. */
static void check_tokens_after_past(const draw *w, const decode_call *c, const buffer *records)
{
    decode_problem d = *w->d, allowed = *w->allowed;
    draw after = {.d = &d, .options = w->options};
    d.write_states = FLASH_KDA_WRITE_NONE;
    d.has_written = false;
    d.tokens = problem_copy(w->d->tokens), allowed.tokens = problem_copy(w->allowed->tokens);
    start_from_pool(w, d.tokens), start_from_pool(w, allowed.tokens);
    after.truth = decode_solve(&allowed);
    after.out = decode_call_read_out(c);
    after.records = (float *)buffer_read(records);
    check_out(&after);
    check_records(&after);
    CHECK(buffer_is_intact(records), "bytes around records were written");
    decode_answer_free(&after.truth);
    free(after.out), free(after.records);
    problem_free(d.tokens), problem_free(allowed.tokens);
}

/* Applies the same tokens in the call that computes all tokens once more, from the states after those. */
static void check_past(draw *w, decode_call *c)
{
    const size_t numbers =
        (size_t)(w->d->tokens->sequences * w->d->record_columns * w->d->tokens->heads * RECORD);
    buffer records = {.device = c->decode.device, .bytes = numbers * sizeof(float), .band = OUTPUT_BAND_BYTE};
    flash_kda_decode_params params = c->decode;
    buffer_create(&records);
    params.write_states = FLASH_KDA_WRITE_NONE;
    params.written_states.data = params.written_indices.data = NULL;
    params.state_indices = c->apply.state_indices;
    params.num_accepted_tokens = c->apply.num_accepted_tokens;
    params.accepted = c->apply.accepted;
    params.past_records = c->apply.records;
    params.records.data = buffer_start(&records);
    decode_call_restore_pool(c);
    const flash_kda_status status = flash_kda_decode(&params);
    if (CHECK(status == FLASH_KDA_OK, "past_records: %s", flash_kda_last_error())) {
        must(flash_kda_synchronize(params.device, params.stream));
        check_applied(w, c);
        check_tokens_after_past(w, c, &records);
    }
    buffer_free(&records);
}

/* ---- Draws --------------------------------------------------------------------------------------------- */

/* Equal calls give equal bits, with any number of threads. */
static void check_again(const draw *w, decode_call *c)
{
    const problem *p = w->d->tokens;
    decode_call_restore_pool(c);
    c->decode.cpu_threads = c->decode.cpu_threads == 1 ? 3 : 1;
    if (test.device.type == FLASH_KDA_CUDA) c->decode.cpu_threads = 0;
    must(decode_call_run(c));
    uint16_t *out = decode_call_read_out(c);
    void *pool = decode_call_read_pool(c);
    CHECK(first_difference(out, w->out, sizeof *out, problem_rows(p) * DIM) < 0,
          "a second call's out differs");
    CHECK(first_difference(pool, w->pool, is_bf16(w) ? 2 : 4, p->slots * p->heads * DIM * DIM) < 0,
          "a second call's states differ");
    free(out);
    free(pool);
    if (!w->written) return;
    void *written = decode_call_read_written(c);
    CHECK(first_difference(written, w->written, is_bf16(w) ? 2 : 4,
                           w->d->written_slots * p->heads * DIM * DIM) < 0,
          "a second call's written_states differ");
    free(written);
}

static void check_call(draw *w, decode_call *c, bool again)
{
    const flash_kda_status status = decode_call_run(c);
    if (!CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) return;
    const char *damaged = decode_call_damage(c, false);
    CHECK(!damaged, "bytes of %s, or around it, were written that are no part of an output", damaged);
    w->out = decode_call_read_out(c);
    w->pool = decode_call_read_pool(c);
    if (w->d->has_written) w->written = decode_call_read_written(c);
    check_out(w);
    check_states(w);
    if (again) check_again(w, c);
    if (w->d->record_columns) {
        w->records = decode_call_read_records(c);
        check_records(w);
        check_apply(w, c);
        check_past(w, c);
    }
}

static void try_one(uint64_t seed, bool is_wild)
{
    rng r = rng_seed(seed);
    char text[240];
    decode_problem d = draw_decode(&r, test.quick ? 40 : 100, is_wild), allowed = allowed_decode(&d);
    const decode_options options = draw_decode_options(&r, &d);
    draw w = {.d = &d, .allowed = &allowed, .options = &options, .truth = decode_solve(&allowed)};
    decode_call c;
    trying("seed %llu: %s", (unsigned long long)seed, describe_decode(&d, &options, text));
    decode_call_open(&c, &d, options);
    check_call(&w, &c, one_in(&r, 4));
    decode_call_close(&c);
    decode_answer_free(&w.truth);
    free(w.out);
    free(w.pool);
    free(w.written);
    free(w.records);
    decode_problem_free(&d);
    decode_problem_free(&allowed);
}

static void try_seeds(uint64_t share, bool is_wild)
{
    const uint64_t first = number_from("FLASH_KDA_TEST_SEED", 1);
    const bool is_variant = strncmp(test.kernel, "cpu-", 4) == 0; /* The kernel "cpu" has all draws. */
    const uint64_t asked = number_from("FLASH_KDA_TEST_PROBLEMS", test.quick ? 40 : is_variant ? 100 : 600);
    total_out = (sums){0};
    for (uint64_t i = 0; i < asked / share + 1; i++) try_one(first + i, is_wild);
    trying("all draws together");
    CHECK(total_out.elements < 100000 || error_of(total_out) <= ALL_OUT_BAR,
          "out has relative error %.3g; it must be at most %.3g", error_of(total_out), ALL_OUT_BAR);
}

static void drawn(void)
{
    try_seeds(1, false);
}

/* Numbers that a GPU holds inside of their ranges. */
static void wild(void)
{
    if (test.device.type == FLASH_KDA_CUDA) try_seeds(3, true);
}

/* ---- Decode after a forward pass ----------------------------------------------------------------------- */

/* A part of a tensor of tokens: `count` tokens from `from` on. */
static flash_kda_tensor tokens_of(flash_kda_tensor t, int64_t from, int64_t count)
{
    t.data = (char *)t.data + from * t.stride[1] * (int64_t)dtype_size(t.dtype);
    t.shape[1] = count;
    return t;
}

static void take_tokens(const call *c, int64_t from, int64_t count, flash_kda_tensor *q, flash_kda_tensor *k,
                        flash_kda_tensor *v, flash_kda_tensor *g, flash_kda_tensor *beta,
                        flash_kda_tensor *out)
{
    *q = tokens_of(c->params.q, from, count);
    *k = tokens_of(c->params.k, from, count);
    *v = tokens_of(c->params.v, from, count);
    *g = tokens_of(c->params.g, from, count);
    *beta = tokens_of(c->params.beta, from, count);
    *out = tokens_of(c->params.out, from, count);
}

static void prefill_tokens(const call *c, int64_t count)
{
    flash_kda_fwd_params p = c->params;
    buffer workspace = {.device = p.device, .band = OUTPUT_BAND_BYTE};
    take_tokens(c, 0, count, &p.q, &p.k, &p.v, &p.g, &p.beta, &p.out);
    must(flash_kda_fwd_workspace_size(&p, &workspace.bytes));
    buffer_create(&workspace);
    p.workspace = workspace.bytes ? buffer_start(&workspace) : NULL;
    p.workspace_size = workspace.bytes;
    must(flash_kda_fwd(&p));
    must(flash_kda_synchronize(p.device, p.stream));
    buffer_free(&workspace);
}

static void decode_tokens(const decode_call *c, int64_t from, int64_t count)
{
    flash_kda_decode_params p = c->decode;
    take_tokens(&c->tokens, from, count, &p.q, &p.k, &p.v, &p.g, &p.beta, &p.out);
    const flash_kda_status status = flash_kda_decode(&p);
    CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error());
}

/* A forward pass over the first tokens and decode over the others, one to sixteen at a time, must give what
 * the recurrence gives. */
static void try_split(rng *r, const problem *p, const answer *truth, bool k_first, int64_t split)
{
    const bars gpu = {2.5e-3, 8e-4}, cpu = {OUT_BAR, STATE_BAR},
               limits = test.device.type == FLASH_KDA_CPU ? cpu : gpu;
    const decode_problem d = {.tokens = (problem *)p, .slot_columns = 1};
    decode_options options = {.tokens = options_of(STATE_IN_PLACE, false)};
    options.tokens.k_first = k_first;
    decode_call c;
    decode_call_open(&c, &d, options);
    prefill_tokens(&c.tokens, split);
    for (int64_t at = split, count; at < p->tokens; at += count) {
        count = 1 + below(r, FLASH_KDA_MAX_DECODE_TOKENS);
        if (count > p->tokens - at) count = p->tokens - at;
        decode_tokens(&c, at, count);
    }
    must(flash_kda_synchronize(test.device, NULL));
    uint16_t *out = decode_call_read_out(&c);
    void *pool = decode_call_read_pool(&c);
    check_error("out", relative_rms(truth->out, out, FLASH_KDA_BF16, problem_rows(p) * DIM), limits.out);
    check_error("state", relative_rms(truth->state, pool, FLASH_KDA_F32, problem_states(p) * DIM * DIM),
                limits.state);
    free(out);
    free(pool);
    decode_call_close(&c);
}

static void prefill(void)
{
    const int64_t tokens = test.quick ? 70 : 200, step = test.quick ? 9 : 1;
    rng r = rng_seed(5);
    for (int k_first = 0; k_first < 2; k_first++) {
        problem *p = problem_create(2, tokens, 2);
        problem_group_heads(p, 2);
        fill_case(p, find_case(k_first ? "slow gates" : "random"), 77);
        answer truth = problem_solve(p, true);
        for (int64_t split = 0; split <= tokens; split += step) {
            trying("a forward pass of %lld tokens, then decode, states with %s first", (long long)split,
                   k_first ? "K" : "V");
            try_split(&r, p, &truth, k_first, split);
        }
        answer_free(&truth);
        problem_free(p);
    }
}

/* ---- Slow channels in a bf16 state --------------------------------------------------------------------- */

enum { WRITTEN = DIM / 2 }; /* The keys have zeros in the other channels, which forget alone. */

/* Channels that forget 1e-5 nats a token. */
static problem *forgetful(int64_t tokens)
{
    rng r = rng_seed(9);
    problem *p = problem_create(1, tokens, 1);
    fill_case(p, find_case("random"), 3);
    p->gate = FLASH_KDA_GATE_ACTIVATED;
    p->g_f32 = allocate((size_t)(tokens * DIM), sizeof *p->g_f32);
    for (int64_t i = 0; i < tokens * DIM; i++) {
        p->g_f32[i] = -1e-5f;
        if (i % DIM >= WRITTEN) p->k[i] = 0;
    }
    for (int i = 0; i < DIM * DIM; i++)
        p->initial_state[i] = float_from_bf16(bf16_from_float((float)rng_normal(&r)));
    return p;
}

/* The pool after one token a call, with the state rounded to the nearest bf16 or at random. */
static uint16_t *one_by_one(const problem *p, int64_t tokens, bool at_random)
{
    const decode_problem d = {.tokens = (problem *)p, .slot_columns = 1};
    const decode_options options = {.tokens = options_of(STATE_IN_PLACE, true)};
    int64_t *numbers = allocate((size_t)(2 * tokens), sizeof *numbers);
    buffer rounding = {
        .device = test.device, .bytes = (size_t)(2 * tokens) * sizeof *numbers, .band = NAN_BYTE};
    const int64_t shape[] = {2};
    decode_call c;
    for (int64_t t = 0; t < tokens; t++) numbers[2 * t] = 20261130, numbers[2 * t + 1] = t;
    buffer_create(&rounding);
    buffer_write(&rounding, numbers);
    decode_call_open(&c, &d, options);
    for (int64_t t = 0; t < tokens; t++) {
        int64_t *at = (int64_t *)buffer_start(&rounding) + 2 * t;
        if (at_random) c.decode.rounding = tensor_of(at, FLASH_KDA_I64, 1, shape);
        decode_tokens(&c, t, 1);
    }
    must(flash_kda_synchronize(test.device, NULL));
    uint16_t *pool = decode_call_read_pool(&c);
    decode_call_close(&c);
    buffer_free(&rounding);
    free(numbers);
    return pool;
}

/* Projects the channels that nothing is written to on what they were before: the part of them that is left.
 * */
static double part_left(const problem *p, const uint16_t *pool)
{
    double product = 0.0, square = 0.0;
    for (int e = 0; e < DIM * DIM; e++) {
        if (e % DIM < WRITTEN) continue;
        product += (double)p->initial_state[e] * float_from_bf16(pool[e]);
        square += (double)p->initial_state[e] * p->initial_state[e];
    }
    return product / square;
}

/* How much of a slow channel's state is left after n tokens has a spread, because each element moves by whole
 * steps of bf16, about 2^-8 of itself, one token in 400. After 8192 tokens an element has moved 20 steps,
 * give or take 4.5, or 1.8%; the mean of 8192 elements is good to 2e-4. */
static void stagnation(void)
{
    const int64_t tokens = test.quick ? 1024 : 8192;
    problem *p = forgetful(tokens);
    answer truth = problem_solve(p, true);
    uint16_t *random = one_by_one(p, tokens, true), *nearest = one_by_one(p, 64, false);
    const double left = part_left(p, random), expected = exp(-1e-5 * (double)tokens),
                 error = relative_rms(truth.state, random, FLASH_KDA_BF16, DIM * DIM);
    long moved = 0;
    trying("%lld tokens that forget 1e-5 nats", (long long)tokens);
    CHECK(fabs(left - expected) <= 1.5e-3, "%.5f of slow channels is left; it must be %.5f", left, expected);
    check_error("bf16 state", error, 0.03);
    for (int e = 0; e < DIM * DIM; e++)
        moved += e % DIM >= WRITTEN && float_from_bf16(nearest[e]) != p->initial_state[e];
    CHECK(moved == 0, "%ld slow elements moved with rounding to the nearest, which rounding at random is for",
          moved);
    free(random);
    free(nearest);
    answer_free(&truth);
    problem_free(p);
}

/* ---- More records than a decode call fills ------------------------------------------------------------- */

/* Asks for `count` records of two sequences of three heads to be applied to states of a dtype and a layout.
 * The first 16 are applied, at most. */
static void apply_many(int64_t count, flash_kda_dtype dtype, bool k_first)
{
    enum { N = 2, HEADS = 3, COLUMNS = 40 };
    const int64_t shapes[][4] = {{N, COLUMNS, HEADS, RECORD}, {N}, {N, HEADS, DIM, DIM}};
    const size_t states = (size_t)N * HEADS * DIM * DIM, numbers = (size_t)N * COLUMNS * HEADS * RECORD;
    double *truth = allocate(states, sizeof *truth);
    float *records = allocate(numbers, sizeof *records);
    void *start = allocate(states, sizeof(float));
    const int64_t accepted[N] = {count, count};
    rng r = rng_seed(77);
    for (size_t i = 0; i < numbers; i++) {
        const size_t row = i / DIM % 3;
        records[i] = (float)(row == 0   ? rng_uniform(&r, 0.9, 1.0)
                             : row == 1 ? rng_normal(&r) / 11.0
                                        : rng_normal(&r));
    }
    for (size_t i = 0; i < states; i++) {
        const float x = (float)rng_normal(&r);
        const uint16_t bits = bf16_from_float(x);
        if (dtype == FLASH_KDA_BF16)
            ((uint16_t *)start)[i] = bits;
        else
            ((float *)start)[i] = x;
        truth[i] = dtype == FLASH_KDA_BF16 ? float_from_bf16(bits) : x;
    }
    for (size_t head = 0; head < N * HEADS; head++)
        for (int64_t i = 0; i < count && i < 16; i++) {
            const float *decay =
                records + ((head / HEADS * COLUMNS + (size_t)i) * HEADS + head % HEADS) * RECORD;
            for (int e = 0; e < DIM * DIM; e++) {
                const int channel = k_first ? e / DIM : e % DIM, row = k_first ? e % DIM : e / DIM;
                double *x = truth + head * DIM * DIM + e;
                *x = *x * decay[channel] + (double)decay[DIM + channel] * decay[2 * DIM + row];
            }
        }
    buffer pool = {.device = test.device,
                   .bytes = states * (dtype == FLASH_KDA_BF16 ? 2 : 4),
                   .band = NAN_BYTE},
           all = {.device = test.device, .bytes = numbers * sizeof *records, .band = NAN_BYTE},
           counts = {.device = test.device, .bytes = sizeof accepted, .band = NAN_BYTE};
    buffer_create(&pool), buffer_create(&all), buffer_create(&counts);
    buffer_write(&pool, start), buffer_write(&all, records), buffer_write(&counts, accepted);
    const flash_kda_apply_params params = {
        .struct_size = sizeof params,
        .device = test.device,
        .kernel = test.kernel,
        .records = tensor_of(buffer_start(&all), FLASH_KDA_F32, 4, shapes[0]),
        .num_accepted_tokens = tensor_of(buffer_start(&counts), FLASH_KDA_I64, 1, shapes[1]),
        .state = tensor_of(buffer_start(&pool), dtype, 4, shapes[2]),
        .state_k_first = k_first,
    };
    trying("%lld records, %s states%s", (long long)count, dtype == FLASH_KDA_BF16 ? "bf16" : "fp32",
           k_first ? ", K first" : "");
    must(flash_kda_apply(&params));
    must(flash_kda_synchronize(test.device, NULL));
    unsigned char *got = buffer_read(&pool);
    const bool is_bf16_state = dtype == FLASH_KDA_BF16;
    check_error(is_bf16_state ? "bf16 state" : "state", relative_rms(truth, got, dtype, (int64_t)states),
                is_bf16_state ? BF16_STATE_BAR : STATE_BAR);
    free(got);
    buffer_free(&pool), buffer_free(&all), buffer_free(&counts);
    free(truth), free(records), free(start);
}

static void many_records(void)
{
    static const int64_t counts[] = {9, 16, 17, 40};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (int k_first = 0; k_first < 2; k_first++) {
            if (test.device.type == FLASH_KDA_CPU && counts[i] > 16) continue; /* which is refused there */
            apply_many(counts[i], FLASH_KDA_F32, k_first);
            apply_many(counts[i], FLASH_KDA_BF16, k_first);
        }
}

/* ---- Kernels without decode ---------------------------------------------------------------------------- */

/* A kernel without decode says so, and then there is nothing else to test. */
static bool decodes(void)
{
    problem *p = problem_create(1, 1, 1);
    const decode_problem d = {.tokens = p, .slot_columns = 1};
    decode_call c;
    decode_call_open(&c, &d, (decode_options){.tokens = options_of(STATE_IN_PLACE, false)});
    const flash_kda_status status = decode_call_run(&c);
    const bool lacks = status == FLASH_KDA_UNAVAILABLE &&
                       strstr(flash_kda_last_error(), "which does not take flash_kda_decode()");
    if (lacks) {
        CHECK(decode_call_untouched(&c), "a call that was not taken wrote to a tensor");
        CHECK(test.device.type != FLASH_KDA_CPU, "%s", flash_kda_last_error());
    } else {
        CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error());
    }
    decode_call_close(&c);
    problem_free(p);
    return !lacks;
}

static void run_drawn(void)
{
    if (decodes()) drawn();
}

static void run_wild(void)
{
    if (decodes()) wild();
}

static void run_prefill(void)
{
    if (decodes()) prefill();
}

static void run_stagnation(void)
{
    if (decodes()) stagnation();
}

static void run_many_records(void)
{
    if (decodes()) many_records();
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"drawn", run_drawn},           {"wild-indices", run_wild},         {"prefill", run_prefill},
        {"stagnation", run_stagnation}, {"many-records", run_many_records},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
