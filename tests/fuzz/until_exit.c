/* exit(), calloc(), free(), fopen() and fclose() of the code that run_until_exit() runs. Everything in such a
 * program but this file is compiled with these names as macros (CMakeLists.txt). */
#undef exit
#undef calloc
#undef free
#undef fopen
#undef fclose
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#include "fuzz.h"

void *fuzz_calloc(size_t count, size_t size);
void fuzz_free(void *block);
FILE *fuzz_fopen(const char *path, const char *mode);
int fuzz_fclose(FILE *file);
void fuzz_exit(int status) __attribute__((noreturn));

enum { MOST = 256 };

static bool inside;
static jmp_buf back;
static int status_of_exit;
static void *blocks[MOST], *files[MOST];

static void *keep(void **list, void *thing)
{
    if (!inside || !thing) return thing;
    for (int i = 0; i < MOST; i++)
        if (!list[i]) return list[i] = thing;
    wrong("more than %d blocks or files at a time", MOST);
}

static void forget(void **list, const void *thing)
{
    for (int i = 0; thing && i < MOST; i++)
        if (list[i] == thing) list[i] = NULL;
}

void *fuzz_calloc(size_t count, size_t size)
{
    return keep(blocks, calloc(count, size));
}

void fuzz_free(void *block)
{
    if (inside) forget(blocks, block);
    free(block);
}

FILE *fuzz_fopen(const char *path, const char *mode)
{
    return keep(files, fopen(path, mode));
}

int fuzz_fclose(FILE *file)
{
    if (inside) forget(files, file);
    return fclose(file);
}

void fuzz_exit(int status)
{
    if (!inside) exit(status);
    status_of_exit = status;
    longjmp(back, 1);
}

int run_until_exit(void (*function)(void *), void *argument)
{
    static FILE *nowhere;
    FILE *const out = stdout, *const err = stderr;
    if (!nowhere) nowhere = fopen("/dev/null", "w");
    if (!nowhere) wrong("/dev/null can't be opened");
    stdout = stderr = nowhere;
    status_of_exit = -1;
    inside = true;
    if (!setjmp(back)) function(argument);
    inside = false;
    stdout = out, stderr = err;
    for (int i = 0; i < MOST; i++) {
        free(blocks[i]);
        if (files[i]) fclose(files[i]);
        blocks[i] = files[i] = NULL;
    }
    return status_of_exit;
}
