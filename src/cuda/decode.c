/*
 * Decode and apply on a GPU: chooses one of the kernels of kernels/decode/decode.cu and launches it.
 *
 *   one     one token of each sequence. The state streams through shared memory.
 *   steps   a few tokens, one after the other, with the state in registers. It is the only kernel that
 *           writes the state after each token of a chain.
 *   chunk   more tokens at once, on tensor cores; and trees of tokens. The state streams too.
 *   each    the same for a tree, with the state after each token written.
 *   past    `chunk` on states that are brought up to date from records on their way.
 *   apply   brings states up to date from records.
 *
 * which_decode() has the policy. A kernel is divided into more CTAs for a head if heads are few
 * (choose_split()). Neither choice changes what a token means, but the kernels round differently, so calls
 * with other numbers of tokens may differ in the last bits.
 */
#include <stdio.h>

#include "../../kernels/decode/decode_shape.h"
#include "cuda.h"
#include "decode_args_of.h"
#include "decode_launch.h"

extern const unsigned char fkda_fatbin_decode[];

/* The kernels for a type and a layout of states, in the order of `module.names`. */
enum { ONE, STEPS, CHUNK, EACH, PAST, APPLY, KERNELS };

#define FKDA_NAMES(suffix)                                                                                   \
    "fkda_decode_one_" suffix, "fkda_decode_steps_" suffix, "fkda_decode_chunk_" suffix,                     \
        "fkda_decode_each_" suffix, "fkda_decode_past_" suffix, "fkda_decode_apply_" suffix

