/*
 * Maps of pieces of sequences, and how they are joined: the fp64 reference of the map against that of the
 * forward pass, kernels against the fp64 reference, and sequences that are computed piece by piece against
 * whole ones.
 *
 * FLASH_KDA_TEST_PROBLEMS says how many calls with drawn options are tried, and FLASH_KDA_TEST_SEED where
 * they begin.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bwd_call.h"
#include "draw.h"
#include "harness.h"

enum { MATRIX = DIM * DIM };

static const flash_kda_device HOST = {FLASH_KDA_CPU, 0};

/* ---- Errors -------------------------------------------------------------------------------------------- */

/* Relative RMS of what is a sum of products in fp32: of joined states, and on the CPU also of maps. */
static const double BAR = 5e-6;

/* On a GPU a map is as exact as any other final state. */
static double map_bar(double of_states)
{
    return test.device.type == FLASH_KDA_CPU ? BAR : of_states;
}

/* Maps whose RMS is far below this are as good as 0: what they leave of a state is below the end of fp32. */
static const double FLOOR = 1e-30;

/* Likewise on a GPU, where a forward pass leaves about 2^-25 of the state before it out (docs/segments.md).
 * An identity has an RMS of 0.09. */
static const double GPU_FLOOR = 1e-6;

static double worst_map, worst_state, worst_joined;

/* Returns infinity if a result is not finite. */
static double error_of(const double *truth, const float *got, int64_t count)
{
    const double floor = test.device.type == FLASH_KDA_CPU ? FLOOR : GPU_FLOOR;
    double wrong = 0.0, all = floor * floor * (double)count;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(got[i])) return INFINITY;
        wrong += ((double)got[i] - truth[i]) * ((double)got[i] - truth[i]);
        all += truth[i] * truth[i];
    }
    return count ? sqrt(wrong / all) : 0.0;
}

static void hold(const char *what, const double *truth, const float *got, int64_t count, double bar,
                 double *worst)
{
    const double error = error_of(truth, got, count);
    CHECK(error <= bar, "%s has relative error %.3g; it must be at most %.3g", what, error, bar);
    if (!(error <= *worst)) *worst = error;
}

/* ---- Calls --------------------------------------------------------------------------------------------- */

/* A call of flash_kda_map() on the inputs of a forward pass. */
typedef struct map_call {
    call inputs;
    flash_kda_map_params params;
    buffer map, state, workspace;
    int64_t states;
    int64_t gap; /* matrices of a sequence beyond those of its heads */
} map_call;

static flash_kda_map_params params_of(const flash_kda_fwd_params *p)
{
    return (flash_kda_map_params){
        .struct_size = sizeof(flash_kda_map_params),
        .device = p->device,
        .k = p->k,
        .v = p->v,
        .g = p->g,
        .beta = p->beta,
        .A_log = p->A_log,
        .dt_bias = p->dt_bias,
        .initial_state = p->initial_state,
        .cu_seqlens = p->cu_seqlens,
        .kernel = p->kernel,
        .lower_bound = p->lower_bound,
        .cpu_threads = p->cpu_threads,
        .gate = p->gate,
        .beta_kind = p->beta_kind,
        .qk_is_normalised = p->qk_is_normalised,
        .state_k_first = p->state_k_first,
    };
}

/* Whether a kernel runs on the device. */
static flash_kda_status ask_for_map(const char *kernel)
{
    problem *p = problem_create(1, 1, 1);
    flash_kda_fwd_params fwd = problem_params(p, false);
    fwd.device = test.device;
    fwd.kernel = kernel;
    const int64_t shape[] = {1, 1, DIM, DIM};
    float map[MATRIX];
    flash_kda_map_params params = params_of(&fwd);
    params.map = tensor_of(map, FLASH_KDA_F32, 4, shape);
    size_t bytes;
    const flash_kda_status status = flash_kda_map_workspace_size(&params, &bytes);
    problem_free(p);
    return status;
}

