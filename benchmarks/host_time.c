/*
 * Host time of flash_kda_fwd(): what the library itself takes to check the arguments, plan, encode TMA
 * descriptors and launch, without a GPU. The pretended driver (tests/pretend_driver) returns from every
 * function at once.
 *
 *     make host-time
 *     LD_LIBRARY_PATH=build/tests/pretend_driver build/benchmarks/host_time [REPEATS]
 *
 * A line of the table is one shape:
 *
 *   first us     A call with a shape that the process has not called before, so that the plan is made anew:
 *                the median of one call in each of 25 child processes. The library's kernels are loaded.
 *   again us     A repeated call with the same shape: the median of REPEATS calls (4000 by default).
 *   launches     Kernel launches of a repeated call.
 *   driver       Calls of the driver that a repeated call makes, launches among them.
 *
 * A first call should take at most 60 us, and a repeated one 2 us if it launches one kernel: "within" or
 * "above" stands beside each time. The program never fails for a time, since other work on the machine makes
 * calls slower.
 */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../tests/pretend_driver/counts.h"
#include "problem.h"

enum { DEFAULT_REPEATS = 4000, MOST_REPEATS = 1000000, MOST_CHILDREN = 25 };

static const double MOST_FIRST_US = 60.0, MOST_AGAIN_US = 2.0;

/* `sequences` counts with cu_seqlens; without it each of `batch` rows is a sequence of `tokens` tokens. */
typedef struct shape {
    const char *lengths; /* for the reader */
    int64_t batch, tokens, sequences, heads, longest;
    bool with_seqlens;
} shape;

/* A shape that the library has not seen, planned as this one is: for calls that only warm the library up. */
static shape neighbour_of(shape s)
{
    s.tokens += 32;
    if (s.longest) s.longest += 32;
    return s;
}

/* No kernel runs, so tensors need addresses alone: 16 TiB apart, more than any tensor here has. */
static void *address(int tensor)
{
    return (void *)((uintptr_t)(tensor + 1) << 44);
}

static flash_kda_fwd_params params_of(shape s)
{
    const int64_t rows[] = {s.batch, s.tokens, s.heads, DIM}, bias[] = {s.heads, DIM},
                  ends[] = {s.sequences + 1};
    const int64_t states[] = {s.with_seqlens ? s.sequences : s.batch, s.heads, DIM, DIM};
    flash_kda_fwd_params p = {
        .struct_size = sizeof p,
        .device = {FLASH_KDA_CUDA, 0},
        .q = tensor_of(address(0), FLASH_KDA_BF16, 4, rows),
        .k = tensor_of(address(1), FLASH_KDA_BF16, 4, rows),
        .v = tensor_of(address(2), FLASH_KDA_BF16, 4, rows),
        .g = tensor_of(address(3), FLASH_KDA_BF16, 4, rows),
        .beta = tensor_of(address(4), FLASH_KDA_BF16, 3, rows),
        .out = tensor_of(address(5), FLASH_KDA_BF16, 4, rows),
        .A_log = tensor_of(address(6), FLASH_KDA_F32, 1, bias),
        .dt_bias = tensor_of(address(7), FLASH_KDA_F32, 2, bias),
        .initial_state = tensor_of(address(8), FLASH_KDA_F32, 4, states),
        .final_state = tensor_of(address(9), FLASH_KDA_F32, 4, states),
        .scale = 0.088F,
        .lower_bound = -5,
        .workspace = address(10),
        /* flash_kda_fwd_workspace_size() would make the plan before the first call, so it is not asked. */
        .workspace_size = (size_t)1 << 40,
        .max_seqlen = s.longest,
    };
    if (s.with_seqlens) p.cu_seqlens = tensor_of(address(11), FLASH_KDA_I64, 1, ends);
    return p;
}

static double call_us(const flash_kda_fwd_params *p)
{
    const double start = now_seconds();
    const flash_kda_status status = flash_kda_fwd(p);
    const double end = now_seconds();
    must(status);
    return 1e6 * (end - start);
}

/* A first call in a process of its own, after a call of a neighbour, which brings code and memory into this
 * process. */
static double first_call_us(shape s)
{
    double us;
    int ends[2];
    if (pipe(ends) != 0) die("there is no pipe to a child process");
    fflush(stdout);
    const pid_t child = fork();
    if (child < 0) die("a child process could not be started");
    if (child == 0) {
        const flash_kda_fwd_params near = params_of(neighbour_of(s)), p = params_of(s);
        call_us(&near);
        us = call_us(&p);
        _exit(write(ends[1], &us, sizeof us) != (ssize_t)sizeof us);
    }
    close(ends[1]);
    const bool answered = read(ends[0], &us, sizeof us) == (ssize_t)sizeof us;
    close(ends[0]);
    int status;
    if (waitpid(child, &status, 0) != child || status != 0 || !answered)
        die("a child process failed at %s tokens of %lld heads", s.lengths, (long long)s.heads);
    return us;
}

