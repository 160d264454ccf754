/* flash-kda run */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "call.h"
#include "cases.h"
#include "command.h"
#include "compare.h"
#include "json.h"
#include "non_finite.h"
#include "recorded.h"
#include "terminal.h"

static const char help[] =
    "flash-kda run [FILE] [OPTION...]\n"
    "Runs the forward pass on the activations in FILE, and shows its error against\n"
    "the recurrence in fp64, its time, how long each head remembers, and the size of\n"
    "the output. FILE is a safetensors file with q, k, v, g, beta, A_log and dt_bias\n"
    "as a layer of a model hands them over. Without FILE the recorded last layer of a\n"
    "small model is used, or made-up activations if it is not at hand.\n"
    "\n"
    "  --device cpu|cuda:N  the device; without it CUDA device 0 if it can be used,\n"
    "                       else the CPU\n"
    "  --kernel NAME        a kernel of this build, instead of the default for the\n"
    "                       device\n"
    "  --nonfinite          also says how many values of each tensor are NaN or\n"
    "                       infinite, and where the first one is\n" JSON_HELP;

enum { COLUMNS = 40, SHOWN_HEADS = 16, REPEATS = 50 };

/* `path` becomes the file's, or empty for made-up activations. */
static problem *load(const char *given, char path[1024])
{
    char why[256];
    if (given || recorded_find(recorded_files[RECORDED_CASES - 1], path)) {
        if (given) snprintf(path, 1024, "%s", given);
        problem *p = recorded_load(path, why);
        if (!p) die("%s", why);
        return p;
    }
    problem *p = problem_create(1, 2048, 4);
    fill_case(p, find_case("channels from fast to slow"), 1);
    *path = 0;
    return p;
}

/* ---- What the gates are ---- */

/* The mean decay of every channel of a head in nats a token, as positive numbers in ascending order: the
 * slowest channel comes first. */
static void decay_rates(const problem *p, int64_t h, double rates[DIM])
{
    int64_t tokens = p->batch * p->tokens;
    for (int i = 0; i < DIM; i++) {
        double sum = 0;
        for (int64_t t = 0; t < tokens; t++) {
            double raw =
                float_from_bf16(p->g[(t * p->heads + h) * DIM + i]) + (double)p->dt_bias[h * DIM + i];
            sum -= p->lower_bound / (1.0 + exp(-exp((double)p->A_log[h]) * raw));
        }
        rates[i] = sum / (double)tokens;
    }
    median(rates, DIM); /* sorts */
}

/* Tokens until half is forgotten, as a reader wants them: "0.18", "34", "12,800". */
static const char *half_life(double rate, char words[24])
{
    double tokens = log(2.0) / rate;
    if (tokens < 10)
        snprintf(words, 24, "%.2f", tokens);
    else if (tokens < 1000)
        snprintf(words, 24, "%.0f", tokens);
    else if (tokens < 1e6)
        snprintf(words, 24, "%d,%03d", (int)tokens / 1000, (int)tokens % 1000);
    else
        snprintf(words, 24, "over 1e6");
    return words;
}

static void print_levels(const double levels[COLUMNS])
{
    for (int i = 0; i < COLUMNS; i++) print_level(levels[i]);
    end_levels();
}

/* A row of half-lives for each head. */
static void print_memory(const problem *p, int64_t heads)
{
    char slow[24], middle[24], fast[24];
    printf("\n%sMemory of the channels%s, from the slowest to the fastest. The height is the\n"
           "number of tokens until half is forgotten, from 0.1 to 10,000 on a logarithmic\n"
           "scale.\n  %-6s  %-*s %9s %9s %9s\n",
           bold(), plain(), "", COLUMNS, "", "slowest", "median", "fastest");
    for (int64_t h = 0; h < heads; h++) {
        double rates[DIM], levels[COLUMNS];
        decay_rates(p, h, rates);
        for (int i = 0; i < COLUMNS; i++) {
            const int begin = DIM * i / COLUMNS, end = DIM * (i + 1) / COLUMNS;
            double rate = 0;
            for (int channel = begin; channel < end; channel++) rate += rates[channel] / (end - begin);
            levels[i] = (log10(log(2.0) / rate) + 1) / 5;
            if (levels[i] < 0.125) levels[i] = 0.125; /* a channel that forgets within a token is shown too */
        }
        printf("  head %-2lld ", (long long)h);
        print_levels(levels);
        printf(" %9s %9s %9s\n", half_life(rates[0], slow), half_life(rates[DIM / 2], middle),
               half_life(rates[DIM - 1], fast));
    }
}

/* ---- What came out ---- */

