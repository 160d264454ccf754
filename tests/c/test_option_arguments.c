/* Wrong pools, checkpoints, gates and strides are refused with their sentences, and nothing is written. What
 * is allowed is not refused. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kinds.h"
#include "refusals.h"

/* Two sequences of 32 and 48 tokens, H = 1, HV = 2. `pooled` has slots and offsets, `every` has dense states
 * and a checkpoint every 16 tokens. */
static problem *pooled_problem, *every_problem;
static call pooled, every;

#define INVALID(sentence, ...) REFUSED(pooled, INVALID_VALUE, sentence, __VA_ARGS__)
#define DTYPE(sentence, ...) REFUSED(pooled, INVALID_DTYPE, sentence, __VA_ARGS__)
#define EVERY(sentence, ...) REFUSED(every, INVALID_VALUE, sentence, __VA_ARGS__)

static const char *const FROM_SEQLENS = ", with N from the 3 entries of cu_seqlens";

static void shapes(void)
{
    INVALID(text("state_indices has shape [3]; it must be [N] = [2]%s", FROM_SEQLENS),
            p.state_indices.shape[0] = 3);
    INVALID("state_indices has 2 dimensions; it must have 1: [N]", p.state_indices.ndim = 2);
    INVALID(text("has_initial_state has shape [1]; it must be [N] = [2]%s", FROM_SEQLENS),
            p.has_initial_state.shape[0] = 1);
    INVALID("has_initial_state has size -2 in dimension 0; sizes must not be negative",
            p.has_initial_state.shape[0] = -2);
    INVALID("initial_state has shape [4, 1, 128, 128]; it must be [slots, HV, V, K] = [4, 2, 128, 128]",
            p.initial_state.shape[1] = 1);
    INVALID("final_state has shape [7, 2, 128, 64]; it must be [slots, HV, V, K] = [7, 2, 128, 128]",
            p.final_state.shape[0] = 7, p.final_state.shape[3] = 64);
    INVALID("final_state has shape [7, 2, 64, 128]; it must be [slots, HV, K, V] = [7, 2, 128, 128]",
            p.final_state.shape[0] = 7, p.final_state.shape[2] = 64, p.state_k_first = 1);
    EVERY(text("initial_state has shape [3, 2, 128, 128]; it must be [N, HV, V, K] = [2, 2, 128, 128]%s",
               FROM_SEQLENS),
          p.initial_state.shape[0] = 3);
    EVERY(text("initial_state has shape [3, 2, 128, 128]; it must be [N, HV, K, V] = [2, 2, 128, 128]%s",
               FROM_SEQLENS),
          p.initial_state.shape[0] = 3, p.state_k_first = 1);
    INVALID("checkpoint_states has shape [6, 1, 128, 128]; it must be [rows, HV, V, K] = [6, 2, 128, 128]",
            p.checkpoint_states.shape[1] = 1);
    INVALID("checkpoint_states has 3 dimensions; it must have 4: [rows, HV, K, V]",
            p.checkpoint_states.ndim = 3, p.state_k_first = 1);
    INVALID("checkpoint_offsets has 3 dimensions; it must have 1 or 2: [N] or [N, C]",
            p.checkpoint_offsets.ndim = 3);
    INVALID(text("checkpoint_offsets has shape [3, 2]; it must be [N, C] = [2, 2]%s", FROM_SEQLENS),
            p.checkpoint_offsets.shape[0] = 3);
    INVALID("checkpoint_offsets has size -1 in dimension 1; sizes must not be negative",
            p.checkpoint_offsets.shape[1] = -1);
    INVALID(text("checkpoint_offsets has shape [4]; it must be [N] = [2]%s", FROM_SEQLENS),
            p.checkpoint_offsets.ndim = 1, p.checkpoint_offsets.shape[0] = 4);
    INVALID(text("checkpoint_indices has shape [2, 3]; it must be [N, C] = [2, 2]%s", FROM_SEQLENS),
            p.checkpoint_indices.shape[1] = 3);
    INVALID("checkpoint_indices has 1 dimensions; it must have 2: [N, C]", p.checkpoint_indices.ndim = 1);
    EVERY(text("checkpoint_starts has shape [1]; it must be [N] = [2]%s", FROM_SEQLENS),
          p.checkpoint_starts.shape[0] = 1);
    EVERY("checkpoint_starts has 0 dimensions; it must have 1: [N]", p.checkpoint_starts.ndim = 0);
}

