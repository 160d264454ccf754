/* Wrong arguments of flash_kda_decode_layer() and flash_kda_decode_layer_reference() are refused with their
 * sentences, and nothing is written. What is allowed is not refused. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"
#include "refusals.h"

/* `rows` has three sequences of 2 tokens, H = 2, which write their last states into slots without indices:
 * L = 3, R = 2, C = 2. `packed` has two sequences of 2 and 3 tokens, H = 2, which write each state: S = 4,
 * L = 6 and 12 slots. `apart` is `packed` with written_states: 7 slots with indices of W = 3 columns. */
static flash_kda_decode_layer_params rows, packed, apart;

/* The memory of both calls, and what it holds before any of them. */
enum { BYTES = 8 << 20 };
static unsigned char *contents, *device_memory;
static size_t used;

static flash_kda_tensor place(flash_kda_dtype dtype, int ndim, int64_t a, int64_t b, int64_t c, int64_t d)
{
    const int64_t shape[4] = {a, b, c, d};
    flash_kda_tensor t = tensor_of(device_memory + used, dtype, ndim, shape);
    int64_t elements = 1;
    for (int i = 0; i < ndim; i++) elements *= shape[i];
    used += ((size_t)elements * dtype_size(dtype) + 255 + 256) / 256 * 256;
    if (used > BYTES) die("the calls need more than %d bytes", BYTES);
    return t;
}

static void put_integers(const flash_kda_tensor *t, const int64_t *numbers, int count)
{
    memcpy(contents + ((unsigned char *)t->data - device_memory), numbers, (size_t)count * sizeof *numbers);
}

#define BF16 FLASH_KDA_BF16
#define F32 FLASH_KDA_F32
#define I64 FLASH_KDA_I64
enum { H = 2, C = 3 * H * DIM };

static flash_kda_decode_layer_params common(int64_t n, int64_t t)
{
    return (flash_kda_decode_layer_params){
        .struct_size = sizeof(flash_kda_decode_layer_params),
        .device = test.device,
        .kernel = test.kernel,
        .x = place(BF16, 3, n, t, C, 1),
        .g = place(BF16, 4, n, t, H, DIM),
        .beta = place(BF16, 3, n, t, H, 1),
        .out = place(BF16, 4, n, t, H, DIM),
        .A_log = place(F32, 1, H, 1, 1, 1),
        .dt_bias = place(F32, 2, H, DIM, 1, 1),
        .output_gate = place(BF16, 4, n, t, H, DIM),
        .norm_weight = place(F32, 1, DIM, 1, 1, 1),
        .scale = 0.1f,
        .lower_bound = -5.0f,
        .norm_eps = 1e-5f,
    };
}

