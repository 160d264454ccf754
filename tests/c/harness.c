#include "harness.h"

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SKIPPED = 77, MAX_KERNELS = 16, SHOWN_FAILURES = 10 };

settings test = {.device = {FLASH_KDA_CPU, 0}};

static char **asked_groups;
static int asked_count;

static _Thread_local char context[200];

typedef struct worst {
    bool any;
    double error, bar;
    char where[200];
} worst;

/* What the running group has found so far. */
static struct {
    pthread_mutex_t lock;
    long checks, failures;
    worst out, state, bf16_state;
} tally = {.lock = PTHREAD_MUTEX_INITIALIZER};

void trying(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(context, sizeof context, format, args);
    va_end(args);
}

bool check_that(bool good, const char *file, int line, const char *format, ...)
{
    pthread_mutex_lock(&tally.lock);
    tally.checks++;
    if (!good && ++tally.failures <= SHOWN_FAILURES) {
        va_list args;
        fprintf(stderr, "FAIL %s:%d: ", strrchr(file, '/') ? strrchr(file, '/') + 1 : file, line);
        va_start(args, format);
        vfprintf(stderr, format, args);
        va_end(args);
        fprintf(stderr, "\n     %s\n", context);
    }
    pthread_mutex_unlock(&tally.lock);
    return good;
}

void check_error(const char *what, double error, double bar)
{
    CHECK(error <= bar, "%s has relative error %.3g; it must be at most %.3g", what, error, bar);
    pthread_mutex_lock(&tally.lock);
    worst *w = strcmp(what, "out") == 0     ? &tally.out
               : strcmp(what, "state") == 0 ? &tally.state
                                            : &tally.bf16_state;
    if (!w->any || error * w->bar > w->error * bar) {
        w->any = true;
        w->error = error;
        w->bar = bar;
        snprintf(w->where, sizeof w->where, "%s", context);
    }
    pthread_mutex_unlock(&tally.lock);
}

static bool device_is_there(const char **reason)
{
    int32_t count;
    const char *no_cuda;
    if (test.device.type == FLASH_KDA_CPU) return true; /* without opening the CUDA driver */
    must(flash_kda_list_devices(NULL, 0, &count, &no_cuda));
    *reason = no_cuda;
    if (test.device.index >= count - 1) {
        if (!*no_cuda) *reason = "there are fewer CUDA devices";
        return false;
    }
    static flash_kda_device_info infos[64];
    for (int i = 0; i < 64; i++) infos[i].struct_size = sizeof infos[i];
    must(flash_kda_list_devices(infos, 64, &count, NULL));
    *reason = infos[test.device.index + 1].reason;
    return infos[test.device.index + 1].kernel[0] != 0;
}

void harness_start(int argc, char **argv)
{
    const char *quick = getenv("FLASH_KDA_TEST_QUICK");
    const char *reason;
    char name[16];
    test.quick = quick && strcmp(quick, "1") == 0;
    asked_groups = allocate((size_t)argc, sizeof *asked_groups);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0) {
            test.quick = true;
        } else if (strcmp(argv[i], "--device") == 0 && i + 1 < argc) {
            if (!parse_device(argv[++i], &test.device))
                die("--device is '%s'; it must be cpu or cuda:N", argv[i]);
        } else if (strcmp(argv[i], "--kernel") == 0 && i + 1 < argc) {
            test.kernel = argv[++i];
        } else if (strcmp(argv[i], "--cut") == 0 && i + 1 < argc) {
            if (!parse_cut(argv[++i], &test.cut))
                die("--cut is '%s'; it must be auto, never, always or mixed", argv[i]);
        } else if (argv[i][0] == '-') {
            die("%s is no option; there are --device, --kernel, --cut and --quick", argv[i]);
        } else {
            asked_groups[asked_count++] = argv[i];
        }
    }
    if (device_is_there(&reason)) return;
    printf("skipped: %s can't be used: %s\n", device_text(test.device, name), reason);
    exit(SKIPPED);
}

