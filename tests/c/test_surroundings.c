/* What goes on around a call on the CPU: threads that are cancelled, signals, interruption, floating-point
 * settings, another locale, and tensors that another thread writes to meanwhile. Results stay the same or,
 * where they cannot, nothing outside the call's memory is touched. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fenv.h>
#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <pmmintrin.h>
#endif

#include "harness.h"

/* ThreadSanitizer reports, rightly, that two threads use a tensor which the test changes while it is read. */
#if defined(__SANITIZE_THREAD__)
enum { THREADS = 1, SANITIZED = 1, FEW_CALLS = 40 }; /* a call takes half a second */
#elif defined(__SANITIZE_ADDRESS__)
enum { THREADS = 4, SANITIZED = 1, FEW_CALLS = 300 };
#else
enum { THREADS = 4, SANITIZED = 0, FEW_CALLS = 300 };
#endif

static call_options with_threads(int threads, state_mode mode)
{
    call_options options = options_of(mode, false);
    options.threads = threads;
    return options;
}

static void sleep_ms(double ms)
{
    usleep((useconds_t)(1e3 * ms));
}

/* Processor time of this process. Unlike a clock on the wall it stands still while other processes run. */
static double processor_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- cancellation ---- */

/* Threads of this process; 0 where there is no /proc. */
static int thread_count(void)
{
    DIR *tasks = opendir("/proc/self/task");
    int count = -2; /* "." and ".." */
    if (!tasks) return 0;
    while (readdir(tasks)) count++;
    closedir(tasks);
    return count;
}

static void *call_for_ever(void *c)
{
    for (;;) must(flash_kda_fwd(&((call *)c)->params));
    return NULL;
}

static void *one_call(void *c)
{
    must(flash_kda_fwd(&((call *)c)->params));
    return NULL;
}

static void call_in_thread(call *c)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, one_call, c) != 0) die("no thread");
    pthread_join(thread, NULL);
}

/* A cancelled thread ends between calls, when no worker uses its stack any more. Then the stack is taken from
 * it, so that a worker which still ran would end the process. */
static void cancellation(void)
{
    enum { STACK = 1 << 20 };
    call c;
    problem *p = problem_create(1, 1500, 4);
    fill_case(p, find_case("random"), 1);
    must(call_open(&c, p, with_threads(4, STATE_OUT)));
    call_in_thread(&c); /* with the first thread, ThreadSanitizer starts one of its own */
    const int before = thread_count();
    for (int i = 0; i < (test.quick ? 8 : 40); i++) {
        pthread_t thread;
        pthread_attr_t attributes;
        trying("cancelled call %d", i);
        void *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        pthread_attr_init(&attributes);
        pthread_attr_setstack(&attributes, stack, STACK);
        if (pthread_create(&thread, &attributes, call_for_ever, &c) != 0) die("no thread");
        sleep_ms(1 + 0.3 * i);
        pthread_cancel(thread);
        pthread_join(thread, NULL);
        munmap(stack, STACK);
        pthread_attr_destroy(&attributes);
        /* A thread that has been joined counts until it has had its last bit of processor time, for which it
         * may wait long on a busy machine. */
        for (int ms = 0; ms < 60000 && thread_count() > before; ms++) sleep_ms(1);
        CHECK(thread_count() <= before, "%d threads are left, before there were %d", thread_count(), before);
    }
    call_close(&c);
    problem_free(p);
}

/* ---- signals ---- */

static pid_t main_thread, calling_thread;
static atomic_int handled, handled_elsewhere;

static void note_thread(int number)
{
    (void)number;
    const pid_t self = (pid_t)syscall(SYS_gettid);
    if (self != main_thread && self != calling_thread) atomic_fetch_add(&handled_elsewhere, 1);
    atomic_fetch_add(&handled, 1);
}

typedef struct repeated_call {
    call *c;
    const uint16_t *expected; /* out; NULL: anything */
    atomic_bool ready, stop;
    atomic_long calls;
} repeated_call;

static void *call_again(void *argument)
{
    repeated_call *r = argument;
    calling_thread = (pid_t)syscall(SYS_gettid);
    atomic_store(&r->ready, true);
    while (!atomic_load(&r->stop)) {
        flash_kda_status status = call_run(r->c);
        CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error());
        uint16_t *out = call_read_out(r->c);
        CHECK(first_difference(r->expected, out, 2, r->c->rows * DIM) < 0, "out differs");
        free(out);
        r->calls++;
    }
    return NULL;
}

