/* The tests' own tools. A comparison that lets NaN pass, or a guard band that sees nothing, would make every
 * other test worthless. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "nearest.h"
#include "non_finite.h"
#include "recorded.h"
#include "safetensors.h"

static void comparison(void)
{
    const double truth[] = {1.0, -2.0, 2.0}, zeros[] = {0.0, 0.0, 0.0};
    float got[] = {1.0f, -2.0f, 2.0f};
    CHECK(relative_rms(truth, got, FLASH_KDA_F32, 3) == 0.0, "equal numbers differ");
    got[0] = 1.3f;
    CHECK(fabs(relative_rms(truth, got, FLASH_KDA_F32, 3) - 0.1) < 1e-7, "an error of 0.3 in 3");
    got[1] = NAN;
    CHECK(isinf(relative_rms(truth, got, FLASH_KDA_F32, 3)), "NaN passes");
    got[1] = INFINITY;
    CHECK(isinf(relative_rms(truth, got, FLASH_KDA_F32, 3)), "infinity passes");
    memset(got, 0, sizeof got);
    CHECK(relative_rms(zeros, got, FLASH_KDA_F32, 3) == 0.0, "zeros differ from zeros");
    got[2] = 1e-30f;
    CHECK(isinf(relative_rms(zeros, got, FLASH_KDA_F32, 3)), "1e-30 passes for 0");
    uint16_t rounded[] = {0x3f80, 0xc000, 0x7fc0};
    CHECK(isinf(relative_rms(truth, rounded, FLASH_KDA_BF16, 3)), "a bf16 NaN passes");
    rounded[2] = 0x4000;
    CHECK(relative_rms(truth, rounded, FLASH_KDA_BF16, 3) == 0.0, "equal bf16 numbers differ");
}

static void rounding(void)
{
    CHECK(bf16_from_float(1.0f) == 0x3f80, "1");
    CHECK(bf16_from_float(1.00390625f) == 0x3f80, "halfway to the even one below");
    CHECK(bf16_from_float(1.01171875f) == 0x3f82, "halfway to the even one above");
    CHECK(bf16_from_float(3.4e38f) == 0x7f80, "past the largest");
    CHECK(isnan(float_from_bf16(bf16_from_float(NAN))), "NaN");
    CHECK(isnan(float_from_bf16(0xffff)), "the poison is NaN in bf16");
    for (uint32_t bits = 0; bits < 0x10000; bits++)
        if ((bits & 0x7f80) != 0x7f80 && bf16_from_float(float_from_bf16((uint16_t)bits)) != bits)
            CHECK(false, "bf16 %04x changes", bits);
}

/* A write just outside a buffer must be found, on either side of each written buffer. */
static void guards(void)
{
#if defined(__SANITIZE_ADDRESS__)
    return; /* the sanitizer's red zones take the place of the bands */
#endif
    problem *p = problem_create(1, 3, 2);
    fill_case(p, find_case("random"), 1);
    for (int where = 0; where < 5; where++) {
        call c;
        must(call_open(&c, p, options_of(STATE_BOTH, false)));
        char *out = c.params.out.data, *state = c.params.final_state.data, *q = c.params.q.data;
        char *const target[] = {out - 1, out + 3 * 2 * DIM * 2, state - 1, state + 2 * DIM * DIM * 4, q + 5};
        const char *const names[] = {"out", "out", "final_state", "final_state", "q"};
        const char byte = 0x11;
        CHECK(!call_damage(&c, p), "damage before anything was written");
        CHECK(call_untouched(&c), "outputs are not poisoned");
        must(flash_kda_copy(test.device, target[where], (flash_kda_device){FLASH_KDA_CPU, 0}, &byte, 1));
        const char *damaged = call_damage(&c, p);
        CHECK(damaged && strcmp(damaged, names[where]) == 0, "the write near %s was not seen", names[where]);
        must(flash_kda_copy(test.device, out, (flash_kda_device){FLASH_KDA_CPU, 0}, &byte, 1));
        CHECK(!call_untouched(&c), "a write to out was not seen");
        call_close(&c);
    }
    problem_free(p);
}