static void create_output(const map_call *c, const problem *p, buffer *b, flash_kda_tensor *t)
{
    const int64_t shape[] = {p->sequences, p->heads, DIM, DIM};
    *b = (buffer){.device = test.device,
                  .bytes = (size_t)((p->sequences * (p->heads + c->gap) - c->gap) * MATRIX) * sizeof(float),
                  .band = OUTPUT_BAND_BYTE};
    buffer_create(b);
    unsigned char *nan = malloc(b->bytes);
    memset(nan, NAN_BYTE, b->bytes);
    buffer_write(b, nan);
    free(nan);
    *t = tensor_of(buffer_start(b), FLASH_KDA_F32, 4, shape);
    t->stride[0] += c->gap * MATRIX;
}

static bool open_map(map_call *c, const problem *p, call_options options, int wanted, int64_t gap)
{
    *c = (map_call){.states = problem_states(p), .gap = gap};
    options.mode = options.mode == STATE_NONE ? STATE_NONE : STATE_IN;
    must(call_open(&c->inputs, p, options));
    c->params = params_of(&c->inputs.params);
    if (wanted & 1) create_output(c, p, &c->map, &c->params.map);
    if (wanted & 2) create_output(c, p, &c->state, &c->params.state);
    const flash_kda_status status = flash_kda_map_workspace_size(&c->params, &c->params.workspace_size);
    if (!CHECK(status == FLASH_KDA_OK, "workspace size: %s", flash_kda_last_error())) return false;
    c->workspace = (buffer){.device = test.device, .bytes = c->params.workspace_size + 64, .band = 0x11};
    buffer_create(&c->workspace);
    c->params.workspace = (void *)(((uintptr_t)buffer_start(&c->workspace) + 63) / 64 * 64);
    return true;
}

static void close_map(map_call *c)
{
    call_close(&c->inputs);
    buffer *const all[] = {&c->map, &c->state, &c->workspace};
    for (int i = 0; i < 3; i++)
        if (all[i]->base) buffer_free(all[i]);
}

/* The matrices of all heads, contiguous, as they lie in memory without state_k_first. */
static float *read_matrices(const map_call *c, const problem *p, const buffer *b)
{
    unsigned char *bytes = buffer_read(b);
    const float *from = (const float *)bytes;
    float *to = allocate((size_t)c->states * MATRIX, sizeof *to);
    for (int64_t i = 0; i < c->states; i++) {
        const float *m = from + (i / p->heads * (p->heads + c->gap) + i % p->heads) * MATRIX;
        for (int64_t at = 0; at < MATRIX; at++)
            to[i * MATRIX + at] = c->params.state_k_first ? m[at % DIM * DIM + at / DIM] : m[at];
    }
    for (int64_t n = 0; n + 1 < p->sequences; n++) { /* gaps */
        const unsigned char *gap =
            bytes + (size_t)((n * (p->heads + c->gap) + p->heads) * MATRIX) * sizeof(float);
        for (size_t at = 0; at < (size_t)(c->gap * MATRIX) * sizeof(float); at++)
            if (!CHECK(gap[at] == NAN_BYTE, "a gap between sequences was written")) break;
    }
    free(bytes);
    return to;
}

/* What a call has computed; NULL for what it has not. */
typedef struct outcome {
    float *map, *state;
} outcome;

static void outcome_free(outcome *o)
{
    free(o->map);
    free(o->state);
}

static outcome run(const problem *p, call_options options, int wanted, int64_t gap)
{
    map_call c;
    outcome o = {NULL, NULL};
    if (open_map(&c, p, options, wanted, gap)) {
        const flash_kda_status status = flash_kda_map(&c.params);
        if (CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) {
            CHECK(call_untouched(&c.inputs), "an input was written");
            if (c.map.base) CHECK(buffer_is_intact(&c.map), "memory around map was written");
            if (c.state.base) CHECK(buffer_is_intact(&c.state), "memory around state was written");
            CHECK(buffer_is_intact(&c.workspace), "memory around the workspace was written");
            if (c.map.base) o.map = read_matrices(&c, p, &c.map);
            if (c.state.base) o.state = read_matrices(&c, p, &c.state);
        }
    }
    close_map(&c);
    return o;
}