/* Sizes of which products do not fit 64 bits, or a tensor no memory. */
static void overflowing_sizes(void)
{
    const long long huge = 1LL << 62;
    INVALID(text("initial_state has shape [%lld, 2, 128, 128]; a tensor must fit in memory", huge),
            p.initial_state.shape[0] = huge);
    INVALID("final_state has shape [17179869184, 2, 128, 128]; a tensor must fit in memory",
            p.final_state.shape[0] = 1LL << 34);
    INVALID(text("checkpoint_states has shape [%lld, 2, 128, 128]; a tensor must fit in memory",
                 (long long)INT64_MAX),
            p.checkpoint_states.shape[0] = INT64_MAX);
    INVALID(text("checkpoint_offsets has shape [2, %lld]; a tensor must fit in memory", huge),
            p.checkpoint_offsets.shape[1] = huge);
    INVALID(
        "checkpoint_offsets has C = 2147483648 offsets for each sequence; there must be at most 2147483583",
        p.checkpoint_offsets.shape[1] = 1LL << 31, p.checkpoint_indices.data = NULL,
        p.checkpoint_offsets.stride[0] = 1LL << 31);
    INVALID(text("checkpoint_states has stride %lld in dimension 0; the tensor must fit in memory", huge),
            p.checkpoint_states.stride[0] = huge);
    INVALID(text("initial_state has stride %lld in dimension 0; the tensor must fit in memory",
                 (long long)INT64_MIN),
            p.initial_state.stride[0] = INT64_MIN);
}

static void dtypes(void)
{
    DTYPE("state_indices has dtype float32; it must be int64 or int32",
          p.state_indices.dtype = FLASH_KDA_F32);
    DTYPE("has_initial_state has dtype int32; it must be bool", p.has_initial_state.dtype = FLASH_KDA_I32);
    DTYPE("checkpoint_states has dtype float16; it must be float32 or bfloat16",
          p.checkpoint_states.dtype = FLASH_KDA_F16);
    DTYPE("checkpoint_offsets has dtype bool; it must be int64 or int32",
          p.checkpoint_offsets.dtype = FLASH_KDA_BOOL);
    DTYPE("checkpoint_indices has dtype none; it must be int64 or int32", p.checkpoint_indices.dtype = 0);
    REFUSED(every, INVALID_DTYPE, "checkpoint_starts has dtype bfloat16; it must be int64 or int32",
            p.checkpoint_starts.dtype = FLASH_KDA_BF16);
    DTYPE("final_state has dtype bfloat16 and initial_state float32; they must have the same",
          p.final_state.dtype = FLASH_KDA_BF16);
}

static void strides(void)
{
    INVALID("state_indices has strides [2]; it must be contiguous, with strides [1]",
            p.state_indices.stride[0] = 2);
    INVALID("has_initial_state has strides [-1]; it must be contiguous, with strides [1]",
            p.has_initial_state.stride[0] = -1);
    INVALID("checkpoint_offsets has strides [1, 2]; it must be contiguous, with strides [2, 1]",
            p.checkpoint_offsets.stride[0] = 1, p.checkpoint_offsets.stride[1] = 2);
    INVALID("checkpoint_indices has strides [4, 1]; it must be contiguous, with strides [2, 1]",
            p.checkpoint_indices.stride[0] = 4);
    EVERY("checkpoint_starts has strides [0]; it must be contiguous, with strides [1]",
          p.checkpoint_starts.stride[0] = 0);
    INVALID("checkpoint_states has strides [32768, 16384, 1, 128]; all but its first dimension must be "
            "contiguous, with strides [16384, 128, 1]",
            p.checkpoint_states.stride[2] = 1, p.checkpoint_states.stride[3] = 128);
    INVALID(
        "checkpoint_states has stride 32760 in dimension 0; its elements must not share memory, so it must "
        "be at least 32768",
        p.checkpoint_states.stride[0] = 32760);
    INVALID("final_state has stride 0 in dimension 0; its elements must not share memory, so it must be at "
            "least 1",
            p.final_state.stride[0] = 0);
    INVALID("g has strides [20480, 256, 128, 2]; its last dimension must be contiguous, with stride 1",
            p.g.stride[3] = 2);
    if (test.device.type != FLASH_KDA_CUDA) return;
    INVALID("checkpoint_states has stride 32772 in dimension 0; on a GPU it must be a multiple of 16 bytes, "
            "which are 8 elements, and not negative",
            p.checkpoint_states.stride[0] = 32772);
    INVALID(
        "initial_state has stride 32770 in dimension 0; on a GPU it must be a multiple of 16 bytes, which "
        "are 4 elements, and not negative",
        p.initial_state.stride[0] = 32770);
    INVALID(
        "g has stride 130 in dimension 2; on a GPU it must be a multiple of 16 bytes, which are 4 elements, "
        "and not negative",
        p.g.stride[2] = 130);
}

