/* Every wrong argument is refused with its sentence, and nothing is written. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "refusals.h"

/* B = 2, T = 5, H = 3; or two sequences of 4 and 6 tokens. */
static problem *fixed_problem, *ragged_problem;
static call fixed, with_seqlens;

#define INVALID(sentence, ...) REFUSED(fixed, INVALID_VALUE, sentence, __VA_ARGS__)
#define DTYPE(sentence, ...) REFUSED(fixed, INVALID_DTYPE, sentence, __VA_ARGS__)
#define SEQLENS(sentence, ...) REFUSED(with_seqlens, INVALID_VALUE, sentence, __VA_ARGS__)

/* The least struct_size, of the oldest header: everything before the workspace. */
static const size_t OLDEST = offsetof(flash_kda_fwd_params, workspace);

static void structs(void)
{
    expect_refusal(&fixed, NULL, FLASH_KDA_INVALID_VALUE,
                   "params is null; it must point to a flash_kda_fwd_params");
    const char *size =
        "params->struct_size is %zu; it must be sizeof(flash_kda_fwd_params) = %zu (in older headers "
        "%zu or more)";
    const size_t wrong[] = {0, 8, OLDEST - 8, OLDEST + 4, sizeof(flash_kda_fwd_params) + 8, SIZE_MAX};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        INVALID(text(size, wrong[i], sizeof p, OLDEST), p.struct_size = wrong[i]);
    size_t bytes;
    CHECK(flash_kda_fwd_workspace_size(&fixed.params, NULL) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(flash_kda_fwd_workspace_size(NULL, &bytes) == FLASH_KDA_INVALID_VALUE, "no refusal");
}

static void null_pointers(void)
{
    INVALID("q is null; it must point to its 7680 bytes", p.q.data = NULL);
    INVALID("k is null; it must point to its 7680 bytes", p.k.data = NULL);
    INVALID("v is null; it must point to its 7680 bytes", p.v.data = NULL);
    INVALID("g is null; it must point to its 7680 bytes", p.g.data = NULL);
    INVALID("beta is null; it must point to its 60 bytes", p.beta.data = NULL);
    INVALID("out is null; it must point to its 7680 bytes", p.out.data = NULL);
}

static void sizes(void)
{
    INVALID("q has 3 dimensions; it must have 4: [B, T, H, K]", p.q.ndim = 3);
    INVALID("beta has 4 dimensions; it must have 3: [B, T, HV]", p.beta.ndim = 4);
    INVALID("A_log has shape []; it must have HV = 3 elements", p.A_log.ndim = 0);
    INVALID("out has 1000 dimensions; it must have 4: [B, T, HV, V]", p.out.ndim = 1000);
    INVALID("dt_bias has -1 dimensions; it must have 0 to 4", p.dt_bias.ndim = -1);
    INVALID("q has size -1 in dimension 0; sizes must not be negative", p.q.shape[0] = -1);
    INVALID("q has size -5 in dimension 1; sizes must not be negative", p.q.shape[1] = -5);
    INVALID("v has size -128 in dimension 3; sizes must not be negative", p.v.shape[3] = -128);
    INVALID("g has size -3 in dimension 2; sizes must not be negative", p.g.shape[2] = -3);
    INVALID("final_state has size -2 in dimension 0; sizes must not be negative",
            p.final_state.shape[0] = -2);
    INVALID("q has B = 0; there must be at least 1 batch row", p.q.shape[0] = 0);
    INVALID("q has H = 0; there must be at least 1 head", p.q.shape[2] = 0);
    INVALID("q has K = 64; the head size K must be 128", p.q.shape[3] = 64);
    INVALID("q has K = 256; the head size K must be 128", p.q.shape[3] = 256);
    INVALID("v has V = 64; the head size V must be 128", p.v.shape[3] = 64);
    INVALID("v has V = 0; the head size V must be 128", p.v.shape[3] = 0);
    INVALID("k has shape [2, 4, 3, 128]; it must be [B, T, H, K] = [2, 5, 3, 128]", p.k.shape[1] = 4);
    INVALID("k has shape [2, 5, 1, 128]; it must be [B, T, H, K] = [2, 5, 3, 128]", p.k.shape[2] = 1);
    INVALID("v has HV = 4 heads and q has H = 3; HV must be a multiple of H", p.v.shape[2] = 4);
    INVALID("v has HV = 0 heads and q has H = 3; HV must be a multiple of H", p.v.shape[2] = 0);
    INVALID("v has HV = 3 heads and q has H = 6; HV must be a multiple of H", p.q.shape[2] = 6);
    INVALID("v has shape [2, 4, 3, 128]; it must be [B, T, HV, V] = [2, 5, 3, 128]", p.v.shape[1] = 4);
    INVALID("g has shape [2, 5, 3, 128]; it must be [B, T, HV, K] = [2, 5, 6, 128]", p.v.shape[2] = 6);
    INVALID("g has shape [1, 5, 3, 128]; it must be [B, T, HV, K] = [2, 5, 3, 128]", p.g.shape[0] = 1);
    INVALID("beta has shape [2, 5, 1]; it must be [B, T, HV] = [2, 5, 3]", p.beta.shape[2] = 1);
    INVALID("out has shape [2, 6, 3, 128]; it must be [B, T, HV, V] = [2, 5, 3, 128]", p.out.shape[1] = 6);
    INVALID("A_log has shape [2]; it must have HV = 3 elements", p.A_log.shape[0] = 2);
    INVALID("dt_bias has shape [3, 64]; it must have HV * K = 384 elements", p.dt_bias.shape[1] = 64);
    INVALID("initial_state has shape [1, 3, 128, 128]; it must be [N, HV, V, K] = [2, 3, 128, 128]",
            p.initial_state.shape[0] = 1);
    INVALID("final_state has shape [2, 3, 64, 128]; it must be [N, HV, V, K] = [2, 3, 128, 128]",
            p.final_state.shape[2] = 64);
    INVALID("initial_state has 3 dimensions; it must have 4: [N, HV, V, K]", p.initial_state.ndim = 3);
    SEQLENS("initial_state has shape [1, 3, 128, 128]; it must be [N, HV, V, K] = [2, 3, 128, 128], with N "
            "from the 3 entries of cu_seqlens",
            p.initial_state.shape[0] = 1);
    SEQLENS(
        "final_state has shape [2, 3, 128, 128]; it must be [N, HV, V, K] = [1, 3, 128, 128], with N from "
        "the 2 entries of cu_seqlens",
        p.cu_seqlens.shape[0] = 2, p.initial_state.shape[0] = 1);
}

static void overflowing_sizes(void)
{
    const long long huge = 1LL << 62;
    const char *many = "q has B * T = %lld * %lld tokens and v has HV = %lld heads; there must be at most "
                       "2147482623 tokens, and a tensor must fit in memory";
#define TOKENS(b, t, h)                                                                                      \
    INVALID(text(many, (long long)(b), (long long)(t), (long long)(h)), p.q.shape[0] = b, p.q.shape[1] = t,  \
            p.q.shape[2] = p.v.shape[2] = h)
    TOKENS(2, INT64_MAX, 3);
    TOKENS(huge, huge, 3);
    TOKENS(2, 1 << 30, 3);
    TOKENS(1, INT32_MAX, 1);
    TOKENS(1, 1 << 30, huge);
    INVALID(text("there are N * HV = 2 * %lld states; there must be at most 2147482623", huge),
            p.q.shape[1] = 0, p.q.shape[2] = p.v.shape[2] = huge);
    INVALID("there are N * HV = 70000 * 70000 states; there must be at most 2147482623", p.q.shape[0] = 70000,
            p.q.shape[1] = 0, p.q.shape[2] = 1, p.v.shape[2] = 70000);
    SEQLENS(text("there are N * HV = %lld * 3 states; there must be at most 2147482623", huge),
            p.cu_seqlens.shape[0] = huge + 1);
    SEQLENS("there are N * HV = 715827882 * 3 states; there must be at most 2147482623",
            p.cu_seqlens.shape[0] = 715827883);
    INVALID("v has HV = 16777216; there must be at most 16777215 heads", p.q.shape[1] = 0,
            p.v.shape[2] = 1 << 24, p.q.shape[2] = 1);
    INVALID("A_log has shape [4611686018427387904, 4]; it must have HV = 3 elements", p.A_log.ndim = 2,
            p.A_log.shape[0] = huge, p.A_log.shape[1] = 4);
#undef TOKENS
}

static void dtypes(void)
{
    DTYPE("q has dtype float32; it must be bfloat16", p.q.dtype = FLASH_KDA_F32);
    DTYPE("k has dtype float16; it must be bfloat16", p.k.dtype = FLASH_KDA_F16);
    DTYPE("v has dtype float64; it must be bfloat16", p.v.dtype = FLASH_KDA_F64);
    DTYPE("g has dtype float16; it must be bfloat16 or float32", p.g.dtype = FLASH_KDA_F16);
    DTYPE("beta has dtype int64; it must be bfloat16 or float32", p.beta.dtype = FLASH_KDA_I64);
    DTYPE("beta has dtype bool; it must be bfloat16 or float32", p.beta.dtype = FLASH_KDA_BOOL);
    DTYPE("out has dtype float32; it must be bfloat16", p.out.dtype = FLASH_KDA_F32);
    DTYPE("A_log has dtype bfloat16; it must be float32", p.A_log.dtype = FLASH_KDA_BF16);
    DTYPE("dt_bias has dtype bfloat16; it must be float32", p.dt_bias.dtype = FLASH_KDA_BF16);
    DTYPE("initial_state has dtype float16; it must be float32 or bfloat16",
          p.initial_state.dtype = FLASH_KDA_F16);
    DTYPE("final_state has dtype int32; it must be float32 or bfloat16", p.final_state.dtype = FLASH_KDA_I32);
    DTYPE("final_state has dtype bfloat16 and initial_state float32; they must have the same",
          p.final_state.dtype = FLASH_KDA_BF16);
    DTYPE("q has dtype none; it must be bfloat16", p.q.dtype = 0);
    DTYPE("q has dtype another type; it must be bfloat16", p.q.dtype = FLASH_KDA_OTHER);
    DTYPE("q has dtype an unknown type; it must be bfloat16", p.q.dtype = 99);
    DTYPE("q has dtype an unknown type; it must be bfloat16", p.q.dtype = -1);
    REFUSED(with_seqlens, INVALID_DTYPE, "cu_seqlens has dtype float32; it must be int64 or int32",
            p.cu_seqlens.dtype = FLASH_KDA_F32);
}

static void strides(void)
{
    INVALID("k has strides [1920, 384, 128, 2]; its last dimension must be contiguous, with stride 1",
            p.k.stride[3] = 2);
    INVALID("q has strides [1920, 384, 1, 3]; its last dimension must be contiguous, with stride 1",
            p.q.stride[2] = 1, p.q.stride[3] = 3);
    INVALID("out has strides [1920, 384, 128, -1]; its last dimension must be contiguous, with stride 1",
            p.out.stride[3] = -1);
    INVALID("A_log has strides [2]; it must be contiguous, with strides [1]", p.A_log.stride[0] = 2);
    INVALID("dt_bias has strides [1, 3]; it must be contiguous, with strides [128, 1]",
            p.dt_bias.stride[0] = 1, p.dt_bias.stride[1] = 3);
    INVALID("final_state has strides [49152, 16384, 1, 128]; all but its first dimension must be contiguous, "
            "with strides [16384, 128, 1]",
            p.final_state.stride[2] = 1, p.final_state.stride[3] = 128);
    INVALID("initial_state has strides [49152, 16400, 128, 1]; all but its first dimension must be "
            "contiguous, with strides [16384, 128, 1]",
            p.initial_state.stride[1] = 16400);
    SEQLENS("cu_seqlens has strides [2]; it must be contiguous, with strides [1]",
            p.cu_seqlens.stride[0] = 2);
}

/* Strides with which a tensor would not fit in memory, and those of outputs that share memory. */
static void far_and_near(void)
{
    const long long huge = 1LL << 62;
#define FAR(name, step, dimension)                                                                           \
    INVALID(text(#name " has stride %lld in dimension %d; the tensor must fit in memory", (long long)(step), \
                 dimension),                                                                                 \
            p.name.stride[dimension] = step)
    FAR(q, huge, 0);
    FAR(k, INT64_MAX, 1);
    FAR(v, INT64_MIN, 2);
    FAR(g, -huge, 1);
    FAR(beta, huge, 2);
    FAR(beta, INT64_MIN, 0);
    FAR(out, 1LL << 47, 1);
    FAR(initial_state, huge, 0);
    FAR(final_state, INT64_MAX, 0);
#undef FAR
#define NEAR(name, stride_, dimension, least)                                                                \
    INVALID(text(#name " has stride %d in dimension %d; its elements must not share memory, so it must be "  \
                       "at least %d",                                                                        \
                 stride_, dimension, least),                                                                 \
            p.name.stride[dimension] = stride_)
    NEAR(out, 0, 0, 1);
    NEAR(out, 376, 1, 384);
    NEAR(out, 120, 2, 128);
    NEAR(out, 1912, 0, 1920);
    NEAR(final_state, 49144, 0, 49152);
    NEAR(final_state, 0, 0, 1);
#undef NEAR
}

/* What a GPU cannot do. */
static void gpu_strides(void)
{
    if (test.device.type != FLASH_KDA_CUDA) return;
#define ODD(name, stride_, dimension, unit)                                                                  \
    INVALID(text(#name                                                                                       \
                 " has stride %lld in dimension %d; on a GPU it must be a multiple of 16 bytes, which "      \
                 "are %d elements, and not negative",                                                        \
                 (long long)(stride_), dimension, unit),                                                     \
            p.name.stride[dimension] = stride_)
    ODD(q, 388, 1, 8);
    ODD(k, -128, 2, 8);
    ODD(v, 1924, 0, 8);
    ODD(g, 129, 2, 8);
    ODD(out, 392 + 4, 1, 8);
    ODD(initial_state, 49154, 0, 4);
    ODD(final_state, -49152, 0, 4);
#undef ODD
    INVALID("q has stride 2147483648 in dimension 1; on a GPU it must be at most 2147483647",
            p.q.stride[1] = 1LL << 31);
    INVALID("out has stride 4294967296 in dimension 2; on a GPU it must be at most 2147483647",
            p.out.stride[2] = 1LL << 32);
}

static void alignment(void)
{
    MISALIGNED(INVALID, q, 2, 16);
    MISALIGNED(INVALID, k, 8, 16);
    MISALIGNED(INVALID, v, 1, 16);
    MISALIGNED(INVALID, g, 4, 16);
    MISALIGNED(INVALID, out, 2, 16);
    MISALIGNED(INVALID, beta, 1, 2);
    MISALIGNED(INVALID, A_log, 2, 4);
    MISALIGNED(INVALID, dt_bias, 4, 16);
    MISALIGNED(INVALID, initial_state, 4, 16);
    MISALIGNED(INVALID, final_state, 8, 16);
    MISALIGNED(SEQLENS, cu_seqlens, 4, 8);
}

/* Besides WRONG_OPTIONS, which test_option_arguments.c holds the forward pass to. */
static void scalars(void)
{
    INVALID("scale is -inf; it must be finite", p.scale = -INFINITY);
    INVALID("scale is nan; it must be finite", p.scale = fabsf(NAN));
    INVALID("lower_bound is -inf; it must be in [-5, 0]", p.lower_bound = -INFINITY);
    INVALID("lower_bound is inf; it must be in [-5, 0]", p.lower_bound = INFINITY);
    INVALID("lower_bound is nan; it must be in [-5, 0]", p.lower_bound = fabsf(NAN));
    INVALID("batch_invariant is 2; it must be 0 or 1", p.batch_invariant = 2);
    INVALID("batch_invariant is -1; it must be 0 or 1", p.batch_invariant = -1);
    INVALID("cut is 4; it must be a flash_kda_cut, in [0, 3]", p.cut = 4);
    INVALID("cut is -1; it must be a flash_kda_cut, in [0, 3]", p.cut = -1);
    INVALID("reserved is 1; it must be 0", p.reserved = 1);
    INVALID(text("max_seqlen is -1; it must be in [0, T] = [0, %lld]", (long long)p.q.shape[1]),
            p.max_seqlen = -1);
    INVALID(text("max_seqlen is %lld; it must be in [0, T] = [0, %lld]", (long long)p.q.shape[1] + 1,
                 (long long)p.q.shape[1]),
            p.max_seqlen = p.q.shape[1] + 1);
}

/* The records of "nonfinite" are checked as a tensor is. */
static void records(void)
{
    void *odd = (char *)fixed.params.nonfinite.data + 4;
    INVALID("nonfinite has shape [9, 2]; it must be [tensors, 2] = [10, 2]", p.nonfinite.shape[0] = 9);
    INVALID("nonfinite has shape [10, 3]; it must be [tensors, 2] = [10, 2]", p.nonfinite.shape[1] = 3);
    INVALID("nonfinite has 1 dimensions; it must have 2: [tensors, 2]", p.nonfinite.ndim = 1);
    INVALID("nonfinite has strides [1, 10]; it must be contiguous, with strides [2, 1]",
            p.nonfinite.stride[0] = 1, p.nonfinite.stride[1] = 10);
    INVALID(text("nonfinite is at address %p; it must be aligned to 8 bytes", odd), p.nonfinite.data = odd);
    DTYPE("nonfinite has dtype int32; it must be int64", p.nonfinite.dtype = FLASH_KDA_I32);
    DTYPE("nonfinite has dtype float64; it must be int64", p.nonfinite.dtype = FLASH_KDA_F64);
    INVALID("nonfinite overlaps q; it must have memory of its own", p.nonfinite.data = p.q.data);
    INVALID("nonfinite overlaps out; it must have memory of its own",
            p.nonfinite.data = (char *)p.out.data + 7672);
    INVALID("nonfinite overlaps initial_state; it must have memory of its own",
            p.nonfinite.data = p.initial_state.data);
    INVALID("workspace overlaps nonfinite; it must have memory of its own",
            p.workspace = (void *)((uintptr_t)p.nonfinite.data / 64 * 64), p.workspace_size = 128);
}

static void overlaps(void)
{
    INVALID("out overlaps v; it must have memory of its own", p.out.data = p.v.data);
    INVALID("out overlaps q; it must have memory of its own", p.out.data = (char *)p.q.data + 7664);
    INVALID("out overlaps final_state; it must have memory of its own", p.out.data = p.final_state.data);
    INVALID("out overlaps dt_bias; it must have memory of its own", p.out.data = p.dt_bias.data);
    INVALID("final_state overlaps g; it must have memory of its own",
            p.g.data = p.final_state.data); /* the larger one */
    const char *in_part =
        "final_state overlaps initial_state in part; they must be apart, or the same memory "
        "with the same strides";
    INVALID(in_part, p.final_state.data = (char *)p.initial_state.data + 16);
    INVALID(in_part, p.final_state.data = p.initial_state.data, p.final_state.stride[0] += 64);
    INVALID("workspace overlaps out; it must have memory of its own", p.workspace = p.out.data,
            p.workspace_size = 64);
    /* A workspace that begins just before out and ends beyond the last address. */
    static const size_t sizes[] = {SIZE_MAX, SIZE_MAX - 4096, SIZE_MAX / 2};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        flash_kda_fwd_params p = fixed.params;
        p.workspace = (void *)(((uintptr_t)p.out.data - 64) / 64 * 64), p.workspace_size = sizes[i];
        trying("workspace_size %zu", sizes[i]);
        CHECK(flash_kda_fwd(&p) == FLASH_KDA_INVALID_VALUE, "no refusal");
        CHECK(strstr(flash_kda_last_error(), "workspace overlaps"), "%s", flash_kda_last_error());
    }
}

