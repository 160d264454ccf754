/* What the test programs share: the command line, checks, and one line of report for each group. */
#ifndef TESTS_HARNESS_H
#define TESTS_HARNESS_H

#include "call.h"
#include "cases.h"
#include "compare.h"

typedef struct settings {
    flash_kda_device device;
    const char *kernel; /* NULL: the default */
    flash_kda_cut cut;
    bool quick; /* fewer and smaller problems, for sanitizers and the emulator */
    /* Asks whether the device runs a kernel; kernels that are FLASH_KDA_UNAVAILABLE are skipped. NULL: a
     * forward pass has to run. */
    flash_kda_status (*ask)(const char *kernel);
} settings;
extern settings test;

/* Reads the command line: --device cpu|cuda:N, --kernel NAME, --cut auto|never|always|mixed, --quick (or the
 * environment variable FLASH_KDA_TEST_QUICK=1), and names of groups. Ends the program with status 77, which
 * CTest counts as skipped, if the device is not there. */
void harness_start(int argc, char **argv);

typedef struct group {
    const char *name;
    void (*run)(void);
} group;

/* Runs the groups that the command line names (all if it names none) with every kernel of the device, or with
 * the kernel that the command line names. Returns the exit status. */
int harness_run(const group *groups, int count);

/* The number that a variable of the environment holds, or `otherwise` if it is not set. How many problems a
 * test draws is in FLASH_KDA_TEST_PROBLEMS, and with which seed it begins in FLASH_KDA_TEST_SEED. */
uint64_t number_from(const char *variable, uint64_t otherwise);

/* Says what is being tried. The message of a check that fails has it. Each thread has its own. */
void trying(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Counts a check, and reports it if it fails. Returns `good`. */
bool check_that(bool good, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
#define CHECK(good, ...) check_that(good, __FILE__, __LINE__, __VA_ARGS__)

/* Checks error <= bar, and remembers the error of the group that comes closest to its bar. `what` is "out",
 * "state" or "bf16 state". */
void check_error(const char *what, double error, double bar);

/* The outputs of one call. */
typedef struct result {
    uint16_t *out; /* bf16 [B, T, H, DIM] */
    void *state;   /* [N, H, DIM, DIM] of the type of the call, or NULL */
} result;
void result_free(result *r);

/* Runs the problem once on the device under test, checks that only outputs were written, and holds the result
 * to the answer unless the answer is NULL. */
result run_and_check(const problem *p, const answer *truth, bars limits, call_options options);
call_options options_of(state_mode mode, bool bf16_state);

/* Holds every state mode and dtype to the reference. Calls that differ only in where the state comes from or
 * goes to must give equal bits. */
void check_state_modes(const problem *p, bars limits);

#endif