static void alignment(void)
{
    MISALIGNED(INVALID, state_indices, 4, 8);
    MISALIGNED(INVALID, checkpoint_states, 8, 16);
    MISALIGNED(INVALID, checkpoint_offsets, 2, 4);
    MISALIGNED(INVALID, checkpoint_indices, 1, 4);
    MISALIGNED(EVERY, checkpoint_starts, 4, 8);
    MISALIGNED(INVALID, g, 8, 16);
    MISALIGNED(INVALID, beta, 2, 4);
}

static void kinds(void)
{
    WRONG_OPTIONS(EVERY);
    EVERY("checkpoint_every is -16; it must be a multiple of 16 tokens, or 0", p.checkpoint_every = -16);
    EVERY("checkpoint_every is 8; it must be a multiple of 16 tokens, or 0", p.checkpoint_every = 8);
    EVERY(text("checkpoint_every is %lld; it must be a multiple of 16 tokens, or 0", (long long)INT64_MAX),
          p.checkpoint_every = INT64_MAX);
}

/* Options that make no sense together. */
static void combinations(void)
{
    INVALID("checkpoint_offsets is given with checkpoint_every = 32; only one of them must say where the "
            "checkpoints are",
            p.checkpoint_every = 32);
    INVALID(
        "checkpoint_states is given without checkpoint_offsets and with checkpoint_every = 0; one of them "
        "must say where the checkpoints are",
        p.checkpoint_offsets.data = NULL);
    INVALID("checkpoint_offsets is given without checkpoint_states; checkpoint_states must be given too",
            p.checkpoint_states.data = NULL);
    EVERY("checkpoint_every is 16 without checkpoint_states; checkpoint_states must be given too",
          p.checkpoint_states.data = NULL);
    EVERY("checkpoint_indices is given without checkpoint_offsets; it must be absent",
          p.checkpoint_indices = pooled.params.checkpoint_indices);
    INVALID("checkpoint_indices is given without checkpoint_offsets; it must be absent",
            p.checkpoint_offsets.data = p.checkpoint_states.data = NULL);
    INVALID("checkpoint_starts is given with checkpoint_every = 0; it must be absent",
            p.checkpoint_starts = every.params.checkpoint_starts);
}

/* ---- Memory that is shared ----------------------------------------------------------------------------- */

/* Whether a call is refused because tensors overlap. Nothing is computed in any case: the workspace, which is
 * looked at later, is a wrong one. */
static bool overlaps(const flash_kda_fwd_params *params)
{
    flash_kda_fwd_params p = *params;
    p.workspace = (void *)32;
    p.workspace_size = 0;
    const flash_kda_status status = flash_kda_fwd(&p);
    CHECK(status != FLASH_KDA_OK, "no refusal");
    return status == FLASH_KDA_INVALID_VALUE && strstr(flash_kda_last_error(), "overlaps");
}