static void workspaces(void)
{
    size_t need = fixed.params.workspace_size;
    char *elsewhere = allocate(need + 256, 1); /* never used: the call is refused */
    char *wrong = elsewhere + 64 - (uintptr_t)elsewhere % 64 + 32;
    INVALID(text("workspace is at address %p; it must be aligned to 64 bytes", (void *)wrong),
            p.workspace = wrong);
    if (need > 0) {
        INVALID(text("workspace_size is %zu bytes; this call needs %zu", need - 1, need),
                p.workspace_size = need - 1);
        INVALID(text("workspace_size is 0 bytes; this call needs %zu", need), p.workspace_size = 0);
        INVALID(text("workspace is null; it must point to %zu bytes", need), p.workspace = NULL);
    }
    free(elsewhere);
}

static void sequences(void)
{
    SEQLENS("cu_seqlens has 1 entries; it must have N + 1 for N >= 1 sequences", p.cu_seqlens.shape[0] = 1);
    SEQLENS("cu_seqlens has 0 entries; it must have N + 1 for N >= 1 sequences", p.cu_seqlens.shape[0] = 0);
    SEQLENS("cu_seqlens has 2 dimensions; it must have 1: [N + 1]", p.cu_seqlens.ndim = 2);
    INVALID("cu_seqlens is given with B = 2; B must be 1, all sequences in one row",
            p.cu_seqlens = with_seqlens.params.cu_seqlens);
}