/* Computes a problem in every way that gives equal bits, and holds it to the reference. */
static void check_problem_with(const problem *p, call_options options, int64_t gap, bars limits)
{
    const int64_t count = problem_states(p) * MATRIX;
    double *map64 = allocate((size_t)count, sizeof *map64), *state64 = allocate((size_t)count, sizeof *map64);
    const flash_kda_fwd_params fwd = problem_params(p, mode_reads(options.mode));
    const flash_kda_map_params params = params_of(&fwd);
    must(flash_kda_map_reference(&params, map64, state64));
    outcome both = run(p, options, 3, gap);
    if (both.map && both.state) {
        hold("map", map64, both.map, count, map_bar(limits.state), &worst_map);
        hold("state", state64, both.state, count, limits.state, &worst_state);
    }
    for (int wanted = 1; wanted <= 2; wanted++) {
        options.threads = wanted * 3; /* so that columns are divided in another way */
        outcome one = run(p, options, wanted, 0);
        if (both.map && one.map)
            CHECK(first_difference(both.map, one.map, 4, count) < 0, "map depends on state or threads");
        if (both.state && one.state)
            CHECK(first_difference(both.state, one.state, 4, count) < 0, "state depends on map or threads");
        outcome_free(&one);
    }
    outcome_free(&both);
    free(map64);
    free(state64);
}

static void check_problem(problem *p)
{
    check_problem_with(p, options_of(STATE_IN, false), 0, ordinary_bars(test.device));
    problem_free(p);
}

/* ---- The reference ------------------------------------------------------------------------------------- */

/* The state after a piece is the state before it times the map, plus the state that zeros become. */
static void reference(void)
{
    static const int64_t lengths[] = {0, 1, 40};
    problem *p = problem_create_ragged(lengths, 3, 2);
    fill_case(p, find_case("channels from fast to slow"), 5);
    const int64_t count = problem_states(p) * MATRIX;
    double *map = allocate((size_t)count, sizeof *map), *state = allocate((size_t)count, sizeof *map);
    const flash_kda_fwd_params fwd = problem_params(p, false);
    const flash_kda_map_params params = params_of(&fwd);
    must(flash_kda_map_reference(&params, map, state));
    answer truth = problem_solve(p, true);
    double most = 0.0;
    for (int64_t i = 0; i < problem_states(p); i++) {
        for (int64_t v = 0; v < DIM; v++) {
            for (int64_t k = 0; k < DIM; k++) {
                double sum = state[i * MATRIX + v * DIM + k];
                for (int64_t j = 0; j < DIM; j++)
                    sum += (double)p->initial_state[i * MATRIX + v * DIM + j] * map[i * MATRIX + j * DIM + k];
                most = fmax(most, fabs(sum - truth.state[i * MATRIX + v * DIM + k]));
            }
        }
    }
    CHECK(most < 1e-12, "the map and the forward pass are %.3g apart", most);
    for (int64_t i = 0; i < 2 * MATRIX; i++) /* of the sequence without tokens */
        CHECK(map[i] == (i % MATRIX / DIM == i % DIM), "the map of no tokens is not the identity");
    answer_free(&truth);
    free(map);
    free(state);
    problem_free(p);
}

/* ---- Kernels against the reference --------------------------------------------------------------------- */

static void lengths(void)
{
    for (int64_t tokens = 0; tokens <= 50; tokens++) {
        const bool near_chunk_end = tokens % 16 <= 1 || tokens % 16 == 15;
        if (test.quick && !near_chunk_end) continue;
        problem *p = problem_create(1, tokens, 1);
        fill_case(p, find_case("channels from fast to slow"), (uint64_t)tokens);
        trying("T = %lld", (long long)tokens);
        check_problem(p);
    }
}

static void ragged(void)
{
    static const int64_t sizes[] = {17, 0, 1, 31, 16};
    for (int64_t shared = 1; shared <= 2; shared++) {
        problem *p = problem_create_ragged(sizes, 5, 2 * shared);
        problem_group_heads(p, shared);
        fill_case(p, find_case("slow gates"), 7);
        trying("5 sequences, %lld value heads for a head of keys", (long long)shared);
        check_problem(p);
    }
    problem *p = problem_create(3, 40, 2);
    fill_case(p, find_case("random"), 7);
    trying("3 batch rows");
    check_problem(p);
}

static void cases(void)
{
    for (int i = 0; i < test_case_count; i++) {
        problem *p = problem_create(1, test.quick ? 35 : 150, 1);
        fill_case(p, &test_cases[i], 11);
        trying("%s, T = %lld", test_cases[i].name, (long long)p->tokens);
        check_problem_with(p, options_of(STATE_IN, false), 0, case_bars(&test_cases[i], test.device));
        problem_free(p);
    }
}