/* Every output on every other tensor. */
static void shared_tensors(void)
{
    const call *const calls[] = {&pooled, &every};
    for (int i = 0; i < 2; i++) {
        flash_kda_fwd_params p = calls[i]->params;
        flash_kda_tensor *const all[] = {&p.out,
                                         &p.nonfinite,
                                         &p.checkpoint_states,
                                         &p.final_state,
                                         &p.q,
                                         &p.k,
                                         &p.v,
                                         &p.g,
                                         &p.beta,
                                         &p.A_log,
                                         &p.dt_bias,
                                         &p.cu_seqlens,
                                         &p.state_indices,
                                         &p.has_initial_state,
                                         &p.checkpoint_offsets,
                                         &p.checkpoint_indices,
                                         &p.checkpoint_starts};
        enum { OUTPUTS = 4, ALL = sizeof all / sizeof *all };
        for (int a = 0; a < OUTPUTS; a++)
            for (int b = a + 1; b < ALL; b++) {
                if (!all[a]->data || !all[b]->data) continue;
                void *const before = all[b]->data;
                all[b]->data = (char *)all[a]->data + 16;
                trying("output %d and tensor %d share memory", a, b);
                CHECK(overlaps(&p), "it says: %s", flash_kda_last_error());
                all[b]->data = before;
            }
        trying("nothing is shared");
        CHECK(!overlaps(&p), "it says: %s", flash_kda_last_error());
        CHECK(call_untouched(calls[i]), "a buffer was written");
    }
}

static void pools_in_place(void)
{
    const char *in_part =
        "final_state overlaps initial_state in part; they must be apart, or the same memory "
        "with the same strides";
    char *const initial = pooled.params.initial_state.data;
    const int64_t slot = pooled.params.initial_state.stride[0];
    INVALID(in_part, p.final_state.data = initial + 64);
    INVALID(in_part, p.final_state = p.initial_state, p.final_state.stride[0] += 4);
    INVALID(in_part, p.initial_state.shape[0] = p.final_state.shape[0] = 3,
            p.final_state.stride[0] = p.initial_state.stride[0], p.final_state.data = initial + slot * 4);
    flash_kda_fwd_params p = pooled.params;
    p.final_state = p.initial_state;
    trying("a pool in place");
    CHECK(!overlaps(&p), "it says: %s", flash_kda_last_error());
    p.final_state.shape[0] = 3;
    trying("a pool in place, with fewer slots of final_state");
    CHECK(!overlaps(&p), "it says: %s", flash_kda_last_error());
    trying("states of two layers beside each other in each slot");
    p.initial_state.shape[0] = p.final_state.shape[0] = 2;
    p.initial_state.stride[0] = p.final_state.stride[0] = 2 * slot;
    p.final_state.data = initial + slot * 4;
    CHECK(!overlaps(&p), "it says: %s", flash_kda_last_error());
    p.checkpoint_states = p.final_state;
    p.checkpoint_states.data = initial + 64;
    CHECK(overlaps(&p), "checkpoints in a pool are not refused");
}

/* A call whose tensors are slices of one buffer, one of them moved by some bytes. */
static bool slices_overlap(const call *c, size_t tensor, int64_t bytes)
{
    flash_kda_fwd_params p = c->params;
    flash_kda_tensor *t = (flash_kda_tensor *)((char *)&p + tensor);
    t->data = (char *)t->data + bytes;
    return overlaps(&p);
}

/* Slices of one buffer, and views of one tensor in other orders, with one batch row and with three. */
static void interleaved_slices(void)
{
    static const int64_t batches[] = {1, 3};
    static const layout layouts[] = {LAYOUT_FUSED, LAYOUT_PADDED, LAYOUT_HEAD_MAJOR, LAYOUT_TOKEN_MAJOR};
    for (int i = 0; i < 2; i++) {
        problem *p = problem_create(batches[i], 20, 2);
        fill_case(p, find_case("random"), 3);
        for (int l = 0; l < 4; l++) {
            call c;
            call_options options = options_of(STATE_NONE, false);
            options.for_reference = true;
            for (int a = 0; a < STRIDED_ARGS; a++) options.layouts[a] = layouts[l];
            must(call_open(&c, p, options));
            const size_t out = offsetof(flash_kda_fwd_params, out);
            trying("%lld batch rows, layout %d", (long long)batches[i], layouts[l]);
            CHECK(!slices_overlap(&c, out, 0), "it says: %s", flash_kda_last_error());
            if (layouts[l] == LAYOUT_FUSED) {
                CHECK(slices_overlap(&c, out, -2 * DIM * 2), "out in front of its slice is not refused");
                CHECK(!slices_overlap(&c, offsetof(flash_kda_fwd_params, q), 2 * DIM * 2),
                      "q on k is refused");
            }
            call_close(&c);
        }
        problem_free(p);
    }
}