static void print_output(const problem *p, const uint16_t *out, int64_t heads)
{
    int64_t tokens = p->batch * p->tokens;
    printf("\n%sSize of the output%s over time. The height is relative to the head's largest;\n"
           "the RMS over all tokens stands on the right.\n",
           bold(), plain());
    for (int64_t h = 0; h < heads; h++) {
        double levels[COLUMNS] = {0}, largest = 0, total = 0;
        for (int column = 0; column < COLUMNS; column++) {
            int64_t begin = tokens * column / COLUMNS, end = tokens * (column + 1) / COLUMNS;
            double sum = 0;
            for (int64_t t = begin; t < end; t++)
                for (int i = 0; i < DIM; i++) {
                    double x = float_from_bf16(out[(t * p->heads + h) * DIM + i]);
                    sum += x * x;
                }
            total += sum;
            levels[column] = end > begin ? sqrt(sum / (double)((end - begin) * DIM)) : 0;
            if (levels[column] > largest) largest = levels[column];
        }
        for (int i = 0; i < COLUMNS; i++) levels[i] = largest > 0 ? levels[i] / largest : 0;
        printf("  head %-2lld ", (long long)h);
        print_levels(levels);
        printf(" %9.4f\n", tokens ? sqrt(total / (double)(tokens * DIM)) : 0.0);
    }
}

static void print_error(const char *what, double error, double bar)
{
    printf("  %-7s relative error %s%.3e%s  (at most %.3e)\n", what, error <= bar ? good() : bad(), error,
           plain(), bar);
}

/* "[0, 17, 2, 5]": the element number `place` of a contiguous tensor. */
static void print_place(const flash_kda_tensor *t, int64_t place)
{
    int64_t step = 1;
    for (int i = 1; i < t->ndim; i++) step *= t->shape[i];
    for (int i = 0; i < t->ndim; i++) {
        printf("%s%lld", i ? ", " : "[", (long long)(place / step));
        place %= step;
        if (i + 1 < t->ndim) step /= t->shape[i + 1];
    }
    printf("]");
}

/* What the call has counted: a line for each tensor that has such values. */
static void print_nonfinite(const call *c)
{
    const flash_kda_fwd_params *p = &c->params;
    const struct {
        const char *name;
        const flash_kda_tensor *tensor;
    } all[FLASH_KDA_CHECKED_TENSORS] = {
        [FLASH_KDA_CHECKED_Q] = {"q", &p->q},
        [FLASH_KDA_CHECKED_K] = {"k", &p->k},
        [FLASH_KDA_CHECKED_V] = {"v", &p->v},
        [FLASH_KDA_CHECKED_G] = {"g", &p->g},
        [FLASH_KDA_CHECKED_BETA] = {"beta", &p->beta},
        [FLASH_KDA_CHECKED_A_LOG] = {"A_log", &p->A_log},
        [FLASH_KDA_CHECKED_DT_BIAS] = {"dt_bias", &p->dt_bias},
        [FLASH_KDA_CHECKED_INITIAL_STATE] = {"initial_state", &p->initial_state},
        [FLASH_KDA_CHECKED_OUT] = {"out", &p->out},
        [FLASH_KDA_CHECKED_FINAL_STATE] = {"final_state", &p->final_state},
    };
    flash_kda_nonfinite records[FLASH_KDA_CHECKED_TENSORS];
    int64_t found = 0;
    call_read_nonfinite(c, records);
    for (int i = 0; i < FLASH_KDA_CHECKED_TENSORS; i++) {
        if (!records[i].count) continue;
        found += records[i].count;
        printf("  %-7s %s: %s%lld%s %s not finite, the first is %s", "values", all[i].name, bad(),
               (long long)records[i].count, plain(), records[i].count == 1 ? "value is" : "values are",
               all[i].name);
        print_place(all[i].tensor, records[i].first);
        printf("\n");
    }
    if (!found) printf("  %-7s all are finite, in every tensor\n", "values");
}

/* The median time of a call. */
static double time_call(const call *c, int *count)
{
    double times[REPEATS], spent = 0;
    float ms;
    *count = 0;
    progress("timing");
    while (*count < REPEATS && (*count < 5 || spent < 500)) {
        must(flash_kda_time_fwd(&c->params, 1, &ms));
        times[(*count)++] = ms;
        spent += ms;
    }
    progress_done();
    return median(times, *count);
}

/* What was found out about a problem. */
typedef struct result {
    const char *file, *kernel;
    const flash_kda_device_info *info;
    bool is_asked; /* the user has asked for the device */
    double out_error, state_error, milliseconds;
    bars limits;
    int calls; /* that were timed */
    non_finite inputs[NON_FINITE_TENSORS];
    int non_finite_inputs;
} result;

static bool has_passed(const result *r)
{
    return r->out_error <= r->limits.out && r->state_error <= r->limits.state;
}

static void print_inputs(const result *r)
{
    char text[200];
    for (int i = 0; i < r->non_finite_inputs; i++) {
        printf("  %-7s %s", i ? "" : "inputs", bad());
        snprintf(text, sizeof text, "%s has %lld NaN or infinite numbers, the first at %s", r->inputs[i].name,
                 (long long)r->inputs[i].count, r->inputs[i].first);
        print_wrapped(text, 10, 10);
        printf("%s\n", plain());
    }
}

