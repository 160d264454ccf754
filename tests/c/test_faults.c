/*
 * Each function of the driver fails at each of its calls (tests/fault_driver): every failure is a status and
 * a sentence that names the function, a call that failed before its first launch has written nothing, and the
 * next calls work again and give the result of a run without faults. Every case runs in a process of its own,
 * since a library opens its driver once.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../src/cuda/driver.h"
#include "cases.h"
#include "harness.h"

#define NAME(name, symbol, arguments) #name,

static const char *const functions[] = {FKDA_DRIVER_FUNCTIONS(NAME) FKDA_NEW_DRIVER_FUNCTIONS(NAME)};
enum { FUNCTIONS = sizeof functions / sizeof *functions, MOST_CALLS = 30, WORDS = 512 };

/* The ways to run a call: each asks other things of the driver. */
static const struct {
    const char *kernel;
    int64_t tokens, heads;
    flash_kda_cut cut;
    bool counts; /* values that are not finite */
    bool quick;  /* tried by --quick too. Without --quick, tried with every function that can fail */
} ways[] = {
    {"portable", 40, 1, FLASH_KDA_CUT_AUTO, true, true},
    /* More heads than SMs: flags are cleared for handoffs. */
    {"hopper", 40, 5, FLASH_KDA_CUT_NEVER, false, true},
    /* Two segments, so passes, which have other launches. Other functions are called as for one launch. */
    {"hopper", 300, 1, FLASH_KDA_CUT_ALWAYS, true, false},
};
static int way;
static bool told[FUNCTIONS]; /* a failure of the function was reported, in any way */

/* What a process found, in memory that it shares with its parent. */
typedef struct findings {
    bool finished;
    int failures;      /* public calls that failed while the fault was on */
    char first[WORDS]; /* the sentence of the first one */
    bool named;        /* some sentence names the function */
    bool silent;       /* a failure had no sentence */
    bool wrote;        /* fwd wrote to memory, and its sentence does not say so */
    bool works_again;  /* without the fault all calls work */
    uint64_t sum;      /* of the bits of out and the state, of the run without the fault */
} findings;

static bool record(findings *f, const char *function, flash_kda_status status)
{
    if (status == FLASH_KDA_OK) return true;
    const char *sentence = flash_kda_last_error();
    if (!f->failures++) snprintf(f->first, WORDS, "%s", sentence);
    f->silent |= !*sentence;
    f->named |= strstr(sentence, function) != NULL;
    return false;
}

/* Checksum of the outputs, to be compared between processes. */
static uint64_t checksum(const unsigned char *bytes, size_t count)
{
    uint64_t sum = 14695981039346656037u;
    for (size_t i = 0; i < count; i++) sum = (sum ^ bytes[i]) * 1099511628211u;
    return sum;
}

/* Every public call that uses the driver. Memory of the emulated GPU is the process's own. */
static bool use_everything(findings *f, const char *function, const problem *p, uint64_t *sum)
{
    const size_t out_bytes = (size_t)problem_rows(p) * DIM * 2,
                 state_bytes = (size_t)problem_states(p) * DIM * DIM * sizeof(float);
    unsigned char *out = aligned_alloc(64, out_bytes), *state = aligned_alloc(64, state_bytes);
    flash_kda_nonfinite records[FLASH_KDA_CHECKED_TENSORS];
    const int64_t of_records[] = {FLASH_KDA_CHECKED_TENSORS, 2};
    const flash_kda_device gpu = {FLASH_KDA_CUDA, 0}, cpu = {FLASH_KDA_CPU, 0};
    flash_kda_device_info infos[2] = {{.struct_size = sizeof *infos}, {.struct_size = sizeof *infos}};
    flash_kda_fwd_params params = problem_params(p, false);
    const int64_t states[] = {p->sequences, p->heads, DIM, DIM};
    const char *no_cuda = "";
    int32_t count = 0;
    size_t need = 0;
    char words[WORDS];
    void *memory = NULL;
    float milliseconds;
    bool good = record(f, function, flash_kda_list_devices(infos, 2, &count, &no_cuda));
    if (good && count == 1) {
        good = false;
        if (!f->failures++) snprintf(f->first, WORDS, "%s", no_cuda);
        f->named |= strstr(no_cuda, function) != NULL, f->silent |= !*no_cuda;
    }
    params.device = gpu;
    params.kernel = ways[way].kernel, params.cut = ways[way].cut;
    params.out = params.v, params.out.data = out;
    params.final_state = tensor_of(state, FLASH_KDA_F32, 4, states);
    memset(out, 0xff, out_bytes), memset(state, 0xff, state_bytes), memset(records, 0x5a, sizeof records);
    if (ways[way].counts) params.nonfinite = tensor_of(records, FLASH_KDA_I64, 2, of_records);
    good &= record(f, function, flash_kda_explain(&params, words, sizeof words));
    if (record(f, function, flash_kda_fwd_workspace_size(&params, &need))) {
        void *workspace = aligned_alloc(64, (need + 64) / 64 * 64);
        params.workspace = workspace, params.workspace_size = need;
        if (!record(f, function, flash_kda_fwd(&params))) {
            good = false;
            const char *sentence = flash_kda_last_error();
            const bool launched = strstr(sentence, "final_state") || strstr(sentence, "cuCtxPopCurrent"),
                       counted = strstr(sentence, "nonfinite");
            for (size_t i = 0; i < out_bytes && !launched; i++) f->wrote |= out[i] != 0xff;
            const unsigned char *bytes_of_records = (const unsigned char *)records;
            const size_t record_bytes = counted ? 0 : sizeof records;
            for (size_t i = 0; i < record_bytes; i++) f->wrote |= bytes_of_records[i] != 0x5a;
        }
        *sum = checksum(out, out_bytes) ^ checksum(state, state_bytes) ^
               checksum((const unsigned char *)records, sizeof records);
        good &= record(f, function, flash_kda_time_fwd(&params, 1, &milliseconds));
        free(workspace);
    } else {
        good = false;
    }
    if (record(f, function, flash_kda_malloc(gpu, 4096, &memory))) {
        good &= record(f, function, flash_kda_copy(gpu, memory, cpu, out, 16));
        good &= record(f, function, flash_kda_free(gpu, memory));
    } else {
        good = false;
    }
    good &= record(f, function, flash_kda_synchronize(gpu, NULL));
    free(out), free(state);
    return good;
}

