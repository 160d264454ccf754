/* flash-kda bench */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "call.h"
#include "cases.h"
#include "command.h"
#include "json.h"
#include "terminal.h"

static const char help[] =
    "flash-kda bench [OPTION...]\n"
    "Times the forward pass with fp32 states in and out.\n"
    "\n"
    "  --lengths LENGTHS    the tokens of each sequence: 8192, or 1300,547,2048, or\n"
    "                       1024x8 for eight sequences of 1024 tokens; without it a\n"
    "                       few shapes that suit the device\n" HEADS_DEVICE_AND_KERNEL_HELP CUT_HELP
    "  --batch-invariant    asks for results that don't depend on what else is in the\n"
    "                       batch\n" JSON_HELP "\n"
    "The columns of the table:\n"
    "\n"
    "  ms       the median time of a call: on a GPU by events around it, on the CPU\n"
    "           by the clock\n"
    "  GB/s     the bytes of q, k, v, g, beta, out and both states, each counted\n"
    "           once, over ms\n"
    "  floor    the time in which the same bytes cross memory at the speed of a large\n"
    "           copy, which is measured in the same run\n"
    "  x floor  ms over floor\n"
    "\n"
    "Gates are as in trained models: every head has slow channels beside fast ones.\n"
    "If the tensors of one call could stay in the GPU's cache, calls take turns with\n"
    "several sets of tensors.\n";

enum { MAX_SETS = 16, MAX_REPEATS = 200, LENGTHS_COLUMNS = 28 };

typedef struct shape {
    const char *lengths;
    int64_t heads;
} shape;

static const shape gpu_shapes[] = {
    {"8192", 96},   {"1300,547,2048,963,271,3063", 96},
    {"1024x8", 96}, {"8192", 16},
    {"4096", 8},    {"2048x4", 12},
    {"65536", 8},   {"512x32", 32},
    {"16x256", 12},
};
static const shape cpu_shapes[] = {
    {"8192", 8}, {"1300,547,2048,271", 8}, {"512x8", 8}, {"2048", 1}, {"16x64", 8}};

static problem *create_problem(shape s)
{
    int64_t *lengths, count = lengths_option(s.lengths, &lengths);
    problem *p =
        count == 1 ? problem_create(1, lengths[0], s.heads) : problem_create_ragged(lengths, count, s.heads);
    free(lengths);
    return p;
}

/* Fills a few tokens and repeats them. The time of a call does not depend on it, and random numbers are slow.
 * */
static void fill_repeating(problem *p)
{
    const int64_t period = p->tokens < 256 ? p->tokens : 256;
    problem few = *p;
    few.tokens = period;
    fill_case(&few, find_case("channels from fast to slow"), 1);
    uint16_t *const tensors[] = {p->q, p->k, p->v, p->g, p->beta};
    for (int i = 0; i < 5; i++) {
        int64_t row = p->heads * (i < 4 ? DIM : 1);
        for (int64_t t = period; t < p->tokens; t++)
            memcpy(tensors[i] + t * row, tensors[i] + (t - period) * row, (size_t)row * sizeof(uint16_t));
    }
}

/* The bytes that must cross memory once: q, k, v, g, beta and out in bf16, and both states in fp32. */
static double bytes_of(const problem *p)
{
    double rows = (double)problem_rows(p), states = (double)problem_states(p);
    return rows * (5 * DIM * 2 + 2) + 2 * states * DIM * DIM * 4;
}

/* Bytes that a large copy within the device reads and writes in a second. */
static double copy_speed(flash_kda_device device)
{
    const size_t bytes = (size_t)1 << (device.type == FLASH_KDA_CPU ? 28 : 30);
    double seconds[9];
    void *from, *to;
    must(flash_kda_malloc(device, bytes, &from));
    must(flash_kda_malloc(device, bytes, &to));
    char *zeros = allocate(bytes, 1);
    must(flash_kda_copy(device, from, (flash_kda_device){FLASH_KDA_CPU, 0}, zeros, bytes));
    free(zeros);
    for (int i = -1; i < 9; i++) {
        double start = now_seconds();
        must(flash_kda_copy(device, to, device, from, bytes));
        must(flash_kda_synchronize(device, NULL));
        if (i >= 0) seconds[i] = now_seconds() - start;
    }
    must(flash_kda_free(device, from));
    must(flash_kda_free(device, to));
    return 2.0 * (double)bytes / median(seconds, 9);
}

/* The median of the milliseconds of one call. */
static double time_problem(const problem *p, call_options how)
{
    const double cache = 200e6; /* a few times the L2 of an H100 */
    call sets[MAX_SETS];
    double times[MAX_REPEATS], spent = 0;
    int count = 1, done = 0;
    float ms;
    if (how.device.type == FLASH_KDA_CUDA) count += (int)(cache / (bytes_of(p) + 1));
    if (count > MAX_SETS) count = MAX_SETS;
    for (int i = 0; i < count; i++) {
        must(call_open(&sets[i], p, how));
        must(flash_kda_time_fwd(&sets[i].params, 1, &ms)); /* loads kernels and warms caches up */
    }
    while (done < MAX_REPEATS && (done < 5 || spent < 1000)) {
        must(flash_kda_time_fwd(&sets[done % count].params, 1, &ms));
        times[done++] = ms;
        spent += ms;
    }
    for (int i = 0; i < count; i++) call_close(&sets[i]);
    return median(times, done);
}

/* "8192", "1300,547,2048,..." : as much of the lengths as the column has room for. */
static const char *short_lengths(const char *lengths, char text[LENGTHS_COLUMNS + 1])
{
    const bool is_long = strlen(lengths) > LENGTHS_COLUMNS;
    snprintf(text, LENGTHS_COLUMNS + 1, "%.*s%s", is_long ? LENGTHS_COLUMNS - 3 : LENGTHS_COLUMNS, lengths,
             is_long ? "..." : "");
    return text;
}