/* Outputs of which each has a part of every row of one tensor: heads, and tokens. */
static void halves(void)
{
    enum { T = 6, H = 2 };
    const int64_t shape[] = {1, T, H, DIM}, of_beta[] = {1, T, H};
    problem *p = problem_create(1, T, H);
    call c;
    call_options options = options_of(STATE_NONE, false);
    options.for_reference = true;
    fill_case(p, find_case("random"), 4);
    must(call_open(&c, p, options));
    void *memory;
    must(flash_kda_malloc(test.device, (size_t)2 * T * H * DIM * 2, &memory));
    flash_kda_fwd_params params = c.params;
    params.v = params.out = tensor_of(memory, FLASH_KDA_BF16, 4, shape);
    params.beta = tensor_of(params.beta.data, FLASH_KDA_BF16, 3, of_beta);
    params.v.stride[1] = params.out.stride[1] = 2 * H * DIM;
    params.out.data = (char *)memory + H * DIM * 2;
    trying("heads of one tensor");
    CHECK(!overlaps(&params), "it says: %s", flash_kda_last_error());
    params.out.data = (char *)memory + H * DIM * 2 - 16;
    CHECK(overlaps(&params), "out in the end of v's rows is not refused");
    params.out.data = (char *)memory + H * DIM * 2 + 16;
    CHECK(overlaps(&params), "out in the begin of v's next rows is not refused");
    trying("heads of two tensors in turn");
    params.v.stride[1] = params.out.stride[1] = 2 * H * DIM;
    params.v.stride[2] = params.out.stride[2] = 2 * DIM;
    params.out.data = (char *)memory + DIM * 2;
    CHECK(!overlaps(&params), "it says: %s", flash_kda_last_error());
    params.out.data = (char *)memory + DIM * 2 + 16;
    CHECK(overlaps(&params), "out in the begin of v's next head is not refused");
    must(flash_kda_free(test.device, memory));
    call_close(&c);
    problem_free(p);
}

static void shared_memory(void)
{
    shared_tensors();
    pools_in_place();
    interleaved_slices();
    halves();
}

/* ---- Numbers in tensors -------------------------------------------------------------------------------- */

/* The reference refuses numbers that are not allowed, and so does every kernel on the CPU that takes the
 * call. */
static void expect_wrong_numbers(const call *c, const flash_kda_fwd_params *p, const char *sentence)
{
    const int64_t values = c->rows * DIM;
    double *out = allocate((size_t)values, sizeof *out);
    trying("expected: %s", sentence);
    CHECK(flash_kda_reference(p, out, NULL, NULL) == FLASH_KDA_INVALID_VALUE, "the reference takes it");
    CHECK(strcmp(flash_kda_last_error(), sentence) == 0, "the sentence is: %s", flash_kda_last_error());
    for (int64_t i = 0; i < values; i++)
        if (out[i] != 0.0) {
            CHECK(false, "the reference wrote to out64");
            break;
        }
    const flash_kda_status status = flash_kda_fwd(p);
    if (status != FLASH_KDA_UNAVAILABLE || !strstr(flash_kda_last_error(), "which does not take")) {
        CHECK(status == FLASH_KDA_INVALID_VALUE, "a kernel takes it");
        CHECK(strcmp(flash_kda_last_error(), sentence) == 0, "the sentence is: %s", flash_kda_last_error());
    }
    CHECK(call_untouched(c), "a buffer was written");
    free(out);
}