static bool asked_for(const char *name)
{
    for (int i = 0; i < asked_count; i++)
        if (strcmp(asked_groups[i], name) == 0) return true;
    return asked_count == 0;
}

static void print_worst(const char *what, const worst *w)
{
    if (w->any) printf("  %s %.2e of %.2e", what, w->error, w->bar);
}

/* Runs one group and returns how many checks failed. */
static long run_group(const group *g)
{
    tally.checks = tally.failures = 0;
    tally.out = tally.state = tally.bf16_state = (worst){0};
    context[0] = 0;
    double start = now_seconds();
    g->run();
    printf("  %-15s %7ld checks %5.1f s", g->name, tally.checks, now_seconds() - start);
    print_worst("out", &tally.out);
    print_worst("state", &tally.state);
    print_worst("bf16 state", &tally.bf16_state);
    printf("%s\n", tally.failures ? "  FAILED" : tally.checks ? "" : "  nothing to check on this device");
    if (tally.failures > SHOWN_FAILURES) printf("  and %ld failures more\n", tally.failures - SHOWN_FAILURES);
    if (tally.failures && tally.out.any) printf("    worst out: %s\n", tally.out.where);
    if (tally.failures && tally.state.any) printf("    worst state: %s\n", tally.state.where);
    if (tally.failures && tally.bf16_state.any) printf("    worst bf16 state: %s\n", tally.bf16_state.where);
    fflush(stdout);
    return tally.failures;
}

static flash_kda_status ask_for_forward_pass(const char *kernel)
{
    problem *p = problem_create(1, 1, 1);
    flash_kda_fwd_params params = problem_params(p, false);
    params.device = test.device;
    params.kernel = kernel;
    params.out = params.v;
    size_t bytes;
    const flash_kda_status status = flash_kda_fwd_workspace_size(&params, &bytes);
    problem_free(p);
    return status;
}

/* Whether the device can run a kernel. A kernel for another instruction set or architecture is no failure. */
static bool runs_here(const char *kernel)
{
    const flash_kda_status status = test.ask ? test.ask(kernel) : ask_for_forward_pass(kernel);
    if (status == FLASH_KDA_OK) return true;
    if (status != FLASH_KDA_UNAVAILABLE) must(status);
    printf("skipped: %s\n", flash_kda_last_error());
    return false;
}

static void refuse_unknown_groups(const group *groups, int count)
{
    for (int i = 0; i < asked_count; i++) {
        bool known = false;
        for (int g = 0; g < count; g++) known = known || strcmp(asked_groups[i], groups[g].name) == 0;
        if (!known) die("'%s' is no group of this program", asked_groups[i]);
    }
}

