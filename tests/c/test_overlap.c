/*
 * Calls that overlap with what they must not overlap with: cu_seqlens changes while kernels run, two calls
 * share a workspace, or cu_seqlens is malformed from the start. Results are then unspecified. But every call
 * ends, with a result or with an error, and nothing outside of the tensors and the workspace is touched. A
 * cu_seqlens that is malformed and does not change must not even give an error.
 *
 * A kernel that waits in vain ends in a trap, after which the process cannot use its CUDA context any more.
 * So this program starts itself again for each case, and the parent uses no device. On a GPU every case may
 * take CASE_SECONDS, a multiple of the time after which a kernel gives up (kernels/hopper/ptx/patience.cuh).
 * The emulator finds by itself that nothing moves, and a clock would only find that the machine is busy.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

enum { SKIPPED = 77, CASE_SECONDS = 600, MOST_KERNELS = 16, CALLERS = 2 };
static const char CASE[] = "FLASH_KDA_OVERLAP_CASE"; /* the number of the case, in the child's environment */

/* ---- The driver, for what the library does not offer --------------------------------------------------- */

/* Memory that the host writes and kernels read. On a GPU this is pinned memory of the host; the emulator has
 * no function for it, because its device memory is the host's. Streams: NULL where there are none. */
static void *driver_function(const char *symbol)
{
    static void *library;
    if (!library) library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return library ? dlsym(library, symbol) : NULL;
}

static bool memory_is_shared(void)
{
    return !driver_function("cuMemAllocHost_v2");
}

static void enter_context(void)
{
    int (*retain)(void **, int) = NULL, (*push)(void *) = NULL;
    void *context;
    *(void **)&retain = driver_function("cuDevicePrimaryCtxRetain");
    *(void **)&push = driver_function("cuCtxPushCurrent_v2");
    if (!retain || !push || retain(&context, test.device.index) || push(context)) die("no CUDA context");
}

static void *host_memory(size_t bytes)
{
    int (*allocate_host)(void **, size_t) = NULL;
    void *memory = NULL;
    *(void **)&allocate_host = driver_function("cuMemAllocHost_v2");
    if (!allocate_host) {
        must(flash_kda_malloc(test.device, bytes, &memory));
    } else {
        enter_context();
        if (allocate_host(&memory, bytes)) die("no pinned memory");
    }
    return memory;
}

/* A stream that does not wait for the default stream. */
static void *stream_create(void)
{
    int (*create)(void **, unsigned) = NULL;
    void *stream = NULL;
    *(void **)&create = driver_function("cuStreamCreate");
    if (!create) return NULL;
    enter_context();
    if (create(&stream, 1)) die("no stream");
    return stream;
}

/* ---- Contents of cu_seqlens ---------------------------------------------------------------------------- */

enum { CONTENTS = 12, FIRST_MALFORMED = 4 };

static uint64_t next_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 33;
}

/* Content number `which` for sequences of `tokens` tokens in all. The first ones are valid. */
static void fill_borders(int64_t *borders, int64_t sequences, int64_t tokens, int which)
{
    uint64_t seed = (uint64_t)which;
    for (int64_t n = 0; n <= sequences; n++) {
        const int64_t short_ones = 7 * n < tokens ? 7 * n : tokens, random = (int64_t)next_random(&seed);
        int64_t x = 0;
        switch (which) {
        case 0: x = tokens * n / sequences; break;               /* equal lengths */
        case 1: x = n == 0 ? 0 : tokens; break;                  /* all in the first one */
        case 2: x = n == sequences ? tokens : 0; break;          /* all in the last one */
        case 3: x = n == sequences ? tokens : short_ones; break; /* a long one behind short ones */
        case 4: x = 0; break;
        case 5: x = tokens; break;
        case 6: x = n % 2 ? tokens : 0; break; /* overlapping: they seem to need more than there is */
        case 7: x = tokens - tokens * n / sequences; break;
        case 8: x = n % 2 ? INT64_MAX : INT64_MIN; break;
        case 9: x = 3 * tokens * n / sequences - tokens; break;
        case 10: x = n == 0 ? 0 : tokens - 33 * (n % 3); break;
        default: x = random % (4 * tokens) - tokens; break;
        }
        borders[n] = x;
    }
}

