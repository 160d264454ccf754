/* flash-kda check */
#include <stdio.h>
#include <stdlib.h>

#include "call.h"
#include "cases.h"
#include "command.h"
#include "compare.h"
#include "recorded.h"
#include "terminal.h"

static const char help[] =
    "flash-kda check [OPTION...]\n"
    "Runs the forward pass on ordinary and on hard inputs, and on recorded activations where the files\n"
    "of data/ are at hand. Prints the relative RMS error of output and final state against the\n"
    "recurrence in fp64, and beside each error the most that is allowed. The exit status is 0 if every\n"
    "line is good, and 1 if one is not.\n"
    "\n"
    "  --device cpu|cuda:N  the device; given again, another device; without it every device that can\n"
    "                       be used\n"
    "  --kernel NAME        a kernel of this build, instead of the default for the device\n";

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
    printf("  %s%9.2e%s %s%9.2e%s", passed ? "" : bad(), error, passed ? "" : plain(), faint(), bar, plain());
}

static bool print_row(const test_case *c, const measurement *m, flash_kda_device device)
{
    bars limits = case_bars(c, device);
    bool passed = m->out <= limits.out && m->state <= limits.state && !m->fault;
    printf("  %-28s", c->name);
    print_error(m->out, limits.out);
    print_error(m->state, limits.state);
    printf("  %s%s%s", passed ? good() : bad(), passed ? "ok" : "FAILED", plain());
    if (m->fault) printf("  memory around %s was written", m->fault);
    putchar('\n');
    return passed;
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

static outcome check_devices(const flash_kda_device_info *infos, int count, const char *kernel)
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
    for (int d = 0; d < count; d++) {
        printf("%s", bold());
        print_device(&infos[d]);
        printf(", kernel %s%s\n", kernel ? kernel : infos[d].kernel, plain());
        printf("  %-28s  %9s %9s  %9s %9s\n", "relative RMS error", "output", "at most", "state", "at most");
        for (int i = 0; i < found; i++) {
            o.checked++;
            o.failed += !print_row(subjects[i].c, &all[d * most + i], infos[d].device);
        }
        putchar('\n');
    }
    free(all);
    free(subjects);
    return o;
}

int command_check(int argc, char **argv)
{
    static const struct option options[] = {DEVICE_OPTION, KERNEL_OPTION, HELP_OPTION, {0}};
    flash_kda_device_info chosen[MAX_DEVICES];
    const char *kernel = NULL, *no_cuda;
    int count = 0, all_count;
    for (int c; (c = getopt_long(argc, argv, "h", options, NULL)) != -1;) {
        switch (c) {
        case 'h': fputs(help, stdout); return 0;
        case 'd':
            if (count < MAX_DEVICES) chosen[count++] = find_device(device_option(optarg));
            break;
        case 'k': kernel = optarg; break;
        default: refuse_option("check", argv);
        }
    }
    if (optind < argc) die("check takes no argument, but there is '%s'", argv[optind]);
    if (kernel && count == 0) chosen[count++] = best_device();
    bool every = count == 0;
    if (every) {
        flash_kda_device_info *all = list_devices(&all_count, &no_cuda);
        for (int i = 0; i < all_count && count < MAX_DEVICES; i++)
            if (all[i].kernel[0]) chosen[count++] = all[i];
        say_what_is_left_out(all, all_count);
        free(all);
    }
    for (int i = 0; i < count; i++) require_kernel(chosen[i].device, kernel);
    const outcome o = check_devices(chosen, count, kernel);
    if (every && *no_cuda) printf("No CUDA device was checked: %s\n", no_cuda);
    if (o.failed)
        printf("%s%d of %d checks failed.%s\n", bad(), o.failed, o.checked, plain());
    else
        printf("%sAll %d checks passed.%s\n", good(), o.checked, plain());
    return o.failed ? 1 : 0;
}
