/* What the terminal can show. */
#ifndef TOOLS_TERMINAL_H
#define TOOLS_TERMINAL_H

#include <stdbool.h>

/* Colours: standard output is a terminal, and NO_COLOR is not set. */
bool terminal_has_colour(void);

/* The size of a number in [0, 1] as one cell: a block where standard output is a terminal that knows Unicode,
 * else a character. */
void print_level(double level);

/* Ends a run of print_level(): back to the terminal's own colours. */
void end_levels(void);

/* "" or escape sequences. */
const char *bold(void);
const char *good(void);
const char *bad(void);
const char *faint(void);
const char *plain(void);

/* A line on standard error that the next one replaces; nothing if that is no terminal. */
void progress(const char *format, ...) __attribute__((format(printf, 1, 2)));
void progress_done(void);

#endif
