/*
 * The forward pass on the CPU beside OpenBLAS: multiply-adds a second of sgemm on a 1024 cube and of
 * flash_kda_fwd() at T = 8192, H = 8, on the same threads. A token of a head counts as 3 * 128 * 128
 * multiply-adds, the multiply-adds of the three large products.
 *
 *     cpu_sgemm [KERNEL]        cpu (the default), cpu-avx512, cpu-avx2 or cpu-portable
 *     cpu_sgemm KERNEL quick    small sizes, whose times mean nothing: for a test of the program itself
 *
 * OpenBLAS is opened at run time, so the build does not need it.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "call.h"
#include "cases.h"

/* What is timed: the edge of the cube, the shape of the forward pass, and how often each is repeated. */
static struct {
    int cube, tokens, heads, repeats;
} sizes = {.cube = 1024, .tokens = 8192, .heads = 8, .repeats = 7};

typedef struct openblas {
    void (*sgemm)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                  const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
    void (*set_num_threads)(int threads);
    char *(*get_corename)(void);
    char *(*get_config)(void);
} openblas;

static void find(void *library, const char *name, void *function)
{
    void *symbol = dlsym(library, name);
    if (!symbol) die("libopenblas.so.0 has no %s", name);
    memcpy(function, &symbol, sizeof symbol);
}

static openblas open_openblas(void)
{
    void *library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        die("this benchmark compares with OpenBLAS, which is not installed (%s).\n"
            "On Debian or Ubuntu: apt-get install libopenblas0-pthread",
            dlerror());
    openblas blas;
    find(library, "cblas_sgemm", &blas.sgemm);
    find(library, "openblas_set_num_threads", &blas.set_num_threads);
    find(library, "openblas_get_corename", &blas.get_corename);
    find(library, "openblas_get_config", &blas.get_config);
    return blas;
}

/* Multiply-adds a second, in units of 1e9, of the fastest run, which other work on the machine disturbed
 * least. */
static double sgemm_rate(const openblas *blas, int threads)
{
    const int cube = sizes.cube;
    const size_t count = (size_t)cube * (size_t)cube;
    float *a = allocate(count, sizeof *a), *b = allocate(count, sizeof *b), *c = allocate(count, sizeof *c);
    rng random = rng_seed(1);
    for (size_t i = 0; i < count; i++) {
        a[i] = (float)rng_normal(&random);
        b[i] = (float)rng_normal(&random);
    }
    const int row_major = 101, plain = 111;
    blas->set_num_threads(threads);
    double best = 1e9;
    for (int i = 0; i < 3 * sizes.repeats; i++) {
        double start = now_seconds();
        blas->sgemm(row_major, plain, plain, cube, cube, cube, 1.0f, a, cube, b, cube, 0.0f, c, cube);
        double seconds = now_seconds() - start;
        if (seconds < best) best = seconds;
    }
    free(a);
    free(b);
    free(c);
    return (double)cube * cube * cube / best * 1e-9;
}

typedef struct sgemm_result {
    double rate;
    char core[32], config[160];
} sgemm_result;

/* The rate of one kernel of OpenBLAS, in a process of its own: OpenBLAS chooses its kernel when it is loaded,
 * and a kernel that this CPU can't run ends that process alone. */
static sgemm_result try_sgemm(const char *core, int threads)
{
    sgemm_result result = {0};
    int ends[2];
    if (pipe(ends) != 0) die("no pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) die("no process");
    if (child == 0) {
        unsetenv("OPENBLAS_L2_SIZE");
        if (core)
            setenv("OPENBLAS_CORETYPE", core, 1);
        else
            unsetenv("OPENBLAS_CORETYPE");
        openblas blas = open_openblas();
        result.rate = sgemm_rate(&blas, threads);
        snprintf(result.core, sizeof result.core, "%s", blas.get_corename());
        snprintf(result.config, sizeof result.config, "%s", blas.get_config());
        _exit(write(ends[1], &result, sizeof result) != (ssize_t)sizeof result);
    }
    close(ends[1]);
    if (read(ends[0], &result, sizeof result) != (ssize_t)sizeof result) memset(&result, 0, sizeof result);
    close(ends[0]);
    int status;
    if (waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) != 0)
        exit(WEXITSTATUS(status)); /* the child has said why: there is no OpenBLAS */
    return result;
}

/* The fastest kernel that OpenBLAS has for this CPU. A release that is older than the CPU may not know the
 * CPU and take its slowest kernel, so others are tried by name. */
static sgemm_result best_sgemm(int threads)
{
    static const char *const cores[] = {NULL, "SkylakeX", "Haswell"};
    sgemm_result best = {0};
    for (size_t i = 0; i < sizeof cores / sizeof *cores; i++) {
        sgemm_result result = try_sgemm(cores[i], threads);
        if (result.rate > best.rate) best = result;
    }
    return best;
}

static double kda_rate(const problem *p, const char *kernel, int threads, state_mode mode, bool bf16_state)
{
    call c;
    call_options options = {.kernel = kernel, .threads = threads, .mode = mode, .bf16_state = bf16_state};
    must(call_open(&c, p, options));
    double best = 1e9;
    for (int i = 0; i < sizes.repeats; i++) {
        call_poison(&c);
        double start = now_seconds();
        must(flash_kda_fwd(&c.params));
        double seconds = now_seconds() - start;
        if (seconds < best) best = seconds;
    }
    call_close(&c);
    return 3.0 * DIM * DIM * sizes.tokens * sizes.heads / best * 1e-9;
}

int main(int argc, char **argv)
{
    const char *kernel = argc > 1 ? argv[1] : "cpu";
    if (argc > 3 || (argc == 3 && strcmp(argv[2], "quick") != 0)) die("usage: cpu_sgemm [KERNEL [quick]]");
    if (argc == 3) sizes.cube = 32, sizes.tokens = 64, sizes.heads = 1, sizes.repeats = 1;
    flash_kda_device_info cpu = {.struct_size = sizeof cpu};
    int32_t devices;
    must(flash_kda_list_devices(&cpu, 1, &devices, NULL));
    printf("CPU: %s (%s), %d threads\n", cpu.name, cpu.arch, cpu.units);
    printf("flash_kda: kernel \"%s\", T = %d, H = %d\n\n", kernel, sizes.tokens, sizes.heads);

    problem *p = problem_create(1, sizes.tokens, sizes.heads);
    fill_case(p, find_case("random"), 1);
    printf("threads  state                  sgemm GMAC/s  flash_kda GMAC/s  ratio\n");
    for (int threads = 1; threads <= cpu.units; threads++) {
        sgemm_result sgemm = best_sgemm(threads);
        if (sgemm.rate == 0.0) die("sgemm did not run");
        printf("%s, kernel %s\n", sgemm.config, sgemm.core);
        for (int mode = 0; mode < STATE_MODES; mode++) {
            for (int bf16_state = 0; bf16_state <= (mode == STATE_NONE ? 0 : 1); bf16_state++) {
                double kda = kda_rate(p, kernel, threads, (state_mode)mode, bf16_state);
                printf("%7d  %-16s %-4s  %12.1f  %16.1f  %4.0f%%\n", threads, state_mode_names[mode],
                       mode == STATE_NONE ? ""
                       : bf16_state       ? "bf16"
                                          : "fp32",
                       sgemm.rate, kda, 100.0 * kda / sgemm.rate);
            }
        }
    }
    problem_free(p);
    return 0;
}
