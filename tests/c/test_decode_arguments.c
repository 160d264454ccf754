/* Wrong arguments of flash_kda_decode(), flash_kda_apply() and flash_kda_decode_reference() are refused with
 * their sentences, and nothing is written. What is allowed is not refused. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "decode_call.h"
#include "harness.h"
#include "refusals.h"

/* `packed` has two sequences of 2 and 3 tokens, which write each state: H = 1, HV = 2, S = 4, P = 3, R = 5, A
 * = 4 and 12 slots. `rows` has three sequences of 2 tokens, which write their last states into slots without
 * indices: R = 2. */
static decode_problem packed_problem, rows_problem;
static decode_call packed, rows;
/* `packed` and `rows` with written_states: 9 slots with indices of W = 4 columns and a tree, and 4 slots
 * without indices. */
static decode_problem apart_problem, plain_problem;
static decode_call apart, plain;

/* ---- Refusals ------------------------------------------------------------------------------------------ */

static void check_refusal(const decode_call *c, flash_kda_status got, flash_kda_status want,
                          const char *sentence)
{
    expect_sentence(got, want, sentence);
    must(flash_kda_synchronize(test.device, NULL));
    CHECK(decode_call_untouched(c), "a tensor was written");
}

static void refuses_decode(const decode_call *c, const flash_kda_decode_params *p, flash_kda_status want,
                           const char *sentence)
{
    trying("expected: %s", sentence);
    check_refusal(c, flash_kda_decode(p), want, sentence);
}

static void refuses_apply(const decode_call *c, const flash_kda_apply_params *p, flash_kda_status want,
                          const char *sentence)
{
    trying("expected of apply: %s", sentence);
    check_refusal(c, flash_kda_apply(p), want, sentence);
}