/* No gate is clamped: tokens that forget all, and tokens that forget nothing, are exact. */
static void gates(void)
{
    for (int i = 0; i < DECAY_KINDS; i++) {
        for (int softplus = 0; softplus < 2; softplus++) {
            problem *p = problem_create(1, test.quick ? 20 : 100, 1);
            fill_case(p, find_case("random"), 3);
            p->gate = softplus ? FLASH_KDA_GATE_SOFTPLUS : FLASH_KDA_GATE_ACTIVATED;
            fill_decays(p, (decays)i, i % 2 != 0, 17);
            trying("%s, %s gate", decays_names[i], softplus ? "softplus" : "activated");
            check_problem(p);
        }
    }
    for (int i = 0; i < 3; i++) {
        static const float bounds[] = {0.0f, -1e-3f, -5.0f};
        problem *p = problem_create(1, 37, 1);
        fill_case(p, find_case("channels from fast to slow"), 21);
        p->lower_bound = bounds[i];
        trying("lower_bound = %g", (double)p->lower_bound);
        check_problem(p);
    }
}

/* A slow channel's map stays exact over many tokens. */
static void long_pieces(void)
{
    if (test.quick) return;
    problem *p = problem_create(1, 20000, 1);
    fill_case(p, find_case("slow gates"), 13);
    trying("T = 20000, slow gates");
    check_problem(p);
}

static void try_seed(uint64_t seed)
{
    rng r = rng_seed(seed);
    const drawing how = {ALL_OPTIONS & ~(1 << OPTION_POOL | 1 << OPTION_CHECKPOINTS), test.quick ? 150 : 500,
                         false};
    problem *p = draw_problem(&r, how);
    call_options options = draw_options(&r, how, p);
    options.counts_nonfinite = false;
    options.mode = one_in(&r, 3) ? STATE_NONE : STATE_IN;
    char text[DESCRIPTION];
    trying("seed %llu: %s", (unsigned long long)seed, describe(p, &options, text));
    check_problem_with(p, options, below(&r, 2), ordinary_bars(test.device));
    problem_free(p);
}

static void drawn(void)
{
    const uint64_t first = number_from("FLASH_KDA_TEST_SEED", 1),
                   count = number_from("FLASH_KDA_TEST_PROBLEMS", test.quick ? 10 : 80);
    for (uint64_t seed = first; seed < first + count; seed++) try_seed(seed);
}

/* ---- Joining ------------------------------------------------------------------------------------------- */

/* One sequence in pieces, which are the sequences of one call. */
typedef struct pieces {
    problem *whole, *cut;
    int64_t count;
    outcome maps;
} pieces;

/* Piece i has lengths[i] tokens. */
static pieces cut_in_pieces(const int64_t *sizes, int64_t count, int64_t heads, bool k_first)
{
    pieces x = {.count = count};
    int64_t tokens = 0;
    for (int64_t i = 0; i < count; i++) tokens += sizes[i];
    x.whole = problem_create(1, tokens, heads);
    fill_case(x.whole, find_case("channels from fast to slow"), 31);
    x.cut = problem_create_ragged(sizes, count, heads);
    fill_case(x.cut, find_case("channels from fast to slow"), 31);
    const size_t rows = (size_t)problem_rows(x.cut) * DIM * sizeof *x.cut->q;
    memcpy(x.cut->q, x.whole->q, rows);
    memcpy(x.cut->k, x.whole->k, rows);
    memcpy(x.cut->v, x.whole->v, rows);
    memcpy(x.cut->g, x.whole->g, rows);
    memcpy(x.cut->beta, x.whole->beta, rows / DIM);
    memcpy(x.cut->A_log, x.whole->A_log, (size_t)heads * sizeof(float));
    memcpy(x.cut->dt_bias, x.whole->dt_bias, (size_t)(heads * DIM) * sizeof(float));
    call_options options = options_of(STATE_NONE, false);
    options.k_first = k_first;
    x.maps = run(x.cut, options, 3, 0);
    return x;
}

static void free_pieces(pieces *x)
{
    problem_free(x->whole);
    problem_free(x->cut);
    outcome_free(&x->maps);
}

