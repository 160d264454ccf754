#define _POSIX_C_SOURCE 200809L
#include "terminal.h"

#include <langinfo.h>
#include <locale.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool terminal_has_colour(void)
{
    const char *no_colour = getenv("NO_COLOR"), *terminal = getenv("TERM");
    bool dumb = terminal && strcmp(terminal, "dumb") == 0;
    return isatty(STDOUT_FILENO) && !dumb && !(no_colour && *no_colour);
}

static bool knows_unicode(void)
{
    setlocale(LC_CTYPE, "");
    return isatty(STDOUT_FILENO) && strcmp(nl_langinfo(CODESET), "UTF-8") == 0;
}

static int colour_now = -1; /* of a run of levels */

void print_level(double level)
{
    static const char *const blocks[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
    static const char ramp[] = " .:-=+*#@";
    static const int colours[] = {24, 24, 31, 38, 44, 43, 79, 150, 229}; /* deep blue to pale yellow */
    int step = level > 0 ? (int)(level * 8 + 0.5) : 0;
    if (step > 8) step = 8;
    if (terminal_has_colour() && colours[step] != colour_now) printf("\033[38;5;%dm", colours[step]);
    colour_now = colours[step];
    if (knows_unicode())
        fputs(blocks[step], stdout);
    else
        putchar(ramp[step]);
}

void end_levels(void)
{
    colour_now = -1;
    fputs(plain(), stdout);
}

static const char *escape(const char *sequence)
{
    return terminal_has_colour() ? sequence : "";
}

const char *bold(void)
{
    return escape("\033[1m");
}

const char *good(void)
{
    return escape("\033[32m");
}

const char *bad(void)
{
    return escape("\033[1;31m");
}

const char *faint(void)
{
    return escape("\033[2m");
}

const char *plain(void)
{
    return escape("\033[0m");
}

void progress(const char *format, ...)
{
    va_list args;
    if (!isatty(STDERR_FILENO)) return;
    fflush(stdout);
    fputs("\r\033[K", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fflush(stderr);
}

void progress_done(void)
{
    if (isatty(STDERR_FILENO)) fputs("\r\033[K", stderr);
}