/* The main thread blocks the signal, so the kernel looks for another thread that takes it. */
static void signals(void)
{
    call c;
    sigset_t set;
    pthread_t thread;
    struct sigaction old, action = {.sa_handler = note_thread, .sa_flags = SA_RESTART};
    problem *p = problem_create(1, 400, 4);
    fill_case(p, find_case("random"), 2);
    must(call_open(&c, p, with_threads(4, STATE_OUT)));
    must(call_run(&c));
    repeated_call again = {.c = &c, .expected = call_read_out(&c)};
    main_thread = (pid_t)syscall(SYS_gettid);
    handled = handled_elsewhere = 0;
    sigaction(SIGUSR1, &action, &old);
    if (pthread_create(&thread, NULL, call_again, &again) != 0) die("no thread");
    while (!atomic_load(&again.ready)) sleep_ms(1);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    trying("signals to the process during calls");
    for (int i = 0; i < (test.quick ? 200 : 1000) || atomic_load(&again.calls) < 3; i++) {
        kill(getpid(), SIGUSR1);
        usleep(200);
    }
    atomic_store(&again.stop, true);
    pthread_join(thread, NULL);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    CHECK(again.calls > 0 && handled > 0, "%ld calls, %d signals were handled", (long)again.calls, handled);
    CHECK(handled_elsewhere == 0, "the handler ran on a worker %d times", handled_elsewhere);
    sigaction(SIGUSR1, &old, NULL);
    free((void *)again.expected);
    call_close(&c);
    problem_free(p);
}

/* ---- interruption ---- */

static _Atomic(int32_t) interrupt_word;
static double interrupted_at; /* in processor time */

static void *interrupt_soon(void *ms)
{
    sleep_ms(*(const double *)ms);
    interrupted_at = processor_seconds();
    atomic_store(&interrupt_word, 7);
    return NULL;
}

static const char too_early[] = "*interrupt is not 0, so the call was given up before it began";

/* Runs the call, or the reference if there is an `out` for it, and interrupts it after some milliseconds.
 * Returns false if it had not begun then, or was over, which happens where the machine is busy. */
static bool interrupt_once(call *c, double *out)
{
    /* Far more than a chunk takes, since sanitizers are slow. */
    const double most_seconds = SANITIZED ? 2.0 : 0.1;
    pthread_t thread;
    double ms = 5;
    atomic_store(&interrupt_word, 0);
    if (pthread_create(&thread, NULL, interrupt_soon, &ms) != 0) die("no thread");
    const flash_kda_status status = out ? flash_kda_reference(&c->params, out, NULL, NULL) : call_run(c);
    const double ended_at = processor_seconds();
    pthread_join(thread, NULL);
    CHECK(ended_at - interrupted_at < most_seconds, "the call went on for %.3f s of processor time",
          ended_at - interrupted_at);
    if (status == FLASH_KDA_OK) return false;
    CHECK(status == FLASH_KDA_INTERRUPTED, "%s", flash_kda_status_string(status));
    if (strcmp(flash_kda_last_error(), too_early) == 0) return false;
    CHECK(strcmp(flash_kda_last_error(),
                 "*interrupt became nonzero, so the call was given up; its results are undefined") == 0,
          "%s", flash_kda_last_error());
    return true;
}

static void check_interrupted(call *c, double *out)
{
    bool interrupted = false;
    for (int i = 0; i < 100 && !interrupted; i++) interrupted = interrupt_once(c, out);
    CHECK(interrupted, "the call was never interrupted");
}

static void interruption(void)
{
    call c;
    /* So long that the call is not over when it is interrupted. If it is over, it is repeated. */
    problem *p = problem_create(1, SANITIZED || test.quick ? 10000 : 40000, 4);
    fill_case(p, find_case("random"), 3);
    must(call_open(&c, p, with_threads(2, STATE_OUT)));
    c.params.interrupt = (const volatile int32_t *)&interrupt_word;

    trying("interrupt is set before the call");
    atomic_store(&interrupt_word, -1);
    CHECK(call_run(&c) == FLASH_KDA_INTERRUPTED, "no refusal");
    CHECK(strcmp(flash_kda_last_error(), too_early) == 0, "%s", flash_kda_last_error());
    CHECK(call_untouched(&c), "an output was written");

    trying("interrupt is set during the call");
    for (int i = 0; i < 3; i++) {
        check_interrupted(&c, NULL);
        const char *damaged = call_damage(&c, p);
        CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);
    }

    trying("interrupt is set during the reference");
    double *out = allocate((size_t)problem_rows(p) * DIM, sizeof *out);
    check_interrupted(&c, out);
    free(out);
    call_close(&c);
    problem_free(p);

    trying("interrupt stays 0, and sequences without tokens");
    const int64_t lengths[] = {5, 0, 40, 0};
    p = problem_create_ragged(lengths, 4, 2);
    fill_case(p, find_case("random"), 3);
    must(call_open(&c, p, options_of(STATE_BOTH, false)));
    c.params.interrupt = (const volatile int32_t *)&interrupt_word;
    atomic_store(&interrupt_word, 0);
    must(call_run(&c));
    result plain = run_and_check(p, NULL, (bars){0, 0}, options_of(STATE_BOTH, false)),
           now = {call_read_out(&c), call_read_state(&c)};
    CHECK(first_difference(plain.out, now.out, 2, problem_rows(p) * DIM) < 0, "out differs");
    CHECK(first_difference(plain.state, now.state, 4, problem_states(p) * DIM * DIM) < 0, "state differs");
    result_free(&plain);
    result_free(&now);
    call_close(&c);
    problem_free(p);
}