/* Whether a call may write a byte, which is `at` bytes after the start of a buffer. */
static bool may_be_written(const call *c, int number, int64_t at)
{
    static const int outputs[] = {ARG_OUT, ARG_FINAL_STATE, ARG_CHECKPOINT_STATES};
    static const int64_t written[][2] = {{0}, {3}, {0, 4}}, /* batch rows, slots, rows of spread_problem() */
        counts[] = {1, 1, 2};
    for (int o = 0; o < 3; o++) {
        const tensor_place *place = &c->places[outputs[o]];
        const flash_kda_tensor *t = &place->view;
        const int64_t size = (int64_t)dtype_size(t->dtype),
                      elements = t->shape[1] * t->shape[2] * t->shape[3];
        for (int64_t i = 0; place->buffer == number && i < counts[o] * elements; i++) {
            const int64_t first = written[o][i / elements], j = i % elements / (t->shape[2] * t->shape[3]),
                          k = i / t->shape[3] % t->shape[2], l = i % t->shape[3];
            const int64_t element = (int64_t)place->offset + size * (first * t->stride[0] + j * t->stride[1] +
                                                                     k * t->stride[2] + l * t->stride[3]);
            if (at >= element && at < element + size) return true;
        }
    }
    return false;
}

/* Two sequences, of which the first has no slot and ends in no memory, and checkpoints in rows 0 and 4. */
static problem *spread_problem(void)
{
    static const int64_t lengths[] = {17, 33}, offsets[] = {16, 32}, rows[] = {4, 0};
    problem *p = problem_create_ragged(lengths, 2, 1);
    fill_case(p, find_case("random"), 1);
    problem_make_pool(p, 4);
    p->first_slot = 1;
    p->state_indices[0] = 0;
    p->state_indices[1] = 3;
    p->checkpoint_rows = 5;
    p->checkpoint_offsets = allocate(2, sizeof *p->checkpoint_offsets);
    p->checkpoint_indices = allocate(2, sizeof *p->checkpoint_indices);
    for (int i = 0; i < 2; i++) p->checkpoint_offsets[i] = offsets[i], p->checkpoint_indices[i] = rows[i];
    return p;
}

/* Changes a byte anywhere in a buffer, and back again. */
static void change_byte(const call *c, const problem *p, int number, rng *r)
{
    const flash_kda_device cpu = {FLASH_KDA_CPU, 0};
    const int64_t at = (int64_t)(rng_bits(r) % c->buffers[number].bytes);
    char *const byte = (char *)call_buffer(c, number) + at;
    char before, changed;
    must(flash_kda_copy(cpu, &before, test.device, byte, 1));
    changed = (char)(before ^ 0x11);
    must(flash_kda_copy(test.device, byte, cpu, &changed, 1));
    const bool damaged = call_damage(c, p), allowed = may_be_written(c, number, at);
    CHECK(damaged != allowed, "buffer %d: byte %lld %s", number, (long long)at,
          allowed ? "may be written" : "was written, and it was not seen");
    CHECK(!call_untouched(c), "buffer %d: a change of byte %lld was not seen", number, (long long)at);
    must(flash_kda_copy(test.device, byte, cpu, &before, 1));
}

/* A write to a gap, a slot or a row that is not the call's must be found, wherever it is, and no other. */
static void gaps(void)
{
    static const layout layouts[] = {LAYOUT_PADDED, LAYOUT_HEAD_MAJOR, LAYOUT_FUSED, LAYOUT_REVERSED};
    rng r = rng_seed(1);
    problem *p = spread_problem();
    for (int l = 0; l < 4; l++) {
        call c;
        call_options options = options_of(l % 2 ? STATE_BOTH : STATE_IN_PLACE, l == 2);
        options.for_reference = true;
        options.slot_gap = options.final_gap = options.row_gap = 3;
        options.k_first = l % 2;
        for (int a = 0; a < STRIDED_ARGS; a++) options.layouts[a] = layouts[l];
        must(call_open(&c, p, options));
        trying("layout %d", (int)layouts[l]);
        for (int a = 0; a < ARGS; a++)
            for (int i = 0; c.places[a].view.ndim && i < 30; i++) change_byte(&c, p, c.places[a].buffer, &r);
        CHECK(call_untouched(&c) && !call_damage(&c, p), "something has changed");
        call_close(&c);
    }
    problem_free(p);
}

/* What is written to a tensor is read from it, whatever its layout is. */
static void layouts(void)
{
    problem *p = problem_create(2, 3, 2);
    fill_case(p, find_case("random"), 1);
    for (int l = 0; l < LAYOUTS; l++) {
        call c;
        call_options options = options_of(STATE_BOTH, false);
        options.for_reference = options.k_first = true;
        for (int a = 0; a < STRIDED_ARGS; a++) options.layouts[a] = (layout)l;
        must(call_open(&c, p, options));
        void *v = call_read(&c, ARG_V), *initial = call_read(&c, ARG_INITIAL_STATE);
        CHECK(memcmp(v, p->v, (size_t)c.rows * DIM * 2) == 0, "layout %d: v is not the problem's", l);
        CHECK(memcmp(initial, p->initial_state, (size_t)c.states * DIM * DIM * 4) == 0,
              "layout %d: initial_state is not the problem's", l);
        call_write(&c, ARG_OUT, p->g);
        call_write_slot(&c, ARG_FINAL_STATE, 1, p->initial_state);
        uint16_t *out = call_read_out(&c);
        float *final = call_read_state(&c);
        CHECK(memcmp(out, p->g, (size_t)c.rows * DIM * 2) == 0, "layout %d: out was not written", l);
        CHECK(memcmp(final + 2 * DIM * DIM, p->initial_state, sizeof(float) * 2 * DIM * DIM) == 0,
              "layout %d: slot 1 was not written", l);
        CHECK(!call_damage(&c, p), "layout %d: something else was written", l);
        free(v);
        free(initial);
        free(out);
        free(final);
        call_close(&c);
    }
    problem_free(p);
}