static fkda_module module = {
    .image = fkda_fatbin_decode,
    .names = {FKDA_NAMES("f32"), FKDA_NAMES("bf16"), FKDA_NAMES("k_first_f32"), FKDA_NAMES("k_first_bf16")},
    .shared_bytes = FKDA_DECODE_MOST_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum {
    /* From this many tokens of a sequence on, the kernel `chunk` computes them. For fewer tokens the small
     * matrices of `chunk`, and the barriers of the CTA that they need, cost more than taking the tokens one
     * after the other. */
    CHUNK_FROM = 5,
    CHUNK_WITHOUT_WRITING_FROM = 4, /* where no state is written */
    /* log2 of the CTAs that a head is divided among if there are heads enough. With one token a CTA has
     * 16 KB of an fp32 state or 32 KB of a bf16 state. */
    SPLIT_OF_FP32_FOR_ONE_TOKEN = 2,
    SPLIT_OF_BF16_FOR_ONE_TOKEN = 0,
    /* The same for `apply`: 32 KB. Each CTA of a head reads all decays and keys of the records. */
    SPLIT_OF_FP32_TO_APPLY = 1,
    SPLIT_OF_BF16_TO_APPLY = 0,
    /* The same for several tokens. Each of the CTAs that share a head prepares all tokens, and a warp one
     * token at a time. With few tokens a CTA has a warp for each token, so that more CTAs fit on an SM, and
     * some load while others compute. */
    SPLIT_FOR_MORE = 0,
    SPLIT_FOR_TWO_TOKENS = 2,
    SPLIT_FOR_FOUR_TOKENS = 1,
    SPLIT_FOR_EACH = 1, /* the kernel `each` has all of the CTA's rows in shared memory */
    /* Where heads are few. A CTA keeps enough warps to prepare several tokens side by side. */
    MOST_SPLIT_FOR_MORE = 1,
    CTAS_PER_SM = 2, /* heads are divided further while the launch has fewer CTAs than this on each SM */
};

static int choose_split(int64_t heads, int least, int most, int sms)
{
    int split = least;
    while (split < most && heads << split < (int64_t)CTAS_PER_SM * sms) split++;
    return split;
}

/* The largest split of the kernels `one` and `apply`, which leaves each CTA one warp. */
static int most_split_of_one(int threads)
{
    int split = 0;
    while (threads >> split > 32) split++;
    return split;
}

static int kernel_of(const fkda_state_view *state, bool k_first, int which)
{
    return KERNELS * ((state->dtype == FLASH_KDA_BF16) + 2 * k_first) + which;
}

static int which_decode(const fkda_decode_problem *p)
{
    if (p->past_records) return PAST;
    if (p->parents.data) return p->write_states == FLASH_KDA_WRITE_EACH ? EACH : CHUNK;
    if (!p->cu_seqlens.data && p->tokens == 1) return ONE;
    if (p->write_states == FLASH_KDA_WRITE_EACH) return STEPS;
    /* With cu_seqlens the host does not know the lengths. It then takes `chunk`, so that a sequence is
     * computed in one way whatever other sequences the call has. */
    const bool writes = p->write_states != FLASH_KDA_WRITE_NONE;
    const int from = writes ? CHUNK_FROM : CHUNK_WITHOUT_WRITING_FROM;
    return p->cu_seqlens.data || p->tokens >= from ? CHUNK : STEPS;
}

static fkda_decode_launch launch_of_one(const fkda_decode_problem *p, int64_t heads, int sms)
{
    const bool is_bf16 = p->state.dtype == FLASH_KDA_BF16;
    const int threads = FKDA_DECODE_THREADS_OF_ONE(is_bf16, p->state_k_first),
              least = is_bf16 ? SPLIT_OF_BF16_FOR_ONE_TOKEN : SPLIT_OF_FP32_FOR_ONE_TOKEN,
              split = choose_split(heads, least, most_split_of_one(threads), sms);
    return (fkda_decode_launch){
        .split = split,
        .threads = threads >> split,
        .shared_bytes = FKDA_DECODE_BYTES_OF_ONE(is_bf16) >> split,
    };
}

/* The tokens of a sequence, at most. */
static int most_tokens(const fkda_decode_problem *p)
{
    return p->tokens < FKDA_DECODE_MAX_TOKENS ? (int)p->tokens : FKDA_DECODE_MAX_TOKENS;
}

static int least_split_of_more(const fkda_decode_problem *p, int which)
{
    if (which == EACH) return SPLIT_FOR_EACH;
    if (which == CHUNK || which == PAST || p->write_states == FLASH_KDA_WRITE_EACH || p->tokens > 4)
        return SPLIT_FOR_MORE;
    return p->tokens > 2 ? SPLIT_FOR_FOUR_TOKENS : SPLIT_FOR_TWO_TOKENS;
}

static fkda_decode_launch launch_of_more(const fkda_decode_problem *p, int which, int64_t heads, int sms)
{
    const bool is_bf16 = p->state.dtype == FLASH_KDA_BF16;
    const int tokens = most_tokens(p),
              split = choose_split(heads, least_split_of_more(p, which), MOST_SPLIT_FOR_MORE, sms);
    int shared_bytes = which == STEPS ? FKDA_DECODE_STEPS_BYTES(tokens)
                                      : FKDA_DECODE_CHUNK_BYTES(tokens, which == EACH, is_bf16, split);
    if (which == PAST) {
        const int64_t most = FKDA_DECODE_MAX_TOKENS, past = p->past_columns < most ? p->past_columns : most;
        shared_bytes += FKDA_DECODE_PAST_BYTES((int)past, split);
    }
    return (fkda_decode_launch){
        .split = split,
        .threads = FKDA_DECODE_THREADS >> split,
        .shared_bytes = shared_bytes,
    };
}

/* The launch of a call of decode, all but its arguments. */
static fkda_decode_launch launch_of_decode(const fkda_decode_problem *p, int sms)
{
    const int which = which_decode(p);
    const int64_t heads = p->sequences * p->heads;
    fkda_decode_launch l = which == ONE ? launch_of_one(p, heads, sms) : launch_of_more(p, which, heads, sms);
    l.kernel = kernel_of(&p->state, p->state_k_first, which);
    l.heads = heads;
    return l;
}

static fkda_decode_launch launch_of_apply(const fkda_apply_problem *p, int sms)
{
    const int64_t heads = p->sequences * p->heads;
    const bool is_bf16 = p->state.dtype == FLASH_KDA_BF16;
    const int threads = FKDA_DECODE_THREADS_OF_ONE(is_bf16, p->state_k_first), most = FKDA_DECODE_MAX_TOKENS,
              tokens = p->record_columns < most ? (int)p->record_columns : most,
              least = is_bf16 ? SPLIT_OF_BF16_TO_APPLY : SPLIT_OF_FP32_TO_APPLY,
              split = choose_split(heads, least, most_split_of_one(threads), sms);
    return (fkda_decode_launch){
        .kernel = kernel_of(&p->state, p->state_k_first, APPLY),
        .split = split,
        .threads = threads >> split,
        .shared_bytes = FKDA_DECODE_APPLY_BYTES(is_bf16, tokens, split),
        .heads = heads,
    };
}

flash_kda_status fkda_cuda_apply(const fkda_apply_problem *p)
{
    int sms;
    if (p->sequences * p->heads == 0 || p->record_columns == 0) return FLASH_KDA_OK;
    const flash_kda_status status = fkda_cuda_sms(p->device.index, &sms);
    if (status != FLASH_KDA_OK) return status;
    fkda_apply_args args = {
        .past = fkda_past_args_of(p),
        .state = fkda_state_args_of(&p->state),
        .state_indices = fkda_index_args_of(&p->state_indices, 1),
        .rounding = (const long long *)p->rounding,
        .first_slot = p->first_slot,
        .heads = (int)p->heads,
        .sequences = (int)p->sequences,
        .state_is_bf16 = p->state.dtype == FLASH_KDA_BF16,
        .state_k_first = p->state_k_first,
    };
    fkda_decode_launch l = launch_of_apply(p, sms);
    l.args = &args;
    args.split = l.split;
    return fkda_launch_decode(p->device, p->stream, &module, &l);
}

flash_kda_status fkda_cuda_decode(const fkda_decode_problem *p)
{
    int sms;
    const fkda_apply_problem past = fkda_past_of(p);
    if (p->sequences * p->heads == 0) return FLASH_KDA_OK;
    if (p->tokens == 0) return p->past_records ? fkda_cuda_apply(&past) : FLASH_KDA_OK;
    const flash_kda_status status = fkda_cuda_sms(p->device.index, &sms);
    if (status != FLASH_KDA_OK) return status;
    fkda_decode_args args = fkda_decode_args_of(p);
    fkda_decode_launch l = launch_of_decode(p, sms);
    args.past = fkda_past_args_of(&past);
    l.args = &args;
    args.split = l.split;
    args.room = FKDA_DECODE_ROOM_OF_A_CHUNK(most_tokens(p));
    return fkda_launch_decode(p->device, p->stream, &module, &l);
}

void fkda_cuda_explain_decode(const fkda_decode_problem *p, char *text, size_t size)
{
    static const char *const how[KERNELS] = {
        [ONE] = "one token of each sequence, and states that stream through shared memory",
        [STEPS] = "tokens one after the other, with states in registers",
        [CHUNK] = "all tokens of a sequence at once on tensor cores, and states that stream through shared "
                  "memory",
        [EACH] = "all tokens of a sequence at once on tensor cores, with states in shared memory",
        [PAST] = "all tokens of a sequence at once on tensor cores, and states to which records are applied "
                 "while they stream through shared memory",
    };
    int sms;
    if (fkda_cuda_sms(p->device.index, &sms) != FLASH_KDA_OK) sms = 1;
    const fkda_decode_launch l = launch_of_decode(p, sms);
    fkda_explain_launch(module.names[l.kernel], how[l.kernel % KERNELS], &l, text, size);
}

void fkda_cuda_explain_apply(const fkda_apply_problem *p, char *text, size_t size)
{
    int sms;
    if (fkda_cuda_sms(p->device.index, &sms) != FLASH_KDA_OK) sms = 1;
    const fkda_decode_launch l = launch_of_apply(p, sms);
    fkda_explain_launch(module.names[l.kernel], "the records of all accepted tokens at once", &l, text, size);
}