/* Turns each matrix around, for calls with K first. */
static void transpose_all(float *matrices, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        for (int64_t a = 0; a < DIM; a++)
            for (int64_t b = 0; b < a; b++) {
                float *x = matrices + i * MATRIX + a * DIM + b, *y = matrices + i * MATRIX + b * DIM + a;
                const float kept = *x;
                *x = *y;
                *y = kept;
            }
}

static float *on_device(const float *from, int64_t count)
{
    void *memory;
    must(flash_kda_malloc(test.device, (size_t)count * sizeof *from, &memory));
    must(flash_kda_copy(test.device, memory, HOST, from, (size_t)count * sizeof *from));
    return memory;
}

/* Joins the pieces. maps, states and what is returned, entering and after it the final state, are V first
 * whatever k_first says. */
static float *join(const float *maps, const float *states, const float *initial, int64_t count, int64_t heads,
                   bool backwards, bool k_first, int threads)
{
    const int64_t of_piece = heads * MATRIX, all = count * of_piece;
    const int64_t shape[] = {count, heads, DIM, DIM}, one[] = {1, heads, DIM, DIM};
    /* Maps and states take turns in one buffer, as ranks send them. */
    float *sent = allocate((size_t)(2 * all), sizeof *sent),
          *start = allocate((size_t)of_piece, sizeof *start),
          *got = allocate((size_t)(all + of_piece), sizeof *got);
    for (int64_t i = 0; i < count; i++) {
        memcpy(sent + 2 * i * of_piece, maps + i * of_piece, (size_t)of_piece * sizeof *sent);
        memcpy(sent + (2 * i + 1) * of_piece, states + i * of_piece, (size_t)of_piece * sizeof *sent);
    }
    if (initial) memcpy(start, initial, (size_t)of_piece * sizeof *start);
    if (k_first) transpose_all(sent, 2 * count * heads), transpose_all(start, heads);
    float *const sent_there = on_device(sent, 2 * all), *const start_there = on_device(start, of_piece),
                 *const got_there = on_device(got, all + of_piece);
    flash_kda_join_params p = {.struct_size = sizeof p,
                               .device = test.device,
                               .maps = tensor_of(sent_there, FLASH_KDA_F32, 4, shape),
                               .states = tensor_of(sent_there + of_piece, FLASH_KDA_F32, 4, shape),
                               .initial_state =
                                   tensor_of(initial ? start_there : NULL, FLASH_KDA_F32, 4, one),
                               .entering = tensor_of(got_there, FLASH_KDA_F32, 4, shape),
                               .final_state = tensor_of(got_there + all, FLASH_KDA_F32, 4, one),
                               .kernel = test.kernel,
                               .backwards = backwards,
                               .state_k_first = k_first,
                               .cpu_threads = threads};
    p.maps.stride[0] = p.states.stride[0] = 2 * of_piece;
    const flash_kda_status status = flash_kda_join(&p);
    CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error());
    must(flash_kda_copy(HOST, got, test.device, got_there, (size_t)(all + of_piece) * sizeof *got));
    must(flash_kda_free(test.device, sent_there));
    must(flash_kda_free(test.device, start_there));
    must(flash_kda_free(test.device, got_there));
    if (k_first) transpose_all(got, (count + 1) * heads);
    free(sent);
    free(start);
    return got;
}