/* The values in cu_seqlens, which only the CPU looks at. */
static void sequence_values(void)
{
    static const struct {
        int64_t ends[3];
        const char *sentence;
    } wrong[] = {
        {{1, 4, 10}, "cu_seqlens[0] is 1; it must be 0"},
        {{-1, 4, 10}, "cu_seqlens[0] is -1; it must be 0"},
        {{0, 4, 9}, "cu_seqlens ends with 9; its last entry must be T = 10"},
        {{0, 4, 11}, "cu_seqlens ends with 11; its last entry must be T = 10"},
        {{0, 12, 10}, "cu_seqlens[2] is 10 after 12; it must not decrease"},
        {{0, -1, 10}, "cu_seqlens[1] is -1 after 0; it must not decrease"},
    };
    if (test.device.type != FLASH_KDA_CPU) return;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        int64_t wide[3];
        int32_t narrow[3];
        for (int n = 0; n < 3; n++) narrow[n] = (int32_t)(wide[n] = wrong[i].ends[n]);
        SEQLENS(wrong[i].sentence, p.cu_seqlens.data = wide);
        SEQLENS(wrong[i].sentence, p.cu_seqlens.data = narrow, p.cu_seqlens.dtype = FLASH_KDA_I32);
    }
}

/* "cpu, cpu-avx512, ..." */
static const char *kernel_names(int32_t device_type)
{
    static char names[256];
    flash_kda_kernel_info kernels[16];
    int32_t count;
    for (int i = 0; i < 16; i++) kernels[i].struct_size = sizeof *kernels;
    must(flash_kda_list_kernels(kernels, 16, &count));
    for (int i = 0, used = 0; i < count; i++)
        if (kernels[i].device_type == device_type)
            used += snprintf(names + used, sizeof names - (size_t)used, "%s%s", used ? ", " : "",
                             kernels[i].name);
    return names;
}

