/* The `flash-kda` command: finds the subcommand. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "command.h"

static const struct {
    const char *name, *what;
    int (*run)(int, char **);
} commands[] = {
    {"info", "prints devices and kernels, and says what would run for a shape", command_info},
    {"check", "tests this machine against the recurrence in fp64", command_check},
    {"bench", "times a few shapes, and compares them with what memory allows", command_bench},
    {"run", "runs the forward pass on recorded activations and shows what it computed", command_run},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void help(FILE *to)
{
    fputs("flash-kda: Kimi Delta Attention, forward pass, on CPUs and NVIDIA GPUs\n\n", to);
    for (int i = 0; i < COMMANDS; i++)
        fprintf(to, "  flash-kda %-6s %s\n", commands[i].name, commands[i].what);
    fputs(
        "\nflash-kda COMMAND --help explains a command. flash-kda --version prints the library's version.\n",
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
    die("'%s' is not a command; there are info, check, bench and run (flash-kda --help)", name);
}

/* A full disk takes the text, and says so only when it is written out. Then a script must not go on with half
 * an answer. */
int main(int argc, char **argv)
{
    const int status = run(argc, argv);
    if (fflush(stdout) != 0 || ferror(stdout)) die("the output can't be written: %s", strerror(errno));
    return status;
}
