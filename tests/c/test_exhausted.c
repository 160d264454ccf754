/* Memory, threads or file descriptors run out. A call on the CPU needs none of them once it has begun, and
 * what does need them fails with a sentence. The program's own malloc() and pthread_create() stand before the
 * C library's, and fail when they are told to. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "harness.h"
#include "safetensors.h"

/* ---- functions that fail ---- */

/* The library finds the program's functions. */
#define SHOWN __attribute__((visibility("default")))

/* How many more calls succeed before all others fail; below 0: none fails. */
static atomic_int threads_left = -1, blocks_left = -1;
static atomic_int blocks_taken, threads_refused; /* since they were set to 0 */

static bool spend(atomic_int *left)
{
    int now = atomic_load(left);
    while (now > 0 && !atomic_compare_exchange_weak(left, &now, now - 1)) continue;
    return now != 0;
}

SHOWN int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                         void *argument)
{
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (!real) {
        void *found = dlsym(RTLD_NEXT, "pthread_create");
        memcpy(&real, &found, sizeof real);
    }
    if (spend(&threads_left)) return real(thread, attributes, run, argument);
    atomic_fetch_add(&threads_refused, 1);
    return EAGAIN;
}

/* A sanitizer has a malloc() of its own, and other C libraries have no second name for theirs. */
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
enum { COUNTS_BLOCKS = 1 };
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);

static bool block_is_left(void)
{
    atomic_fetch_add(&blocks_taken, 1);
    if (spend(&blocks_left)) return true;
    errno = ENOMEM;
    return false;
}

SHOWN void *malloc(size_t bytes)
{
    return block_is_left() ? __libc_malloc(bytes) : NULL;
}

SHOWN void *calloc(size_t count, size_t bytes)
{
    return block_is_left() ? __libc_calloc(count, bytes) : NULL;
}

SHOWN int posix_memalign(void **memory, size_t alignment, size_t bytes)
{
    *memory = block_is_left() ? __libc_memalign(alignment, bytes) : NULL;
    return *memory ? 0 : ENOMEM;
}
#else
enum { COUNTS_BLOCKS = 0 };
#endif

/* ---- what is left ---- */

static problem *p;
static result expected;

static void check_result(call *c)
{
    result now = {call_read_out(c), call_read_state(c)};
    CHECK(first_difference(expected.out, now.out, 2, problem_rows(p) * DIM) < 0, "out differs");
    CHECK(first_difference(expected.state, now.state, 4, problem_states(p) * DIM * DIM) < 0, "state differs");
    result_free(&now);
    call_poison(c);
}

static void open_call(call *c)
{
    call_options options = options_of(STATE_BOTH, false);
    options.threads = 4;
    p = problem_create(1, 300, 5);
    fill_case(p, find_case("random"), 6);
    must(call_open(c, p, options));
    must(call_run(c));
    expected = (result){call_read_out(c), call_read_state(c)};
    call_poison(c);
}

static void close_call(call *c)
{
    result_free(&expected);
    call_close(c);
    problem_free(p);
}

static void no_threads(void)
{
    call c;
    open_call(&c);
    for (int left = 0; left < 4; left++) {
        trying("%d threads can be started", left);
        atomic_store(&threads_left, left);
        atomic_store(&threads_refused, 0);
        const flash_kda_status status = flash_kda_fwd(&c.params);
        atomic_store(&threads_left, -1);
        CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error());
        CHECK(threads_refused == (left < 3), "%d threads were refused", threads_refused);
        check_result(&c);
    }
    close_call(&c);
}

/* fwd() allocates nothing, and starting a thread may fail for want of memory. */
static void no_memory(void)
{
    call c;
    if (!COUNTS_BLOCKS) return;
    open_call(&c);
    trying("fwd with one thread");
    flash_kda_fwd_params params = c.params;
    params.cpu_threads = 1;
    atomic_store(&blocks_taken, 0);
    flash_kda_status status = flash_kda_fwd(&params);
    CHECK(status == FLASH_KDA_OK && blocks_taken == 0, "fwd took %d blocks of memory", blocks_taken);
    check_result(&c);

    trying("fwd without memory");
    atomic_store(&blocks_left, 0);
    status = flash_kda_fwd(&c.params);
    atomic_store(&blocks_left, -1);
    CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error());
    check_result(&c);

    trying("the reference without memory");
    double *out = allocate((size_t)problem_rows(p) * DIM, sizeof *out);
    atomic_store(&blocks_left, 0);
    status = flash_kda_reference(&c.params, out, NULL, NULL);
    atomic_store(&blocks_left, -1);
    CHECK(status == FLASH_KDA_DEVICE_ERROR && strstr(flash_kda_last_error(), "could not allocate"), "%d: %s",
          status, flash_kda_last_error());
    CHECK(out[0] == 0.0, "the reference wrote");
    free(out);

    trying("flash_kda_malloc without memory");
    void *memory = NULL;
    atomic_store(&blocks_left, 0);
    status = flash_kda_malloc(test.device, 100, &memory);
    atomic_store(&blocks_left, -1);
    CHECK(status == FLASH_KDA_DEVICE_ERROR && strstr(flash_kda_last_error(), "bytes is 100"), "%d: %s",
          status, flash_kda_last_error());

    trying("devices without memory");
    flash_kda_device_info info = {.struct_size = sizeof info};
    int32_t count = 0;
    atomic_store(&blocks_left, 0);
    status = flash_kda_list_devices(&info, 1, &count, NULL);
    atomic_store(&blocks_left, -1);
    CHECK(status == FLASH_KDA_OK && count >= 1 && strcmp(info.name, "CPU") == 0 && info.units >= 1, "%d: %s",
          status, info.name);
    close_call(&c);
}

/* No file can be opened, as if there were no /proc either. */
static void no_files(void)
{
    call c;
    char why[256] = "";
    struct rlimit before, none;
    open_call(&c);
    if (getrlimit(RLIMIT_NOFILE, &before) != 0) die("no limit of file descriptors");
    none = before;
    none.rlim_cur = 0;
    trying("no file descriptor");
    setrlimit(RLIMIT_NOFILE, &none);
    flash_kda_device_info info = {.struct_size = sizeof info};
    int32_t count = 0;
    const flash_kda_status listed = flash_kda_list_devices(&info, 1, &count, NULL),
                           run = flash_kda_fwd(&c.params);
    safetensors *file = safetensors_open(FLASH_KDA_DATA "/kda_layer0.safetensors", why);
    setrlimit(RLIMIT_NOFILE, &before);
    CHECK(listed == FLASH_KDA_OK && count >= 1 && strcmp(info.name, "CPU") == 0 && info.units >= 1, "%d: %s",
          listed, info.name);
    CHECK(run == FLASH_KDA_OK, "%s", flash_kda_last_error());
    check_result(&c);
    CHECK(!file && strstr(why, "can't be opened"), "%s", why);
    close_call(&c);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"threads", no_threads}, {"memory", no_memory}, {"files", no_files}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