static void write_borders(void *to, const int64_t *borders, int64_t sequences, bool narrow)
{
    for (int64_t n = 0; n <= sequences; n++) {
        if (narrow)
            ((volatile int32_t *)to)[n] = (int32_t)borders[n];
        else
            ((volatile int64_t *)to)[n] = borders[n];
    }
}

/* ---- Shapes and calls ---------------------------------------------------------------------------------- */

typedef struct shape {
    int64_t tokens, heads, sequences;
    bool batch_invariant, tells_longest;
} shape;

/* With these a GPU of 9 to 22 SMs runs solo CTAs, CTA pairs, divided work items, passes with lists, relays
 * and mixed launches, as --cut says. The quick ones are for the emulator, which takes a second for 500 tokens
 * of one head. */
enum { SHAPES = 5 };
static const shape shapes[SHAPES] = {
    {300, 5, 3, false, false},   {1100, 2, 8, false, true}, {2048, 12, 1, false, false},
    {20000, 2, 50, false, true}, {5000, 3, 7, true, false},
};
static const shape quick_shapes[SHAPES] = {
    {60, 3, 3, false, false},  {600, 1, 4, false, true}, {500, 1, 1, false, false},
    {200, 1, 40, false, true}, {300, 2, 2, true, false},
};

static const shape *shape_of(int number)
{
    return test.quick ? &quick_shapes[number] : &shapes[number];
}

static problem *create(const shape *s, uint64_t seed)
{
    int64_t *lengths = allocate((size_t)s->sequences, sizeof *lengths);
    for (int64_t n = 0; n < s->sequences; n++)
        lengths[n] = s->tokens * (n + 1) / s->sequences - s->tokens * n / s->sequences;
    problem *p = problem_create_ragged(lengths, s->sequences, s->heads);
    fill_case(p, &test_cases[0], seed);
    free(lengths);
    return p;
}

/* Opens a call with one sequence that has all tokens, and then gives it the borders of content `which`. */
static void open_call(call *c, problem *p, const shape *s, bool narrow, int which)
{
    call_options options = options_of(STATE_BOTH, narrow);
    const size_t bytes = ((size_t)s->sequences + 1) * sizeof(int64_t);
    int64_t *borders = allocate(bytes, 1);
    options.batch_invariant = s->batch_invariant, options.tells_longest = s->tells_longest;
    options.i32_seqlens = narrow;
    fill_borders(p->cu_seqlens, s->sequences, s->tokens, 1);
    must(call_open(c, p, options));
    fill_borders(p->cu_seqlens, s->sequences, s->tokens, which);
    write_borders(borders, p->cu_seqlens, s->sequences, narrow);
    must(flash_kda_copy(test.device, c->params.cu_seqlens.data, (flash_kda_device){FLASH_KDA_CPU, 0}, borders,
                        narrow ? bytes / 2 : bytes));
    free(borders);
}

/* Looks at a call that was allowed to fail, once no other call is in flight. Returns false if the device
 * cannot be used any more, perhaps because of another thread's call. */
static bool look_at(call *c, const problem *p, flash_kda_status status, long *errors)
{
    char sentence[512];
    snprintf(sentence, sizeof sentence, "%s", flash_kda_last_error());
    if (!CHECK(status == FLASH_KDA_OK || status == FLASH_KDA_DEVICE_ERROR, "%s", sentence)) return true;
    if (status != FLASH_KDA_OK) {
        ++*errors;
        CHECK(strstr(sentence, "waited in vain") || strstr(sentence, "undefined"), "%s", sentence);
    }
    if (flash_kda_synchronize(test.device, NULL) != FLASH_KDA_OK && !memory_is_shared()) return false;
    const char *damaged = call_damage(c, p);
    CHECK(!damaged, "memory around %s was written, or it is an input and changed", damaged);
    return true;
}