static void random_numbers(void)
{
    rng r = rng_seed(1);
    double sum = 0, squares = 0;
    const int count = 100000;
    for (int i = 0; i < count; i++) {
        double x = rng_normal(&r);
        sum += x;
        squares += x * x;
    }
    CHECK(fabs(sum / count) < 0.02, "mean %g", sum / count);
    CHECK(fabs(squares / count - 1) < 0.03, "variance %g", squares / count);
    rng known = rng_seed(0);
    CHECK(rng_bits(&known) == 0xe220a8397b1dcdafu, "not splitmix64");
}

static void write_file(const char *path, const char *header, const void *data, size_t bytes)
{
    FILE *file = fopen(path, "wb");
    if (!file) die("%s can't be written", path);
    uint64_t length = strlen(header);
    for (int i = 0; i < 8; i++) fputc((int)(length >> 8 * i & 0xff), file);
    fwrite(header, 1, (size_t)length, file);
    fwrite(data, 1, bytes, file);
    fclose(file);
}

static void files(void)
{
    char why[256];
    const float numbers[] = {1, 2, 3, 4, 5, 6};
    const char *path = "test_support.safetensors";
    write_file(
        path,
        "{\"__metadata__\":{\"a\":\"b\"},\"x\":{\"dtype\":\"F32\",\"shape\":[2, 2],\"data_offsets\":[8,24]},"
        "\"past\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[20,28]},"
        "\"wrong\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}",
        numbers, sizeof numbers);
    safetensors *file = safetensors_open(path, why);
    if (!CHECK(file, "%s", why)) return;
    flash_kda_tensor x = safetensors_get(file, "x", why);
    CHECK(x.data && x.ndim == 2 && x.dtype == FLASH_KDA_F32 && x.shape[0] == 2 && x.shape[1] == 2, "x");
    CHECK(x.data && memcmp(x.data, numbers + 2, 16) == 0, "x has other numbers");
    CHECK(!safetensors_get(file, "past", why).data && strstr(why, "past has data_offsets [20,28]; they must"),
          "%s", why);
    CHECK(!safetensors_get(file, "wrong", why).data &&
              strstr(why, "[0,8], 8 bytes; its shape [3] of F32 has 12"),
          "%s", why);
    CHECK(!safetensors_get(file, "none", why).data && strcmp(why, "none is missing in the file") == 0, "%s",
          why);
    CHECK(!safetensors_get(file, "wrnog", why).data &&
              strstr(why, "missing in the file, did you mean wrong?"),
          "%s", why);
    CHECK(!safetensors_get(file, "dtype", why).data && strstr(why, "dtype is missing"), "%s", why);
    CHECK(!safetensors_get(file, "a", why).data && strstr(why, "a is missing"), "%s", why);
    safetensors_close(file);
    CHECK(!recorded_load(path, why) && strstr(why, "q is missing"), "%s", why);
    /* Each sentence names what is wrong: sizes whose product leaves 64 bits, offsets far beyond the file,
     * sizes that no data bounds, and what is no list of numbers. */
    static const struct {
        const char *entry, *sentence;
    } hostile[] = {
        {"\"BF16\",\"shape\":[1099511627776,1099511627776,4,128],\"data_offsets\":[0,0]",
         "q has shape [1099511627776,1099511627776,4,128], which is more than any memory has"},
        {"\"BF16\",\"shape\":[4611686018427387904,4611686018427387904,4,128],\"data_offsets\":[0,0]",
         "which is more than any memory has"},
        {"\"BF16\",\"shape\":[99999999999999999999,1,1,128],\"data_offsets\":[0,0]",
         "q has shape [99999999999999999999,1,1,128]; it must be a list of at most 4 whole numbers"},
        {"\"BF16\",\"shape\":[1,1,1,128],\"data_offsets\":[4611686018427387904,4611686018427388160]",
         "q has data_offsets [4611686018427387904,4611686018427388160]; they must be a begin and an end in "
         "[0, 24]"},
        {"\"BF16\",\"shape\":[1099511627776,0,1073741824,128],\"data_offsets\":[0,0]",
         "which is more than any memory has"},
        {"\"BF16\",\"shape\":[1048576,0,1048576,128],\"data_offsets\":[0,0]",
         "q has shape [1048576, 0, 1048576, 128]; it must be [B, T, H, 128], and not empty"},
        {"\"BF16\",\"shape\":[2, 2.5],\"data_offsets\":[0,24]", "q has shape [2, 2.5]; it must be a list"},
        {"\"BF16\",\"shape\":[12],\"data_offsets\":[24,0]", "q has data_offsets [24,0]; they must be"},
        {"\"BF16\",\"shape\":[12],\"data_offsets\":[0]", "q has data_offsets [0]; they must be"},
        {"\"BF16\",\"shape\":[12],\"data_offsets\":[0,24]", "q has shape [12]; it must be [B, T, H, 128]"},
        {"\"F8_E4M3\",\"shape\":[24],\"data_offsets\":[0,24]",
         "q has dtype \"F8_E4M3\"; it must be BF16, F16, F32, F64, I32 or I64"},
        {"\"BF16\",\"shape\":[12]},\"k\":{\"dtype\":\"BF16\",\"shape\":[12],\"data_offsets\":[0,24]",
         "q must have a dtype, a shape and data_offsets"},
    };
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        char header[256];
        snprintf(header, sizeof header, "{\"q\":{\"dtype\":%s}}", hostile[i].entry);
        write_file(path, header, numbers, sizeof numbers);
        CHECK(!recorded_load(path, why) && strstr(why, hostile[i].sentence), "%s: %s", hostile[i].entry, why);
    }
    CHECK(!safetensors_open("no/such/file", why) && strstr(why, "can't be opened: No such file"), "%s", why);
    CHECK(!safetensors_open(FLASH_KDA_DATA, why) && strstr(why, "can't be read: Is a directory"), "%s", why);
    CHECK(!safetensors_open(FLASH_KDA_DATA "/README.md", why) && strstr(why, "not a safetensors"), "%s", why);
    remove(path);
}

