/* The `flash-kda` command: finds the subcommand. */
#include <stdio.h>
#include <string.h>

#include "command.h"
#include "nearest.h"
#include "terminal.h"

static const struct {
    const char *name, *what;
    int (*run)(int, char **);
} commands[] = {
    {"info", "prints devices and kernels, and what would run for a shape", command_info},
    {"check", "tests this machine against the recurrence in fp64", command_check},
    {"bench", "times a few shapes, and compares them with what memory allows", command_bench},
    {"run", "computes recorded activations and shows what comes out", command_run},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void help(FILE *to)
{
    fputs("flash-kda: Kimi Delta Attention, forward pass, on CPUs and NVIDIA GPUs\n\n", to);
    for (int i = 0; i < COMMANDS; i++)
        fprintf(to, "  flash-kda %-6s %s\n", commands[i].name, commands[i].what);
    fputs("\nflash-kda COMMAND --help explains a command. flash-kda --version prints the\n"
          "library's version.\n",
          to);
}

static int run(int argc, char **argv)
{
    if (argc < 2) {
        help(stderr);
        return 2;
    }
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        help(stdout);
        return 0;
    }
    if (strcmp(name, "--version") == 0) {
        printf("flash-kda %s\n", flash_kda_version());
        return 0;
    }
    opterr = 0; /* the subcommands refuse wrong options with a sentence of their own */
    for (int i = 0; i < COMMANDS; i++)
        if (strcmp(name, commands[i].name) == 0) return commands[i].run(argc - 1, argv + 1);
    const char *names[COMMANDS];
    char hint[HINT_BYTES];
    for (int i = 0; i < COMMANDS; i++) names[i] = commands[i].name;
    die("'%s' is not a command; there are info, check, bench and run (flash-kda --help)%s", name,
        nearest_hint(name, names, COMMANDS, hint));
}

/* A full disk takes the text, and says so only when it is written out. Then a script must not go on with half
 * an answer. */
int main(int argc, char **argv)
{
    const int status = run(argc, argv);
    flush_output();
    return status;
}