/* counted: the call, if it has counted NaN and infinities; else NULL. */
static void print_result(const result *r, const problem *p, const uint16_t *out, const call *counted)
{
    char more[64];
    if (*r->file)
        printf("%s%s%s\n", bold(), r->file, plain());
    else
        printf("%smade-up activations%s (no recorded ones found)\n", bold(), plain());
    printf("  %-7s B = %lld, T = %lld, H = %lld, K = V = %d, no initial state\n  %-7s ", "shape",
           (long long)p->batch, (long long)p->tokens, (long long)p->heads, DIM, "device");
    snprintf(more, sizeof more, ", kernel %s", r->kernel);
    print_device(r->info, more, 10);
    putchar('\n');
    print_left_out(r->info, 1, r->is_asked);
    if (counted)
        print_nonfinite(counted);
    else
        print_inputs(r);
    print_error("output", r->out_error, r->limits.out);
    print_error("state", r->state_error, r->limits.state);
    printf("  %-7s %.3f ms, %.0f thousand tokens a second  (median of %d)\n", "time", r->milliseconds,
           (double)(p->batch * p->tokens) / r->milliseconds, r->calls);
    int64_t heads = p->heads < SHOWN_HEADS ? p->heads : SHOWN_HEADS;
    if (p->tokens > 0 && !r->non_finite_inputs) {
        print_memory(p, heads);
        print_output(p, out, heads);
        if (heads < p->heads) printf("  and %lld more heads\n", (long long)(p->heads - heads));
    }
}

static void json_result(const result *r, const problem *p)
{
    json_open_object(NULL);
    json_text("file", *r->file ? r->file : NULL);
    json_integer("batch", p->batch);
    json_integer("tokens", p->tokens);
    json_integer("heads", p->heads);
    json_device(r->info);
    json_text("kernel", r->kernel);
    json_left_out(r->info, 1, r->is_asked);
    json_open_array("non_finite");
    for (int i = 0; i < r->non_finite_inputs; i++) {
        json_open_object(NULL);
        json_text("tensor", r->inputs[i].name);
        json_integer("count", r->inputs[i].count);
        json_text("first", r->inputs[i].first);
        json_close_object();
    }
    json_close_array();
    json_number("output_error", r->out_error);
    json_number("output_at_most", r->limits.out);
    json_number("state_error", r->state_error);
    json_number("state_at_most", r->limits.state);
    json_number("milliseconds", r->milliseconds);
    json_bool("passed", has_passed(r));
    json_close_object();
}

static int run(const char *given, const flash_kda_device_info *info, const char *kernel, bool is_asked,
               bool json, bool nonfinite)
{
    char file[1024];
    problem *p = load(given, file);
    result r = {.file = file,
                .kernel = kernel ? kernel : info->kernel,
                .info = info,
                .is_asked = is_asked,
                .limits = ordinary_bars(info->device)};
    call c;
    r.non_finite_inputs = find_non_finite(p, r.inputs);
    must(call_open(&c, p,
                   (call_options){.device = info->device,
                                  .kernel = kernel,
                                  .mode = STATE_OUT,
                                  .tells_longest = true,
                                  .counts_nonfinite = nonfinite}));
    must(call_run(&c));
    c.params.nonfinite = (flash_kda_tensor){0}; /* the time is that of the forward pass alone */
    uint16_t *out = call_read_out(&c);
    float *state = call_read_state(&c);
    progress("the recurrence in fp64");
    answer truth = problem_solve(p, false);
    progress_done();
    r.out_error = relative_rms(truth.out, out, FLASH_KDA_BF16, problem_rows(p) * DIM);
    r.state_error = relative_rms(truth.state, state, FLASH_KDA_F32, problem_states(p) * DIM * DIM);
    r.milliseconds = time_call(&c, &r.calls);
    if (json)
        json_result(&r, p);
    else
        print_result(&r, p, out, nonfinite ? &c : NULL);
    answer_free(&truth);
    free(out);
    free(state);
    call_close(&c);
    problem_free(p);
    return has_passed(&r) ? 0 : 1;
}

int command_run(int argc, char **argv)
{
    static const struct option options[] = {
        DEVICE_OPTION, KERNEL_OPTION, {"nonfinite", no_argument, NULL, 'n'}, JSON_OPTION, HELP_OPTION, {0}};
    flash_kda_device_info info = {0};
    const char *kernel = NULL;
    bool json = false, nonfinite = false;
    for (int c; (c = getopt_long(argc, argv, ":h", options, NULL)) != -1;) {
        switch (c) {
        case 'h': fputs(help, stdout); return 0;
        case 'd': info = find_device(device_option(optarg)); break;
        case 'k': kernel = optarg; break;
        case 'j': json = true; break;
        case 'n': nonfinite = true; break;
        default: refuse_option("run", argv, options, c);
        }
    }
    if (argc - optind > 1) die("run takes one file, but there is '%s' too", argv[optind + 1]);
    const bool is_asked = info.struct_size != 0;
    if (!is_asked) info = best_device();
    require_kernel(info.device, kernel);
    return run(optind < argc ? argv[optind] : NULL, &info, kernel, is_asked, json, nonfinite);
}