uint64_t number_from(const char *variable, uint64_t otherwise)
{
    const char *text = getenv(variable);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

int harness_run(const group *groups, int count)
{
    flash_kda_kernel_info kernels[MAX_KERNELS];
    int32_t kernel_count;
    const char *only = test.kernel;
    long failures = 0, runs = 0, elsewhere = 0;
    bool ran_by_cpu = false; /* kernel "cpu" is the first of the kernels behind it that runs here */
    char name[16];
    for (int k = 0; k < MAX_KERNELS; k++) kernels[k].struct_size = sizeof kernels[k];
    refuse_unknown_groups(groups, count);
    must(flash_kda_list_kernels(kernels, MAX_KERNELS, &kernel_count));
    for (int k = 0; k < kernel_count && k < MAX_KERNELS; k++) {
        if (kernels[k].device_type != test.device.type) continue;
        if (only && strcmp(only, kernels[k].name) != 0) continue;
        if (!runs_here(kernels[k].name)) {
            elsewhere++;
            continue;
        }
        if (ran_by_cpu) {
            ran_by_cpu = false;
            continue;
        }
        ran_by_cpu = strcmp(kernels[k].name, "cpu") == 0;
        test.kernel = kernels[k].name;
        printf("%s, kernel %s, error of its bar where it comes closest\n", device_text(test.device, name),
               test.kernel);
        for (int i = 0; i < count; i++) {
            if (!asked_for(groups[i].name)) continue;
            failures += run_group(&groups[i]);
            runs++;
        }
    }
    if (runs == 0 && elsewhere) return SKIPPED;
    if (runs == 0) die("%s has no kernel called '%s'", device_text(test.device, name), only ? only : "");
    return failures ? 1 : 0;
}

void result_free(result *r)
{
    free(r->out);
    free(r->state);
    *r = (result){0};
}

call_options options_of(state_mode mode, bool bf16_state)
{
    return (call_options){.device = test.device,
                          .kernel = test.kernel,
                          .cut = test.cut,
                          .mode = mode,
                          .bf16_state = bf16_state};
}

result run_and_check(const problem *p, const answer *truth, bars limits, call_options options)
{
    call c;
    result r = {0};
    flash_kda_status status = call_open(&c, p, options);
    if (!CHECK(status == FLASH_KDA_OK, "workspace size: %s", flash_kda_last_error())) return r;
    status = call_run(&c);
    if (!CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) {
        call_close(&c);
        return r;
    }
    const char *damaged = call_damage(&c, p);
    CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);
    r.out = call_read_out(&c);
    if (mode_writes(options.mode)) r.state = call_read_state(&c);
    call_close(&c);
    if (!truth) return r;
    check_error("out", relative_rms(truth->out, r.out, FLASH_KDA_BF16, problem_rows(p) * DIM), limits.out);
    int64_t state_values = problem_states(p) * DIM * DIM;
    if (r.state && options.bf16_state)
        check_error("bf16 state", relative_rms(truth->state, r.state, FLASH_KDA_BF16, state_values),
                    bar_of_bf16_state(limits.state));
    else if (r.state)
        check_error("state", relative_rms(truth->state, r.state, FLASH_KDA_F32, state_values), limits.state);
    return r;
}

/* The index of the first f32 state that does not have the bits of the bf16 state when it is rounded to bf16;
 * -1 if there is none. */
static int64_t first_rounding_difference(const float *exact, const uint16_t *rounded, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (bf16_from_float(exact[i]) != rounded[i]) return i;
    return -1;
}

static void check_mode(const problem *p, const answer *truth, bars limits, state_mode mode, bool bf16_state,
                       const result *plain)
{
    int64_t values = problem_rows(p) * DIM, state_values = problem_states(p) * DIM * DIM, at;
    result r = run_and_check(p, truth, limits, options_of(mode, bf16_state));
    if (!r.out || !plain->out) return;
    at = first_difference(plain->out, r.out, sizeof *r.out, values);
    CHECK(at < 0, "out[%lld] depends on how the state is passed", (long long)at);
    if (r.state) {
        at = bf16_state ? first_rounding_difference(plain->state, r.state, state_values)
                        : first_difference(plain->state, r.state, sizeof(float), state_values);
        CHECK(at < 0, "final_state[%lld] depends on how the state is passed", (long long)at);
    }
    result_free(&r);
}

void check_state_modes(const problem *p, bars limits)
{
    char what[200];
    snprintf(what, sizeof what, "%s", context);
    for (int with_initial = 0; with_initial < 2; with_initial++) {
        answer truth = problem_solve(p, with_initial);
        state_mode full = with_initial ? STATE_BOTH : STATE_OUT;
        trying("%s, %s f32", what, state_mode_names[full]);
        result plain = run_and_check(p, &truth, limits, options_of(full, false));
        for (int mode = 0; mode < STATE_MODES; mode++) {
            if (mode_reads(mode) != with_initial) continue;
            for (int bf16_state = 0; bf16_state < 2; bf16_state++) {
                if ((int)full == mode && !bf16_state) continue;
                trying("%s, %s %s", what, state_mode_names[mode], bf16_state ? "bf16" : "f32");
                check_mode(p, &truth, limits, mode, bf16_state, &plain);
            }
        }
        result_free(&plain);
        answer_free(&truth);
    }
    trying("%s", what);
}