static void run_in_child(findings *f, const char *function, int number, const problem *p)
{
    const pid_t child = fork();
    if (child == 0) {
        char text[16];
        uint64_t ignored = 0;
        findings without = {0};
        snprintf(text, sizeof text, "%d", number);
        setenv("FAULT_FUNCTION", function, 1), setenv("FAULT_CALL", text, 1);
        use_everything(f, function, p, &ignored);
        unsetenv("FAULT_FUNCTION");
        f->works_again = use_everything(&without, function, p, &f->sum);
        f->finished = true;
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (status) f->finished = false;
}

/* Functions whose failure may go unnoticed: the error's name is missing then, or another launch does the
 * work, as without a cooperative launch if the driver does not say what a green context has. */
static bool may_be_silent(const char *function)
{
    return strcmp(function, "cuGetErrorName") == 0 || strcmp(function, "cuModuleUnload") == 0 ||
           strcmp(function, "cuLaunchKernelEx") == 0 || strcmp(function, "cuLaunchKernel") == 0 ||
           strcmp(function, "cuStreamGetGreenCtx") == 0 || strcmp(function, "cuGreenCtxGetDevResource") == 0;
}

static void every_fault(void)
{
    findings *f = mmap(NULL, sizeof *f, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    problem *p = problem_create(1, ways[way].tokens, ways[way].heads);
    fill_case(p, find_case("slow gates"), 5);
    memset(f, 0, sizeof *f);
    run_in_child(f, "none", 1, p);
    trying("no fault");
    if (!CHECK(f->finished && !f->failures && f->works_again, "%s", f->first)) return;
    const uint64_t sum = f->sum;
    for (int i = 0; i < FUNCTIONS; i++) {
        const bool launches = strstr(functions[i], "Launch") || strstr(functions[i], "Memset");
        if (!ways[way].quick && !launches) continue;
        /* Other functions than launches are called alike in each way. */
        if (test.quick && told[i] && !launches) continue;
        for (int number = 1; number <= (test.quick ? 1 : MOST_CALLS); number++) {
            memset(f, 0, sizeof *f);
            run_in_child(f, functions[i], number, p);
            trying("%s, cut %d%s: call %d of %s fails: \"%s\"", ways[way].kernel, ways[way].cut,
                   ways[way].counts ? ", counts" : "", number, functions[i], f->first);
            CHECK(f->finished, "the process died");
            CHECK(!f->silent, "a failure has no sentence");
            CHECK(!f->wrote, "a call wrote what its sentence does not call undefined");
            CHECK(f->works_again, "it does not work again");
            CHECK(!f->works_again || f->sum == sum, "the result differs afterwards");
            if (!f->failures) break; /* the function is not called that often, or is not missed */
            told[i] = true;
            CHECK(f->named, "no sentence names %s", functions[i]);
        }
    }
    problem_free(p);
    munmap(f, sizeof *f);
}

static void faults(void)
{
    for (way = 0; way < (int)(sizeof ways / sizeof *ways); way++)
        if (ways[way].quick || !test.quick) every_fault();
    for (int i = 0; i < FUNCTIONS; i++) {
        trying("%s fails", functions[i]);
        CHECK(told[i] || may_be_silent(functions[i]), "no call reports it");
    }
}

/* The parent must not open the driver, so the harness is given the CPU. */
int main(int argc, char **argv)
{
    static const group groups[] = {{"faults", faults}};
    harness_start(argc, argv);
    return harness_run(groups, 1);
}
