/* What the terminal can show. */
#ifndef TOOLS_TERMINAL_H
#define TOOLS_TERMINAL_H

#include <stdbool.h>

/* Whether colours are shown: standard output is a terminal, and NO_COLOR is not set. */
bool terminal_has_colour(void);

/* Prints a number in [0, 1] as one cell: a bar of its height where standard output is a terminal that shows
 * Unicode, else a character. */
void print_level(double level);

/* Prints a text whose lines are broken between words, so that no line is longer than LINE_COLUMNS unless one
 * word is. The first line begins at `column`, where the cursor is; others begin with `indent` spaces. Returns
 * the column where the text ends. */
enum { LINE_COLUMNS = 80 };
int print_wrapped(const char *text, int column, int indent);

/* Ends a run of print_level(), and goes back to the terminal's own colours. */
void end_levels(void);

/* Escape sequences, or "" where no colours are shown. */
const char *bold(void);
const char *good(void);
const char *bad(void);
const char *faint(void);
const char *plain(void);

/* Writes out what was printed so far. If that cannot be done, the process ends with a sentence. */
void flush_output(void);

/* Prints a line on standard error that the next such line replaces, or nothing if standard error is no
 * terminal. */
void progress(const char *format, ...) __attribute__((format(printf, 1, 2)));
void progress_done(void);

#endif
