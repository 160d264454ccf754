/* Every wrong argument of the backward pass is refused with its sentence, and nothing is written. So is what
 * the forward pass saves, and where. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bwd_call.h"
#include "refusals.h"

/* B = 2, T = 5, H = 3; or two sequences of 4 and 6 tokens. */
static bwd_problem *fixed_problem, *ragged_problem;
static bwd_call fixed, with_seqlens;

static void expect(const bwd_call *c, const flash_kda_bwd_params *params, flash_kda_status want,
                   const char *sentence)
{
    trying("expected: %s", sentence);
    const flash_kda_status got = flash_kda_bwd(params);
    CHECK(got == want, "%s; it must be %s", flash_kda_status_string(got), flash_kda_status_string(want));
    CHECK(strcmp(flash_kda_last_error(), sentence) == 0, "the sentence is: %s", flash_kda_last_error());
    CHECK(bwd_call_untouched(c), "a buffer was written");
}

#define EXPECT(c, status, sentence, ...)                                                                     \
    do {                                                                                                     \
        flash_kda_bwd_params p = (c).params;                                                                 \
        __VA_ARGS__;                                                                                         \
        expect(&(c), &p, FLASH_KDA_##status, sentence);                                                      \
    } while (0)
#define INVALID(sentence, ...) EXPECT(fixed, INVALID_VALUE, sentence, __VA_ARGS__)
#define DTYPE(sentence, ...) EXPECT(fixed, INVALID_DTYPE, sentence, __VA_ARGS__)
#define SEQLENS(sentence, ...) EXPECT(with_seqlens, INVALID_VALUE, sentence, __VA_ARGS__)

static void structs(void)
{
    const char *size = "params->struct_size is %zu; it must be sizeof(flash_kda_bwd_params) = %zu (in older "
                       "headers %zu or more)";
    const size_t whole = sizeof(flash_kda_bwd_params);
    const size_t first = offsetof(flash_kda_bwd_params, workspace_limit);
    const size_t wrong[] = {0, 8, first - 8, whole + 8, SIZE_MAX};
    expect(&fixed, NULL, FLASH_KDA_INVALID_VALUE, "params is null; it must point to a flash_kda_bwd_params");
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        INVALID(text(size, wrong[i], whole, first), p.struct_size = wrong[i]);
    size_t bytes;
    CHECK(flash_kda_bwd_workspace_size(&fixed.params, NULL) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(flash_kda_bwd_workspace_size(NULL, &bytes) == FLASH_KDA_INVALID_VALUE, "no refusal");
    INVALID("batch_invariant is 2; it must be 0 or 1", p.batch_invariant = 2);
}

static void tensors(void)
{
    INVALID("q is null; it must point to its 7680 bytes", p.q.data = NULL);
    INVALID("q has 3 dimensions; it must have 4: [B, T, H, K]", p.q.ndim = 3);
    INVALID("q has K = 64; the head size K must be 128", p.q.shape[3] = 64);
    INVALID("k has shape [2, 4, 3, 128]; it must be [B, T, H, K] = [2, 5, 3, 128]", p.k.shape[1] = 4);
    INVALID("v has HV = 4 heads and q has H = 3; HV must be a multiple of H", p.v.shape[2] = 4);
    INVALID("beta has shape [2, 5, 1]; it must be [B, T, HV] = [2, 5, 3]", p.beta.shape[2] = 1);
    INVALID("dout has shape [2, 6, 3, 128]; it must be [B, T, HV, V] = [2, 5, 3, 128]", p.dout.shape[1] = 6);
    INVALID("dfinal_state has shape [1, 3, 128, 128]; it must be [N, HV, V, K] = [2, 3, 128, 128]",
            p.dfinal_state.shape[0] = 1);
    INVALID("dq has shape [2, 5, 1, 128]; it must be [B, T, H, K] = [2, 5, 3, 128]", p.dq.shape[2] = 1);
    INVALID("dk has 5 dimensions; it must have 4: [B, T, H, K]", p.dk.ndim = 5);
    INVALID("dv has shape [2, 5, 3, 64]; it must be [B, T, HV, V] = [2, 5, 3, 128]", p.dv.shape[3] = 64);
    INVALID("dg has shape [1, 5, 3, 128]; it must be [B, T, HV, K] = [2, 5, 3, 128]", p.dg.shape[0] = 1);
    INVALID("dbeta has shape [2, 5, 4]; it must be [B, T, HV] = [2, 5, 3]", p.dbeta.shape[2] = 4);
    INVALID("dA_log has shape [4]; it must have HV = 3 elements", p.dA_log.shape[0] = 4);
    INVALID("ddt_bias has shape [3, 64]; it must have HV * K = 384 elements", p.ddt_bias.shape[1] = 64);
    INVALID("dinitial_state has shape [2, 3, 64, 128]; it must be [N, HV, V, K] = [2, 3, 128, 128]",
            p.dinitial_state.shape[2] = 64);
    SEQLENS("dfinal_state has shape [1, 3, 128, 128]; it must be [N, HV, V, K] = [2, 3, 128, 128], with N "
            "from the 3 entries of cu_seqlens",
            p.dfinal_state.shape[0] = 1);
    SEQLENS("cu_seqlens has 1 entries; it must have N + 1 for N >= 1 sequences", p.cu_seqlens.shape[0] = 1);
    INVALID("cu_seqlens is given with B = 2; B must be 1, all sequences in one row",
            p.cu_seqlens = with_seqlens.params.cu_seqlens);
    INVALID("initial_state has shape [2, 3, 128, 128]; it must be [N, HV, K, V] = [2, 4, 128, 128]",
            p.state_k_first = 1, p.q.shape[2] = p.k.shape[2] = p.v.shape[2] = 4, p.dout.data = NULL,
            p.g = p.v, p.beta.shape[2] = 4, p.A_log.shape[0] = 4, p.dt_bias.shape[0] = 4);
}

static void dtypes(void)
{
    DTYPE("q has dtype float32; it must be bfloat16", p.q.dtype = FLASH_KDA_F32);
    DTYPE("beta has dtype float16; it must be bfloat16 or float32", p.beta.dtype = FLASH_KDA_F16);
    DTYPE("dout has dtype float32; it must be bfloat16", p.dout.dtype = FLASH_KDA_F32);
    DTYPE("dfinal_state has dtype float64; it must be float32 or bfloat16",
          p.dfinal_state.dtype = FLASH_KDA_F64);
    DTYPE("dv has dtype float16; it must be bfloat16", p.dv.dtype = FLASH_KDA_F16);
    DTYPE("dg has dtype float32; it must be bfloat16", p.dg.dtype = FLASH_KDA_F32);
    DTYPE("dg has dtype bfloat16; it must be float32", p.g.dtype = FLASH_KDA_F32);
    DTYPE("dbeta has dtype none; it must be bfloat16", p.dbeta.dtype = 0);
    DTYPE("dA_log has dtype bfloat16; it must be float32", p.dA_log.dtype = FLASH_KDA_BF16);
    DTYPE("ddt_bias has dtype float64; it must be float32", p.ddt_bias.dtype = FLASH_KDA_F64);
    DTYPE("dinitial_state has dtype bfloat16; it must be float32", p.dinitial_state.dtype = FLASH_KDA_BF16);
    EXPECT(with_seqlens, INVALID_DTYPE, "cu_seqlens has dtype float32; it must be int64 or int32",
           p.cu_seqlens.dtype = FLASH_KDA_F32);
}

static void layouts(void)
{
    const char *aligned = "%s is at address %p; it must be aligned to %d bytes";
    INVALID("dout has strides [1920, 384, 128, 2]; its last dimension must be contiguous, with stride 1",
            p.dout.stride[3] = 2);
    INVALID("dq has stride 0 in dimension 1; its elements must not share memory, so it must be at least 1",
            p.dq.stride[1] = 0);
    INVALID("dbeta has stride 2 in dimension 1; its elements must not share memory, so it must be at least 3",
            p.dbeta.stride[1] = 2);
    INVALID("dA_log has strides [2]; it must be contiguous, with strides [1]", p.dA_log.stride[0] = 2);
    INVALID("dinitial_state has strides [49152, 16384, 1, 128]; all but its first dimension must be "
            "contiguous, with strides [16384, 128, 1]",
            p.dinitial_state.stride[2] = 1, p.dinitial_state.stride[3] = 128);
    INVALID(text(aligned, "dk", (char *)fixed.params.dk.data + 2, 16), p.dk.data = (char *)p.dk.data + 2);
    INVALID(text(aligned, "dA_log", (char *)fixed.params.dA_log.data + 2, 4),
            p.dA_log.data = (char *)p.dA_log.data + 2);
    INVALID(text(aligned, "workspace", (char *)fixed.params.workspace + 4, 64),
            p.workspace = (char *)p.workspace + 4);
    INVALID(text(aligned, "saved", (char *)fixed.params.workspace + 4, 64), p.saved = (char *)p.workspace + 4,
            p.saved_size = 64);
}

static void options(void)
{
    INVALID("scale is inf; it must be finite", p.scale = INFINITY);
    INVALID("lower_bound is -6; it must be in [-5, 0]", p.lower_bound = -6.0f);
    INVALID("gate is 3; it must be a flash_kda_gate, in [0, 2]", p.gate = 3);
    INVALID("beta_kind is -1; it must be a flash_kda_beta, in [0, 2]", p.beta_kind = -1);
    INVALID("qk_is_normalised is 2; it must be 0 or 1", p.qk_is_normalised = 2);
    INVALID("state_k_first is -1; it must be 0 or 1", p.state_k_first = -1);
    INVALID("cpu_threads is -1; it must be 0 (all) or more", p.cpu_threads = -1);
    INVALID("max_seqlen is 6; it must be in [0, T] = [0, 5]", p.max_seqlen = 6);
    INVALID(text("interrupt is at address %p; it must be aligned to 4 bytes", (void *)2),
            p.interrupt = (const volatile int32_t *)2);
    INVALID("A_log is absent; it must be given with the gate FLASH_KDA_GATE_SOFTPLUS",
            p.gate = FLASH_KDA_GATE_SOFTPLUS, p.A_log.data = NULL);
    INVALID(
        "dt_bias is given with the gate FLASH_KDA_GATE_ACTIVATED, for which g is the log decay itself; it "
        "must be absent",
        p.gate = FLASH_KDA_GATE_ACTIVATED, p.A_log.data = NULL);
    INVALID("dA_log is given without A_log; it must be absent", p.A_log.data = NULL);
    INVALID("ddt_bias is given without dt_bias; it must be absent", p.dt_bias.data = NULL);
    INVALID(
        "dq, dk, dv, dg, dbeta, dA_log, ddt_bias and dinitial_state are all absent; at least one gradient "
        "must be given",
        p.dq.data = p.dk.data = p.dv.data = p.dg.data = p.dbeta.data = NULL,
        p.dA_log.data = p.ddt_bias.data = p.dinitial_state.data = NULL);
}

static void memory(void)
{
    const size_t needed = fixed.params.workspace_size;
    INVALID(text("workspace_size is %zu bytes; this call needs %zu", needed - 1, needed),
            p.workspace_size = needed - 1);
    INVALID(text("workspace is null; it must point to %zu bytes", needed), p.workspace = NULL);
    INVALID("saved is null and saved_size is 5; without saved it must be 0", p.saved_size = 5);
    INVALID("dk overlaps dq; it must have memory of its own", p.dk = p.dq);
    INVALID("dq overlaps q; it must have memory of its own", p.dq = p.q);
    INVALID("dv overlaps dout; it must have memory of its own", p.dv = p.dout);
    INVALID("dinitial_state overlaps dfinal_state; it must have memory of its own",
            p.dinitial_state = p.dfinal_state);
    INVALID("dA_log overlaps A_log; it must have memory of its own", p.dA_log = p.A_log);
    INVALID("workspace overlaps dg; it must have memory of its own",
            p.workspace = (void *)(((uintptr_t)p.dg.data + 63) / 64 * 64), p.workspace_size = 64);
    INVALID("workspace overlaps saved; it must have memory of its own", p.saved = p.workspace,
            p.saved_size = 64);
}

static void seqlens(void)
{
    int64_t *const at = with_seqlens.params.cu_seqlens.data;
    const struct {
        int64_t values[3];
        const char *sentence;
    } wrong[] = {
        {{1, 4, 10}, "cu_seqlens[0] is 1; it must be 0"},
        {{0, 11, 10}, "cu_seqlens[2] is 10 after 11; it must not decrease"},
        {{0, 4, 9}, "cu_seqlens ends with 9; its last entry must be T = 10"},
    };
    for (int i = 0; i < 3; i++) {
        memcpy(at, wrong[i].values, sizeof wrong[i].values);
        trying("expected: %s", wrong[i].sentence);
        CHECK(flash_kda_bwd(&with_seqlens.params) == FLASH_KDA_INVALID_VALUE, "no refusal");
        CHECK(strcmp(flash_kda_last_error(), wrong[i].sentence) == 0, "the sentence is: %s",
              flash_kda_last_error());
    }
    memcpy(at, ragged_problem->forward->cu_seqlens, sizeof wrong[0].values);
    CHECK(bwd_call_untouched(&with_seqlens), "a buffer was written");
}

static void devices(void)
{
    INVALID("device index is 1; the CPU's must be 0", p.device.index = 1);
    INVALID("device type is 7; it must be FLASH_KDA_CPU or FLASH_KDA_CUDA", p.device.type = 7);
    flash_kda_bwd_params p = fixed.params;
    p.device = (flash_kda_device){FLASH_KDA_CUDA, 0};
    p.kernel = "cpu";
    trying("a GPU and a kernel of the CPU, or no GPU");
    CHECK(flash_kda_bwd(&p) == FLASH_KDA_UNAVAILABLE, "no refusal");
    CHECK(bwd_call_untouched(&fixed), "a buffer was written");
}

static void references(void)
{
    flash_kda_gradients64 to = {.struct_size = sizeof to - 8};
    trying("wrong arguments of the reference");
    CHECK(flash_kda_bwd_reference(&fixed.params, NULL) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(flash_kda_bwd_reference(&fixed.params, &to) == FLASH_KDA_INVALID_VALUE, "no refusal");
    to.struct_size = sizeof to;
    CHECK(flash_kda_bwd_reference(NULL, &to) == FLASH_KDA_INVALID_VALUE, "no refusal");
    flash_kda_bwd_params p = fixed.params;
    p.device.type = FLASH_KDA_CUDA;
    CHECK(flash_kda_bwd_reference(&p, &to) == FLASH_KDA_INVALID_VALUE, "no refusal");
    CHECK(strcmp(flash_kda_last_error(),
                 "device is not the CPU; the reference takes tensors in CPU memory") == 0,
          "the sentence is: %s", flash_kda_last_error());
}

/* ---- `saved` of the forward pass ----------------------------------------------------------------------- */

static void saving(void)
{
    problem *long_problem = problem_create(1, 400, 1);
    call c;
    call_options how = options_of(STATE_NONE, false);
    must(call_open(&c, long_problem, how));
    size_t needed = 0;
    trying("a forward pass that saves");
    CHECK(flash_kda_fwd_saved_size(&c.params, NULL) == FLASH_KDA_INVALID_VALUE, "no refusal");
    must(flash_kda_fwd_saved_size(&c.params, &needed));
    CHECK(needed == (size_t)DIM * DIM * 4, "%zu bytes are needed", needed);
    void *memory_of_64 = aligned_alloc(64, needed);
    REFUSED(c, INVALID_VALUE, text("saved_size is %zu bytes; this call needs %zu", needed - 1, needed),
            p.saved = memory_of_64, p.saved_size = needed - 1);
    REFUSED(c, INVALID_VALUE, "saved is null and saved_size is 7; without saved it must be 0",
            p.saved_size = 7);
    REFUSED(
        c, INVALID_VALUE,
        text("saved is at address %p; it must be aligned to 64 bytes", (void *)((char *)memory_of_64 + 4)),
        p.saved = (char *)memory_of_64 + 4, p.saved_size = needed);
    REFUSED(c, INVALID_VALUE, "saved overlaps out; it must have memory of its own",
            p.saved = (void *)(((uintptr_t)p.out.data + 63) / 64 * 64), p.saved_size = 64);
    free(memory_of_64);
    call_close(&c);
    problem_free(long_problem);
}

static void short_saved(void)
{
    bwd_problem *b = bwd_problem_create(problem_create(1, 400, 1), 3);
    bwd_call c;
    must(bwd_call_open(&c, b, (bwd_options){.forward = options_of(STATE_IN, false), .saves = true}));
    EXPECT(c, INVALID_VALUE, "saved_size is 65535 bytes; this call needs 65536", p.saved_size--);
    bwd_call_close(&c);
    bwd_problem_free(b);
}

/* A short forward pass saves nothing. A pointer to its 0 bytes is taken, and the call needs no other
 * workspace for it, because a size call has no pointers. */
static void empty_saved(void)
{
    problem *p = problem_create(1, 40, 2);
    problem_group_heads(p, 2);
    bwd_problem *b = bwd_problem_create(p, 5);
    bwd_call c;
    must(bwd_call_open(&c, b, (bwd_options){.forward = options_of(STATE_IN, false), .saves = true}));
    size_t bytes = 0;
    flash_kda_bwd_params sizes = c.params;
    sizes.saved = NULL;
    trying("`saved` of 0 bytes");
    CHECK(c.params.saved && c.params.saved_size == 0, "%zu bytes are saved", c.params.saved_size);
    must(flash_kda_bwd_workspace_size(&sizes, &bytes));
    c.params.workspace_size = bytes;
    CHECK(bwd_call_run(&c) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    bwd_call_close(&c);
    bwd_problem_free(b);
}

static void everything(void)
{
    static const int64_t lengths[] = {4, 6};
    fixed_problem = bwd_problem_create(problem_create(2, 5, 3), 1);
    ragged_problem = bwd_problem_create(problem_create_ragged(lengths, 2, 3), 2);
    const bwd_options how = {.forward = options_of(STATE_IN, false)};
    must(bwd_call_open(&fixed, fixed_problem, how));
    must(bwd_call_open(&with_seqlens, ragged_problem, how));
    structs();
    tensors();
    dtypes();
    layouts();
    options();
    memory();
    seqlens();
    devices();
    references();
    saving();
    short_saved();
    empty_saved();
    bwd_call_close(&fixed);
    bwd_call_close(&with_seqlens);
    bwd_problem_free(fixed_problem);
    bwd_problem_free(ragged_problem);
}

int main(int argc, char **argv)
{
    static const group all[] = {{"refusals", everything}};
    harness_start(argc, argv);
    return harness_run(all, 1);
}
