/* What a call launches, on the pretended GPU (tests/pretend_driver): how many kernels, of how many CTAs and
 * threads. No kernel runs. */
#include <stdio.h>
#include <string.h>

#include "harness.h"
#include "pretended.h"

enum { MOST_SHARED_BYTES = 227 << 10 }; /* of a CTA, on compute capability 9.0 */

static const pretended_counts *counts;

static bool is_hopper(void)
{
    return strcmp(test.kernel, "hopper") == 0;
}

static int sm_count(void)
{
    flash_kda_device_info devices[2] = {{.struct_size = sizeof *devices}, {.struct_size = sizeof *devices}};
    int32_t count;
    must(flash_kda_list_devices(devices, 2, &count, NULL));
    return devices[1].units;
}

static flash_kda_fwd_params params_of(pretended_shape shape)
{
    flash_kda_fwd_params p = pretended_params(shape);
    p.kernel = test.kernel;
    p.cut = test.cut;
    return p;
}

/* What one call launches. */
typedef struct launched {
    unsigned long count;
    size_t memset_words;
    pretended_launch launch[PRETENDED_LAUNCHES];
} launched;

static launched one_call(const flash_kda_fwd_params *p)
{
    const pretended_counts before = *counts;
    launched l = {0};
    const flash_kda_status status = flash_kda_fwd(p);
    if (!CHECK(status == FLASH_KDA_OK, "%s", flash_kda_last_error())) return l;
    l.count = counts->launches - before.launches;
    l.memset_words = counts->memset_words - before.memset_words;
    CHECK(l.count <= PRETENDED_LAUNCHES, "it launches %lu kernels", l.count);
    for (unsigned long i = 0; i < l.count && i < PRETENDED_LAUNCHES; i++)
        l.launch[i] = counts->launch[(before.launches + i) % PRETENDED_LAUNCHES];
    return l;
}

static void trying_shape(pretended_shape s, const flash_kda_fwd_params *p)
{
    trying("B = %lld, T = %lld, H = %lld, N of cu_seqlens = %lld, longest %lld, cut %d, batch_invariant %d",
           (long long)s.batch, (long long)s.tokens, (long long)s.heads, (long long)s.sequences,
           (long long)s.longest, p->cut, p->batch_invariant);
}

static pretended_shape random_shape(rng *r)
{
    static const int64_t most_tokens[] = {64, 2048, 20000, 300000};
    pretended_shape s = {.batch = 1};
    s.tokens = (int64_t)(rng_bits(r) % (uint64_t)most_tokens[rng_bits(r) % 4]) + 1;
    s.heads = (int64_t)(rng_bits(r) % (rng_bits(r) % 2 ? 16 : 128)) + 1;
    switch (rng_bits(r) % 3) {
    case 0: s.batch = (int64_t)(rng_bits(r) % 8) + 1; break;
    case 1:
        s.sequences = (int64_t)(rng_bits(r) % 60) + 1;
        s.longest = (s.tokens + s.sequences - 1) / s.sequences;
        s.longest += (int64_t)(rng_bits(r) % (uint64_t)(s.tokens - s.longest + 1));
        break;
    default: s.sequences = (int64_t)(rng_bits(r) % 60) + 1; break;
    }
    return s;
}

/* A call that counts values that are not finite launches what it launches without that, a counting kernel
 * before and one after it, and sets its records in one memset. A counting kernel has at most four CTAs on
 * each SM and one more for each tensor, so that all of them run at the same time. */
static void counting(void)
{
    enum { RECORD_WORDS = FLASH_KDA_CHECKED_TENSORS * 4, INPUTS = FLASH_KDA_CHECKED_OUT, OUTPUTS = 2 };
    static const int64_t shape[] = {FLASH_KDA_CHECKED_TENSORS, 2};
    const unsigned full = 4 * (unsigned)sm_count();
    rng r = rng_seed(4);
    for (int i = 0; i < (test.quick ? 100 : 500); i++) {
        const pretended_shape s = random_shape(&r);
        flash_kda_fwd_params p = params_of(s);
        trying_shape(s, &p);
        const launched without = one_call(&p);
        p.nonfinite = tensor_of((void *)((uintptr_t)1 << 20), FLASH_KDA_I64, 2, shape);
        const launched with = one_call(&p);
        if (!CHECK(with.count == without.count + 2, "it launches %lu kernels instead of %lu", with.count,
                   without.count + 2))
            continue;
        const pretended_launch *inputs = with.launch, *outputs = &with.launch[with.count - 1];
        CHECK(memcmp(inputs + 1, without.launch, without.count * sizeof *inputs) == 0,
              "the forward pass launches something else");
        CHECK(with.memset_words == without.memset_words + RECORD_WORDS, "a memset clears %zu words",
              with.memset_words);
        CHECK(inputs->threads == 256 && outputs->threads == 256, "a CTA has %u and %u threads",
              inputs->threads, outputs->threads);
        CHECK(inputs->ctas >= INPUTS && inputs->ctas <= full + INPUTS && outputs->ctas >= OUTPUTS &&
                  outputs->ctas <= full + OUTPUTS,
              "%u and %u CTAs count", inputs->ctas, outputs->ctas);
        CHECK(!inputs->early && !outputs->early, "a counting kernel starts early");
    }
}

