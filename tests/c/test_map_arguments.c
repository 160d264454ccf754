/* Every wrong argument of flash_kda_map() and flash_kda_join() is refused with its sentence, and nothing is
 * written. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "refusals.h"

enum { MATRIX = DIM * DIM };

/* B = 2, T = 5, H = 3; or two sequences of 4 and 6 tokens. */
static call fixed, with_seqlens;
static float *written[2]; /* map and state */
static void *workspace;

static flash_kda_map_params params_of(const flash_kda_fwd_params *f)
{
    const int64_t shape[] = {2, 3, DIM, DIM};
    flash_kda_map_params p = {.struct_size = sizeof p,
                              .device = f->device,
                              .k = f->k,
                              .v = f->v,
                              .g = f->g,
                              .beta = f->beta,
                              .A_log = f->A_log,
                              .dt_bias = f->dt_bias,
                              .initial_state = f->initial_state,
                              .cu_seqlens = f->cu_seqlens,
                              .map = tensor_of(written[0], FLASH_KDA_F32, 4, shape),
                              .state = tensor_of(written[1], FLASH_KDA_F32, 4, shape),
                              .kernel = test.kernel,
                              .lower_bound = f->lower_bound};
    must(flash_kda_map_workspace_size(&p, &p.workspace_size));
    p.workspace = workspace;
    return p;
}

static void expect_unwritten(void)
{
    for (int i = 0; i < 2; i++)
        for (int64_t at = 0; at < 6 * MATRIX; at++)
            if (!CHECK(isnan(written[i][at]), "%s was written", i ? "state" : "map")) return;
}

static void expect(const flash_kda_map_params *p, flash_kda_status want, const char *sentence)
{
    trying("expected: %s", sentence);
    expect_sentence(flash_kda_map(p), want, sentence);
    expect_unwritten();
}

