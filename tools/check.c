/* flash-kda check */
#include <stdio.h>
#include <stdlib.h>

#include "call.h"
#include "cases.h"
#include "command.h"
#include "compare.h"
#include "json.h"
#include "recorded.h"
#include "terminal.h"

static const char help[] =
    "flash-kda check [OPTION...]\n"
    "Runs the forward pass on ordinary and on hard inputs, and on recorded\n"
    "activations where the files of data/ are at hand. Prints the relative RMS error\n"
    "of output and final state against the recurrence in fp64, and beside each error\n"
    "the most that is allowed. The exit status is 0 if every line is good, and 1 if\n"
    "one is not.\n"
    "\n"
    "  --device cpu|cuda:N  the device; given again, another device; without it every\n"
    "                       device that can be used\n"
    "  --kernel NAME        a kernel of this build, instead of the default for the\n"
    "                       device\n" JSON_HELP;

enum { MAX_DEVICES = 64 };

typedef struct measurement {
    double out, state;
    const char *fault; /* what went wrong apart from the numbers, or NULL */
} measurement;

static measurement measure(const problem *p, const answer *truth, flash_kda_device device, const char *kernel)
{
    call c;
    measurement m = {0};
    must(call_open(&c, p, (call_options){.device = device, .kernel = kernel, .mode = STATE_BOTH}));
    must(call_run(&c));
    uint16_t *out = call_read_out(&c);
    float *state = call_read_state(&c);
    m.out = relative_rms(truth->out, out, FLASH_KDA_BF16, problem_rows(p) * DIM);
    m.state = relative_rms(truth->state, state, FLASH_KDA_F32, problem_states(p) * DIM * DIM);
    m.fault = call_damage(&c, p);
    free(out);
    free(state);
    call_close(&c);
    return m;
}

static void print_error(double error, double bar)
{
    bool passed = error <= bar;
    printf("  %s%9.3e%s %s%9.3e%s", passed ? "" : bad(), error, passed ? "" : plain(), faint(), bar, plain());
}

static bool has_passed(const measurement *m, bars limits)
{
    return m->out <= limits.out && m->state <= limits.state && !m->fault;
}

static void json_row(const test_case *c, const measurement *m, bars limits)
{
    json_open_object(NULL);
    json_text("name", c->name);
    json_number("output_error", m->out);
    json_number("output_at_most", limits.out);
    json_number("state_error", m->state);
    json_number("state_at_most", limits.state);
    json_text("written_around", m->fault);
    json_bool("passed", has_passed(m, limits));
    json_close_object();
}

static void print_row(const test_case *c, const measurement *m, bars limits)
{
    const bool passed = has_passed(m, limits);
    printf("  %-28s", c->name);
    print_error(m->out, limits.out);
    print_error(m->state, limits.state);
    printf("  %s%s%s", passed ? good() : bad(), passed ? "ok" : "FAILED", plain());
    if (m->fault) printf("\n    memory around %s was written", m->fault);
    putchar('\n');
}

/* What is checked: a case of made-up inputs, or recorded activations. */
typedef struct subject {
    const test_case *c;
    const char *file; /* of data/; NULL: made up */
} subject;

/* Made-up inputs are a long sequence, an empty one, and sequences shorter than two chunks. NULL: the file is
 * not at hand. */
static problem *create_problem(const subject *s)
{
    static const int64_t lengths[] = {1000, 0, 17, 7};
    char path[1024], why[256];
    if (s->file) {
        if (!recorded_find(s->file, path)) return NULL;
        problem *p = recorded_load(path, why);
        if (!p) die("%s", why);
        return p;
    }
    problem *p = problem_create_ragged(lengths, 4, 2);
    fill_case(p, s->c, 1);
    return p;
}

/* All cases, then the recorded ones. */
static int list_subjects(subject *subjects)
{
    int count = 0;
    for (int i = 0; i < test_case_count; i++) subjects[count++] = (subject){.c = &test_cases[i]};
    for (int i = 0; i < RECORDED_CASES; i++)
        subjects[count++] = (subject){.c = &recorded_cases[i], .file = recorded_files[i]};
    return count;
}

typedef struct outcome {
    int checked, failed;
} outcome;