static bool run_any(call *c, const problem *p, long *errors)
{
    return look_at(c, p, call_run(c), errors);
}

/* ---- Cases --------------------------------------------------------------------------------------------- */

static void malformed(int shape_number)
{
    const shape *s = shape_of(shape_number);
    problem *p = create(s, 1);
    long errors = 0;
    for (int which = 0; which < CONTENTS; which++)
        for (int narrow = 0; narrow < 2; narrow++) {
            /* On the emulator each content with one or two of the shapes, and each kind with half of them. */
            if (test.quick && ((which + shape_number) % 3 || (which / 3 + shape_number + narrow) % 2))
                continue;
            call c;
            trying("shape %d, content %d, %s", shape_number, which, narrow ? "int32" : "int64");
            open_call(&c, p, s, narrow, which);
            const bool usable = run_any(&c, p, &errors);
            CHECK(errors == 0, "the call fails: %s", flash_kda_last_error());
            if (!usable) return;
            call_close(&c);
        }
    problem_free(p);
}

/* A thread that writes one content after the other, or whatever comes, while calls run. */
typedef struct writer {
    pthread_t thread;
    atomic_bool stop;
    const shape *s;
    void *borders;
    bool narrow;
    int contents[2];
    uint32_t *scribbled; /* words to overwrite, or NULL */
    size_t words;
} writer;

static void *flip(void *argument)
{
    writer *w = argument;
    uint64_t seed = 5;
    int64_t *contents[2];
    for (int i = 0; i < 2; i++) {
        contents[i] = allocate((size_t)w->s->sequences + 1, sizeof **contents);
        fill_borders(contents[i], w->s->sequences, w->s->tokens, w->contents[i]);
    }
    while (!atomic_load(&w->stop)) {
        write_borders(w->borders, contents[next_random(&seed) % 2], w->s->sequences, w->narrow);
        if (next_random(&seed) % 4 == 0) usleep((unsigned)(next_random(&seed) % 200));
    }
    for (int i = 0; i < 2; i++) free(contents[i]);
    return NULL;
}

static void *scribble(void *argument)
{
    writer *w = argument;
    uint64_t seed = 6;
    while (!atomic_load(&w->stop)) {
        const uint64_t r = next_random(&seed), where = next_random(&seed) << 20 ^ next_random(&seed);
        const uint32_t what = (uint32_t)(next_random(&seed) << 16 ^ next_random(&seed));
        for (size_t i = 0; i < 64; i++) /* a run of words that is large, small, negative or random */
            ((volatile uint32_t *)w->scribbled)[(where + i) % w->words] = r % 4 == 0   ? (uint32_t)i
                                                                          : r % 4 == 1 ? what
                                                                          : r % 4 == 2 ? -(uint32_t)i
                                                                                       : 0x7fffffffu;
        if (r % 8 == 0) usleep((unsigned)(next_random(&seed) % 200));
    }
    return NULL;
}

static void start(writer *w, void *(*run)(void *))
{
    atomic_store(&w->stop, false);
    if (pthread_create(&w->thread, NULL, run, w) != 0) die("no thread");
}

static void stop(writer *w)
{
    atomic_store(&w->stop, true);
    pthread_join(w->thread, NULL);
}

/* The calls of one case: many where they are fast, few in the emulator. */
static int rounds(void)
{
    return test.quick ? 2 : memory_is_shared() ? 12 : 300;
}