static void make_calls(void)
{
    const int64_t borders[] = {0, 2, 5}, accepted[] = {1, 2}, slots[] = {1, 2, 3, 4, 5, 6, 7, 8},
                  written[] = {6, 5, 4, 3, -1, 0};
    const flash_kda_device host = {FLASH_KDA_CPU, 0};
    void *memory;
    used = 0;
    must(flash_kda_malloc(test.device, BYTES, &memory));
    device_memory = memory;
    contents = allocate(BYTES, 1);
    rows = common(3, 2);
    rows.weight = place(F32, 3, 3, 4, H * DIM, 1);
    rows.bias = place(F32, 1, C, 1, 1, 1);
    rows.conv_state = place(BF16, 3, 3, C, 3, 1);
    rows.state = place(F32, 4, 3, H, DIM, DIM);
    rows.records = place(F32, 4, 3, 2, H, 3 * DIM);
    rows.conv_windows = place(BF16, 4, 3, 2, C, 3);
    packed = common(1, 5);
    packed.weight = place(BF16, 2, C, 4, 1, 1);
    packed.conv_state = place(BF16, 3, 12, C, 6, 1);
    packed.state = place(BF16, 4, 12, H, DIM, DIM);
    packed.state_indices = place(I64, 2, 2, 4, 1, 1);
    packed.num_accepted_tokens = place(I64, 1, 2, 1, 1, 1);
    packed.cu_seqlens = place(I64, 1, 3, 1, 1, 1);
    packed.conv_windows = place(BF16, 4, 2, 3, C, 3);
    packed.records = place(F32, 4, 2, 3, H, 3 * DIM);
    packed.rounding = place(I64, 1, 2, 1, 1, 1);
    packed.write_states = FLASH_KDA_WRITE_EACH;
    packed.first_slot = 1;
    apart = packed;
    apart.num_accepted_tokens.data = NULL;
    apart.state_indices = place(I64, 1, 2, 1, 1, 1);
    apart.written_states = place(BF16, 4, 7, H, DIM, DIM);
    apart.written_indices = place(I64, 2, 2, 3, 1, 1);
    put_integers(&apart.state_indices, slots, 2);
    put_integers(&apart.written_indices, written, 6);
    put_integers(&packed.state_indices, slots, 8);
    put_integers(&packed.num_accepted_tokens, accepted, 2);
    put_integers(&packed.cu_seqlens, borders, 3);
    must(flash_kda_copy(test.device, device_memory, host, contents, BYTES));
}

static void free_calls(void)
{
    must(flash_kda_free(test.device, device_memory));
    free(contents);
}

static bool is_untouched(void)
{
    const flash_kda_device host = {FLASH_KDA_CPU, 0};
    unsigned char *after = allocate(BYTES, 1);
    must(flash_kda_synchronize(test.device, NULL));
    must(flash_kda_copy(host, after, test.device, device_memory, BYTES));
    const bool same = memcmp(after, contents, BYTES) == 0;
    free(after);
    return same;
}

static void refuses(const flash_kda_decode_layer_params *p, flash_kda_status want, const char *sentence)
{
    trying("expected: %s", sentence);
    expect_sentence(flash_kda_decode_layer(p), want, sentence);
}