/* The states that enter pieces, and the final state, are those of the whole sequence. */
static void joined(void)
{
    static const int64_t sizes[] = {33, 1, 0, 16, 50};
    enum { COUNT = 5, HEADS = 2 };
    for (int k_first = 0; k_first < 2; k_first++) {
        trying("5 pieces, %s first", k_first ? "K" : "V");
        pieces x = cut_in_pieces(sizes, COUNT, HEADS, k_first);
        if (!x.maps.map) return;
        float *got = join(x.maps.map, x.maps.state, x.whole->initial_state, COUNT, HEADS, false, k_first, 1),
              *again =
                  join(x.maps.map, x.maps.state, x.whole->initial_state, COUNT, HEADS, false, k_first, 2);
        CHECK(first_difference(got, again, 4, (COUNT + 1) * HEADS * MATRIX) < 0, "results depend on threads");
        /* The final states of the sequence's beginnings. */
        int64_t tokens = 0;
        for (int i = 0; i <= COUNT; i++) {
            problem *p = problem_create(1, tokens, HEADS);
            fill_case(p, find_case("channels from fast to slow"), 31);
            memcpy(p->k, x.whole->k, (size_t)(tokens * HEADS * DIM) * sizeof *p->k);
            memcpy(p->v, x.whole->v, (size_t)(tokens * HEADS * DIM) * sizeof *p->v);
            memcpy(p->g, x.whole->g, (size_t)(tokens * HEADS * DIM) * sizeof *p->g);
            memcpy(p->beta, x.whole->beta, (size_t)(tokens * HEADS) * sizeof *p->beta);
            memcpy(p->A_log, x.whole->A_log, HEADS * sizeof(float));
            memcpy(p->dt_bias, x.whole->dt_bias, HEADS * DIM * sizeof(float));
            memcpy(p->initial_state, x.whole->initial_state, HEADS * MATRIX * sizeof(float));
            answer truth = problem_solve(p, true);
            hold(i < COUNT ? "entering" : "final_state", truth.state, got + i * HEADS * MATRIX,
                 HEADS * MATRIX, map_bar(ordinary_bars(test.device).state), &worst_joined);
            answer_free(&truth);
            problem_free(p);
            if (i < COUNT) tokens += sizes[i];
        }
        free(got);
        free(again);
        free_pieces(&x);
    }
}

/* Likewise for gradients: what flash_kda_bwd_reference() gives for pieces without dfinal_state joins to what
 * it gives for the whole sequence. */
static void joined_backwards(void)
{
    static const int64_t sizes[] = {20, 17, 0, 40};
    enum { COUNT = 4, HEADS = 2 };
    for (int k_first = 0; k_first < 2; k_first++) {
        trying("4 pieces backwards, %s first", k_first ? "K" : "V");
        pieces x = cut_in_pieces(sizes, COUNT, HEADS, k_first);
        if (!x.maps.map) return;
        bwd_problem *whole = bwd_problem_create(x.whole, 41), *cut = bwd_problem_create(x.cut, 41);
        memcpy(cut->dout, whole->dout, (size_t)problem_rows(x.whole) * DIM * sizeof *cut->dout);
        cut->without_dfinal_state = cut->without_initial_state = true;
        bwd_answer of_whole = bwd_problem_solve(whole), of_cut = bwd_problem_solve(cut);
        float *gradients = allocate(COUNT * HEADS * MATRIX, sizeof *gradients);
        for (int64_t i = 0; i < COUNT * HEADS * MATRIX; i++)
            gradients[i] = (float)of_cut.of[GRAD_INITIAL_STATE][i];
        float *got = join(x.maps.map, gradients, whole->dfinal_state, COUNT, HEADS, true, k_first, 0);
        hold("the gradient of the initial state", of_whole.of[GRAD_INITIAL_STATE],
             got + COUNT * HEADS * MATRIX, HEADS * MATRIX, map_bar(ordinary_bars(test.device).state),
             &worst_joined);
        CHECK(first_difference(got + (COUNT - 1) * HEADS * MATRIX, whole->dfinal_state, 4, HEADS * MATRIX) <
                  0,
              "the gradient after the last piece is not the given one");
        free(got);
        free(gradients);
        bwd_answer_free(&of_whole);
        bwd_answer_free(&of_cut);
        bwd_problem_free(whole);
        bwd_problem_free(cut);
        x.whole = x.cut = NULL;
        outcome_free(&x.maps);
    }
}

static void join_in_fp64(double *entering, const float *map, const float *state, bool backwards)
{
    for (int64_t row = 0; row < DIM; row++) {
        double sum[DIM];
        for (int64_t c = 0; c < DIM; c++) {
            sum[c] = state[row * DIM + c];
            for (int64_t j = 0; j < DIM; j++)
                sum[c] += entering[row * DIM + j] * map[backwards ? c * DIM + j : j * DIM + c];
        }
        memcpy(entering + row * DIM, sum, sizeof sum);
    }
}