/* A CTA of the Hopper kernels has 512 threads, of the join 160. No launch has more CTAs than there are SMs,
 * and CTAs that run together are pairs. */
static void check_launch(const pretended_launch *l, int sms)
{
    CHECK(l->ctas >= 1, "a launch has no CTA");
    CHECK(l->shared_bytes <= MOST_SHARED_BYTES, "a CTA has %u bytes of shared memory", l->shared_bytes);
    if (is_hopper()) {
        CHECK(l->threads == 512 || l->threads == 160, "a CTA has %u threads", l->threads);
        CHECK(l->ctas <= (unsigned)sms, "a launch has %u CTAs on %d SMs", l->ctas, sms);
        CHECK(!l->cooperative || (l->ctas % 2 == 0 && l->threads == 512), "%u CTAs run together", l->ctas);
    } else {
        CHECK(l->threads == 512 || l->threads == 384 || l->threads == 320, "a CTA has %u threads",
              l->threads);
    }
}

static void ctas(void)
{
    const int sms = sm_count();
    rng r = rng_seed(1);
    for (int i = 0; i < (test.quick ? 200 : 2000); i++) {
        const pretended_shape s = random_shape(&r);
        flash_kda_fwd_params p = params_of(s);
        p.batch_invariant = (int32_t)(rng_bits(&r) % 2);
        trying_shape(s, &p);
        const launched l = one_call(&p);
        CHECK(l.count >= 1 && l.count <= 7, "it launches %lu kernels", l.count);
        for (unsigned long n = 0; n < l.count; n++) check_launch(&l.launch[n], sms);
    }
}

static bool same(const launched *a, const launched *b)
{
    return a->count == b->count && a->memset_words == b->memset_words &&
           memcmp(a->launch, b->launch, sizeof a->launch) == 0;
}

/* A repeated call launches what the first one did, and needs as much workspace, whatever was called between.
 * */
static void repeated(void)
{
    enum { SHAPES = 300 };
    static pretended_shape shapes[SHAPES];
    static launched first[SHAPES];
    static size_t bytes[SHAPES];
    rng r = rng_seed(2);
    for (int i = 0; i < SHAPES; i++) {
        shapes[i] = random_shape(&r);
        const flash_kda_fwd_params p = params_of(shapes[i]);
        trying_shape(shapes[i], &p);
        first[i] = one_call(&p);
        must(flash_kda_fwd_workspace_size(&p, &bytes[i]));
        const launched again = one_call(&p);
        CHECK(same(&first[i], &again), "the second call launches something else");
    }
    for (int i = 0; i < SHAPES; i++) {
        const flash_kda_fwd_params p = params_of(shapes[i]);
        size_t now;
        trying_shape(shapes[i], &p);
        const launched later = one_call(&p);
        must(flash_kda_fwd_workspace_size(&p, &now));
        CHECK(same(&first[i], &later), "a later call launches something else");
        CHECK(now == bytes[i], "the workspace has %zu bytes, and had %zu", now, bytes[i]);
    }
}