/* Replaces the numbers of the tensor at that place of the struct, as int64 and, where they fit, as int32. */
static void expect_wrong(const call *c, flash_kda_fwd_params p, size_t tensor_at, const int64_t *numbers,
                         int64_t count, const char *sentence)
{
    int64_t wide[4];
    int32_t narrow[4];
    bool fits = true;
    flash_kda_tensor *t = (flash_kda_tensor *)((char *)&p + tensor_at);
    for (int64_t i = 0; i < count; i++) {
        wide[i] = numbers[i];
        narrow[i] = (int32_t)numbers[i];
        fits &= narrow[i] == numbers[i];
    }
    t->data = wide;
    t->dtype = FLASH_KDA_I64;
    expect_wrong_numbers(c, &p, sentence);
    t->data = narrow;
    t->dtype = FLASH_KDA_I32;
    if (fits) expect_wrong_numbers(c, &p, sentence);
}

#define WRONG(c, tensor, sentence, ...)                                                                      \
    do {                                                                                                     \
        const int64_t numbers[] = {__VA_ARGS__};                                                             \
        expect_wrong(&(c), (c).params, offsetof(flash_kda_fwd_params, tensor), numbers,                      \
                     sizeof numbers / sizeof *numbers, sentence);                                            \
    } while (0)

static void slots(void)
{
    WRONG(pooled, state_indices, "state_indices[1] is 4; it must be less than 4, the slots of initial_state",
          1, 4);
    WRONG(pooled, state_indices,
          "state_indices[0] is 9223372036854775807; it must be less than 4, the slots of initial_state",
          INT64_MAX, 1);
    call fewer = pooled;
    fewer.params.final_state.shape[0] = 3;
    WRONG(fewer, state_indices, "state_indices[0] is 3; it must be less than 3, the slots of final_state", 3,
          1);
    /* An index below first_slot means no state, however many slots there are. */
    call later = pooled;
    later.params.first_slot = 10;
    WRONG(later, state_indices, "state_indices[1] is 10; it must be less than 4, the slots of initial_state",
          9, 10);
}

static void rows(void)
{
    WRONG(
        pooled, checkpoint_offsets,
        "checkpoint_offsets[0, 1] is 8; it must be a multiple of 16 and at most 32, the tokens of sequence 0",
        16, 8, 48, 0);
    WRONG(pooled, checkpoint_offsets,
          "checkpoint_offsets[0, 0] is 48; it must be a multiple of 16 and at most 32, the tokens of "
          "sequence 0",
          48, 0, 0, 0);
    WRONG(pooled, checkpoint_offsets,
          "checkpoint_offsets[1, 1] is 9223372036854775807; it must be a multiple of 16 and at most 48, the "
          "tokens of sequence 1",
          0, INT64_MIN, -5, INT64_MAX);
    WRONG(
        pooled, checkpoint_indices,
        "checkpoint_indices[1, 0] is 6; it must be at least 0 and less than 6, the rows of checkpoint_states",
        0, 1, 6, 3);
    WRONG(pooled, checkpoint_indices,
          "checkpoint_indices[0, 1] is -1; it must be at least 0 and less than 6, the rows of "
          "checkpoint_states",
          0, -1, 2, 3);
    call by_number = pooled;
    by_number.params.checkpoint_indices.data = NULL;
    by_number.params.checkpoint_states.shape[0] = 3;
    WRONG(by_number, checkpoint_offsets,
          "checkpoint_states has 3 rows; it must have row 3 for checkpoint_offsets[1, 1]", 16, 32, 16, 16);
    by_number.params.checkpoint_offsets.ndim = 1;
    by_number.params.checkpoint_offsets.stride[0] = 1;
    by_number.params.checkpoint_states.shape[0] = 1;
    WRONG(by_number, checkpoint_offsets,
          "checkpoint_states has 1 rows; it must have row 1 for checkpoint_offsets[1]", 16, 48);
    WRONG(by_number, checkpoint_offsets,
          "checkpoint_offsets[1] is 24; it must be a multiple of 16 and at most 48, the tokens of sequence 1",
          16, 24);
    WRONG(every, checkpoint_starts,
          "checkpoint_starts[1] is 4; it must leave room for 3 checkpoints among the 6 rows of "
          "checkpoint_states",
          0, 4);
    WRONG(every, checkpoint_starts,
          "checkpoint_starts[0] is -1; it must leave room for 2 checkpoints among the 6 rows of "
          "checkpoint_states",
          -1, 2);
    WRONG(
        every, checkpoint_starts,
        "checkpoint_starts[1] is 9223372036854775807; it must leave room for 3 checkpoints among the 6 rows "
        "of checkpoint_states",
        0, INT64_MAX);
    call all = every;
    all.params.checkpoint_starts.data = NULL;
    all.params.checkpoint_states.shape[0] = 4;
    expect_wrong_numbers(
        &all, &all.params,
        "checkpoint_states has 4 rows; it must have at least 5 for all checkpoints of checkpoint_every = 16");
}