/* Any matrices are joined as in fp64. Without an initial state pieces begin from zeros, in bits. */
static void joined_from_zeros(void)
{
    enum { COUNT = 3, HEADS = 1 };
    float *maps = allocate(COUNT * MATRIX, sizeof *maps), *states = allocate(COUNT * MATRIX, sizeof *maps),
          *zeros = allocate(MATRIX, sizeof *zeros);
    rng r = rng_seed(3);
    for (int i = 0; i < COUNT * MATRIX; i++) {
        maps[i] = 0.1f * (float)rng_normal(&r);
        states[i] = (float)rng_normal(&r);
    }
    trying("no initial state");
    float *without = join(maps, states, NULL, COUNT, HEADS, false, false, 0),
          *with = join(maps, states, zeros, COUNT, HEADS, false, false, 0);
    CHECK(first_difference(without, with, 4, (COUNT + 1) * MATRIX) < 0, "zeros give other bits");
    CHECK(first_difference(with + MATRIX, states, 4, MATRIX) < 0, "the first piece changes its own state");
    for (int backwards = 0; backwards < 2; backwards++) {
        trying("any matrices, %s", backwards ? "backwards" : "forwards");
        float *got = join(maps, states, states, COUNT, HEADS, backwards, backwards, 0);
        double *truth = allocate(MATRIX, sizeof *truth);
        for (int i = 0; i < MATRIX; i++) truth[i] = states[i];
        for (int i = 0; i < COUNT; i++)
            join_in_fp64(truth, maps + (backwards ? COUNT - 1 - i : i) * MATRIX,
                         states + (backwards ? COUNT - 1 - i : i) * MATRIX, backwards);
        hold("final_state", truth, got + COUNT * MATRIX, MATRIX, BAR, &worst_joined);
        free(truth);
        free(got);
    }
    free(without);
    free(with);
    free(maps);
    free(states);
    free(zeros);
}

/* ---- Bad tokens and interruption ----------------------------------------------------------------------- */

/* A NaN in one sequence changes no bit of another one. */
static void neighbours(void)
{
    static const int64_t sizes[] = {20, 20};
    problem *p = problem_create_ragged(sizes, 2, 1);
    fill_case(p, find_case("random"), 51);
    trying("a NaN in another sequence");
    outcome before = run(p, options_of(STATE_IN, false), 3, 0);
    for (int64_t i = 0; i < DIM; i++) p->k[25 * DIM + i] = 0x7fc0;
    outcome after = run(p, options_of(STATE_IN, false), 3, 0);
    if (before.map && after.map) {
        CHECK(first_difference(before.map, after.map, 4, MATRIX) < 0, "map differs");
        CHECK(first_difference(before.state, after.state, 4, MATRIX) < 0, "state differs");
        CHECK(isnan(after.map[MATRIX]), "the map of the sequence with the NaN is finite");
    }
    outcome_free(&before);
    outcome_free(&after);
    problem_free(p);
}

static void interrupted(void)
{
    if (test.device.type != FLASH_KDA_CPU) return; /* where a call has ended before its kernels do */
    problem *p = problem_create(1, 40, 2);
    fill_case(p, find_case("random"), 71);
    const volatile int32_t interrupt = 1;
    map_call c;
    trying("*interrupt is 1 when the call begins");
    if (open_map(&c, p, options_of(STATE_IN, false), 3, 0)) {
        c.params.interrupt = &interrupt;
        CHECK(flash_kda_map(&c.params) == FLASH_KDA_INTERRUPTED, "the call was not given up");
        float *map = read_matrices(&c, p, &c.map);
        CHECK(isnan(map[0]), "a call that was given up wrote");
        free(map);
    }
    close_map(&c);
    problem_free(p);
}

static void print_worst(void)
{
    printf("  errors: map %.2e, state %.2e, joined %.2e\n", worst_map, worst_state, worst_joined);
    worst_map = worst_state = worst_joined = 0.0;
}

int main(int argc, char **argv)
{
    static const group all[] = {
        {"reference", reference},
        {"lengths", lengths},
        {"ragged", ragged},
        {"cases", cases},
        {"gates", gates},
        {"long-pieces", long_pieces},
        {"drawn", drawn},
        {"joined", joined},
        {"joined-backwards", joined_backwards},
        {"joined-from-zeros", joined_from_zeros},
        {"neighbours", neighbours},
        {"interrupted", interrupted},
        {"worst", print_worst},
    };
    harness_start(argc, argv);
    test.ask = ask_for_map;
    return harness_run(all, sizeof all / sizeof *all);
}