static void devices(void)
{
    int32_t count;
    const char *no_cuda;
    must(flash_kda_list_devices(NULL, 0, &count, &no_cuda));
    INVALID("device type is 7; it must be FLASH_KDA_CPU or FLASH_KDA_CUDA", p.kernel = NULL,
            p.device.type = 7);
    INVALID("device index is 1; the CPU's must be 0", p.kernel = NULL,
            p.device = ((flash_kda_device){FLASH_KDA_CPU, 1}));
    INVALID(text("kernel is \"nonsense\"; it must be NULL or one of %s", kernel_names(test.device.type)),
            p.kernel = "nonsense");
    if (count > 1)
        INVALID(text("device index is 99; it must be in [0, %d], the CUDA devices there are", count - 2),
                p.kernel = NULL, p.device = ((flash_kda_device){FLASH_KDA_CUDA, 99}));
    else
        REFUSED(fixed, UNAVAILABLE, text("device is CUDA device 0, but CUDA cannot be used: %s", no_cuda),
                p.kernel = NULL, p.device = ((flash_kda_device){FLASH_KDA_CUDA, 0}));
    if (count > 1 && test.device.type == FLASH_KDA_CUDA) {
        REFUSED(fixed, UNAVAILABLE, "kernel is \"portable\", which does not run on the CPU",
                p.kernel = "portable", p.device = ((flash_kda_device){FLASH_KDA_CPU, 0}));
        REFUSED(fixed, UNAVAILABLE, "kernel is \"cpu\", which does not run on a CUDA device",
                p.kernel = "cpu");
    }
}