static const char *verdict(double us, double most)
{
    return us <= most ? "within" : "above";
}

static void time_shape(shape s, int repeats, const pretended_counts *counts)
{
    static double times[MOST_REPEATS];
    const int children = repeats < MOST_CHILDREN ? repeats : MOST_CHILDREN;
    for (int i = 0; i < children; i++) times[i] = first_call_us(s);
    const double first = median(times, children);

    const flash_kda_fwd_params p = params_of(s);
    call_us(&p);
    const pretended_counts before = *counts;
    call_us(&p);
    const unsigned long launches = counts->launches - before.launches, calls = counts->calls - before.calls;
    for (int i = 0; i < repeats; i++) times[i] = call_us(&p);
    const double again = median(times, repeats);

    printf("%-15s %5lld %-10s %9.2f %-6s %9.2f %-6s %8lu %6lu\n", s.lengths, (long long)s.heads,
           s.with_seqlens ? "cu_seqlens" : "-", first, verdict(first, MOST_FIRST_US), again,
           launches == 1 ? verdict(again, MOST_AGAIN_US) : "-", launches, calls);
    fflush(stdout);
}

/* The pretended driver's counts: a real driver, which would run kernels on made-up addresses, has none. */
static const pretended_counts *find_counts(void)
{
    pretended_counts *(*find)(void) = NULL;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    void *symbol = driver ? dlsym(driver, "pretended_counts_of_thread") : NULL;
    if (!symbol)
        die("LD_LIBRARY_PATH must name the folder of the pretended driver, as `make host-time` does");
    memcpy(&find, &symbol, sizeof find);
    return find();
}

int main(int argc, char **argv)
{
    static const struct {
        const char *lengths;
        int64_t tokens, heads;
    } single[] = {
        {"1", 1, 1},           {"64", 64, 96},        {"1024", 1024, 4},       {"2048", 2048, 12},
        {"8192", 8192, 1},     {"8192", 8192, 16},    {"8192", 8192, 96},      {"65536", 65536, 8},
        {"131072", 131072, 4}, {"262144", 262144, 1}, {"1048576", 1048576, 1},
    };
    static const shape several[] = {
        {.lengths = "1024x8", .batch = 8, .tokens = 1024, .heads = 96},
        {.lengths = "1024x8",
         .batch = 1,
         .tokens = 8 * 1024,
         .heads = 96,
         .longest = 1024,
         .with_seqlens = true,
         .sequences = 8},
        {.lengths = "30000,100x50",
         .batch = 1,
         .tokens = 35000,
         .heads = 8,
         .longest = 30000,
         .with_seqlens = true,
         .sequences = 51},
    };
    enum { SINGLE = sizeof single / sizeof *single, SEVERAL = sizeof several / sizeof *several };
    shape shapes[2 * SINGLE + SEVERAL];
    int count = 0;

    const long repeats = argc > 1 ? strtol(argv[1], NULL, 10) : DEFAULT_REPEATS;
    if (argc > 2 || repeats < 1 || repeats > MOST_REPEATS)
        die("host_time takes one argument, the number of repeated calls, from 1 to %d", MOST_REPEATS);
    setenv("PRETEND_GPU", "90:132", 0);
    const pretended_counts *counts = find_counts();

    for (int with_seqlens = 0; with_seqlens < 2; with_seqlens++)
        for (int i = 0; i < SINGLE; i++)
            shapes[count++] = (shape){.lengths = single[i].lengths,
                                      .batch = 1,
                                      .tokens = single[i].tokens,
                                      .sequences = 1,
                                      .heads = single[i].heads,
                                      .longest = with_seqlens ? single[i].tokens : 0,
                                      .with_seqlens = with_seqlens};
    for (int i = 0; i < SEVERAL; i++) shapes[count++] = several[i];

    for (int i = 0; i < count; i++) {
        const flash_kda_fwd_params near = params_of(neighbour_of(shapes[i]));
        call_us(&near); /* loads kernels */
    }
    printf("Host time of a call on a pretended GPU (%s), microseconds\n", getenv("PRETEND_GPU"));
    printf("within: at most %.0f us for a first call, %.0f us for a repeated call of one launch\n\n",
           MOST_FIRST_US, MOST_AGAIN_US);
    printf("%-15s %5s %-10s %9s %-6s %9s %-6s %8s %6s\n", "lengths", "heads", "borders", "first us", "",
           "again us", "", "launches", "driver");
    for (int i = 0; i < count; i++) time_shape(shapes[i], (int)repeats, counts);
    return 0;
}
