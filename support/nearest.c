#include "nearest.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

enum { MOST_LETTERS = 63, FAR = 1000 };

static int letter(char c)
{
    return tolower((unsigned char)c);
}

static int least(int a, int b)
{
    return a < b ? a : b;
}

int name_distance(const char *a, const char *b)
{
    /* changes[i][j]: from the first i letters of a to the first j letters of b */
    int changes[MOST_LETTERS + 1][MOST_LETTERS + 1];
    const size_t m = strlen(a), n = strlen(b);
    if (m > MOST_LETTERS || n > MOST_LETTERS) return FAR;
    for (size_t i = 0; i <= m; i++) changes[i][0] = (int)i;
    for (size_t j = 0; j <= n; j++) changes[0][j] = (int)j;
    for (size_t i = 1; i <= m; i++)
        for (size_t j = 1; j <= n; j++) {
            const int other = letter(a[i - 1]) != letter(b[j - 1]);
            int best = least(changes[i - 1][j], changes[i][j - 1]) + 1;
            best = least(best, changes[i - 1][j - 1] + other);
            if (i > 1 && j > 1 && letter(a[i - 1]) == letter(b[j - 2]) &&
                letter(a[i - 2]) == letter(b[j - 1]))
                best = least(best, changes[i - 2][j - 2] + 1);
            changes[i][j] = best;
        }
    return changes[m][n];
}

const char *nearest_name(const char *wrong, const char *const *names, int count)
{
    const char *nearest = NULL;
    int best = (int)strlen(wrong) / 3;
    if (best < 1) best = 1;
    for (int i = 0; i < count; i++) {
        const int distance = name_distance(wrong, names[i]);
        /* A name of which every letter was changed is no hint. */
        if (distance > best || distance >= (int)strlen(names[i]) || (nearest && distance == best)) continue;
        nearest = names[i], best = distance;
    }
    return nearest;
}

const char *nearest_hint(const char *wrong, const char *const *names, int count, char text[HINT_BYTES])
{
    const char *nearest = nearest_name(wrong, names, count);
    text[0] = 0;
    if (nearest) snprintf(text, HINT_BYTES, ", did you mean %.63s?", nearest);
    return text;
}