static void numbers(void)
{
    if (test.device.type != FLASH_KDA_CPU) return;
    slots();
    rows();
}

/* ---- What is allowed ----------------------------------------------------------------------------------- */

/* The arguments are right, if a kernel takes them. `plain` is the same without what means nothing, because
 * flash_kda_fwd_workspace_size() takes tensors without a pointer as being there. */
static void expect_taken(flash_kda_fwd_params p, const flash_kda_fwd_params *plain)
{
    size_t values = DIM;
    for (int i = 0; i < 3; i++) values *= (size_t)p.v.shape[i];
    double *out = allocate(values, sizeof *out);
    if (test.device.type == FLASH_KDA_CPU)
        CHECK(flash_kda_reference(&p, out, NULL, NULL) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    free(out);
    flash_kda_status status = flash_kda_fwd_workspace_size(plain, &p.workspace_size);
    if (status == FLASH_KDA_OK) {
        must(flash_kda_malloc(test.device, p.workspace_size, &p.workspace));
        status = flash_kda_fwd(&p);
        must(flash_kda_synchronize(test.device, NULL));
        must(flash_kda_free(test.device, p.workspace));
    }
    CHECK(status == FLASH_KDA_OK || strstr(flash_kda_last_error(), "which does not take"), "%s",
          flash_kda_last_error());
}

/* The fields of absent tensors, and strides and indices without a meaning. */
static void allowed(void)
{
    flash_kda_fwd_params p = every.params, plain = p;
    plain.dt_bias = (flash_kda_tensor){0};
    flash_kda_tensor *const absent[] = {&p.checkpoint_offsets, &p.checkpoint_indices, &p.state_indices,
                                        &p.has_initial_state, &p.dt_bias};
    for (int i = 0; i < 5; i++) {
        memset(absent[i], 0x7f, sizeof *absent[i]);
        absent[i]->data = NULL;
    }
    p.checkpoint_offsets.ndim = 2;
    p.q.stride[0] = INT64_MIN;
    p.q.stride[2] = INT64_MAX;
    trying("rubbish in the fields of absent tensors and in strides that mean nothing");
    expect_taken(p, &plain);

    const int64_t A_log[] = {1, 1, 2, 1}, dt_bias[] = {2 * DIM};
    p = pooled.params;
    trying("A_log and dt_bias in other shapes");
    p.A_log = tensor_of(p.A_log.data, FLASH_KDA_F32, 4, A_log);
    p.dt_bias = tensor_of(p.dt_bias.data, FLASH_KDA_F32, 1, dt_bias);
    expect_taken(p, &p);
    trying("any lower_bound with another gate");
    p.lower_bound = NAN;
    expect_taken(p, &p);

    trying("a batch of no tokens with rubbish in its strides");
    p = pooled.params;
    p.first_slot = 0;
    flash_kda_tensor *const left_out[] = {&p.cu_seqlens,        &p.state_indices,      &p.has_initial_state,
                                          &p.checkpoint_states, &p.checkpoint_offsets, &p.checkpoint_indices,
                                          &p.initial_state,     &p.final_state};
    for (int i = 0; i < 8; i++) *left_out[i] = (flash_kda_tensor){0};
    flash_kda_tensor *const tokens[] = {&p.q, &p.k, &p.v, &p.g, &p.beta, &p.out};
    for (int i = 0; i < 6; i++) {
        tokens[i]->shape[1] = 0;
        tokens[i]->stride[0] = tokens[i]->stride[1] = tokens[i]->stride[2] = INT64_MAX - i;
    }
    expect_taken(p, &p);
    call_poison(&pooled);
    call_poison(&every);
}

/* Programs that were built with headers that lack some of the last fields. What is behind their smaller
 * struct is not the struct's, and the fields mean "default". */
static void older_structs(void)
{
    static const size_t sizes[] = {
        offsetof(flash_kda_fwd_params, kernel),        offsetof(flash_kda_fwd_params, nonfinite),
        offsetof(flash_kda_fwd_params, state_indices), offsetof(flash_kda_fwd_params, checkpoint_states),
        offsetof(flash_kda_fwd_params, gate),
    };
    problem *p = problem_create(2, 5, 3);
    fill_case(p, find_case("random"), 5);
    call_options options = options_of(STATE_BOTH, false);
    call c;
    must(call_open(&c, p, options));
    must(call_run(&c));
    uint16_t *want = call_read_out(&c);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        flash_kda_fwd_params old = c.params;
        old.struct_size = sizes[i];
        memset((char *)&old + sizes[i], 0x7f, sizeof old - sizes[i]);
        size_t bytes = 0;
        void *workspace;
        trying("a struct of %zu bytes", sizes[i]);
        call_poison(&c);
        CHECK(flash_kda_fwd_workspace_size(&old, &bytes) == FLASH_KDA_OK, "%s", flash_kda_last_error());
        must(flash_kda_malloc(test.device, bytes, &workspace));
        old.workspace = workspace;
        old.workspace_size = bytes;
        CHECK(flash_kda_fwd(&old) == FLASH_KDA_OK, "%s", flash_kda_last_error());
        must(flash_kda_synchronize(test.device, NULL));
        uint16_t *got = call_read_out(&c);
        const bool by_name = sizes[i] > offsetof(flash_kda_fwd_params, kernel);
        CHECK(!by_name || memcmp(got, want, (size_t)c.rows * DIM * 2) == 0, "out differs");
        CHECK(!call_damage(&c, p), "something else was written");
        free(got);
        must(flash_kda_free(test.device, workspace));
    }
    free(want);
    call_close(&c);
    problem_free(p);
}