static void flips(int shape_number)
{
    static const int pairs[][2] = {{0, 1}, {2, 3}, {3, 1}, {0, 6}, {1, 4}, {7, 11}, {8, 9}, {10, 2}};
    const shape *s = shape_of(shape_number);
    problem *p = create(s, 2);
    long errors = 0;
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        call c;
        const bool narrow = i % 2;
        if (test.quick && ((int)i + shape_number) % 4) continue; /* each pair with one or two shapes */
        writer w = {.s = s, .narrow = narrow, .contents = {pairs[i][0], pairs[i][1]}};
        open_call(&c, p, s, narrow, pairs[i][0]); /* its own borders stay as they are */
        w.borders = host_memory(((size_t)s->sequences + 1) * sizeof(int64_t));
        write_borders(w.borders, p->cu_seqlens, s->sequences, narrow);
        c.params.cu_seqlens.data = w.borders;
        bool usable = true;
        start(&w, flip);
        for (int round = 0; usable && round < rounds(); round++) {
            trying("shape %d, contents %d and %d, round %d", shape_number, pairs[i][0], pairs[i][1], round);
            usable = run_any(&c, p, &errors);
        }
        stop(&w);
        if (!usable) break;
        if (memory_is_shared()) must(flash_kda_free(test.device, w.borders));
        call_close(&c);
    }
    printf("    shape %d: %ld calls ended with an error\n", shape_number, errors);
    problem_free(p);
}

typedef struct caller {
    pthread_t thread;
    int index, shape_number;
    void *workspace;
    pthread_barrier_t *meet;
    bool usable; /* the device, after the calls */
    long errors;
} caller;

static void *call_again(void *argument)
{
    caller *own = argument;
    const shape *s = shape_of(own->shape_number);
    problem *p = create(s, 3 + (uint64_t)own->index);
    call c;
    open_call(&c, p, s, false, own->index ? 3 : 0);
    c.params.workspace = own->workspace;
    c.params.stream = stream_create();
    own->usable = true;
    for (int round = 0; round < rounds(); round++) {
        trying("shape %d, caller %d, round %d", own->shape_number, own->index, round);
        pthread_barrier_wait(own->meet);
        const flash_kda_status status = own->usable ? call_run(&c) : FLASH_KDA_OK;
        pthread_barrier_wait(
            own->meet); /* all calls are over, also one that has cost the process its context */
        own->usable = own->usable && look_at(&c, p, status, &own->errors);
    }
    if (own->usable) call_close(&c);
    problem_free(p);
    return NULL;
}

static void shared_workspace(int shape_number)
{
    caller callers[CALLERS];
    pthread_barrier_t meet;
    const shape *s = shape_of(shape_number);
    problem *p = create(s, 1);
    call c;
    open_call(&c, p, s, false, 0);
    pthread_barrier_init(&meet, NULL, CALLERS);
    for (int i = 0; i < CALLERS; i++) {
        callers[i] = (caller){.index = i, .shape_number = shape_number, .meet = &meet};
        callers[i].workspace = c.params.workspace;
        if (pthread_create(&callers[i].thread, NULL, call_again, &callers[i]) != 0) die("no thread");
    }
    long errors = 0;
    bool usable = true;
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(callers[i].thread, NULL);
        errors += callers[i].errors;
        usable = usable && callers[i].usable;
    }
    printf("    shape %d: %ld calls ended with an error\n", shape_number, errors);
    pthread_barrier_destroy(&meet);
    if (!usable) return;
    const char *damaged = call_damage(&c, p);
    CHECK(!damaged, "memory around %s was written", damaged);
    call_close(&c);
    problem_free(p);
}

/* Somebody writes to the workspace while calls run. Only where the host can write to device memory. */
static void scribbled(int shape_number)
{
    const shape *s = shape_of(shape_number);
    problem *p = create(s, 4);
    long errors = 0;
    call c;
    open_call(&c, p, s, false, 0);
    writer w = {.s = s, .scribbled = c.params.workspace};
    w.words = c.params.workspace_size / sizeof *w.scribbled;
    if (memory_is_shared() && w.words) {
        /* Lists and flags come first or behind the states that work items hand over. */
        start(&w, scribble);
        for (int round = 0; round < 4 * rounds(); round++) {
            trying("shape %d, round %d", shape_number, round);
            fill_borders(p->cu_seqlens, s->sequences, s->tokens, round % FIRST_MALFORMED);
            write_borders(c.params.cu_seqlens.data, p->cu_seqlens, s->sequences, false);
            run_any(&c, p, &errors);
        }
        stop(&w);
        printf("    shape %d: %ld calls ended with an error\n", shape_number, errors);
    }
    call_close(&c);
    problem_free(p);
}