static void names(void)
{
    static const char *const kernels[] = {"cpu", "cpu-avx512", "cpu-avx2", "hopper", "portable"};
    static const struct {
        const char *wrong, *nearest;
    } rows[] = {
        {"hoper", "hopper"},
        {"Hopper", "hopper"},
        {"cpu-avx51", "cpu-avx512"},
        {"protable", "portable"},
        {"cup", "cpu"},
        {"xyz", NULL},
        {"", NULL},
        {"flash", NULL},
    };
    char hint[HINT_BYTES];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const char *found = nearest_name(rows[i].wrong, kernels, 5);
        CHECK(found == rows[i].nearest || (found && rows[i].nearest && strcmp(found, rows[i].nearest) == 0),
              "%s is near %s", rows[i].wrong, found ? found : "nothing");
    }
    CHECK(strcmp(nearest_hint("hoper", kernels, 5, hint), ", did you mean hopper?") == 0, "%s", hint);
    CHECK(!*nearest_hint("xyz", kernels, 5, hint), "%s", hint);
}

static void not_finite(void)
{
    problem *p = problem_create(1, 3, 2);
    fill_case(p, find_case("random"), 1);
    non_finite found[NON_FINITE_TENSORS];
    CHECK(find_non_finite(p, found) == 0, "finite numbers count");
    p->g[(2 * 2 + 1) * DIM + 5] = 0x7fc0;
    p->g[(2 * 2 + 1) * DIM + 6] = 0xff80;
    p->A_log[1] = INFINITY;
    if (CHECK(find_non_finite(p, found) == 2, "two tensors have such numbers")) {
        CHECK(strcmp(found[0].name, "g") == 0 && found[0].count == 2 &&
                  strcmp(found[0].first, "[0, 2, 1, 5]") == 0,
              "%s: %lld from %s on", found[0].name, (long long)found[0].count, found[0].first);
        CHECK(strcmp(found[1].name, "A_log") == 0 && found[1].count == 1 &&
                  strcmp(found[1].first, "[1]") == 0,
              "%s: %lld from %s on", found[1].name, (long long)found[1].count, found[1].first);
    }
    problem_free(p);
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"comparison", comparison}, {"rounding", rounding},
        {"guards", guards},         {"gaps", gaps},
        {"layouts", layouts},       {"random-numbers", random_numbers},
        {"files", files},           {"names", names},
        {"not-finite", not_finite},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
