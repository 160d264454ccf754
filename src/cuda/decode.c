/* Decode and apply on a GPU: launches kernels/decode/decode.cu. */
#include "../../kernels/decode/decode_shape.h"
#include "cuda.h"
#include "decode_args_of.h"
#include "modules.h"

extern const unsigned char fkda_fatbin_decode[];

/* The kernels for a type and a layout of states, in the order of `module.names`. */
enum { ONE, STEPS, CHUNK, APPLY, KERNELS };

#define FKDA_NAMES(suffix)                                                                                   \
    "fkda_decode_one_" suffix, "fkda_decode_steps_" suffix, "fkda_decode_chunk_" suffix,                     \
        "fkda_decode_apply_" suffix

static fkda_module module = {
    .image = fkda_fatbin_decode,
    .names = {FKDA_NAMES("f32"), FKDA_NAMES("bf16"), FKDA_NAMES("k_first_f32"), FKDA_NAMES("k_first_bf16")},
    .shared_bytes = FKDA_DECODE_SHARED_BYTES(FKDA_DECODE_VECTORS_OF_A_CHUNK, FKDA_DECODE_MAX_TOKENS),
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum {
    /* Tokens of a sequence from which on they are computed at once. For fewer, the small matrices and the
     * meetings of the CTA that they need cost more than a token does. */
    CHUNK_FROM = 5,
    /* log2 of the CTAs that a head is divided among where there are heads enough. With one token, CTAs of
     * half a head let loads of one overlap with stores of another. With more tokens, CTAs that share a head
     * would prepare them twice. */
    SPLIT_FOR_ONE_TOKEN = 1,
    SPLIT_FOR_MORE = 0,
    /* At most. A warp prepares one token at a time, so CTAs for several tokens keep some warps. */
    MOST_SPLIT_FOR_ONE_TOKEN = 3,
    MOST_SPLIT_FOR_MORE = 1,
    CTAS_PER_SM = 2, /* with fewer, heads are divided further */
};

static int choose_split(int64_t heads, bool one_token, int sms)
{
    int split = one_token ? SPLIT_FOR_ONE_TOKEN : SPLIT_FOR_MORE;
    const int most = one_token ? MOST_SPLIT_FOR_ONE_TOKEN : MOST_SPLIT_FOR_MORE;
    while (split < most && heads << split < (int64_t)CTAS_PER_SM * sms) split++;
    return split;
}

typedef struct launch {
    int kernel, split, shared_bytes;
    int64_t heads; /* of all sequences */
    void *args;
} launch;

static flash_kda_status run(flash_kda_device device, void *stream, const launch *l)
{
    const fkda_driver *driver;
    const int ordinal = device.index;
    flash_kda_status status = fkda_enter_device(ordinal, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_load_module(driver, &module, ordinal);
    if (status == FLASH_KDA_OK) {
        void *pointers[] = {l->args};
        const CUresult result =
            driver->cuLaunchKernel(module.functions[ordinal][l->kernel], (unsigned)(l->heads << l->split), 1,
                                   1, FKDA_DECODE_THREADS >> l->split, 1, 1, (unsigned)l->shared_bytes,
                                   (CUstream)stream, pointers, NULL);
        if (result) status = fkda_driver_fail("cuLaunchKernel", result);
    }
    return fkda_leave_device(driver, status);
}

static int kernel_of(const fkda_state_view *state, bool k_first, int which)
{
    return KERNELS * ((state->dtype == FLASH_KDA_BF16) + 2 * k_first) + which;
}

static int which_decode(const fkda_decode_problem *p)
{
    if (p->parents.data) return CHUNK;
    if (!p->cu_seqlens.data && p->tokens == 1) return ONE;
    if (p->write_states == FLASH_KDA_WRITE_EACH) return STEPS;
    /* With cu_seqlens the lengths are not known here, and a sequence is computed in one way whatever else is
     * in the call. */
    return p->cu_seqlens.data || p->tokens >= CHUNK_FROM ? CHUNK : STEPS;
}

flash_kda_status fkda_cuda_decode(const fkda_decode_problem *p)
{
    const int which = which_decode(p);
    const int64_t heads = p->sequences * p->heads;
    const int tokens = p->tokens < FKDA_DECODE_MAX_TOKENS ? (int)p->tokens : FKDA_DECODE_MAX_TOKENS,
              vectors = which == CHUNK ? FKDA_DECODE_VECTORS_OF_A_CHUNK : FKDA_DECODE_VECTORS_OF_A_STEP;
    int sms;
    if (heads == 0 || p->tokens == 0) return FLASH_KDA_OK;
    const flash_kda_status status = fkda_cuda_sms(p->device.index, &sms);
    if (status != FLASH_KDA_OK) return status;
    fkda_decode_args args = fkda_decode_args_of(p);
    args.split = choose_split(heads, which == ONE, sms);
    const launch l = {
        .kernel = kernel_of(&p->state, p->state_k_first, which),
        .split = args.split,
        .shared_bytes = FKDA_DECODE_SHARED_BYTES(vectors, tokens),
        .heads = heads,
        .args = &args,
    };
    return run(p->device, p->stream, &l);
}

flash_kda_status fkda_cuda_apply(const fkda_apply_problem *p)
{
    const int64_t heads = p->sequences * p->heads;
    int sms;
    if (heads == 0 || p->record_columns == 0) return FLASH_KDA_OK;
    const flash_kda_status status = fkda_cuda_sms(p->device.index, &sms);
    if (status != FLASH_KDA_OK) return status;
    fkda_apply_args args = {
        .split = choose_split(heads, false, sms),
        .records = p->records,
        .state = fkda_state_args_of(&p->state),
        .state_indices = fkda_index_args_of(&p->state_indices, 1),
        .num_accepted_tokens = fkda_index_args_of(&p->num_accepted_tokens, 1),
        .accepted = fkda_index_args_of(&p->accepted, p->accepted_columns),
        .rounding = (const long long *)p->rounding,
        .first_slot = p->first_slot,
        .record_columns = (int)p->record_columns,
        .heads = (int)p->heads,
        .sequences = (int)p->sequences,
        .state_is_bf16 = p->state.dtype == FLASH_KDA_BF16,
        .state_k_first = p->state_k_first,
    };
    const launch l = {
        .kernel = kernel_of(&p->state, p->state_k_first, APPLY),
        .split = args.split,
        .shared_bytes = FKDA_DECODE_APPLY_BYTES,
        .heads = heads,
        .args = &args,
    };
    return run(p->device, p->stream, &l);
}