/* ---- Parent and child ---------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    void (*run)(int shape_number);
} kinds[] = {{"malformed", malformed},
             {"flips", flips},
             {"shared-workspace", shared_workspace},
             {"scribbled", scribbled}};
enum { KINDS = sizeof kinds / sizeof *kinds, CASES = KINDS * SHAPES };

static bool is_kind(const char *name)
{
    for (int k = 0; k < KINDS; k++)
        if (strcmp(name, kinds[k].name) == 0) return true;
    return false;
}

static int case_number;

static void run_case(void)
{
    kinds[case_number / SHAPES].run(case_number % SHAPES);
}

/* Starts this program again for one case and one kernel. Returns the child's exit status, or -1 if it was
 * killed. */
static int run_child(int argc, char **argv, int number, const char *kernel)
{
    char text[16];
    char **arguments = allocate((size_t)argc + 3, sizeof *arguments);
    int kept = 0;
    for (int i = 0; i < argc; i++)
        if (!is_kind(argv[i])) arguments[kept++] = argv[i];
    arguments[kept++] = (char[]){"--kernel"}, arguments[kept++] = (char *)(uintptr_t)kernel;
    arguments[kept] = NULL;
    snprintf(text, sizeof text, "%d", number);
    setenv(CASE, text, 1);
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        execv("/proc/self/exe", arguments);
        _exit(127);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) die("no child process");
    free(arguments);
    if (WIFSIGNALED(status)) printf("case %d, %s: signal %d\n", number, kernel, WTERMSIG(status));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Whether the command line names this kind of case, or none at all. */
static bool asked_for(int argc, char **argv, const char *name)
{
    bool any = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], name) == 0) return true;
        any |= is_kind(argv[i]);
    }
    return !any;
}

/* The value of an option, or NULL. */
static const char *option(int argc, char **argv, const char *name)
{
    for (int i = 1; i + 1 < argc; i++)
        if (strcmp(argv[i], name) == 0) return argv[i + 1];
    return NULL;
}

static int run_parent(int argc, char **argv)
{
    flash_kda_kernel_info kernels[MOST_KERNELS];
    int32_t count;
    int run = 0, failed = 0;
    const char *only = option(argc, argv, "--kernel");
    for (int k = 0; k < MOST_KERNELS; k++) kernels[k].struct_size = sizeof kernels[k];
    must(flash_kda_list_kernels(kernels, MOST_KERNELS, &count));
    for (int k = 0; k < count && k < MOST_KERNELS; k++) {
        if (kernels[k].device_type != FLASH_KDA_CUDA) continue;
        if (only && strcmp(only, kernels[k].name) != 0) continue;
        for (int i = 0; i < CASES; i++) {
            if (!asked_for(argc, argv, kinds[i / SHAPES].name)) continue;
            const int status = run_child(argc, argv, i, kernels[k].name);
            run += status != SKIPPED;
            if (status == 0 || status == SKIPPED) continue;
            printf("case %d (%s, shape %d), kernel %s: FAILED\n", i, kinds[i / SHAPES].name, i % SHAPES,
                   kernels[k].name);
            failed++;
        }
    }
    printf("%d cases, %d failed\n", run, failed);
    return failed ? 1 : run ? 0 : SKIPPED;
}

int main(int argc, char **argv)
{
    const char *number = getenv(CASE);
    group groups[KINDS];
    if (!number) return run_parent(argc, argv);
    case_number = (int)strtol(number, NULL, 10) % CASES;
    for (int i = 0; i < KINDS; i++) groups[i] = (group){kinds[i].name, run_case};
    harness_start(argc, argv);
    if (!memory_is_shared()) alarm(CASE_SECONDS); /* the default action ends the process */
    /* The child runs the group of its case alone, whatever groups the parent was asked for. */
    return harness_run(&groups[case_number / SHAPES], 1);
}
