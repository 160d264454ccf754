/*
 * Host time of flash_kda_fwd(), and of the calls about decode (host_time_decode.c): what the library itself
 * takes to check the arguments, plan, encode TMA descriptors and launch, without a GPU. The pretended driver
 * (tests/pretend_driver) returns from every function at once.
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
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host_time.h"

enum { DEFAULT_REPEATS = 4000, MOST_REPEATS = 1000000, MOST_CHILDREN = 25 };

static const double MOST_FIRST_US = 60.0;

typedef struct shape {
    const char *lengths; /* for the reader */
    pretended_shape of;
} shape;

/* A shape that the library has not seen, and plans as it plans this one: for calls that only warm the library
 * up. */
static pretended_shape neighbour_of(pretended_shape s)
{
    s.tokens += 32;
    if (s.longest) s.longest += 32;
    return s;
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
        const flash_kda_fwd_params near = pretended_params(neighbour_of(s.of)), p = pretended_params(s.of);
        call_us(&near);
        us = call_us(&p);
        _exit(write(ends[1], &us, sizeof us) != (ssize_t)sizeof us);
    }
    close(ends[1]);
    const bool answered = read(ends[0], &us, sizeof us) == (ssize_t)sizeof us;
    close(ends[0]);
    int status;
    if (waitpid(child, &status, 0) != child || status != 0 || !answered)
        die("a child process failed at %s tokens of %lld heads", s.lengths, (long long)s.of.heads);
    return us;
}

const char *verdict(double us, double most)
{
    return us <= most ? "within" : "above";
}

static void time_shape(shape s, int repeats, const pretended_counts *counts)
{
    static double times[MOST_REPEATS];
    const int children = repeats < MOST_CHILDREN ? repeats : MOST_CHILDREN;
    for (int i = 0; i < children; i++) times[i] = first_call_us(s);
    const double first = median(times, children);

    const flash_kda_fwd_params p = pretended_params(s.of);
    call_us(&p);
    const pretended_counts before = *counts;
    call_us(&p);
    const unsigned long launches = counts->launches - before.launches, calls = counts->calls - before.calls;
    for (int i = 0; i < repeats; i++) times[i] = call_us(&p);
    const double again = median(times, repeats);

    printf("%-15s %5lld %-10s %9.2f %-6s %9.2f %-6s %8lu %6lu\n", s.lengths, (long long)s.of.heads,
           s.of.sequences ? "cu_seqlens" : "-", first, verdict(first, MOST_FIRST_US), again,
           launches == 1 ? verdict(again, MOST_AGAIN_US) : "-", launches, calls);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    /* Single sequences, each with and without cu_seqlens. */
    static const shape single[] = {
        {"1", {.batch = 1, .tokens = 1, .heads = 1}},
        {"64", {.batch = 1, .tokens = 64, .heads = 96}},
        {"1024", {.batch = 1, .tokens = 1024, .heads = 4}},
        {"2048", {.batch = 1, .tokens = 2048, .heads = 12}},
        {"8192", {.batch = 1, .tokens = 8192, .heads = 1}},
        {"8192", {.batch = 1, .tokens = 8192, .heads = 16}},
        {"8192", {.batch = 1, .tokens = 8192, .heads = 96}},
        {"65536", {.batch = 1, .tokens = 65536, .heads = 8}},
        {"131072", {.batch = 1, .tokens = 131072, .heads = 4}},
        {"262144", {.batch = 1, .tokens = 262144, .heads = 1}},
        {"1048576", {.batch = 1, .tokens = 1048576, .heads = 1}},
    };
    static const shape several[] = {
        {"1024x8", {.batch = 8, .tokens = 1024, .heads = 96}},
        {"1024x8", {.batch = 1, .tokens = 8192, .heads = 96, .sequences = 8, .longest = 1024}},
        {"30000,100x50", {.batch = 1, .tokens = 35000, .heads = 8, .sequences = 51, .longest = 30000}},
    };
    enum { SINGLE = sizeof single / sizeof *single, SEVERAL = sizeof several / sizeof *several };
    shape shapes[2 * SINGLE + SEVERAL];
    int count = 0;

    const long repeats = argc > 1 ? strtol(argv[1], NULL, 10) : DEFAULT_REPEATS;
    if (argc > 2 || repeats < 1 || repeats > MOST_REPEATS)
        die("host_time takes one argument, the number of repeated calls, from 1 to %d", MOST_REPEATS);
    setenv("PRETEND_GPU", "90:132", 0);
    const pretended_counts *counts = pretended_counts_find();

    for (int i = 0; i < SINGLE; i++) shapes[count++] = single[i];
    for (int i = 0; i < SINGLE; i++) {
        shapes[count] = single[i];
        shapes[count].of.sequences = 1;
        shapes[count++].of.longest = single[i].of.tokens;
    }
    for (int i = 0; i < SEVERAL; i++) shapes[count++] = several[i];

    for (int i = 0; i < count; i++) {
        const flash_kda_fwd_params near = pretended_params(neighbour_of(shapes[i].of));
        call_us(&near); /* loads kernels */
    }
    printf("Host time of a call on a pretended GPU (%s), microseconds\n", getenv("PRETEND_GPU"));
    printf("within: at most %.0f us for a first call, %.0f us for a repeated call of one launch\n\n",
           MOST_FIRST_US, MOST_AGAIN_US);
    printf("%-15s %5s %-10s %9s %-6s %9s %-6s %8s %6s\n", "lengths", "heads", "with", "first us", "",
           "again us", "", "launches", "driver");
    for (int i = 0; i < count; i++) time_shape(shapes[i], (int)repeats, counts);
    time_decode_calls((int)repeats, counts);
    return 0;
}
