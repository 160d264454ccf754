#define _POSIX_C_SOURCE 200809L
#include "terminal.h"

#include <errno.h>
#include <langinfo.h>
#include <locale.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

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

static int colour_now = -1; /* the colour of the last print_level() of a run; -1: none */

void print_level(double level)
{
    static const char *const bars[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
    static const char ramp[] = " .:-=+*#@";
    static const int colours[] = {24, 24, 31, 38, 44, 43, 79, 150, 229}; /* deep blue to pale yellow */
    int step = level > 0 ? (int)(level * 8 + 0.5) : 0;
    if (step > 8) step = 8;
    if (terminal_has_colour() && colours[step] != colour_now) printf("\033[38;5;%dm", colours[step]);
    colour_now = colours[step];
    if (knows_unicode())
        fputs(bars[step], stdout);
    else
        putchar(ramp[step]);
}

int print_wrapped(const char *text, int column, int indent)
{
    bool at_start = true; /* of a line, where no space comes before a word */
    while (*text) {
        const int word = (int)strcspn(text, " \n");
        if (!at_start && column + 1 + word > LINE_COLUMNS) {
            printf("\n%*s", indent, "");
            column = indent;
            at_start = true;
        }
        if (word) {
            printf("%s%.*s", at_start ? "" : " ", word, text);
            column += word + !at_start;
            at_start = false;
        }
        text += word;
        if (*text == '\n') {
            printf("\n%*s", text[1] ? indent : 0, "");
            column = text[1] ? indent : 0;
            at_start = true;
        }
        if (*text) text++;
    }
    return column;
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

void flush_output(void)
{
    const bool was_lost = ferror(stdout);
    if (fflush(stdout) != 0) die("the output can't be written: %s", strerror(errno));
    if (was_lost) die("the output can't be written: a part of it was lost before");
}

void progress(const char *format, ...)
{
    va_list args;
    flush_output();
    if (!isatty(STDERR_FILENO)) return;
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
