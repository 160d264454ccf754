/* decode_layer against its definition in fp64: calls with any option, tensors that lie in memory in any way
 * the library takes, and every byte that no call may write. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "layer_call.h"

enum { QUICK_CALLS = 40, CALLS_OF_VARIANTS = 150, CALLS = 600 };
static const uint64_t FIRST_SEED = 20261130ull * 1000003;

/* Calls with any option. */
static void drawn(void)
{
    const bool is_variant = strncmp(test.kernel, "cpu-", 4) == 0; /* The kernel "cpu" has all draws. */
    const int most = test.quick ? QUICK_CALLS : is_variant ? CALLS_OF_VARIANTS : CALLS;
    const uint64_t calls = number_from("FLASH_KDA_TEST_PROBLEMS", (uint64_t)most),
                   first = number_from("FLASH_KDA_TEST_SEED", FIRST_SEED);
    for (uint64_t seed = first; seed < first + calls; seed++) {
        rng r = rng_seed(seed);
        layer_call *c = layer_draw(&r, layer_any_sizes(&r));
        trying("seed %llu: %s", (unsigned long long)seed, c->text);
        layer_run_and_check(c);
        layer_free(c);
    }
}

/* A call with T tokens and T calls with one token give the same bits. */
static void one_by_one(void)
{
    for (int i = 0; i < (test.quick ? 6 : 40); i++) {
        rng r = rng_seed(77 + (uint64_t)i);
        layer_sizes sizes = {.sequences = 1 + (int64_t)(rng_bits(&r) % 3),
                             .heads = 1 + (int64_t)(rng_bits(&r) % 2),
                             .tokens = 2 + (int64_t)(rng_bits(&r) % 5),
                             .write = FLASH_KDA_WRITE_LAST};
        layer_call *c = layer_draw(&r, sizes);
        trying("call %d: %s", i, c->text);
        layer_check_one_by_one(c);
        layer_free(c);
    }
}

/* Indices that may be anything. */
static void wild_indices(void)
{
    if (test.device.type != FLASH_KDA_CUDA) return;
    for (int i = 0; i < (test.quick ? 20 : 200); i++) {
        rng r = rng_seed(123 + (uint64_t)i);
        layer_call *c = layer_draw(&r, layer_any_sizes(&r));
        trying("call %d: %s", i, c->text);
        layer_check_wild(&r, c);
        layer_free(c);
    }
}

/* The number of threads changes no bit. */
static void threads(void)
{
    if (test.device.type != FLASH_KDA_CPU) return;
    rng r = rng_seed(5);
    layer_sizes sizes = {.sequences = 3, .heads = 5, .tokens = 2, .write = FLASH_KDA_WRITE_LAST};
    layer_call *c = layer_draw(&r, sizes);
    trying("%s", c->text);
    for (int count = 2; count <= 7; count++) layer_check_threads(c, count);
    layer_free(c);
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"drawn", drawn}, {"one-by-one", one_by_one}, {"threads", threads}, {"wild-indices", wild_indices}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