/* The launches of each strategy, on 132 SMs. */
static void strategies(void)
{
    static const struct {
        const char *strategy;
        pretended_shape shape;
        flash_kda_cut cut;
        unsigned long launches;
        unsigned ctas; /* of the last launch */
        int cooperative;
    } expected[] = {
        {
            .strategy = "whole, a CTA pair for each head",
            .shape = {.batch = 1, .tokens = 1, .heads = 1},
            .launches = 1,
            .ctas = 2,
        },
        {
            .strategy = "whole, a solo CTA for each head",
            .shape = {.batch = 4, .tokens = 1000, .heads = 32},
            .launches = 1,
            .ctas = 128,
        },
        {
            .strategy = "whole, even shares",
            .shape = {.batch = 1, .tokens = 8192, .heads = 96},
            .launches = 1,
            .ctas = 132,
        },
        {
            .strategy = "whole, since nothing may be cut",
            .shape = {.batch = 1, .tokens = 262144, .heads = 1},
            .cut = FLASH_KDA_CUT_NEVER,
            .launches = 1,
            .ctas = 2,
        },
        {
            .strategy = "relay of 6 segments",
            .shape = {.batch = 1, .tokens = 2048, .heads = 12},
            .launches = 1,
            .ctas = 132,
            .cooperative = 1,
        },
        {
            .strategy = "relay of 5 segments",
            .shape = {.batch = 1, .tokens = 8192, .heads = 16},
            .launches = 1,
            .ctas = 128,
            .cooperative = 1,
        },
        {
            .strategy = "mixed",
            .shape = {.batch = 1, .tokens = 35000, .heads = 8, .sequences = 51, .longest = 30000},
            .launches = 1,
            .ctas = 132,
            .cooperative = 1,
        },
        {
            .strategy = "passes: first, maps, one join, later",
            .shape = {.batch = 1, .tokens = 1024, .heads = 4},
            .launches = 4,
            .ctas = 56,
        },
        {
            .strategy = "passes: first, maps, three joins, later",
            .shape = {.batch = 1, .tokens = 262144, .heads = 1},
            .launches = 6,
            .ctas = 132,
        },
        {
            .strategy = "passes: list, first, maps, three joins, later",
            .shape = {.batch = 1, .tokens = 300000, .heads = 1, .sequences = 50},
            .cut = FLASH_KDA_CUT_ALWAYS,
            .launches = 7,
            .ctas = 132,
        },
    };
    if (!is_hopper() || test.cut != FLASH_KDA_CUT_AUTO || sm_count() != 132) return;
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        flash_kda_fwd_params p = params_of(expected[i].shape);
        p.cut = expected[i].cut;
        trying("%s", expected[i].strategy);
        const launched l = one_call(&p);
        if (!CHECK(l.count == expected[i].launches, "it launches %lu kernels", l.count)) continue;
        const pretended_launch *last = &l.launch[l.count - 1];
        CHECK(last->ctas == expected[i].ctas, "the last launch has %u CTAs", last->ctas);
        CHECK(last->cooperative == expected[i].cooperative, "cooperative is %d", last->cooperative);
    }
}

/* ---- The backward pass --------------------------------------------------------------------------------- */

static size_t workspace_of_backward(pretended_shape shape, const char *kernel)
{
    const flash_kda_fwd_params f = pretended_params(shape);
    const flash_kda_bwd_params p = {.struct_size = sizeof p,
                                    .device = f.device,
                                    .q = f.q,
                                    .k = f.k,
                                    .v = f.v,
                                    .g = f.g,
                                    .beta = f.beta,
                                    .A_log = f.A_log,
                                    .dt_bias = f.dt_bias,
                                    .cu_seqlens = f.cu_seqlens,
                                    .dout = f.v,
                                    .dq = f.q,
                                    .dk = f.k,
                                    .dv = f.v,
                                    .dg = f.g,
                                    .dbeta = f.beta,
                                    .scale = 1.0f,
                                    .lower_bound = -5.0f,
                                    .gate = f.gate,
                                    .kernel = kernel,
                                    .max_seqlen = shape.longest,
                                    .workspace_limit = SIZE_MAX}; /* all heads at once */
    size_t bytes = 0;
    must(flash_kda_bwd_workspace_size(&p, &bytes));
    return bytes;
}

/* Without a name, gradients come from "hopper" on compute capability 9.0. Its workspace has two images of a
 * state for each chunk of 32 tokens of a head, and at most 3% beside them. */
static void backward(void)
{
    static const pretended_shape shapes[] = {
        {1, 8192, 96, 0, 0}, {1, 65536, 8, 0, 0}, {1, 65536, 16, 9, 20000}};
    if (!is_hopper() || sm_count() != 132) return;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const pretended_shape s = shapes[i];
        const size_t by_default = workspace_of_backward(s, NULL), hopper = workspace_of_backward(s, "hopper"),
                     images = (size_t)(s.tokens * s.heads) / 32 * 2 * 33280;
        trying("T = %lld, H = %lld", (long long)s.tokens, (long long)s.heads);
        CHECK(by_default == hopper, "the default needs %zu bytes, hopper %zu", by_default, hopper);
        CHECK(by_default != workspace_of_backward(s, "portable"), "the default needs as much as portable");
        CHECK(hopper >= images && hopper <= images + images * 3 / 100, "hopper needs %zu bytes, images %zu",
              hopper, images);
    }
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"strategies", strategies},
                                   {"ctas", ctas},
                                   {"repeated", repeated},
                                   {"counting", counting},
                                   {"backward", backward}};
    harness_start(argc, argv);
    counts = pretended_counts_find();
    return harness_run(groups, sizeof groups / sizeof *groups);
}