#define EXPECT(c, status, sentence, ...)                                                                     \
    do {                                                                                                     \
        flash_kda_map_params p = params_of(&(c).params);                                                     \
        __VA_ARGS__;                                                                                         \
        expect(&p, FLASH_KDA_##status, sentence);                                                            \
    } while (0)
#define INVALID(sentence, ...) EXPECT(fixed, INVALID_VALUE, sentence, __VA_ARGS__)
#define DTYPE(sentence, ...) EXPECT(fixed, INVALID_DTYPE, sentence, __VA_ARGS__)

static void structs(void)
{
    const size_t whole = sizeof(flash_kda_map_params), wrong[] = {0, 8, whole - 8, whole + 8, SIZE_MAX};
    expect(NULL, FLASH_KDA_INVALID_VALUE, "params is null; it must point to a flash_kda_map_params");
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        INVALID(text("params->struct_size is %zu; it must be sizeof(flash_kda_map_params) = %zu (in older "
                     "headers %zu or more)",
                     wrong[i], whole, whole),
                p.struct_size = wrong[i]);
    size_t bytes;
    const flash_kda_map_params p = params_of(&fixed.params);
    expect_sentence(flash_kda_map_workspace_size(&p, NULL), FLASH_KDA_INVALID_VALUE,
                    "bytes is null; it must point to a size_t");
    CHECK(flash_kda_map_workspace_size(NULL, &bytes) == FLASH_KDA_INVALID_VALUE, "no refusal");
    expect_sentence(flash_kda_map_reference(&p, NULL, NULL), FLASH_KDA_INVALID_VALUE,
                    "map64 and state64 are null; at least one of them must point to doubles");
}

static void tensors(void)
{
    INVALID("k is null; it must point to its 7680 bytes", p.k.data = NULL);
    INVALID("k has 3 dimensions; it must have 4: [B, T, H, K]", p.k.ndim = 3);
    INVALID("k has K = 64; the head size K must be 128", p.k.shape[3] = 64);
    INVALID("k has H = 0; there must be at least 1 head", p.k.shape[2] = 0);
    INVALID("k has B = 0; there must be at least 1 batch row", p.k.shape[0] = 0);
    INVALID("v has V = 64; the head size V must be 128", p.v.shape[3] = 64);
    INVALID("v has HV = 4 heads and k has H = 3; HV must be a multiple of H", p.v.shape[2] = 4);
    INVALID("v has shape [2, 4, 3, 128]; it must be [B, T, HV, V] = [2, 5, 3, 128]", p.v.shape[1] = 4);
    INVALID("g has shape [2, 5, 1, 128]; it must be [B, T, HV, K] = [2, 5, 3, 128]", p.g.shape[2] = 1);
    INVALID("beta has shape [2, 5, 1]; it must be [B, T, HV] = [2, 5, 3]", p.beta.shape[2] = 1);
    INVALID("A_log has shape [4]; it must have HV = 3 elements", p.A_log.shape[0] = 4);
    INVALID("initial_state has shape [1, 3, 128, 128]; it must be [N, HV, V, K] = [2, 3, 128, 128]",
            p.initial_state.shape[0] = 1);
    INVALID("map has shape [2, 2, 128, 128]; it must be [N, HV, K, K] = [2, 3, 128, 128]",
            p.map.shape[1] = 2);
    INVALID("state has shape [1, 3, 128, 128]; it must be [N, HV, V, K] = [2, 3, 128, 128]",
            p.state.shape[0] = 1);
    INVALID("state has 3 dimensions; it must have 4: [N, HV, K, V]", p.state.ndim = 3, p.state_k_first = 1);
    INVALID("map and state are all absent; at least one of them must be given", p.map.data = NULL,
            p.state.data = NULL);
    INVALID("cu_seqlens is given with B = 2; B must be 1, all sequences in one row",
            p.cu_seqlens = with_seqlens.params.cu_seqlens);
    EXPECT(with_seqlens, INVALID_VALUE,
           "map has shape [1, 3, 128, 128]; it must be [N, HV, K, K] = [2, 3, 128, 128], with N from the 3 "
           "entries of cu_seqlens",
           p.map.shape[0] = 1);
    int64_t *const short_seqlens = copied((const int64_t[]){0, 4, 9}, 3);
    EXPECT(with_seqlens, INVALID_VALUE, "cu_seqlens ends with 9; its last entry must be T = 10",
           p.cu_seqlens.data = short_seqlens);
    free(short_seqlens);
    DTYPE("k has dtype float32; it must be bfloat16", p.k.dtype = FLASH_KDA_F32);
    DTYPE("initial_state has dtype float64; it must be float32 or bfloat16",
          p.initial_state.dtype = FLASH_KDA_F64);
    DTYPE("map has dtype bfloat16; it must be float32", p.map.dtype = FLASH_KDA_BF16);
    DTYPE("state has dtype bfloat16; it must be float32", p.state.dtype = FLASH_KDA_BF16);
}

static void layouts(void)
{
    const char *aligned = "%s is at address %p; it must be aligned to %d bytes";
    INVALID("map has strides [49152, 16384, 1, 128]; all but its first dimension must be contiguous, with "
            "strides [16384, 128, 1]",
            p.map.stride[2] = 1, p.map.stride[3] = 128);
    INVALID("state has stride 0 in dimension 0; its elements must not share memory, so it must be at least 1",
            p.state.stride[0] = 0);
    INVALID(text(aligned, "map", (char *)written[0] + 4, 16), p.map.data = (char *)p.map.data + 4);
    INVALID(text(aligned, "workspace", (char *)workspace + 4, 64), p.workspace = (char *)p.workspace + 4);
    INVALID("state overlaps map; it must have memory of its own", p.state.data = p.map.data);
    INVALID("map overlaps initial_state; it must have memory of its own", p.map.data = p.initial_state.data);
    INVALID("workspace overlaps state; it must have memory of its own", p.workspace = p.state.data);
    const size_t needed = params_of(&fixed.params).workspace_size;
    INVALID(text("workspace_size is %zu bytes; this call needs %zu", needed - 1, needed), p.workspace_size--);
    INVALID(text("workspace is null; it must point to %zu bytes", needed), p.workspace = NULL);
}

/* "cpu, cpu-avx2, ..." */
static const char *kernel_names(void)
{
    static char names[200];
    flash_kda_kernel_info infos[16];
    int32_t count;
    for (int i = 0; i < 16; i++) infos[i].struct_size = sizeof *infos;
    must(flash_kda_list_kernels(infos, 16, &count));
    for (int i = 0, used = 0; i < count; i++)
        if (infos[i].device_type == FLASH_KDA_CPU)
            used +=
                snprintf(names + used, sizeof names - (size_t)used, "%s%s", used ? ", " : "", infos[i].name);
    return names;
}

static void options(void)
{
    INVALID("lower_bound is -6; it must be in [-5, 0]", p.lower_bound = -6.0f);
    INVALID("gate is 3; it must be a flash_kda_gate, in [0, 2]", p.gate = 3);
    INVALID("beta_kind is -1; it must be a flash_kda_beta, in [0, 2]", p.beta_kind = -1);
    INVALID("qk_is_normalised is 2; it must be 0 or 1", p.qk_is_normalised = 2);
    INVALID("state_k_first is -1; it must be 0 or 1", p.state_k_first = -1);
    INVALID("cpu_threads is -1; it must be 0 (all) or more", p.cpu_threads = -1);
    INVALID(text("interrupt is at address %p; it must be aligned to 4 bytes", (const void *)unaligned_word()),
            p.interrupt = unaligned_word());
    INVALID("A_log is absent; it must be given with the gate FLASH_KDA_GATE_SOFTPLUS",
            p.gate = FLASH_KDA_GATE_SOFTPLUS, p.A_log.data = NULL);
    INVALID(
        "dt_bias is given with the gate FLASH_KDA_GATE_ACTIVATED, for which g is the log decay itself; it "
        "must be absent",
        p.gate = FLASH_KDA_GATE_ACTIVATED, p.A_log.data = NULL);
    INVALID("device type is 7; it must be FLASH_KDA_CPU or FLASH_KDA_CUDA", p.device.type = 7);
    CHECK(params_of(&fixed.params).workspace_size > 0, "a call needs no workspace");
    INVALID(text("kernel is \"%s\"; it must be NULL or one of %s", "none", kernel_names()),
            p.kernel = "none");
    flash_kda_map_params p = params_of(&fixed.params);
    p.device.type = FLASH_KDA_CUDA;
    double map64[1];
    expect_sentence(flash_kda_map_reference(&p, map64, NULL), FLASH_KDA_INVALID_VALUE,
                    "device is not the CPU; the reference takes tensors in CPU memory");
}

/* ---- flash_kda_join() ---------------------------------------------------------------------------------- */

static float *pieces, *joined; /* maps, then states; entering and final_state */

static flash_kda_join_params join_params(void)
{
    const int64_t shape[] = {2, 1, DIM, DIM}, one[] = {1, 1, DIM, DIM};
    return (flash_kda_join_params){.struct_size = sizeof(flash_kda_join_params),
                                   .device = test.device,
                                   .maps = tensor_of(pieces, FLASH_KDA_F32, 4, shape),
                                   .states = tensor_of(pieces + 2 * MATRIX, FLASH_KDA_F32, 4, shape),
                                   .initial_state = tensor_of(pieces, FLASH_KDA_F32, 4, one),
                                   .entering = tensor_of(joined, FLASH_KDA_F32, 4, shape),
                                   .final_state = tensor_of(joined + 2 * MATRIX, FLASH_KDA_F32, 4, one),
                                   .kernel = test.kernel};
}

static void expect_join(const flash_kda_join_params *p, flash_kda_status want, const char *sentence)
{
    trying("expected: %s", sentence);
    expect_sentence(flash_kda_join(p), want, sentence);
    for (int64_t at = 0; at < 3 * MATRIX; at++)
        if (!CHECK(isnan(joined[at]), "entering or final_state was written")) return;
}

#define JOIN(status, sentence, ...)                                                                          \
    do {                                                                                                     \
        flash_kda_join_params p = join_params();                                                             \
        __VA_ARGS__;                                                                                         \
        expect_join(&p, FLASH_KDA_##status, sentence);                                                       \
    } while (0)

static void joins(void)
{
    const size_t whole = sizeof(flash_kda_join_params);
    expect_join(NULL, FLASH_KDA_INVALID_VALUE, "params is null; it must point to a flash_kda_join_params");
    JOIN(INVALID_VALUE,
         text("params->struct_size is %zu; it must be sizeof(flash_kda_join_params) = %zu (in older headers "
              "%zu or more)",
              whole + 8, whole, whole),
         p.struct_size += 8);
    JOIN(INVALID_VALUE, "maps has 3 dimensions; it must have 4: [P, HV, K, K]", p.maps.ndim = 3);
    JOIN(INVALID_VALUE, "maps has P = 0; there must be at least 1 piece", p.maps.shape[0] = 0);
    JOIN(INVALID_VALUE, "maps has HV = 0; there must be at least 1 head", p.maps.shape[1] = 0);
    JOIN(INVALID_VALUE, "maps has shape [2, 1, 64, 128]; it must be [P, HV, K, K] = [2, 1, 128, 128]",
         p.maps.shape[2] = 64);
    JOIN(INVALID_VALUE, "states has shape [3, 1, 128, 128]; it must be [P, HV, V, K] = [2, 1, 128, 128]",
         p.states.shape[0] = 3);
    JOIN(INVALID_VALUE,
         "initial_state has shape [2, 1, 128, 128]; it must be [1, HV, K, V] = [1, 1, 128, 128]",
         p.initial_state.shape[0] = 2, p.state_k_first = 1);
    JOIN(INVALID_VALUE, "entering has shape [2, 2, 128, 128]; it must be [P, HV, V, K] = [2, 1, 128, 128]",
         p.entering.shape[1] = 2);
    JOIN(INVALID_VALUE, "final_state has 2 dimensions; it must have 4: [1, HV, V, K]",
         p.final_state.ndim = 2);
    JOIN(INVALID_VALUE, "entering and final_state are all absent; at least one of them must be given",
         p.entering.data = p.final_state.data = NULL);
    JOIN(INVALID_VALUE, "maps is null; it must point to its 131072 bytes", p.maps.data = NULL);
    JOIN(INVALID_DTYPE, "maps has dtype bfloat16; it must be float32", p.maps.dtype = FLASH_KDA_BF16);
    JOIN(INVALID_DTYPE, "initial_state has dtype float16; it must be float32 or bfloat16",
         p.initial_state.dtype = FLASH_KDA_F16);
    JOIN(INVALID_VALUE, "final_state overlaps entering; it must have memory of its own",
         p.final_state.data = p.entering.data);
    JOIN(INVALID_VALUE, "entering overlaps maps; it must have memory of its own",
         p.entering.data = p.maps.data, p.final_state.data = NULL);
    JOIN(INVALID_VALUE, "backwards is 2; it must be 0 or 1", p.backwards = 2);
    JOIN(INVALID_VALUE, "state_k_first is -1; it must be 0 or 1", p.state_k_first = -1);
    JOIN(INVALID_VALUE, "cpu_threads is -3; it must be 0 (all) or more", p.cpu_threads = -3);
    JOIN(INVALID_VALUE, "reserved is 1; it must be 0", p.reserved = 1);
    JOIN(INVALID_VALUE, text("kernel is \"%s\"; it must be NULL or one of %s", "none", kernel_names()),
         p.kernel = "none");
    flash_kda_join_params p = join_params();
    p.backwards = 7;
    expect_sentence(flash_kda_check_join(&p), FLASH_KDA_INVALID_VALUE, "backwards is 7; it must be 0 or 1");
    p.backwards = 1;
    p.maps.data = NULL; /* of which a check of shapes alone knows nothing */
    CHECK(flash_kda_check_join(&p) == FLASH_KDA_OK, "%s", flash_kda_last_error());
}

static float *nan_matrices(int64_t count)
{
    float *x = allocate((size_t)(count * MATRIX), sizeof *x);
    memset(x, 0xff, (size_t)(count * MATRIX) * sizeof *x);
    return x;
}

static void everything(void)
{
    static const int64_t lengths[] = {4, 6};
    problem *equal = problem_create(2, 5, 3), *ragged = problem_create_ragged(lengths, 2, 3);
    must(call_open(&fixed, equal, options_of(STATE_IN, false)));
    must(call_open(&with_seqlens, ragged, options_of(STATE_IN, false)));
    for (int i = 0; i < 2; i++) written[i] = nan_matrices(6);
    workspace = aligned_alloc(64, (size_t)1 << 25);
    pieces = allocate(4 * MATRIX, sizeof *pieces);
    joined = nan_matrices(3);
    structs();
    tensors();
    layouts();
    options();
    joins();
    CHECK(call_untouched(&fixed) && call_untouched(&with_seqlens), "an input was written");
    call_close(&fixed);
    call_close(&with_seqlens);
    problem_free(equal);
    problem_free(ragged);
    for (int i = 0; i < 2; i++) free(written[i]);
    free(workspace);
    free(pieces);
    free(joined);
}

int main(int argc, char **argv)
{
    static const group all[] = {{"refusals", everything}};
    harness_start(argc, argv);
    return harness_run(all, 1);
}