#define REFUSES(c, status, sentence, ...)                                                                    \
    do {                                                                                                     \
        flash_kda_decode_layer_params p = (c);                                                               \
        __VA_ARGS__;                                                                                         \
        refuses(&p, FLASH_KDA_##status, sentence);                                                           \
    } while (0)
#define ROWS(sentence, ...) REFUSES(rows, INVALID_VALUE, sentence, __VA_ARGS__)
#define PACKED(sentence, ...) REFUSES(packed, INVALID_VALUE, sentence, __VA_ARGS__)
#define APART(sentence, ...) REFUSES(apart, INVALID_VALUE, sentence, __VA_ARGS__)

static const char *const FROM_SEQLENS = ", with N from the 3 entries of cu_seqlens";

static void structs(void)
{
    refuses(NULL, FLASH_KDA_INVALID_VALUE,
            "params is null; it must point to a flash_kda_decode_layer_params");
    const size_t least = offsetof(flash_kda_decode_layer_params, kernel),
                 sizes[] = {0, least - 8, sizeof rows + 8, sizeof rows - 4};
    for (int i = 0; i < 4; i++)
        ROWS(text("params->struct_size is %zu; it must be sizeof(flash_kda_decode_layer_params) = %zu (in "
                  "older "
                  "headers %zu or more)",
                  sizes[i], sizeof rows, least),
             p.struct_size = sizes[i]);
}

static void shapes(void)
{
    ROWS("x has 4 dimensions; it must have 3: [N, T, 3 * H * D]", p.x.ndim = 4);
    PACKED("x has 1 dimensions; it must have 3: [1, total, 3 * H * D]", p.x.ndim = 1);
    ROWS("x has shape [3, 2, 640]; it must be [N, T, 3 * H * D] = [3, 2, 768]", p.x.shape[2] = 640);
    ROWS("x has N = 0; there must be at least 1 sequence", p.x.shape[0] = 0);
    ROWS("x has T = 17; there must be at most 16 tokens", p.x.shape[1] = 17);
    ROWS("x has size -1 in dimension 1; sizes must not be negative", p.x.shape[1] = -1);
    ROWS("g has 3 dimensions; it must have 4: [N, T, H, D]", p.g.ndim = 3);
    ROWS("g has D = 64; the head size D must be 128", p.g.shape[3] = 64);
    ROWS("g has H = 0; there must be at least 1 head and at most 5592405", p.g.shape[2] = 0);
    ROWS("g has shape [3, 1, 2, 128]; it must be [N, T, H, D] = [3, 2, 2, 128]", p.g.shape[1] = 1);
    PACKED("cu_seqlens is given and the first size of x is 2; it must be 1, all sequences in one row",
           p.x.shape[0] = 2);
    PACKED("cu_seqlens has 1 entries; it must have N + 1 for N >= 1 sequences", p.cu_seqlens.shape[0] = 1);
    PACKED("cu_seqlens has 2 dimensions; it must have 1: [N + 1]", p.cu_seqlens.ndim = 2);
    ROWS("weight has 1 dimensions; it must have 2 or 3: [3 * H * D, 4] or [3, 4, H * D]", p.weight.ndim = 1);
    ROWS("weight has shape [3, 3, 256]; it must be [3, 4, H * D] = [3, 4, 256]", p.weight.shape[1] = 3);
    PACKED("weight has shape [768, 3]; it must be [3 * H * D, 4] = [768, 4]", p.weight.shape[1] = 3);
    ROWS("bias has shape [767]; it must have 3 * H * D = 768 elements", p.bias.shape[0] = 767);
    ROWS("conv_state has shape [3, 767, 3]; it must be [slots, 3 * H * D, L] = [3, 768, 3]",
         p.conv_state.shape[1] = 767);
    ROWS("conv_state has 2 slots and state 3; they must have as many", p.conv_state.shape[0] = 2);
    ROWS("conv_state has L = 2; it must be at least 3", p.conv_state.shape[2] = 2);
    PACKED("conv_state has L = 5 and state_indices S = 4; L must be 3 or at least S + 2",
           p.conv_state.shape[2] = 5);
    ROWS("beta has shape [3, 2, 1]; it must be [N, T, H] = [3, 2, 2]", p.beta.shape[2] = 1);
    PACKED("out has shape [1, 4, 2, 128]; it must be [1, total, H, D] = [1, 5, 2, 128]", p.out.shape[1] = 4);
    ROWS("A_log has shape [3]; it must have H = 2 elements", p.A_log.shape[0] = 3);
    ROWS("dt_bias has shape [2, 64]; it must have H * D = 256 elements", p.dt_bias.shape[1] = 64);
    ROWS("output_gate has shape [3, 2, 1, 128]; it must be [N, T, H, D] = [3, 2, 2, 128]",
         p.output_gate.shape[2] = 1);
    ROWS("norm_weight has shape [127]; it must have D = 128 elements", p.norm_weight.shape[0] = 127);
    ROWS("state has shape [3, 1, 128, 128]; it must be [slots, H, V, K] = [3, 2, 128, 128]",
         p.state.shape[1] = 1);
    ROWS("state has 3 dimensions; it must have 4: [slots, H, K, V]", p.state.ndim = 3, p.state_k_first = 1);
    ROWS("state has 2 slots; without state_indices it must have one for each of N = 3 sequences",
         p.state.shape[0] = p.conv_state.shape[0] = 2);
    PACKED(text("state_indices has shape [3, 4]; it must be [N, S] = [2, 4]%s", FROM_SEQLENS),
           p.state_indices.shape[0] = 3);
    PACKED("state_indices has S = 2147483584; it must be at most 2147483583",
           p.state_indices.shape[1] = p.state_indices.stride[0] = INT32_MAX - 63);
    PACKED(text("num_accepted_tokens has shape [1]; it must be [N] = [2]%s", FROM_SEQLENS),
           p.num_accepted_tokens.shape[0] = 1);
    ROWS("records has R = 1; it must be at least T = 2", p.records.shape[1] = 1, p.records.stride[0] = 768);
    ROWS("records has shape [3, 2, 2, 128]; it must be [N, R, H, 3 * K] = [3, 2, 2, 384]",
         p.records.shape[3] = 128);
    ROWS("conv_windows has C = 1; it must be at least T = 2", p.conv_windows.shape[1] = 1);
    ROWS("conv_windows has shape [3, 2, 768, 4]; it must be [N, C, 3 * H * D, 3] = [3, 2, 768, 3]",
         p.conv_windows.shape[3] = 4);
    PACKED("rounding has shape [3]; it must be [2] = [2]", p.rounding.shape[0] = 3);
}

static void shapes_of_written(void)
{
    APART("written_states has 3 dimensions; it must have 4: [slots2, H, V, K]", p.written_states.ndim = 3);
    APART("written_states has shape [7, 2, 128, 64]; it must be [slots2, H, K, V] = [7, 2, 128, 128]",
          p.written_states.shape[3] = 64, p.state_k_first = 1);
    APART(
        "written_states has 4 slots; without written_indices it must have one for each of the 5 states that "
        "are written",
        p.written_indices.data = NULL, p.written_states.shape[0] = 4);
    APART(
        "written_states has 1 slots; without written_indices it must have one for each of the 2 states that "
        "are written",
        p.written_indices.data = NULL, p.written_states.shape[0] = 1, p.write_states = FLASH_KDA_WRITE_LAST);
    APART(text("written_indices has shape [3, 3]; it must be [N, W] = [2, 3]%s", FROM_SEQLENS),
          p.written_indices.shape[0] = 3);
    APART("written_indices has 2 dimensions; it must have 1: [N]", p.write_states = FLASH_KDA_WRITE_LAST);
    APART("state_indices has 2 dimensions; it must have 1: [N]", p.state_indices = packed.state_indices);
    PACKED("state_indices has 1 dimensions; it must have 2: [N, S]", p.state_indices = apart.state_indices);
    APART(
        "written_states has strides [32768, 16384, 1, 128]; all but its first dimension must be contiguous, "
        "with strides [16384, 128, 1]",
        p.written_states.stride[2] = 1, p.written_states.stride[3] = 128);
    APART("written_states is given with FLASH_KDA_WRITE_NONE; it must be absent",
          p.write_states = FLASH_KDA_WRITE_NONE);
    APART("written_indices is given without written_states; it must be absent", p.written_states.data = NULL);
    APART("num_accepted_tokens is given with written_states; it must be absent",
          p.num_accepted_tokens = packed.num_accepted_tokens);
}

/* Sizes of which products do not fit 64 bits, or a tensor no memory. */
static void overflowing_sizes(void)
{
    const long long huge = 1LL << 62;
    ROWS(text("x has %lld * 2 tokens; there must be at most 2147482623", huge), p.x.shape[0] = huge);
    PACKED(text("x has 1 * %lld tokens; there must be at most 2147482623", (long long)INT64_MAX),
           p.x.shape[1] = INT64_MAX);
    PACKED("there are N * HV = 2147483647 * 2 states; there must be at most 2147482623",
           p.cu_seqlens.shape[0] = 1LL << 31);
    ROWS(text("g has H = %lld; there must be at least 1 head and at most 5592405", huge),
         p.g.shape[2] = huge);
    ROWS(text("state has shape [%lld, 2, 128, 128]; a tensor must fit in memory", huge),
         p.state.shape[0] = huge);
    ROWS(text("conv_state has shape [3, 768, %lld]; a tensor must fit in memory", huge),
         p.conv_state.shape[2] = huge);
    ROWS(text("conv_windows has shape [3, %lld, 768, 3]; a tensor must fit in memory", huge),
         p.conv_windows.shape[1] = huge);
    ROWS(text("weight has stride %lld in dimension 0; the tensor must fit in memory", (long long)INT64_MIN),
         p.weight.stride[0] = INT64_MIN);
    ROWS(text("x has stride %lld in dimension 0; the tensor must fit in memory", huge), p.x.stride[0] = huge);
}

#define DTYPE(c, tensor, type, sentence)                                                                     \
    REFUSES(c, INVALID_DTYPE, #tensor " has dtype " sentence, p.tensor.dtype = FLASH_KDA_##type)

static void dtypes(void)
{
    DTYPE(rows, x, F32, "float32; it must be bfloat16");
    DTYPE(rows, weight, F16, "float16; it must be float32 or bfloat16");
    DTYPE(rows, bias, F64, "float64; it must be float32 or bfloat16");
    DTYPE(rows, conv_state, F32, "float32; it must be bfloat16");
    DTYPE(rows, g, F16, "float16; it must be bfloat16 or float32");
    DTYPE(rows, beta, I32, "int32; it must be bfloat16 or float32");
    DTYPE(rows, out, F32, "float32; it must be bfloat16");
    DTYPE(rows, A_log, BF16, "bfloat16; it must be float32");
    DTYPE(rows, dt_bias, BF16, "bfloat16; it must be float32");
    DTYPE(rows, output_gate, F16, "float16; it must be bfloat16 or float32");
    DTYPE(rows, norm_weight, F16, "float16; it must be float32 or bfloat16");
    DTYPE(rows, state, F16, "float16; it must be float32 or bfloat16");
    DTYPE(rows, records, BF16, "bfloat16; it must be float32");
    DTYPE(rows, conv_windows, F32, "float32; it must be bfloat16");
    DTYPE(packed, state_indices, F32, "float32; it must be int64 or int32");
    DTYPE(packed, num_accepted_tokens, BOOL, "bool; it must be int64 or int32");
    DTYPE(packed, cu_seqlens, F64, "float64; it must be int64 or int32");
    DTYPE(packed, rounding, I32, "int32; it must be int64");
    DTYPE(apart, written_states, F32, "float32 and state has dtype bfloat16; they must have one dtype");
    DTYPE(apart, written_indices, F32, "float32; it must be int64 or int32");
}

static void strides(void)
{
    ROWS("x has strides [1536, 768, 2]; its last dimension must be contiguous, with stride 1",
         p.x.stride[2] = 2);
    ROWS("g has strides [512, 256, 128, 2]; its last dimension must be contiguous, with stride 1",
         p.g.stride[3] = 2);
    ROWS("out has stride 64 in dimension 2; its elements must not share memory, so it must be at least 128",
         p.out.stride[2] = 64);
    ROWS("conv_state has stride 0 in dimension 1; its elements must not share memory, so it must be at least "
         "1",
         p.conv_state.stride[1] = 0);
    ROWS("conv_windows has stride 2 in dimension 1; its elements must not share memory, so it must be at "
         "least "
         "3",
         p.conv_windows.stride[1] = 2, p.conv_windows.stride[0] = 100000);
    ROWS("state has stride 32760 in dimension 0; its elements must not share memory, so it must be at least "
         "32768",
         p.state.stride[0] = 32760);
    ROWS("state has strides [32768, 16384, 1, 128]; all but its first dimension must be contiguous, with "
         "strides [16384, 128, 1]",
         p.state.stride[2] = 1, p.state.stride[3] = 128);
    ROWS("bias has strides [2]; it must be contiguous, with strides [1]", p.bias.stride[0] = 2);
    ROWS("norm_weight has strides [2]; it must be contiguous, with strides [1]", p.norm_weight.stride[0] = 2);
    PACKED("state_indices has strides [5, 1]; it must be contiguous, with strides [4, 1]",
           p.state_indices.stride[0] = 5);
    if (test.device.type != FLASH_KDA_CUDA) return;
    ROWS("state has stride 32770 in dimension 0; on a GPU it must be a multiple of 16 bytes, which are 4 "
         "elements, and not negative",
         p.state.stride[0] = 32770);
}

static void alignment(void)
{
    MISALIGNED(ROWS, x, 1, 2);
    MISALIGNED(ROWS, weight, 2, 4);
    MISALIGNED(ROWS, bias, 2, 4);
    MISALIGNED(ROWS, conv_state, 1, 2);
    MISALIGNED(ROWS, out, 1, 2);
    MISALIGNED(ROWS, norm_weight, 2, 4);
    MISALIGNED(ROWS, state, 8, 16);
    MISALIGNED(ROWS, conv_windows, 1, 2);
    MISALIGNED(PACKED, state_indices, 4, 8);
    MISALIGNED(PACKED, rounding, 4, 8);
    MISALIGNED(APART, written_states, 8, 16);
    MISALIGNED(APART, written_indices, 4, 8);
}

static void options(void)
{
    WRONG_OPTIONS(ROWS);
    WRONG_DECODE_OPTIONS(ROWS);
    ROWS("norm_eps is not a finite number of at least 0; it must be one, usually 1e-5", p.norm_eps = NAN);
    ROWS("norm_eps is not a finite number of at least 0; it must be one, usually 1e-5", p.norm_eps = -1e-5f);
    ROWS("reserved is 1; it must be 0", p.reserved = 1);
    PACKED("num_accepted_tokens is given without FLASH_KDA_WRITE_EACH; it must be absent",
           p.write_states = FLASH_KDA_WRITE_NONE);
    int32_t stop = 1;
    if (test.device.type == FLASH_KDA_CPU)
        REFUSES(rows, INTERRUPTED, "*interrupt is not 0, so the call was given up before it began",
                p.interrupt = &stop);
}

static void missing(void)
{
    ROWS("x is null; it must point to its 9216 bytes", p.x.data = NULL);
    ROWS("weight is null; it must point to its 12288 bytes", p.weight.data = NULL);
    ROWS("conv_state is null; it must point to its 13824 bytes", p.conv_state.data = NULL);
    ROWS("g is null; it must point to its 3072 bytes", p.g.data = NULL);
    ROWS("out is null; it must point to its 3072 bytes", p.out.data = NULL);
    ROWS("state is null; it must point to its 393216 bytes", p.state.data = NULL);
}

/* Memory that is written belongs to one argument alone. */
static void overlaps(void)
{
    ROWS("out overlaps x; it must have memory of its own", p.out.data = p.x.data);
    ROWS("out overlaps output_gate; it must have memory of its own", p.out.data = p.output_gate.data);
    ROWS("state overlaps weight; it must have memory of its own", p.weight.data = p.state.data);
    ROWS("conv_state overlaps x; it must have memory of its own", p.conv_state.data = p.x.data);
    ROWS("conv_state overlaps state; it must have memory of its own", p.conv_state.data = p.state.data);
    ROWS("records overlaps state; it must have memory of its own", p.records.data = p.state.data);
    ROWS("conv_windows overlaps state; it must have memory of its own", p.conv_windows.data = p.state.data);
    PACKED("state overlaps rounding; it must have memory of its own", p.rounding.data = p.state.data);
    APART("written_states overlaps state; it must have memory of its own",
          p.written_states.data = p.state.data);
    APART("written_states overlaps conv_state; it must have memory of its own",
          p.conv_state.data = p.written_states.data);
    APART("out overlaps written_indices; it must have memory of its own",
          p.written_indices.data = p.out.data);
}

/* Numbers in tensors, which are looked at on the CPU. */
static void indices(void)
{
    if (test.device.type != FLASH_KDA_CPU) return;
    int64_t far[] = {1, 2, 3, 4, 5, 12, 7, 8}, accepted[] = {1, 5}, none[] = {0, 1}, borders[] = {0, 2, 6};
    int64_t long_first[] = {0, 4, 5}, far_written[] = {6, 5, 4, 3, 7, 0};
    APART("written_indices[1, 1] is 7; it must be less than 7, the slots of written_states",
          p.written_indices.data = far_written);
    APART("written_indices has W = 3 and sequence 0 has 4 tokens; W must be at least the longest sequence",
          p.cu_seqlens.data = long_first, p.records.data = NULL);
    PACKED("state_indices[1, 1] is 12; it must be less than 12, the slots of state",
           p.state_indices.data = far);
    far[5] = 6, far[0] = 12;
    PACKED("state_indices[0, 0] is 12; it must be less than 12, the slots of state",
           p.state_indices.data = far);
    PACKED("num_accepted_tokens[1] is 5; it must be in [1, S] = [1, 4]",
           p.num_accepted_tokens.data = accepted);
    PACKED("num_accepted_tokens[0] is 0; it must be in [1, S] = [1, 4]", p.num_accepted_tokens.data = none);
    PACKED("cu_seqlens ends with 6; its last entry must be total = 5", p.cu_seqlens.data = borders);
    PACKED("conv_windows has C = 3 and sequence 0 has 4 tokens; C must be at least the longest sequence",
           p.cu_seqlens.data = long_first, p.records.data = NULL);
    PACKED("records has R = 3 and sequence 0 has 4 tokens; R must be at least the longest sequence",
           p.cu_seqlens.data = long_first);
}

/* What is said of a call follows no pointer, and its struct may be of an older version. */
static void explanations(void)
{
    char words[1200], few[9] = "";
    trying("flash_kda_explain_decode_layer");
    CHECK(flash_kda_explain_decode_layer(&apart, words, sizeof words) == FLASH_KDA_OK, "%s",
          flash_kda_last_error());
    CHECK(strstr(words, "4 heads of sequences"), "it says: %s", words);
    /* 2 x 2 states are read, and 5 x 2 written. conv_state is read, and 5 windows are written. */
    const int state = DIM * DIM * 2, windows = (2 + 5) * C * 3 * 2 + C * 4 * 2;
    CHECK(strstr(words, text("%d of states read, %d of states written,", 4 * state, 10 * state)),
          "it says: %s", words);
    CHECK(strstr(words, text(", %d of the convolution;", windows)), "it says: %s", words);
    CHECK(flash_kda_explain_decode_layer(&apart, few, sizeof few) == FLASH_KDA_OK, "%s",
          flash_kda_last_error());
    CHECK(strlen(few) == sizeof few - 1 && strncmp(few, words, sizeof few - 1) == 0, "it says: %s", few);
    flash_kda_decode_layer_params old = apart;
    old.struct_size = offsetof(flash_kda_decode_layer_params, kernel);
    old.write_states = FLASH_KDA_WRITE_LAST;
    CHECK(flash_kda_explain_decode_layer(&old, words, sizeof words) == FLASH_KDA_OK, "%s",
          flash_kda_last_error());
    CHECK(strstr(words, "is the first in the table"), "it says: %s", words);
    expect_sentence(flash_kda_explain_decode_layer(&apart, NULL, 8), FLASH_KDA_INVALID_VALUE,
                    "text must point to capacity = 8 bytes, at least 1");
    old.x.shape[2] = 640;
    CHECK(flash_kda_explain_decode_layer(&old, words, sizeof words) == FLASH_KDA_INVALID_VALUE, "taken");
}

static void kernels(void)
{
    flash_kda_decode_layer_params p = rows;
    p.kernel = "none";
    trying("a kernel that does not exist");
    CHECK(flash_kda_decode_layer(&p) == FLASH_KDA_INVALID_VALUE, "an unknown kernel is taken");
    CHECK(strncmp(flash_kda_last_error(), "kernel is \"none\"; it must be NULL or one of ", 44) == 0,
          "the sentence is: %s", flash_kda_last_error());
}

static void references(void)
{
    double out = 0.0;
    if (test.device.type != FLASH_KDA_CPU) {
        CHECK(flash_kda_decode_layer_reference(&rows, &out, NULL) == FLASH_KDA_INVALID_VALUE, "taken");
        CHECK(strcmp(flash_kda_last_error(),
                     "device is not the CPU; the reference takes tensors in CPU memory") == 0,
              "the sentence is: %s", flash_kda_last_error());
        return;
    }
    CHECK(flash_kda_decode_layer_reference(&rows, NULL, NULL) == FLASH_KDA_INVALID_VALUE, "taken");
    CHECK(strcmp(flash_kda_last_error(), "out64 is null; it must point to [N, T, H, V] doubles") == 0,
          "the sentence is: %s", flash_kda_last_error());
}

static void refusals(void)
{
    make_calls();
    structs();
    shapes();
    shapes_of_written();
    overflowing_sizes();
    dtypes();
    strides();
    alignment();
    options();
    missing();
    overlaps();
    indices();
    explanations();
    kernels();
    references();
    trying("all calls that were refused");
    CHECK(is_untouched(), "a tensor was written");
    free_calls();
}

#define TAKES(c, ...)                                                                                        \
    do {                                                                                                     \
        flash_kda_decode_layer_params p = (c);                                                               \
        __VA_ARGS__;                                                                                         \
        trying("allowed: %s", #__VA_ARGS__);                                                                 \
        CHECK(flash_kda_decode_layer(&p) == FLASH_KDA_OK, "refused: %s", flash_kda_last_error());            \
    } while (0)

static void allowed(void)
{
    make_calls();
    TAKES(rows, (void)p);
    TAKES(packed, (void)p);
    TAKES(rows, p.struct_size = offsetof(flash_kda_decode_layer_params, kernel));
    TAKES(rows, p.bias.data = p.A_log.data = p.dt_bias.data = NULL);
    TAKES(rows, p.norm_weight.data = p.output_gate.data = NULL);
    TAKES(rows, p.records.data = p.conv_windows.data = NULL);
    TAKES(rows, p.write_states = FLASH_KDA_WRITE_NONE);
    TAKES(packed, p.num_accepted_tokens.data = NULL);
    TAKES(packed, p.conv_state.shape[2] = 3);
    TAKES(apart, (void)p);
    TAKES(apart, p.conv_state.shape[2] = 5);
    TAKES(apart, p.written_indices.data = NULL);
    TAKES(apart, p.state_indices.data = NULL, p.first_slot = 0);
    TAKES(apart, p.written_indices.data = NULL, p.write_states = FLASH_KDA_WRITE_LAST);
    /* Sequences may start from memory that others read, as the pools are read alone. */
    TAKES(apart, p.g.dtype = FLASH_KDA_BF16, p.g.data = p.x.data);
    TAKES(packed, p.struct_size = offsetof(flash_kda_decode_layer_params, written_states));
    TAKES(packed, p.conv_state.shape[2] = p.conv_state.stride[1] = 7, p.conv_state.stride[0] = 7 * C,
          p.conv_state.shape[0] = p.state.shape[0] = 9);
    TAKES(rows, p.x.shape[1] = p.g.shape[1] = p.beta.shape[1] = p.out.shape[1] = p.output_gate.shape[1] = 0);
    TAKES(rows, p.state.shape[0] = 1, p.conv_state.shape[0] = 1, p.x.shape[0] = p.g.shape[0] = 1,
          p.beta.shape[0] = p.out.shape[0] = p.output_gate.shape[0] = 1, p.records.shape[0] = 1,
          p.conv_windows.shape[0] = 1);
    must(flash_kda_synchronize(test.device, NULL));
    free_calls();
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"refusals", refusals}, {"allowed", allowed}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