#define OF_DECODE(c, status, sentence, ...)                                                                  \
    do {                                                                                                     \
        flash_kda_decode_params p = (c).decode;                                                              \
        __VA_ARGS__;                                                                                         \
        refuses_decode(&(c), &p, FLASH_KDA_##status, sentence);                                              \
    } while (0)
#define OF_APPLY(c, status, sentence, ...)                                                                   \
    do {                                                                                                     \
        flash_kda_apply_params p = (c).apply;                                                                \
        __VA_ARGS__;                                                                                         \
        refuses_apply(&(c), &p, FLASH_KDA_##status, sentence);                                               \
    } while (0)
#define PACKED(sentence, ...) OF_DECODE(packed, INVALID_VALUE, sentence, __VA_ARGS__)
#define ROWS(sentence, ...) OF_DECODE(rows, INVALID_VALUE, sentence, __VA_ARGS__)
#define APART(sentence, ...) OF_DECODE(apart, INVALID_VALUE, sentence, __VA_ARGS__)
#define PLAIN(sentence, ...) OF_DECODE(plain, INVALID_VALUE, sentence, __VA_ARGS__)
#define APPLY(sentence, ...) OF_APPLY(packed, INVALID_VALUE, sentence, __VA_ARGS__)

static const char *const FROM_SEQLENS = ", with N from the 3 entries of cu_seqlens";

/* ---- Structs ------------------------------------------------------------------------------------------- */

static void structs(void)
{
    refuses_decode(&rows, NULL, FLASH_KDA_INVALID_VALUE,
                   "params is null; it must point to a flash_kda_decode_params");
    refuses_apply(&packed, NULL, FLASH_KDA_INVALID_VALUE,
                  "params is null; it must point to a flash_kda_apply_params");
    const size_t sizes[] = {0, offsetof(flash_kda_decode_params, kernel) - 8, sizeof rows.decode + 8,
                            sizeof rows.decode - 4};
    for (int i = 0; i < 4; i++)
        ROWS(text("params->struct_size is %zu; it must be sizeof(flash_kda_decode_params) = %zu (in older "
                  "headers %zu or more)",
                  sizes[i], sizeof rows.decode, offsetof(flash_kda_decode_params, kernel)),
             p.struct_size = sizes[i]);
    const size_t of_apply[] = {0, offsetof(flash_kda_apply_params, kernel) - 8, sizeof packed.apply + 8,
                               sizeof packed.apply - 4};
    for (int i = 0; i < 4; i++)
        APPLY(text("params->struct_size is %zu; it must be sizeof(flash_kda_apply_params) = %zu (in older "
                   "headers %zu or more)",
                   of_apply[i], sizeof packed.apply, offsetof(flash_kda_apply_params, kernel)),
              p.struct_size = of_apply[i]);
}

/* ---- Shapes -------------------------------------------------------------------------------------------- */

static void shapes(void)
{
    ROWS("q has 3 dimensions; it must have 4: [N, T, H, K]", p.q.ndim = 3);
    PACKED("q has 3 dimensions; it must have 4: [1, total, H, K]", p.q.ndim = 3);
    ROWS("v has 5 dimensions; it must have 4: [N, T, HV, V]", p.v.ndim = 5);
    ROWS("q has size -1 in dimension 1; sizes must not be negative", p.q.shape[1] = -1);
    ROWS("q has K = 64; the head size K must be 128", p.q.shape[3] = 64);
    ROWS("v has V = 256; the head size V must be 128", p.v.shape[3] = 256);
    ROWS("q has H = 0; there must be at least 1 head", p.q.shape[2] = 0);
    ROWS("v has HV = 3 heads and q has H = 2; HV must be a multiple of H", p.v.shape[2] = 3,
         p.q.shape[2] = 2);
    ROWS("q has N = 0; there must be at least 1 sequence", p.q.shape[0] = 0);
    ROWS("q has T = 17; there must be at most 16 tokens", p.q.shape[1] = 17);
    PACKED("cu_seqlens is given and the first size of q is 2; it must be 1, all sequences in one row",
           p.q.shape[0] = 2);
    PACKED("cu_seqlens has 1 entries; it must have N + 1 for N >= 1 sequences", p.cu_seqlens.shape[0] = 1);
    PACKED("cu_seqlens has 2 dimensions; it must have 1: [N + 1]", p.cu_seqlens.ndim = 2);
    ROWS("k has shape [3, 1, 1, 128]; it must be [N, T, H, K] = [3, 2, 1, 128]", p.k.shape[1] = 1);
    PACKED("v has shape [1, 4, 2, 128]; it must be [1, total, HV, V] = [1, 5, 2, 128]", p.v.shape[1] = 4);
    ROWS("g has shape [3, 2, 1, 128]; it must be [N, T, HV, K] = [3, 2, 2, 128]", p.g.shape[2] = 1);
    PACKED("g has 3 dimensions; it must have 4: [1, total, HV, K]", p.g.ndim = 3);
    ROWS("beta has shape [3, 2, 1]; it must be [N, T, HV] = [3, 2, 2]", p.beta.shape[2] = 1);
    PACKED("beta has shape [1, 6, 2]; it must be [1, total, HV] = [1, 5, 2]", p.beta.shape[1] = 6);
    ROWS("out has shape [2, 2, 2, 128]; it must be [N, T, HV, V] = [3, 2, 2, 128]", p.out.shape[0] = 2);
    ROWS("A_log has shape [3]; it must have HV = 2 elements", p.A_log.shape[0] = 3);
    ROWS("dt_bias has shape [2, 64]; it must have HV * K = 256 elements", p.dt_bias.shape[1] = 64);
    ROWS("state has shape [3, 1, 128, 128]; it must be [slots, HV, V, K] = [3, 2, 128, 128]",
         p.state.shape[1] = 1);
    ROWS("state has 3 dimensions; it must have 4: [slots, HV, K, V]", p.state.ndim = 3, p.state_k_first = 1);
    ROWS("state has 2 slots; without state_indices it must have one for each of N = 3 sequences",
         p.state.shape[0] = 2);
    PACKED(text("state_indices has shape [3, 4]; it must be [N, S] = [2, 4]%s", FROM_SEQLENS),
           p.state_indices.shape[0] = 3);
    PACKED("state_indices has 1 dimensions; it must have 2: [N, S]", p.state_indices.ndim = 1);
    PACKED("state_indices has 2 dimensions; it must have 1: [N]", p.write_states = FLASH_KDA_WRITE_NONE,
           p.num_accepted_tokens.data = NULL);
    PACKED("state_indices has S = 0; it must have at least the slot that a sequence starts from",
           p.state_indices.shape[1] = 0);
    PACKED("state_indices has S = 2147483584; it must be at most 2147483583",
           p.state_indices.shape[1] = p.state_indices.stride[0] = INT32_MAX - 63);
    PACKED(text("num_accepted_tokens has shape [1]; it must be [N] = [2]%s", FROM_SEQLENS),
           p.num_accepted_tokens.shape[0] = 1);
    PACKED(text("parents has shape [1, 3]; it must be [N, P] = [2, 3]%s", FROM_SEQLENS),
           p.parents.shape[0] = 1);
    PACKED("parents has P = 2147483584; it must be at most 2147483583",
           p.parents.shape[1] = p.parents.stride[0] = INT32_MAX - 63);
    PACKED("parents has size -3 in dimension 1; sizes must not be negative", p.parents.shape[1] = -3);
    ROWS("records has R = 1; it must be at least T = 2", p.records.shape[1] = 1, p.records.stride[0] = 768);
    ROWS("records has shape [3, 2, 2, 128]; it must be [N, R, HV, 3 * K] = [3, 2, 2, 384]",
         p.records.shape[3] = 128);
    ROWS("records has 2 dimensions; it must have 4: [N, R, HV, 3 * K]", p.records.ndim = 2);
    PACKED("rounding has shape [3]; it must be [2] = [2]", p.rounding.shape[0] = 3);
    /* Columns that are too few for the tokens of each sequence. */
    flash_kda_tensor two_by_one = rows.decode.records;
    two_by_one.dtype = FLASH_KDA_I64;
    two_by_one.ndim = 2;
    two_by_one.shape[0] = 3;
    two_by_one.shape[1] = two_by_one.stride[0] = two_by_one.stride[1] = 1;
    ROWS("parents has P = 1; it must be at least T = 2", p.parents = two_by_one,
         p.write_states = FLASH_KDA_WRITE_NONE, p.records.data = NULL);
    ROWS("state_indices has S = 1; it must be at least T = 2", p.state_indices = two_by_one,
         p.write_states = FLASH_KDA_WRITE_EACH, p.records.data = NULL);
}

static void shapes_of_written(void)
{
    APART("written_states has 3 dimensions; it must have 4: [slots2, HV, V, K]", p.written_states.ndim = 3);
    APART("written_states has shape [9, 2, 128, 64]; it must be [slots2, HV, K, V] = [9, 2, 128, 128]",
          p.written_states.shape[3] = 64, p.state_k_first = 1);
    PLAIN("written_states has shape [4, 1, 128, 128]; it must be [slots2, HV, V, K] = [4, 2, 128, 128]",
          p.written_states.shape[1] = 1);
    PLAIN(
        "written_states has 2 slots; without written_indices it must have one for each of the 3 states that "
        "are written",
        p.written_states.shape[0] = 2);
    PLAIN(
        "written_states has 4 slots; without written_indices it must have one for each of the 6 states that "
        "are written",
        p.write_states = FLASH_KDA_WRITE_EACH);
    APART(
        "written_states has 4 slots; without written_indices it must have one for each of the 5 states that "
        "are written",
        p.written_indices.data = NULL, p.written_states.shape[0] = 4);
    APART(text("written_indices has shape [3, 4]; it must be [N, W] = [2, 4]%s", FROM_SEQLENS),
          p.written_indices.shape[0] = 3);
    APART("written_indices has 1 dimensions; it must have 2: [N, W]", p.written_indices.ndim = 1);
    APART("written_indices has 2 dimensions; it must have 1: [N]", p.write_states = FLASH_KDA_WRITE_LAST,
          p.parents.data = NULL);
    APART("written_indices has W = 2147483584; it must be at most 2147483583",
          p.written_indices.shape[1] = p.written_indices.stride[0] = INT32_MAX - 63);
    APART("state_indices has 2 dimensions; it must have 1: [N]",
          p.state_indices = packed.decode.state_indices);
    /* Without the second pool, slots of tokens are state_indices. */
    APART("state_indices has 1 dimensions; it must have 2: [N, S]",
          p.written_states.data = p.written_indices.data = NULL);
    flash_kda_tensor one_column = apart.decode.written_indices;
    one_column.shape[0] = 3;
    one_column.shape[1] = one_column.stride[0] = 1;
    PLAIN("written_indices has W = 1; it must be at least T = 2", p.written_indices = one_column,
          p.write_states = FLASH_KDA_WRITE_EACH);
}

static void shapes_of_apply(void)
{
    APPLY("records has 3 dimensions; it must have 4: [N, R, HV, 3 * K]", p.records.ndim = 3);
    APPLY("records has shape [2, 5, 2, 256]; it must be [N, R, HV, 3 * K] = [2, 5, 2, 384]",
          p.records.shape[3] = 256);
    APPLY("records has N = 0; there must be at least 1 sequence", p.records.shape[0] = 0);
    APPLY("records has HV = 0; there must be at least 1 head", p.records.shape[2] = 0);
    APPLY("records has R = 2147483584; it must be at most 2147483583", p.records.shape[1] = INT32_MAX - 63,
          p.records.stride[1] = 384, p.records.shape[0] = p.records.shape[2] = 1);
    APPLY("num_accepted_tokens has shape [3]; it must be [N] = [2]", p.num_accepted_tokens.shape[0] = 3);
    APPLY("accepted has shape [1, 4]; it must be [N, A] = [2, 4]", p.accepted.shape[0] = 1);
    APPLY("accepted has 1 dimensions; it must have 2: [N, A]", p.accepted.ndim = 1);
    APPLY("accepted has A = 2147483584; it must be at most 2147483583",
          p.accepted.shape[1] = p.accepted.stride[0] = INT32_MAX - 63);
    APPLY("state has shape [12, 1, 128, 128]; it must be [slots, HV, V, K] = [12, 2, 128, 128]",
          p.state.shape[1] = 1);
    APPLY("state has 1 slots; without state_indices it must have one for each of N = 2 sequences",
          p.state.shape[0] = 1, p.state_indices.data = NULL, p.first_slot = 0);
    APPLY("state_indices has shape [1]; it must be [N] = [2]", p.state_indices.shape[0] = 1);
    APPLY("rounding has 0 dimensions; it must have 1: [2]", p.rounding.ndim = 0);
}

/* Sizes of which products do not fit 64 bits, or a tensor no memory. */
static void overflowing_sizes(void)
{
    const long long huge = 1LL << 62;
    ROWS(
        text("q has N * T = %lld * 2 tokens and v has HV = 2 heads; there must be at most 2147482623 tokens, "
             "and a tensor must fit in memory",
             huge),
        p.q.shape[0] = huge);
    PACKED(
        text("q has 1 * T = 1 * %lld tokens and v has HV = 2 heads; there must be at most 2147482623 tokens, "
             "and a tensor must fit in memory",
             (long long)INT64_MAX),
        p.q.shape[1] = INT64_MAX);
    PACKED("there are N * HV = 2147483647 * 2 states; there must be at most 2147482623",
           p.cu_seqlens.shape[0] = 1LL << 31);
    PACKED(text("there are N * HV = %lld * 2 states; there must be at most 2147482623",
                (long long)INT64_MAX - 1),
           p.cu_seqlens.shape[0] = INT64_MAX);
    ROWS("q has N * T = 3 * 2 tokens and v has HV = 4611686018427387904 heads; there must be at most "
         "2147482623 "
         "tokens, and a tensor must fit in memory",
         p.v.shape[2] = huge);
    ROWS(text("state has shape [%lld, 2, 128, 128]; a tensor must fit in memory", huge),
         p.state.shape[0] = huge);
    PACKED(text("state_indices has shape [2, %lld]; a tensor must fit in memory", huge),
           p.state_indices.shape[1] = huge);
    PACKED(text("parents has shape [2, %lld]; a tensor must fit in memory", (long long)INT64_MAX),
           p.parents.shape[1] = INT64_MAX);
    PACKED(text("records has shape [2, %lld, 2, 384]; a tensor must fit in memory", huge),
           p.records.shape[1] = huge);
    ROWS(text("state has stride %lld in dimension 0; the tensor must fit in memory", huge),
         p.state.stride[0] = huge);
    ROWS(text("q has stride %lld in dimension 0; the tensor must fit in memory", (long long)INT64_MIN),
         p.q.stride[0] = INT64_MIN);
    APPLY(text("records has shape [2, 5, %lld, 384]; a tensor must fit in memory", huge),
          p.records.shape[2] = huge);
    APPLY("there are N * HV = 1073741824 * 2 states; there must be at most 2147482623",
          p.records.shape[0] = 1 << 30, p.records.shape[1] = 0);
    APPLY(text("accepted has shape [2, %lld]; a tensor must fit in memory", huge),
          p.accepted.shape[1] = huge);
}

/* ---- Types and strides --------------------------------------------------------------------------------- */

#define DTYPE(c, tensor, type, sentence)                                                                     \
    OF_DECODE(c, INVALID_DTYPE, #tensor " has dtype " sentence, p.tensor.dtype = FLASH_KDA_##type)
#define DTYPE_OF_APPLY(tensor, type, sentence)                                                               \
    OF_APPLY(packed, INVALID_DTYPE, #tensor " has dtype " sentence, p.tensor.dtype = FLASH_KDA_##type)

static void dtypes(void)
{
    DTYPE(rows, q, F32, "float32; it must be bfloat16");
    DTYPE(rows, k, F16, "float16; it must be bfloat16");
    DTYPE(rows, v, F64, "float64; it must be bfloat16");
    DTYPE(rows, g, F16, "float16; it must be bfloat16 or float32");
    DTYPE(rows, beta, I32, "int32; it must be bfloat16 or float32");
    DTYPE(rows, out, F32, "float32; it must be bfloat16");
    DTYPE(rows, A_log, BF16, "bfloat16; it must be float32");
    DTYPE(rows, dt_bias, BF16, "bfloat16; it must be float32");
    DTYPE(rows, state, F16, "float16; it must be float32 or bfloat16");
    DTYPE(rows, records, BF16, "bfloat16; it must be float32");
    DTYPE(packed, state_indices, F32, "float32; it must be int64 or int32");
    DTYPE(packed, num_accepted_tokens, BOOL, "bool; it must be int64 or int32");
    DTYPE(packed, cu_seqlens, F64, "float64; it must be int64 or int32");
    DTYPE(packed, parents, OTHER, "another type; it must be int64 or int32");
    DTYPE(packed, rounding, I32, "int32; it must be int64");
    DTYPE(plain, written_states, F16, "float16; it must be float32 or bfloat16");
    DTYPE(plain, written_states, BF16, "bfloat16 and state has dtype float32; they must have one dtype");
    DTYPE(apart, written_states, F32, "float32 and state has dtype bfloat16; they must have one dtype");
    DTYPE(apart, written_indices, F32, "float32; it must be int64 or int32");
    DTYPE_OF_APPLY(records, F16, "float16; it must be float32");
    DTYPE_OF_APPLY(num_accepted_tokens, F32, "float32; it must be int64 or int32");
    DTYPE_OF_APPLY(accepted, BF16, "bfloat16; it must be int64 or int32");
    DTYPE_OF_APPLY(state, F64, "float64; it must be float32 or bfloat16");
    DTYPE_OF_APPLY(state_indices, BOOL, "bool; it must be int64 or int32");
    DTYPE_OF_APPLY(rounding, I32, "int32; it must be int64");
}

static void strides(void)
{
    ROWS("k has strides [256, 128, 128, 2]; its last dimension must be contiguous, with stride 1",
         p.k.stride[3] = 2);
    ROWS("out has stride 64 in dimension 2; its elements must not share memory, so it must be at least 128",
         p.out.stride[2] = 64);
    ROWS("state has stride 32760 in dimension 0; its elements must not share memory, so it must be at least "
         "32768",
         p.state.stride[0] = 32760);
    ROWS("state has strides [32768, 16384, 1, 128]; all but its first dimension must be contiguous, with "
         "strides "
         "[16384, 128, 1]",
         p.state.stride[2] = 1, p.state.stride[3] = 128);
    ROWS("records has strides [2000, 768, 384, 1]; it must be contiguous, with strides [1536, 768, 384, 1]",
         p.records.stride[0] = 2000);
    PACKED("state_indices has strides [5, 1]; it must be contiguous, with strides [4, 1]",
           p.state_indices.stride[0] = 5);
    PACKED("num_accepted_tokens has strides [2]; it must be contiguous, with strides [1]",
           p.num_accepted_tokens.stride[0] = 2);
    PACKED("cu_seqlens has strides [-1]; it must be contiguous, with strides [1]",
           p.cu_seqlens.stride[0] = -1);
    PACKED("parents has strides [1, 2]; it must be contiguous, with strides [3, 1]", p.parents.stride[0] = 1,
           p.parents.stride[1] = 2);
    PACKED("rounding has strides [0]; it must be contiguous, with strides [1]", p.rounding.stride[0] = 0);
    ROWS("A_log has strides [3]; it must be contiguous, with strides [1]", p.A_log.stride[0] = 3);
    ROWS("dt_bias has strides [256, 1]; it must be contiguous, with strides [128, 1]",
         p.dt_bias.stride[0] = 256);
    APPLY("records has strides [4000, 768, 384, 1]; it must be contiguous, with strides [3840, 768, 384, 1]",
          p.records.stride[0] = 4000);
    APPLY("num_accepted_tokens has strides [0]; it must be contiguous, with strides [1]",
          p.num_accepted_tokens.stride[0] = 0);
    APPLY("accepted has strides [5, 1]; it must be contiguous, with strides [4, 1]",
          p.accepted.stride[0] = 5);
    APPLY("state has stride 0 in dimension 0; its elements must not share memory, so it must be at least 1",
          p.state.stride[0] = 0);
    APPLY("state_indices has strides [7]; it must be contiguous, with strides [1]",
          p.state_indices.stride[0] = 7);
    APPLY("rounding has strides [2]; it must be contiguous, with strides [1]", p.rounding.stride[0] = 2);
    PLAIN("written_states has stride 32760 in dimension 0; its elements must not share memory, so it must be "
          "at least 32768",
          p.written_states.stride[0] = 32760);
    PLAIN(
        "written_states has strides [32768, 16384, 1, 128]; all but its first dimension must be contiguous, "
        "with strides [16384, 128, 1]",
        p.written_states.stride[2] = 1, p.written_states.stride[3] = 128);
    APART("written_indices has strides [5, 1]; it must be contiguous, with strides [4, 1]",
          p.written_indices.stride[0] = 5);
    if (test.device.type != FLASH_KDA_CUDA) return;
    PLAIN("written_states has stride 32770 in dimension 0; on a GPU it must be a multiple of 16 bytes, which "
          "are 4 elements, and not negative",
          p.written_states.stride[0] = 32770);
    ROWS("q has stride 129 in dimension 1; on a GPU it must be a multiple of 16 bytes, which are 8 elements, "
         "and "
         "not negative",
         p.q.stride[1] = 129);
    ROWS("state has stride 32770 in dimension 0; on a GPU it must be a multiple of 16 bytes, which are 4 "
         "elements, and not negative",
         p.state.stride[0] = 32770);
    APPLY("state has stride 32772 in dimension 0; on a GPU it must be a multiple of 16 bytes, which are 8 "
          "elements, and not negative",
          p.state.stride[0] = 32772);
}

static void alignment(void)
{
    MISALIGNED(ROWS, q, 8, 16);
    MISALIGNED(ROWS, k, 2, 16);
    MISALIGNED(ROWS, v, 4, 16);
    MISALIGNED(ROWS, g, 8, 16);
    MISALIGNED(ROWS, beta, 1, 2);
    MISALIGNED(ROWS, out, 8, 16);
    MISALIGNED(ROWS, A_log, 2, 4);
    MISALIGNED(ROWS, dt_bias, 4, 16);
    MISALIGNED(ROWS, state, 8, 16);
    MISALIGNED(ROWS, records, 8, 16);
    MISALIGNED(PACKED, state_indices, 4, 8);
    MISALIGNED(PACKED, num_accepted_tokens, 2, 4);
    MISALIGNED(PACKED, cu_seqlens, 4, 8);
    MISALIGNED(PACKED, parents, 4, 8);
    MISALIGNED(PACKED, rounding, 4, 8);
    MISALIGNED(PLAIN, written_states, 8, 16);
    MISALIGNED(APART, written_indices, 4, 8);
    MISALIGNED(APPLY, records, 4, 16);
    MISALIGNED(APPLY, num_accepted_tokens, 2, 4);
    MISALIGNED(APPLY, accepted, 4, 8);
    MISALIGNED(APPLY, state, 8, 16);
    MISALIGNED(APPLY, state_indices, 1, 8);
    MISALIGNED(APPLY, rounding, 4, 8);
}

static void absent(void)
{
    ROWS("q is null; it must point to its 1536 bytes", p.q.data = NULL);
    ROWS("k is null; it must point to its 1536 bytes", p.k.data = NULL);
    ROWS("v is null; it must point to its 3072 bytes", p.v.data = NULL);
    ROWS("g is null; it must point to its 3072 bytes", p.g.data = NULL);
    ROWS("beta is null; it must point to its 24 bytes", p.beta.data = NULL);
    ROWS("out is null; it must point to its 3072 bytes", p.out.data = NULL);
    ROWS("state is null; it must point to its 393216 bytes", p.state.data = NULL);
    APPLY("records is null; it must point to its 30720 bytes", p.records.data = NULL);
    APPLY("num_accepted_tokens is null; it must point to its 8 bytes", p.num_accepted_tokens.data = NULL);
    APPLY("state is null; it must point to its 786432 bytes", p.state.data = NULL);
}

/* ---- Numbers and flags --------------------------------------------------------------------------------- */

/* Makes of a call that writes records one that applies them. */
static void take_past(flash_kda_decode_params *p)
{
    p->write_states = FLASH_KDA_WRITE_NONE;
    p->past_records = p->records;
    p->records.data = NULL;
    p->num_accepted_tokens = rows.apply.num_accepted_tokens;
}

static void past_records(void)
{
    ROWS("past_records is given without FLASH_KDA_WRITE_NONE; it must be absent", take_past(&p),
         p.write_states = FLASH_KDA_WRITE_LAST);
    ROWS("num_accepted_tokens is absent; it must be given with past_records", take_past(&p),
         p.num_accepted_tokens.data = NULL);
    ROWS("accepted is given without past_records; it must be absent", p.accepted = packed.apply.accepted);
    ROWS("past_records has shape [3, 2, 2, 128]; it must be [N, R, HV, 3 * K] = [3, 2, 2, 384]",
         take_past(&p), p.past_records.shape[3] = 128);
    ROWS("past_records has 2 dimensions; it must have 4: [N, R, HV, 3 * K]", take_past(&p),
         p.past_records.ndim = 2);
    ROWS("past_records has R = 2147483584; it must be at most 2147483583", take_past(&p),
         p.past_records.shape[1] = INT32_MAX - 63, p.past_records.stride[0] = (INT32_MAX - 63) * 768LL);
    ROWS("num_accepted_tokens has shape [2]; it must be [N] = [3]", take_past(&p),
         p.num_accepted_tokens = packed.apply.num_accepted_tokens);
    ROWS("accepted has shape [2, 4]; it must be [N, A] = [3, 4]", take_past(&p),
         p.accepted = packed.apply.accepted);
    ROWS("records overlaps past_records; it must have memory of its own", take_past(&p),
         p.records = p.past_records);
    ROWS("state overlaps past_records; it must have memory of its own", take_past(&p),
         p.past_records.data = p.state.data);
    ROWS("out overlaps accepted; it must have memory of its own", take_past(&p),
         p.accepted = rows.apply.num_accepted_tokens, p.accepted.ndim = 2, p.accepted.shape[1] = 1,
         p.accepted.stride[0] = p.accepted.stride[1] = 1, p.accepted.data = p.out.data);
}

static void options(void)
{
    WRONG_OPTIONS(ROWS);
    WRONG_DECODE_OPTIONS(ROWS);
    ROWS("num_accepted_tokens is given without FLASH_KDA_WRITE_EACH; it must be absent",
         p.num_accepted_tokens = packed.decode.num_accepted_tokens);
    ROWS("parents is given with FLASH_KDA_WRITE_LAST; a tree has no last state, so it must be absent",
         p.parents = packed.decode.parents);
    PLAIN("written_states is given with FLASH_KDA_WRITE_NONE; it must be absent",
          p.write_states = FLASH_KDA_WRITE_NONE);
    APART("written_indices is given without written_states; it must be absent", p.written_states.data = NULL);
    APART("num_accepted_tokens is given with written_states; it must be absent",
          p.num_accepted_tokens = packed.decode.num_accepted_tokens);
    APPLY("state_k_first is 2; it must be 0 or 1", p.state_k_first = 2);
    APPLY("cpu_threads is -1; it must be 0 (all) or more", p.cpu_threads = -1);
    APPLY("first_slot is -3; it must be 0 or more", p.first_slot = -3);
    APPLY("first_slot is 1 without state_indices; it must be 0", p.state_indices.data = NULL);
    APPLY(text("interrupt is at address %p; it must be aligned to 4 bytes", (const void *)unaligned_word()),
          p.interrupt = unaligned_word());
}

static void devices(void)
{
    ROWS("device type is 7; it must be FLASH_KDA_CPU or FLASH_KDA_CUDA", p.device.type = 7);
    APPLY("device type is -1; it must be FLASH_KDA_CPU or FLASH_KDA_CUDA", p.device.type = -1);
    if (test.device.type != FLASH_KDA_CPU) return;
    ROWS("device index is 1; the CPU's must be 0", p.device.index = 1);
    flash_kda_decode_params p = rows.decode;
    p.kernel = "quick";
    trying("a kernel that there is not");
    CHECK(flash_kda_decode(&p) == FLASH_KDA_INVALID_VALUE, "it is taken");
    CHECK(strncmp(flash_kda_last_error(), "kernel is \"quick\"; it must be NULL or one of cpu", 46) == 0,
          "the sentence is: %s", flash_kda_last_error());
    CHECK(decode_call_untouched(&rows), "a tensor was written");
}

/* A call that is interrupted before it begins writes nothing. */
static void interrupted(void)
{
    static const volatile int32_t now = 1;
    const char *sentence = "*interrupt is not 0, so the call was given up before it began";
    if (test.device.type != FLASH_KDA_CPU) return;
    OF_DECODE(rows, INTERRUPTED, sentence, p.interrupt = &now);
    OF_APPLY(packed, INTERRUPTED, sentence, p.interrupt = &now);
}

/* ---- Memory that is shared ----------------------------------------------------------------------------- */

/* Whether a call is refused because tensors overlap. Nothing is computed in any case: the kernel, which is
 * looked for later, is a wrong one. */
static bool overlaps(flash_kda_decode_params p)
{
    p.kernel = "none";
    CHECK(flash_kda_decode(&p) == FLASH_KDA_INVALID_VALUE, "no refusal");
    return strstr(flash_kda_last_error(), "it must have memory of its own");
}

static bool apply_overlaps(flash_kda_apply_params p)
{
    p.kernel = "none";
    CHECK(flash_kda_apply(&p) == FLASH_KDA_INVALID_VALUE, "no refusal");
    return strstr(flash_kda_last_error(), "it must have memory of its own");
}

/* Every output on every other tensor. */
static void shared_tensors(const decode_call *c)
{
    flash_kda_decode_params p = c->decode;
    const bool has_written = p.written_states.data;
    flash_kda_tensor *const all[] = {&p.out,
                                     &p.records,
                                     has_written ? &p.written_states : &p.state,
                                     has_written ? &p.state : &p.written_states,
                                     &p.written_indices,
                                     &p.q,
                                     &p.k,
                                     &p.v,
                                     &p.g,
                                     &p.beta,
                                     &p.A_log,
                                     &p.dt_bias,
                                     &p.state_indices,
                                     &p.num_accepted_tokens,
                                     &p.cu_seqlens,
                                     &p.parents,
                                     &p.rounding};
    enum { OUTPUTS = 3, ALL = sizeof all / sizeof *all };
    for (int a = 0; a < OUTPUTS; a++)
        for (int b = a + 1; b < ALL; b++) {
            if (!all[a]->data || !all[b]->data) continue;
            void *const before = all[b]->data;
            all[b]->data = (char *)all[a]->data + 16;
            trying("output %d and tensor %d share memory", a, b);
            CHECK(overlaps(p), "it says: %s", flash_kda_last_error());
            all[b]->data = before;
        }
    trying("nothing is shared");
    CHECK(!overlaps(p), "it says: %s", flash_kda_last_error());
    CHECK(decode_call_untouched(c), "a tensor was written");
}

static void shared_memory(void)
{
    shared_tensors(&rows);
    shared_tensors(&packed);
    shared_tensors(&plain);
    shared_tensors(&apart);
    flash_kda_decode_params verify = rows.decode;
    verify.write_states = FLASH_KDA_WRITE_NONE;
    verify.rounding = rows.decode.A_log;
    verify.rounding.data = (char *)verify.state.data + 64;
    verify.rounding.dtype = FLASH_KDA_I64;
    trying("an input in a pool that is not written");
    CHECK(!overlaps(verify), "it says: %s", flash_kda_last_error());
    verify = plain.decode;
    verify.rounding = plain.decode.A_log;
    verify.rounding.data = (char *)verify.state.data + 64;
    verify.rounding.dtype = FLASH_KDA_I64;
    trying("an input in a pool beside written_states");
    CHECK(!overlaps(verify), "it says: %s", flash_kda_last_error());
    flash_kda_apply_params p = packed.apply;
    flash_kda_tensor *const inputs[] = {&p.records, &p.num_accepted_tokens, &p.accepted, &p.state_indices,
                                        &p.rounding};
    for (int i = 0; i < 5; i++) {
        void *const before = inputs[i]->data;
        inputs[i]->data = (char *)p.state.data + 16;
        trying("the pool and tensor %d of apply share memory", i);
        CHECK(apply_overlaps(p), "it says: %s", flash_kda_last_error());
        inputs[i]->data = before;
    }
    CHECK(!apply_overlaps(p), "it says: %s", flash_kda_last_error());
}

/* ---- Numbers in tensors, which are looked at on the CPU ------------------------------------------------ */

static void expect_wrong(const decode_call *c, bool of_apply, size_t at, const int64_t *numbers,
                         int64_t count, const char *sentence)
{
    int64_t wide[16];
    int32_t narrow[16];
    flash_kda_decode_params p = c->decode;
    flash_kda_apply_params a = c->apply;
    flash_kda_tensor *t = (flash_kda_tensor *)((of_apply ? (char *)&a : (char *)&p) + at);
    bool fits = true;
    for (int64_t i = 0; i < count; i++) {
        wide[i] = numbers[i];
        narrow[i] = (int32_t)numbers[i];
        fits &= narrow[i] == numbers[i];
    }
    for (int is_i32 = 0; is_i32 <= fits; is_i32++) {
        t->data = is_i32 ? (void *)narrow : (void *)wide;
        t->dtype = is_i32 ? FLASH_KDA_I32 : FLASH_KDA_I64;
        if (of_apply) {
            refuses_apply(c, &a, FLASH_KDA_INVALID_VALUE, sentence);
            continue;
        }
        refuses_decode(c, &p, FLASH_KDA_INVALID_VALUE, sentence);
        double out[16 * 2 * DIM] = {0};
        CHECK(flash_kda_decode_reference(&p, out, NULL) == FLASH_KDA_INVALID_VALUE, "the reference takes it");
        CHECK(strcmp(flash_kda_last_error(), sentence) == 0, "the reference says: %s",
              flash_kda_last_error());
        CHECK(out[0] == 0.0, "the reference wrote to out64");
    }
}

#define WRONG(tensor, sentence, ...)                                                                         \
    do {                                                                                                     \
        const int64_t numbers[] = {__VA_ARGS__};                                                             \
        expect_wrong(&packed, false, offsetof(flash_kda_decode_params, tensor), numbers,                     \
                     sizeof numbers / sizeof *numbers, sentence);                                            \
    } while (0)
#define WRONG_WRITTEN(sentence, ...)                                                                         \
    do {                                                                                                     \
        const int64_t numbers[] = {__VA_ARGS__};                                                             \
        expect_wrong(&apart, false, offsetof(flash_kda_decode_params, written_indices), numbers,             \
                     sizeof numbers / sizeof *numbers, sentence);                                            \
    } while (0)
#define WRONG_APPLY(tensor, sentence, ...)                                                                   \
    do {                                                                                                     \
        const int64_t numbers[] = {__VA_ARGS__};                                                             \
        expect_wrong(&packed, true, offsetof(flash_kda_apply_params, tensor), numbers,                       \
                     sizeof numbers / sizeof *numbers, sentence);                                            \
    } while (0)

static void numbers(void)
{
    if (test.device.type != FLASH_KDA_CPU) return;
    WRONG(cu_seqlens, "cu_seqlens[0] is 1; it must be 0", 1, 2, 5);
    WRONG(cu_seqlens, "cu_seqlens[2] is 1 after 2; it must not decrease", 0, 2, 1);
    WRONG(cu_seqlens, "cu_seqlens ends with 6; its last entry must be total = 5", 0, 3, 6);
    WRONG(cu_seqlens, "cu_seqlens[1] is 17 after 0; a sequence must have at most 16 tokens", 0, 17, 5);
    WRONG(cu_seqlens, "cu_seqlens[1] is 9223372036854775807 after 0; a sequence must have at most 16 tokens",
          0, INT64_MAX, 5);
    WRONG(cu_seqlens, "cu_seqlens[1] is -9223372036854775808 after 0; it must not decrease", 0, INT64_MIN, 5);
    WRONG(cu_seqlens,
          "parents has P = 3 and sequence 1 has 4 tokens; P must be at least the longest sequence", 0, 1, 5);
    WRONG(state_indices, "state_indices[0, 1] is 12; it must be less than 12, the slots of state", 1, 12, 3,
          4, 5, 6, 7, 8);
    WRONG(state_indices,
          "state_indices[1, 3] is 9223372036854775807; it must be less than 12, the slots of state", 1, 2, 3,
          4, 5, 6, 7, INT64_MAX);
    WRONG(num_accepted_tokens, "num_accepted_tokens[1] is 0; it must be in [1, S] = [1, 4]", 1, 0);
    WRONG(num_accepted_tokens, "num_accepted_tokens[0] is 5; it must be in [1, S] = [1, 4]", 5, 1);
    WRONG(num_accepted_tokens,
          "num_accepted_tokens[0] is -9223372036854775808; it must be in [1, S] = [1, 4]", INT64_MIN, 1);
    WRONG(
        parents,
        "parents[1, 2] is 2; it must be less than 2, or negative for the state that the sequence starts from",
        -1, 0, 9, -1, 0, 2);
    WRONG(
        parents,
        "parents[0, 0] is 0; it must be less than 0, or negative for the state that the sequence starts from",
        0, 0, 0, 0, 0, 0);
    WRONG_WRITTEN("written_indices[0, 1] is 9; it must be less than 9, the slots of written_states", 0, 9, 3,
                  4, 5, 6, 7, 8);
    WRONG_WRITTEN(
        "written_indices[1, 2] is 9223372036854775807; it must be less than 9, the slots of written_states",
        1, 2, 3, 4, 5, 6, INT64_MAX, 7);
    OF_DECODE(plain, INVALID_VALUE,
              "written_indices[1] is 4; it must be less than 4, the slots of written_states",
              int64_t slots[] = {3, 4, 0};
              p.written_indices = apart.decode.written_indices; p.written_indices.ndim = 1;
              p.written_indices.shape[0] = 3; p.written_indices.stride[0] = 1; p.written_indices.data = slots;
              p.written_indices.dtype = FLASH_KDA_I64);
    OF_DECODE(apart, INVALID_VALUE, "state_indices[1] is 12; it must be less than 12, the slots of state",
              int64_t slots[] = {3, 12};
              p.state_indices.data = slots; p.state_indices.dtype = FLASH_KDA_I64);
    APART("written_indices has W = 2 and sequence 1 has 3 tokens; W must be at least the longest sequence",
          p.written_indices.shape[1] = p.written_indices.stride[0] = 2);
    WRONG_APPLY(
        num_accepted_tokens,
        "num_accepted_tokens[0] is 5; it must be in [0, 4], where the last is the least of R, A and 16", 5,
        0);
    WRONG_APPLY(
        num_accepted_tokens,
        "num_accepted_tokens[1] is -1; it must be in [0, 4], where the last is the least of R, A and 16", 0,
        -1);
    WRONG_APPLY(accepted, "accepted[0, 1] is 5; it must be in [0, R) = [0, 5)", 0, 5, 9, 9, 0, 1, 2, 9);
    WRONG_APPLY(accepted, "accepted[1, 2] is -1; it must be in [0, R) = [0, 5)", 0, 1, 9, 9, 0, 1, -1, 9);
    WRONG_APPLY(state_indices, "state_indices[1] is 12; it must be less than 12, the slots of state", 0, 12);
    OF_APPLY(packed, INVALID_VALUE,
             "num_accepted_tokens[1] is 3; it must be in [0, 2], where the last is the least of R and 16",
             p.accepted.data = NULL, p.records.shape[1] = 2, p.records.stride[0] = 2 * 768);
    /* Too few columns for the sequences that there are. */
    PACKED("records has R = 2 and sequence 1 has 3 tokens; R must be at least the longest sequence",
           p.records.shape[1] = 2, p.records.stride[0] = 2 * 768);
    PACKED("state_indices has S = 2 and sequence 1 has 3 tokens; S must be at least the longest sequence",
           p.state_indices.shape[1] = p.state_indices.stride[0] = 2);
    /* Without state_indices of each token. */
    OF_DECODE(packed, INVALID_VALUE, "state_indices[1] is 12; it must be less than 12, the slots of state",
              int64_t slots[] = {3, 12};
              p.state_indices = packed.apply.state_indices; p.state_indices.data = slots;
              p.state_indices.dtype = FLASH_KDA_I64; p.write_states = FLASH_KDA_WRITE_NONE;
              p.num_accepted_tokens.data = NULL);
}

/* ---- What is allowed ----------------------------------------------------------------------------------- */

static bool is_taken(flash_kda_status status)
{
    if (status == FLASH_KDA_UNAVAILABLE &&
        strstr(flash_kda_last_error(), "which does not take flash_kda_decode"))
        return test.device.type == FLASH_KDA_CUDA;
    return status == FLASH_KDA_OK;
}

#define TAKEN(c, ...)                                                                                        \
    do {                                                                                                     \
        flash_kda_decode_params p = (c).decode;                                                              \
        __VA_ARGS__;                                                                                         \
        trying("allowed: %s", #__VA_ARGS__);                                                                 \
        CHECK(is_taken(flash_kda_decode(&p)), "%s", flash_kda_last_error());                                 \
        must(flash_kda_synchronize(test.device, NULL));                                                      \
    } while (0)

/* A struct of an older header ends before its last fields, which then have their defaults. */
static void older_structs(void)
{
    flash_kda_decode_params p = rows.decode;
    flash_kda_apply_params a = packed.apply;
    p.struct_size = offsetof(flash_kda_decode_params, kernel);
    a.struct_size = offsetof(flash_kda_apply_params, kernel);
    memset((char *)&p + p.struct_size, 0x7f, sizeof p - p.struct_size);
    memset((char *)&a + a.struct_size, 0x7f, sizeof a - a.struct_size);
    trying("shorter structs");
    CHECK(is_taken(flash_kda_decode(&p)), "%s", flash_kda_last_error());
    CHECK(is_taken(flash_kda_apply(&a)), "%s", flash_kda_last_error());
    must(flash_kda_synchronize(test.device, NULL));
}

static void allowed(void)
{
    TAKEN(rows, (void)p);
    TAKEN(packed, (void)p);
    TAKEN(rows, p.records.data = NULL);
    TAKEN(rows, p.rounding = packed.decode.rounding);
    TAKEN(rows, p.A_log.data = p.dt_bias.data = NULL);
    TAKEN(rows,
          p.q.shape[1] = p.k.shape[1] = p.v.shape[1] = p.g.shape[1] = p.beta.shape[1] = p.out.shape[1] = 0);
    TAKEN(rows, p.state.stride[0] = 0, p.write_states = FLASH_KDA_WRITE_NONE);
    TAKEN(rows, p.lower_bound = 7.0f, p.gate = FLASH_KDA_GATE_SOFTPLUS);
    TAKEN(packed, p.parents.data = p.num_accepted_tokens.data = p.records.data = p.rounding.data = NULL);
    TAKEN(packed, p.first_slot = 1LL << 40); /* no sequence has a state */
    TAKEN(packed, p.first_slot = INT64_MAX);
    TAKEN(plain, (void)p);
    TAKEN(apart, (void)p);
    TAKEN(apart, p.written_indices.data = NULL);
    TAKEN(plain, p.state.stride[0] = 0); /* all sequences start from one state */
    TAKEN(rows, take_past(&p));
    TAKEN(rows, take_past(&p), p.past_records.shape[1] = 0);
    TAKEN(rows, take_past(&p),
          p.q.shape[1] = p.k.shape[1] = p.v.shape[1] = p.g.shape[1] = p.beta.shape[1] = p.out.shape[1] = 0);
    TAKEN(plain, p.written_states.shape[0] = 0,
          p.q.shape[1] = p.k.shape[1] = p.v.shape[1] = p.g.shape[1] = p.beta.shape[1] = p.out.shape[1] = 0,
          p.write_states = FLASH_KDA_WRITE_EACH);
    decode_call_restore_pool(&rows);
    decode_call_restore_pool(&packed);
    older_structs();
    flash_kda_apply_params p = packed.apply;
    trying("apply without a list");
    p.accepted.data = NULL;
    CHECK(is_taken(flash_kda_apply(&p)), "%s", flash_kda_last_error());
    trying("apply without indices");
    p.state_indices.data = NULL;
    p.first_slot = 0;
    CHECK(is_taken(flash_kda_apply(&p)), "%s", flash_kda_last_error());
    must(flash_kda_synchronize(test.device, NULL));
}

/* The reference needs neither out nor records, and refuses a device that is none of the CPU. */
static void reference(void)
{
    double out[6 * 2 * DIM];
    if (test.device.type != FLASH_KDA_CPU) return;
    flash_kda_decode_params p = rows.decode;
    p.out.data = p.records.data = NULL;
    p.kernel = NULL;
    trying("the reference");
    CHECK(flash_kda_decode_reference(&p, out, NULL) == FLASH_KDA_OK, "%s", flash_kda_last_error());
    CHECK(flash_kda_decode_reference(&p, NULL, NULL) == FLASH_KDA_INVALID_VALUE, "a null out64 is taken");
    CHECK(strcmp(flash_kda_last_error(), "out64 is null; it must point to [N, T, HV, V] doubles") == 0,
          "the sentence is: %s", flash_kda_last_error());
    p.device.type = FLASH_KDA_CUDA;
    CHECK(flash_kda_decode_reference(&p, out, NULL) == FLASH_KDA_INVALID_VALUE, "a GPU is taken");
    CHECK(strcmp(flash_kda_last_error(),
                 "device is not the CPU; the reference takes tensors in CPU memory") == 0,
          "the sentence is: %s", flash_kda_last_error());
    CHECK(decode_call_untouched(&rows), "a tensor was written");
}

/* ---- The calls ----------------------------------------------------------------------------------------- */

/* A problem that has a pool of that many slots. */
static problem *with_pool(problem *p, int64_t slots, uint64_t seed)
{
    problem_group_heads(p, 2);
    fill_case(p, find_case("random"), seed);
    free(p->initial_state);
    p->slots = slots;
    p->initial_state = allocate((size_t)(slots * p->heads) * DIM * DIM, sizeof *p->initial_state);
    return p;
}

static void open_calls(void)
{
    static const int64_t lengths[] = {2, 3}, slots[] = {1, 2, 3, 4, 5, 6, 7, 8}, starts[] = {1, 4},
                         parents[] = {-1, 0, 9, -1, 0, 0}, rounding[] = {5, 6}, applied[] = {2, 3},
                         accepted[] = {0, 1, 9, 9, 0, 1, 2, 9};
    rows_problem = (decode_problem){.tokens = with_pool(problem_create(3, 2, 2), 3, 1),
                                    .slot_columns = 1,
                                    .record_columns = 2,
                                    .applied = allocate(3, sizeof *applied)};
    packed_problem = (decode_problem){.tokens = with_pool(problem_create_ragged(lengths, 2, 2), 12, 2),
                                      .write_states = FLASH_KDA_WRITE_EACH,
                                      .state_indices = copied(slots, 8),
                                      .slot_columns = 4,
                                      .first_slot = 1,
                                      .num_accepted_tokens = copied(starts, 2),
                                      .parents = copied(parents, 6),
                                      .parent_columns = 3,
                                      .record_columns = 5,
                                      .rounding = copied(rounding, 2),
                                      .applied = copied(applied, 2),
                                      .accepted = copied(accepted, 8),
                                      .accepted_columns = 4};
    const int64_t written[] = {8, -1, 3, 4, 1, 2, 0, 9};
    plain_problem = (decode_problem){.tokens = with_pool(problem_create(3, 2, 2), 3, 3),
                                     .slot_columns = 1,
                                     .has_written = true,
                                     .written_slots = 4,
                                     .written_columns = 1};
    apart_problem = (decode_problem){.tokens = with_pool(problem_create_ragged(lengths, 2, 2), 12, 4),
                                     .write_states = FLASH_KDA_WRITE_EACH,
                                     .state_indices = copied(slots, 2),
                                     .slot_columns = 1,
                                     .parents = copied(parents, 6),
                                     .parent_columns = 3,
                                     .rounding = copied(rounding, 2),
                                     .has_written = true,
                                     .written_slots = 9,
                                     .written_indices = copied(written, 8),
                                     .written_columns = 4};
    decode_options how = {.tokens = options_of(STATE_IN_PLACE, false)};
    decode_call_open(&rows, &rows_problem, how);
    decode_call_open(&plain, &plain_problem, how);
    how.tokens.bf16_state = true;
    how.i32_accepted = true;
    decode_call_open(&packed, &packed_problem, how);
    decode_call_open(&apart, &apart_problem, how);
}

static void arguments(void)
{
    open_calls();
    structs();
    shapes();
    shapes_of_written();
    shapes_of_apply();
    overflowing_sizes();
    dtypes();
    strides();
    alignment();
    absent();
    past_records();
    options();
    devices();
    interrupted();
    shared_memory();
    numbers();
    reference();
    allowed();
    decode_call_close(&packed);
    decode_call_close(&rows);
    decode_call_close(&apart);
    decode_call_close(&plain);
    decode_problem_free(&apart_problem);
    decode_problem_free(&plain_problem);
    decode_problem_free(&packed_problem);
    decode_problem_free(&rows_problem);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"arguments", arguments}};
    harness_start(argc, argv);
    return harness_run(groups, 1);
}