/* What was found on a device: `count` measurements, with the subjects that they are of. */
static outcome report(const flash_kda_device_info *info, const char *kernel, const subject *subjects,
                      const measurement *all, int count, bool json)
{
    char more[64];
    outcome o = {0};
    if (!kernel) kernel = info->kernel;
    if (json) {
        json_open_object(NULL);
        json_device(info);
        json_text("kernel", kernel);
        json_open_array("cases");
    } else {
        snprintf(more, sizeof more, ", kernel %s", kernel);
        printf("%s", bold());
        print_device(info, more, 0);
        printf("%s\n  %-28s  %9s %9s  %9s %9s\n", plain(), "relative RMS error", "output", "at most", "state",
               "at most");
    }
    for (int i = 0; i < count; i++) {
        const bars limits = case_bars(subjects[i].c, info->device);
        (json ? json_row : print_row)(subjects[i].c, &all[i], limits);
        o.checked++;
        o.failed += !has_passed(&all[i], limits);
    }
    if (json) {
        json_close_array();
        json_close_object();
    } else {
        putchar('\n');
    }
    return o;
}

static outcome check_devices(const flash_kda_device_info *infos, int count, const char *kernel, bool json)
{
    subject *subjects = allocate((size_t)test_case_count + RECORDED_CASES, sizeof *subjects);
    const int most = list_subjects(subjects);
    measurement *all = allocate((size_t)count * (size_t)most, sizeof *all);
    outcome o = {0};
    int found = 0; /* subjects whose inputs are at hand; they move to the front */
    for (int i = 0; i < most; i++) {
        problem *p = create_problem(&subjects[i]);
        if (!p) continue;
        progress("%d of %d: %s", i + 1, most, subjects[i].c->name);
        answer truth = problem_solve(p, true);
        for (int d = 0; d < count; d++) all[d * most + found] = measure(p, &truth, infos[d].device, kernel);
        subjects[found++] = subjects[i];
        answer_free(&truth);
        problem_free(p);
    }
    progress_done();
    if (json) json_open_array("devices");
    for (int d = 0; d < count; d++) {
        const outcome of_device = report(&infos[d], kernel, subjects, &all[d * most], found, json);
        o.checked += of_device.checked;
        o.failed += of_device.failed;
    }
    if (json) json_close_array();
    free(all);
    free(subjects);
    return o;
}

int command_check(int argc, char **argv)
{
    static const struct option options[] = {DEVICE_OPTION, KERNEL_OPTION, JSON_OPTION, HELP_OPTION, {0}};
    flash_kda_device_info chosen[MAX_DEVICES];
    const char *kernel = NULL, *no_cuda;
    int count = 0, all_count;
    bool json = false;
    for (int c; (c = getopt_long(argc, argv, ":h", options, NULL)) != -1;) {
        switch (c) {
        case 'h': fputs(help, stdout); return 0;
        case 'd':
            if (count < MAX_DEVICES) chosen[count++] = find_device(device_option(optarg));
            break;
        case 'k': kernel = optarg; break;
        case 'j': json = true; break;
        default: refuse_option("check", argv, options, c);
        }
    }
    if (optind < argc) die("check takes no argument, but there is '%s'", argv[optind]);
    const bool is_asked = count > 0;
    if (kernel && count == 0) chosen[count++] = best_device();
    if (count == 0) {
        flash_kda_device_info *all = list_devices(&all_count, &no_cuda);
        for (int i = 0; i < all_count && count < MAX_DEVICES; i++)
            if (all[i].kernel[0]) chosen[count++] = all[i];
        free(all);
    }
    for (int i = 0; i < count; i++) require_kernel(chosen[i].device, kernel);
    if (json) json_open_object(NULL);
    const outcome o = check_devices(chosen, count, kernel, json);
    if (json) {
        json_left_out(chosen, count, is_asked);
        json_integer("checked", o.checked);
        json_integer("failed", o.failed);
        json_close_object();
        return o.failed ? 1 : 0;
    }
    print_left_out(chosen, count, is_asked);
    if (o.failed)
        printf("%s%d of %d checks failed.%s\n", bad(), o.failed, o.checked, plain());
    else
        printf("%sAll %d checks passed.%s\n", good(), o.checked, plain());
    return o.failed ? 1 : 0;
}