static void bench_shape(shape s, call_options how, double speed, bool json)
{
    char lengths[LENGTHS_COLUMNS + 1];
    short_lengths(s.lengths, lengths);
    progress("%s, H = %lld", lengths, (long long)s.heads);
    problem *p = create_problem(s);
    fill_repeating(p);
    double ms = time_problem(p, how), bytes = bytes_of(p), floor_ms = 1e3 * bytes / speed;
    progress_done();
    if (json) {
        json_open_object(NULL);
        json_text("lengths", s.lengths);
        json_integer("heads", s.heads);
        json_number("milliseconds", ms);
        json_number("bytes", bytes);
        json_number("floor_milliseconds", floor_ms);
        json_close_object();
    } else {
        printf("  %-*s %4lld %11.3f %9.1f %10.3f %9.1f\n", LENGTHS_COLUMNS, lengths, (long long)s.heads, ms,
               1e-6 * bytes / ms, floor_ms, ms / floor_ms);
    }
    flush_output();
    problem_free(p);
}

static const char *const cut_words[] = {
    [FLASH_KDA_CUT_AUTO] = "",
    [FLASH_KDA_CUT_NEVER] = ", cut never",
    [FLASH_KDA_CUT_ALWAYS] = ", cut always",
    [FLASH_KDA_CUT_MIXED] = ", cut mixed",
};

static const char *const cut_names[] = {
    [FLASH_KDA_CUT_AUTO] = "auto",
    [FLASH_KDA_CUT_NEVER] = "never",
    [FLASH_KDA_CUT_ALWAYS] = "always",
    [FLASH_KDA_CUT_MIXED] = "mixed",
};

static void json_bench(const flash_kda_device_info *info, call_options how, const shape *shapes, int count,
                       bool is_asked)
{
    const double speed = copy_speed(info->device);
    json_open_object(NULL);
    json_device(info);
    json_text("kernel", how.kernel ? how.kernel : info->kernel);
    json_text("cut", cut_names[how.cut]);
    json_bool("batch_invariant", how.batch_invariant);
    json_number("copy_bytes_per_second", speed);
    json_open_array("shapes");
    for (int i = 0; i < count; i++) bench_shape(shapes[i], how, speed, true);
    json_close_array();
    json_left_out(info, 1, is_asked);
    json_close_object();
}

static void bench(const flash_kda_device_info *info, call_options how, const shape *shapes, int count,
                  bool is_asked)
{
    char more[128];
    bool cpu = info->device.type == FLASH_KDA_CPU;
    snprintf(more, sizeof more, ", kernel %s%s%s", how.kernel ? how.kernel : info->kernel, cut_words[how.cut],
             how.batch_invariant ? ", batch invariant" : "");
    printf("%s", bold());
    print_device(info, more, 0);
    printf("%s\n", plain());
    print_left_out(info, 1, is_asked);
    progress("measuring a copy");
    double speed = copy_speed(info->device);
    progress_done();
    printf("  a copy reads and writes %.1f GB/s%s\n\n", 1e-9 * speed, cpu ? " (one thread)" : "");
    printf("  %-28s %4s %11s %9s %10s %9s\n", "lengths", "H", "ms", "GB/s", "floor ms", "x floor");
    for (int i = 0; i < count; i++) bench_shape(shapes[i], how, speed, false);
}

int command_bench(int argc, char **argv)
{
    static const struct option options[] = {
        DEVICE_OPTION,
        KERNEL_OPTION,
        CUT_OPTION,
        BATCH_INVARIANT_OPTION,
        JSON_OPTION,
        {"heads", required_argument, NULL, 'H'},
        {"lengths", required_argument, NULL, 'l'},
        HELP_OPTION,
        {0},
    };
    flash_kda_device_info info = {0};
    call_options how = {.mode = STATE_BOTH, .tells_longest = true};
    shape own = {NULL, 0};
    bool json = false;
    for (int c; (c = getopt_long(argc, argv, ":h", options, NULL)) != -1;) {
        switch (c) {
        case 'h': fputs(help, stdout); return 0;
        case 'd': info = find_device(device_option(optarg)); break;
        case 'k': how.kernel = optarg; break;
        case 'c': how.cut = cut_option(optarg); break;
        case 'i': how.batch_invariant = true; break;
        case 'H': own.heads = heads_option(optarg); break;
        case 'l': own.lengths = optarg; break;
        case 'j': json = true; break;
        default: refuse_option("bench", argv, options, c);
        }
    }
    if (optind < argc) die("bench takes no argument, but there is '%s'", argv[optind]);
    if (own.heads && !own.lengths) die("--heads needs --lengths, for example --lengths 8192");
    const bool is_asked = info.struct_size != 0;
    if (!is_asked) info = best_device();
    require_kernel(info.device, how.kernel);
    how.device = info.device;
    if (own.lengths) {
        int64_t *lengths;
        lengths_option(own.lengths, &lengths); /* refuses wrong lengths before anything takes time */
        free(lengths);
        if (!own.heads) own.heads = default_heads(info.device);
    }
    const bool cpu = info.device.type == FLASH_KDA_CPU;
    const shape *shapes = own.lengths ? &own : cpu ? cpu_shapes : gpu_shapes;
    const int count = own.lengths ? 1
                      : cpu       ? (int)(sizeof cpu_shapes / sizeof *cpu_shapes)
                                  : (int)(sizeof gpu_shapes / sizeof *gpu_shapes);
    (json ? json_bench : bench)(&info, how, shapes, count, is_asked);
    return 0;
}
