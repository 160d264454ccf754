/* The name that somebody meant who wrote another one. */
#ifndef SUPPORT_NEAREST_H
#define SUPPORT_NEAREST_H

#include <stddef.h>

/* Changes of single letters (another, one more, one less, two swapped) that lead from a to b; the case of a
 * letter does not count. Names of more than 63 letters count as far from all others. */
int name_distance(const char *a, const char *b);

/* The nearest of the names, or NULL if none is near: at most a third of the letters may differ, or one. */
const char *nearest_name(const char *wrong, const char *const *names, int count);

/* Writes ", did you mean NAME?" or, if no name is near, nothing. Returns text. */
enum { HINT_BYTES = 96 };
const char *nearest_hint(const char *wrong, const char *const *names, int count, char text[HINT_BYTES]);

#endif
