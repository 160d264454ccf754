/* The parsers of the command. Lines are words: the first is a subcommand, the others are its arguments.
 * `info` runs as it is. The other subcommands would compute, so they are given --help at the end, which they
 * find when all that comes before is right. */
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "fuzz.h"

enum { MOST_WORDS = 32, MOST_BYTES = 2000 };

typedef struct words {
    char *argv[MOST_WORDS + 3];
    int argc;
    int status;
} words;

static void run_command(void *argument)
{
    static const struct {
        const char *name;
        int (*run)(int, char **);
    } commands[] = {
        {"info", command_info}, {"check", command_check}, {"bench", command_bench}, {"run", command_run}};
    words *w = argument;
    int which = 0;
    for (int i = 1; i < (int)(sizeof commands / sizeof *commands); i++)
        if (strcmp(w->argv[0], commands[i].name) == 0) which = i;
    if (which) {
        /* Two, because the first may become the value of the option before it. */
        w->argv[w->argc++] = "--help";
        w->argv[w->argc++] = "--help";
    }
    optind = 0; /* getopt begins anew */
    opterr = 0;
    w->status = commands[which].run(w->argc, w->argv);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char text[MOST_BYTES + 1];
    words w = {.status = -1};
    if (size > MOST_BYTES) return 0;
    memcpy(text, data, size);
    text[size] = 0;
    for (char *at = strtok(text, "\n"); at && w.argc < MOST_WORDS; at = strtok(NULL, "\n"))
        if (strcmp(at, "--") != 0) w.argv[w.argc++] = at;
    if (!w.argc) return 0;
    const int ended = run_until_exit(run_command, &w);
    if (ended != -1 && ended != 2) wrong("the command ended the process with status %d", ended);
    if (ended == -1 && w.status != 0) wrong("the command returned %d", w.status);
    return 0;
}