/* ---- floating-point settings ---- */

enum { SETTINGS = 6 };

static void apply_setting(int which)
{
    static const int rounding[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    if (which < 4) fesetround(rounding[which]);
#if defined(__SSE2__)
    if (which == 4) _mm_setcsr(_mm_getcsr() | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
#endif
#if defined(__GLIBC__)
    if (which == 5) {
        feclearexcept(FE_ALL_EXCEPT);
        feenableexcept(FE_ALL_EXCEPT);
    }
#endif
}

static unsigned current_setting(void)
{
#if defined(__SSE2__)
    return _mm_getcsr();
#else
    return (unsigned)fegetround() | (unsigned)fetestexcept(FE_ALL_EXCEPT) << 16;
#endif
}

static const char *const setting_names[SETTINGS] = {
    "rounding to nearest", "upward", "downward", "towards zero", "flush to zero", "unmasked exceptions"};

/* Values that raise every exception: NaN, infinities, numbers whose squares overflow, and subnormal ones. */
static void make_exceptional(problem *p)
{
    const uint16_t values[] = {0x7fc0, 0x7f80, 0xff80, 0x7f7f, 0x0001, 0x8040};
    uint16_t *const tensors[] = {p->q, p->k, p->v, p->g};
    for (int i = 0; i < 24; i++) tensors[i % 4][((300 + 17 * i) * p->heads) * DIM + 5 * i] = values[i / 4];
}

/* One call with the setting, between its being made and undone. */
static void run_with_setting(call *c, int which)
{
    fenv_t before;
    fegetenv(&before);
    call_poison(c);
    apply_setting(which);
    const unsigned set = current_setting();
    const flash_kda_status status = flash_kda_fwd(&c->params);
    const unsigned after = current_setting();
    fesetenv(&before);
    CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error());
    CHECK(set == after, "the settings were %x, and are %x afterwards", set, after);
}

static void float_settings(void)
{
    call c;
    problem *p = problem_create(1, 700, 3);
    for (int exceptional = 0; exceptional < 2; exceptional++) {
        fill_case(p, find_case("channels from fast to slow"), 4);
        if (exceptional) make_exceptional(p);
        for (int threads = 1; threads <= 3; threads += 2) {
            must(call_open(&c, p, with_threads(threads, STATE_BOTH)));
            run_with_setting(&c, 0);
            result plain = {call_read_out(&c), call_read_state(&c)};
            for (int which = 1; which < SETTINGS; which++) {
                trying("%s, %d threads, %s numbers", setting_names[which], threads,
                       exceptional ? "exceptional" : "ordinary");
                run_with_setting(&c, which);
                result now = {call_read_out(&c), call_read_state(&c)};
                CHECK(first_difference(plain.out, now.out, 2, problem_rows(p) * DIM) < 0, "out differs");
                CHECK(first_difference(plain.state, now.state, 4, problem_states(p) * DIM * DIM) < 0,
                      "final_state differs");
                result_free(&now);
            }
            result_free(&plain);
            call_close(&c);
        }
    }

    /* The checks, the plan, the explanation and the reference compute too. */
    trying("calls that are refused, with unmasked exceptions");
    must(call_open(&c, p, options_of(STATE_OUT, false)));
    fenv_t before;
    char words[1200];
    double *out = allocate((size_t)problem_rows(p) * DIM, sizeof *out);
    fegetenv(&before);
    apply_setting(5);
    flash_kda_fwd_params params = c.params;
    const flash_kda_status explained = flash_kda_explain(&params, words, sizeof words),
                           solved = flash_kda_reference(&params, out, NULL, NULL);
    params.lower_bound = NAN;
    const flash_kda_status refused = flash_kda_fwd(&params);
    fesetenv(&before);
    CHECK(explained == FLASH_KDA_OK && solved == FLASH_KDA_OK && refused == FLASH_KDA_INVALID_VALUE,
          "%d %d %d", explained, solved, refused);
    free(out);
    call_close(&c);
    problem_free(p);
}

/* ---- contents that change ---- */

typedef struct flipper {
    call *c;
    const problem *p;
    atomic_bool stop;
    atomic_long flips;
} flipper;

static void set_border(const call *c, int64_t n, int64_t value)
{
    if (c->options.i32_seqlens)
        __atomic_store_n((int32_t *)c->params.cu_seqlens.data + n, (int32_t)value, __ATOMIC_RELAXED);
    else
        __atomic_store_n((int64_t *)c->params.cu_seqlens.data + n, value, __ATOMIC_RELAXED);
}

/* Right borders, of the problem or of other sequences, or with wild ones among them. */
static void set_borders(const flipper *f, bool others, rng *wild)
{
    const int64_t N = f->p->sequences, T = f->p->tokens;
    const int64_t values[] = {-1, T + 1, INT64_MAX, INT64_MIN, (int64_t)1 << 40, INT32_MAX, -T, T / 2};
    for (int64_t n = 0; n <= N; n++) {
        int64_t border = f->p->cu_seqlens[n];
        if (others && n > 0 && n < N) border = T - (N - n);
        if (wild && n > 0 && n < N) border = values[rng_bits(wild) % 8];
        set_border(f->c, n, border);
    }
}

static void pause_for(uint64_t turns)
{
    for (; turns; turns--) __asm__ volatile("");
}

static void *flip(void *argument)
{
    flipper *f = argument;
    rng r = rng_seed(5);
    while (!atomic_load(&f->stop)) {
        const uint64_t bits = rng_bits(&r);
        set_borders(f, bits & 1, &r);
        pause_for(bits >> 32 & 0xff);
        set_borders(f, bits & 2, NULL);
        pause_for(bits >> 48 & 0xfff);
        f->flips++;
    }
    set_borders(f, false, NULL);
    return NULL;
}

/* Another thread writes borders, right and wrong ones, while calls read them. */
static void contents(void)
{
    const int64_t lengths[] = {40, 40, 220, 0, 17, 83};
    problem *p = problem_create_ragged(lengths, 6, 3);
    fill_case(p, find_case("random"), 5);
    for (int i32 = 0; i32 < 2; i32++) {
        call c;
        pthread_t thread;
        long accepted = 0;
        call_options options = with_threads(THREADS, STATE_BOTH);
        options.i32_seqlens = i32;
        must(call_open(&c, p, options));
        flipper f = {.c = &c, .p = p};
        if (pthread_create(&thread, NULL, flip, &f) != 0) die("no thread");
        trying("cu_seqlens of %d bits change during calls", i32 ? 32 : 64);
        /* Until both threads have had a good share of the processors, too. */
        for (int i = 0; i < (test.quick ? FEW_CALLS : 3000) ||
                        ((accepted < 20 || atomic_load(&f.flips) < 20) && i < 100000);
             i++) {
            const flash_kda_status status = flash_kda_fwd(&c.params);
            accepted += status == FLASH_KDA_OK;
            if (status != FLASH_KDA_OK &&
                !CHECK(status == FLASH_KDA_INVALID_VALUE, "%s", flash_kda_last_error()))
                break;
        }
        atomic_store(&f.stop, true);
        pthread_join(thread, NULL);
        CHECK(accepted > 0 && f.flips > 0, "%ld calls were accepted among %ld changes", accepted,
              (long)f.flips);
        const char *damaged = call_damage(&c, p);
        CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);
        call_close(&c);
    }
    problem_free(p);
}

/* ---- another locale ---- */

/* The build makes a locale called "comma" if localedef can, in the folder that LOCPATH names. */
static void locale(void)
{
    if (!setlocale(LC_ALL, "comma")) return;
    char half[8];
    snprintf(half, sizeof half, "%g", 0.5);
    CHECK(strcmp(half, "0,5") == 0, "the locale writes %s", half);
    problem *p = problem_create(1, 1, 1);
    flash_kda_fwd_params params = problem_params(p, false);
    params.out = params.v;
    params.lower_bound = 0.5f;
    trying("a locale with a decimal comma");
    CHECK(flash_kda_fwd(&params) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strcmp(flash_kda_last_error(), "lower_bound is 0.5; it must be in [-5, 0]") == 0, "%s",
          flash_kda_last_error());
    params.lower_bound = -1.25e+20f;
    CHECK(flash_kda_fwd(&params) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strcmp(flash_kda_last_error(), "lower_bound is -1.25e+20; it must be in [-5, 0]") == 0, "%s",
          flash_kda_last_error());
    setlocale(LC_ALL, "C");
    problem_free(p);
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"cancellation", cancellation},     {"signals", signals},   {"interruption", interruption},
        {"float-settings", float_settings}, {"contents", contents}, {"locale", locale},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
