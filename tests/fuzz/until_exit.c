/* exit(), calloc(), free(), fopen() and fclose() of the code that run_until_exit() runs. The linker puts
 * these in the places of the C library's (--wrap). */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#include "fuzz.h"

void *__real_calloc(size_t count, size_t size);
void __real_free(void *block);
FILE *__real_fopen(const char *path, const char *mode);
int __real_fclose(FILE *file);
void __real_exit(int status) __attribute__((noreturn));

void *__wrap_calloc(size_t count, size_t size);
void __wrap_free(void *block);
FILE *__wrap_fopen(const char *path, const char *mode);
int __wrap_fclose(FILE *file);
void __wrap_exit(int status) __attribute__((noreturn));

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

void *__wrap_calloc(size_t count, size_t size)
{
    return keep(blocks, __real_calloc(count, size));
}

void __wrap_free(void *block)
{
    if (inside) forget(blocks, block);
    __real_free(block);
}

FILE *__wrap_fopen(const char *path, const char *mode)
{
    return keep(files, __real_fopen(path, mode));
}

int __wrap_fclose(FILE *file)
{
    if (inside) forget(files, file);
    return __real_fclose(file);
}

void __wrap_exit(int status)
{
    if (!inside) __real_exit(status);
    status_of_exit = status;
    longjmp(back, 1);
}

int run_until_exit(void (*function)(void *), void *argument)
{
    static FILE *nowhere;
    FILE *const out = stdout, *const err = stderr;
    if (!nowhere) nowhere = __real_fopen("/dev/null", "w");
    if (!nowhere) wrong("/dev/null can't be opened");
    stdout = stderr = nowhere;
    status_of_exit = -1;
    inside = true;
    if (!setjmp(back)) function(argument);
    inside = false;
    stdout = out, stderr = err;
    for (int i = 0; i < MOST; i++) {
        __real_free(blocks[i]);
        if (files[i]) __real_fclose(files[i]);
        blocks[i] = files[i] = NULL;
    }
    return status_of_exit;
}
