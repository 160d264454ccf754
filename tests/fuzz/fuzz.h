/*
 * What the fuzz harnesses share. A harness is one file with LLVMFuzzerTestOneInput(), the interface of
 * libFuzzer, AFL++ and OSS-Fuzz: it makes some use of the library or the command out of bytes, and ends the
 * process with wrong() if a rule is broken. Sanitizers find the rest.
 */
#ifndef TESTS_FUZZ_H
#define TESTS_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Bytes that are used up from the front. After the last one there are zeros. */
typedef struct input {
    const uint8_t *at;
    size_t left;
} input;

uint64_t take(input *from, int bytes);
int64_t take_between(input *from, int64_t least, int64_t most);
bool take_bool(input *from);

/* A size at the edge of something, or any number. */
int64_t take_hostile(input *from);

/* Says what is wrong and aborts. */
void wrong(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Runs code of the command, which ends the process after a wrong argument: exit() returns from here instead,
 * and what the code has allocated and opened is given back. What the code prints is dropped. Returns the exit
 * status, or -1 if the function returned. */
int run_until_exit(void (*function)(void *), void *argument);

#endif