/* ---- The calls ----------------------------------------------------------------------------------------- */

static void open_calls(void)
{
    static const int64_t lengths[] = {32, 48}, indices[] = {3, 1}, offsets[] = {32, 16, 48, 0},
                         row_indices[] = {5, 0, 2, 1}, starts[] = {4, 0};
    problem *p = pooled_problem = problem_create_ragged(lengths, 2, 2), *q;
    problem_group_heads(p, 2);
    fill_case(p, find_case("random"), 1);
    p->gate = FLASH_KDA_GATE_SOFTPLUS;
    widen_gates(p, 2);
    widen_betas(p, 3);
    q = every_problem = problem_copy(p);
    problem_make_pool(p, 4);
    memcpy(p->state_indices, indices, sizeof indices);
    p->first_slot = 1;
    p->has_initial_state = allocate(2, 1);
    p->has_initial_state[1] = 1;
    p->checkpoint_rows = q->checkpoint_rows = 6;
    p->checkpoint_columns = 2;
    p->checkpoint_offsets = copied(offsets, 4);
    p->checkpoint_indices = copied(row_indices, 4);
    q->gate = FLASH_KDA_GATE_BOUNDED;
    q->checkpoint_every = 16;
    q->checkpoint_starts = copied(starts, 2);
    call_options options = options_of(STATE_BOTH, false);
    options.for_reference = true; /* whether or not a kernel takes all of this */
    options.counts_nonfinite = true;
    must(call_open(&every, q, options));
    options.i32_offsets = options.i32_checkpoint_rows = options.bf16_checkpoints = true;
    must(call_open(&pooled, p, options));
}

static void arguments(void)
{
    open_calls();
    shapes();
    overflowing_sizes();
    dtypes();
    strides();
    alignment();
    kinds();
    combinations();
    shared_memory();
    numbers();
    allowed();
    older_structs();
    call_close(&pooled);
    call_close(&every);
    problem_free(pooled_problem);
    problem_free(every_problem);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"arguments", arguments}};
    harness_start(argc, argv);
    return harness_run(groups, 1);
}