/* A program that was built with a header without kernel and cpu_threads: the memory behind its smaller struct
 * is not the struct's. */
static void older_struct(void)
{
    struct {
        flash_kda_fwd_params params;
        char beyond[64];
    } old;
    memset(&old, 0x7f, sizeof old);
    memcpy(&old.params, &fixed.params, sizeof old.params);
    old.params.struct_size = offsetof(flash_kda_fwd_params, kernel);
    memset((char *)&old.params + old.params.struct_size, 0x7f, sizeof old.params - old.params.struct_size);
    size_t bytes = 0;
    char words[1200];
    trying("an older struct");
    CHECK(flash_kda_fwd_workspace_size(&old.params, &bytes) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    CHECK(flash_kda_explain(&old.params, words, sizeof words) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    CHECK(strstr(words, "is the first in the table"), "it says: %s", words);
    void *workspace;
    must(flash_kda_malloc(test.device, bytes, &workspace));
    old.params.workspace = workspace;
    old.params.workspace_size = bytes;
    CHECK(flash_kda_fwd(&old.params) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    must(flash_kda_synchronize(test.device, NULL));
    CHECK(!call_untouched(&fixed), "nothing was written");
    must(flash_kda_free(test.device, workspace));
    call_poison(&fixed);
}

/* The fields of an absent tensor are ignored, and so are strides of dimensions of size 1. */
static void legal(void)
{
    call c = with_seqlens;
    memset(&c.params.initial_state, 0x7f, sizeof c.params.initial_state);
    c.params.initial_state.data = NULL;
    c.params.q.stride[0] = -77;
    trying("rubbish in the fields of an absent tensor");
    CHECK(flash_kda_fwd(&c.params) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    must(flash_kda_synchronize(test.device, NULL));
    call_poison(&c);
}

/* flash_kda_explain(), which needs shapes alone. */
static void explanations(void)
{
    char words[1200], few[12];
    flash_kda_fwd_params p = with_seqlens.params;
    p.q.data = p.k.data = p.v.data = p.g.data = p.beta.data = p.out.data = p.A_log.data = p.dt_bias.data =
        NULL;
    p.cu_seqlens.data = p.workspace = NULL;
    p.workspace_size = 0;
    trying("flash_kda_explain");
    memset(words, 0x7f, sizeof words);
    CHECK(flash_kda_explain(&p, words, sizeof words) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    CHECK(strncmp(words, text("Kernel \"%s\" (", test.kernel), strlen(test.kernel) + 10) == 0, "it says: %s",
          words);
    CHECK(strstr(words, "was asked for.\n"), "it says: %s", words);
    CHECK(strstr(words, text("\nWorkspace: %zu bytes.\n", with_seqlens.params.workspace_size)), "it says: %s",
          words);
    memset(few, 0x7f, sizeof few);
    CHECK(flash_kda_explain(&p, few, 11) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    CHECK(strlen(few) == 10 && few[11] == 0x7f && strncmp(few, words, 10) == 0, "it was not cut well");
    CHECK(flash_kda_explain(&p, NULL, 8) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strcmp(flash_kda_last_error(), "text must point to capacity = 8 bytes, at least 1") == 0,
          "it says: %s", flash_kda_last_error());
    CHECK(flash_kda_explain(&p, few, 0) == FLASH_KDA_INVALID_VALUE, "no refusal");
    p.cpu_threads = -1;
    CHECK(flash_kda_explain(&p, words, sizeof words) == FLASH_KDA_INVALID_VALUE, "no refusal");
}

/* Calls other than flash_kda_fwd(). */
static void others(void)
{
    void *memory;
    float ms = 0;
    double one;
    flash_kda_device nowhere = {9, 0};
    flash_kda_device_info device[1] = {0};
    flash_kda_kernel_info kernels[2] = {{.struct_size = sizeof *kernels}};
    int32_t count = -1;
#define SAYS(call, want, sentence)                                                                           \
    do {                                                                                                     \
        trying("%s", #call);                                                                                 \
        CHECK((call) == FLASH_KDA_##want, "the status is wrong");                                            \
        CHECK(strcmp(flash_kda_last_error(), sentence) == 0, "the sentence is: %s", flash_kda_last_error()); \
    } while (0)
    SAYS(flash_kda_malloc(test.device, 8, NULL), INVALID_VALUE, "memory is null; it must point to a pointer");
    SAYS(flash_kda_malloc(nowhere, 8, &memory), INVALID_VALUE,
         "device type is 9; it must be FLASH_KDA_CPU or FLASH_KDA_CUDA");
    SAYS(flash_kda_copy(test.device, NULL, test.device, &ms, 4), INVALID_VALUE,
         "to is null; it must point to 4 bytes");
    SAYS(flash_kda_copy(test.device, &ms, test.device, NULL, 4), INVALID_VALUE,
         "from is null; it must point to 4 bytes");
    SAYS(flash_kda_time_fwd(&fixed.params, 0, &ms), INVALID_VALUE, "repeats is 0; it must be at least 1");
    SAYS(flash_kda_time_fwd(&fixed.params, 1, NULL), INVALID_VALUE,
         "milliseconds is null; it must point to 1 floats");
    SAYS(flash_kda_list_devices(NULL, 0, NULL, NULL), INVALID_VALUE,
         "count is null; it must point to an int32_t");
    SAYS(flash_kda_list_kernels(NULL, 0, NULL), INVALID_VALUE, "count is null; it must point to an int32_t");
    SAYS(flash_kda_list_kernels(kernels, 2, &count), INVALID_VALUE,
         text("infos[1].struct_size is 0; it must be %zu", sizeof *kernels));
    CHECK(count == -1 && !kernels[0].name, "a refused call wrote");
    SAYS(flash_kda_list_devices(device, 1, &count, NULL), INVALID_VALUE,
         text("infos[0].struct_size is 0; it must be %zu", sizeof *device));
    CHECK(count == -1, "a refused call wrote");
    SAYS(flash_kda_reference(NULL, &one, NULL, NULL), INVALID_VALUE,
         "params is null; it must point to a flash_kda_fwd_params");
    SAYS(flash_kda_reference(&fixed.params, NULL, NULL, NULL), INVALID_VALUE,
         "out64 is null; it must point to [B, T, HV, V] doubles");
#undef SAYS
    CHECK(flash_kda_free(test.device, NULL) == FLASH_KDA_OK, "freeing NULL is an error");
    CHECK(strcmp(flash_kda_status_string((flash_kda_status)77), "unknown flash_kda_status") == 0, "77");
}

static void open_calls(void)
{
    static const int64_t lengths[] = {4, 6};
    fixed_problem = problem_create(2, 5, 3);
    ragged_problem = problem_create_ragged(lengths, 2, 3);
    fill_case(fixed_problem, find_case("random"), 1);
    fill_case(ragged_problem, find_case("random"), 2);
    call_options options = options_of(STATE_BOTH, false);
    options.counts_nonfinite = true;
    must(call_open(&fixed, fixed_problem, options));
    must(call_open(&with_seqlens, ragged_problem, options));
}

static void arguments(void)
{
    open_calls();
    structs();
    null_pointers();
    sizes();
    overflowing_sizes();
    dtypes();
    strides();
    far_and_near();
    gpu_strides();
    alignment();
    scalars();
    records();
    overlaps();
    workspaces();
    sequences();
    sequence_values();
    devices();
    others();
    explanations();
    legal();
    older_struct();
    call_close(&fixed);
    call_close(&with_seqlens);
    problem_free(fixed_problem);
    problem_free(ragged_problem);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"arguments", arguments}};
    harness_start(argc, argv);
    return harness_run(groups, 1);
}
