/*
 * The planner of the kernel "hopper" and the cache of plans, asked directly and without a GPU: what is chosen
 * for known shapes, what every plan must satisfy, and when a plan is made anew.
 */
#include <stdio.h>
#include <string.h>

#include "../../src/cuda/hopper/costs.h"
#include "../../src/cuda/hopper/workspace.h"
#include "../../src/kernel.h"
#include "harness.h"

enum { H100_SMS = 132, CHUNK = FKDA_HOPPER_CHUNK_PAIR };

static const char *const strategy_names[] = {
    [FKDA_HOPPER_WHOLE] = "whole",
    [FKDA_HOPPER_PASSES] = "passes",
    [FKDA_HOPPER_RELAY] = "relay",
    [FKDA_HOPPER_MIXED] = "mixed",
};

/* One batch row of `sequences` sequences; a row without cu_seqlens if there is one sequence. */
static fkda_shape shape_of(int64_t tokens, int64_t heads, int64_t sequences, int64_t max_seqlen)
{
    fkda_shape s;
    memset(&s, 0, sizeof s);
    s.batch = 1, s.tokens = tokens, s.heads = heads, s.sequences = sequences;
    s.has_cu_seqlens = sequences > 1, s.max_seqlen = max_seqlen;
    return s;
}

/* What the planner chooses for well-known shapes, on 132 SMs. */
static void decisions(void)
{
    static const struct {
        int64_t tokens, heads, sequences, max_seqlen;
        int32_t cut, batch_invariant;
        fkda_hopper_strategy strategy;
        int64_t shortest; /* of a segment; 0: not asked */
        int workers;      /* solo CTAs or CTA pairs; 0: not asked */
        int chunk;        /* of whole sequences; 0: not asked */
    } rows[] = {
        /* One sequence, from many heads to few. */
        {.tokens = 8192,
         .heads = 96,
         .sequences = 1,
         .strategy = FKDA_HOPPER_WHOLE,
         .workers = 66,
         .chunk = 32},
        {.tokens = 8192,
         .heads = 66,
         .sequences = 1,
         .strategy = FKDA_HOPPER_WHOLE,
         .workers = 66,
         .chunk = 32},
        {.tokens = 8192, .heads = 24, .sequences = 1, .strategy = FKDA_HOPPER_RELAY, .workers = 66},
        {.tokens = 8192, .heads = 16, .sequences = 1, .strategy = FKDA_HOPPER_RELAY, .workers = 64},
        {.tokens = 2048, .heads = 12, .sequences = 1, .strategy = FKDA_HOPPER_RELAY, .workers = 66},
        {.tokens = 2048, .heads = 6, .sequences = 1, .strategy = FKDA_HOPPER_PASSES, .shortest = 256},
        {.tokens = 1024, .heads = 4, .sequences = 1, .strategy = FKDA_HOPPER_PASSES, .shortest = 128},
        {.tokens = 512, .heads = 4, .sequences = 1, .strategy = FKDA_HOPPER_WHOLE, .workers = 4},
        {.tokens = 262144, .heads = 1, .sequences = 1, .strategy = FKDA_HOPPER_PASSES},
        {.tokens = 0, .heads = 4, .sequences = 1, .cut = FLASH_KDA_CUT_ALWAYS, .strategy = FKDA_HOPPER_WHOLE},
        {.tokens = 127,
         .heads = 1,
         .sequences = 1,
         .cut = FLASH_KDA_CUT_ALWAYS,
         .strategy = FKDA_HOPPER_WHOLE},
        /* Several sequences. */
        {.tokens = 8192,
         .heads = 96,
         .sequences = 8,
         .strategy = FKDA_HOPPER_WHOLE,
         .workers = 132,
         .chunk = 16},
        {.tokens = 4000, .heads = 32, .sequences = 4, .strategy = FKDA_HOPPER_MIXED, .workers = 66},
        {.tokens = 4000, .heads = 34, .sequences = 4, .strategy = FKDA_HOPPER_WHOLE, .chunk = 16},
        {.tokens = 4000, .heads = 12, .sequences = 4, .strategy = FKDA_HOPPER_WHOLE, .chunk = 32},
        {.tokens = 35000,
         .heads = 8,
         .sequences = 51,
         .max_seqlen = 30000,
         .strategy = FKDA_HOPPER_MIXED,
         .shortest = 6368,
         .workers = 66},
        {.tokens = 35000,
         .heads = 8,
         .sequences = 51,
         .strategy = FKDA_HOPPER_MIXED,
         .shortest = 6368,
         .workers = 66},
        {.tokens = 305000, .heads = 8, .sequences = 51, .strategy = FKDA_HOPPER_PASSES, .shortest = 33888},
        {.tokens = 34986, .heads = 8, .sequences = 51, .max_seqlen = 686, .strategy = FKDA_HOPPER_WHOLE},
        {.tokens = 12288, .heads = 14, .sequences = 3, .max_seqlen = 4096, .strategy = FKDA_HOPPER_WHOLE},
        {.tokens = 35000,
         .heads = 64,
         .sequences = 51,
         .max_seqlen = 30000,
         .strategy = FKDA_HOPPER_WHOLE,
         .workers = 66,
         .chunk = 32},
        /* Options. */
        {.tokens = 8192,
         .heads = 16,
         .sequences = 1,
         .cut = FLASH_KDA_CUT_NEVER,
         .strategy = FKDA_HOPPER_WHOLE},
        {.tokens = 8192,
         .heads = 16,
         .sequences = 1,
         .cut = FLASH_KDA_CUT_MIXED,
         .strategy = FKDA_HOPPER_WHOLE},
        {.tokens = 8192,
         .heads = 96,
         .sequences = 1,
         .batch_invariant = 1,
         .strategy = FKDA_HOPPER_PASSES,
         .shortest = 1024},
        {.tokens = 8192,
         .heads = 96,
         .sequences = 8,
         .batch_invariant = 1,
         .cut = FLASH_KDA_CUT_NEVER,
         .strategy = FKDA_HOPPER_WHOLE,
         .workers = 66,
         .chunk = 32},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        fkda_shape s = shape_of(rows[i].tokens, rows[i].heads, rows[i].sequences, rows[i].max_seqlen);
        s.cut = rows[i].cut, s.batch_invariant = rows[i].batch_invariant;
        trying("%lld tokens, %lld heads, %lld sequences, cut %d", (long long)s.tokens, (long long)s.heads,
               (long long)s.sequences, s.cut);
        const fkda_hopper_plan p = fkda_hopper_plan_for(&s, H100_SMS);
        const long long workers = p.strategy == FKDA_HOPPER_RELAY   ? p.relay_pairs
                                  : p.strategy == FKDA_HOPPER_MIXED ? p.mixed.pairs
                                                                    : p.whole.workers;
        CHECK(p.strategy == rows[i].strategy, "the strategy is %s, expected %s", strategy_names[p.strategy],
              strategy_names[rows[i].strategy]);
        CHECK(!rows[i].shortest || p.shortest == rows[i].shortest,
              "segments have %lld tokens or more, expected %lld", (long long)p.shortest,
              (long long)rows[i].shortest);
        CHECK(!rows[i].workers || workers == rows[i].workers, "%lld workers, expected %d", workers,
              rows[i].workers);
        CHECK(!rows[i].chunk || p.whole.chunk == rows[i].chunk, "chunks of %d tokens, expected %d",
              p.whole.chunk, rows[i].chunk);
    }
}

static int64_t segment_chunks(const fkda_relay *r, int i)
{
    return r->first_chunk[i + 1] - r->first_chunk[i];
}

/* How the relay cuts the shapes that docs/segments.md shows. First and shared segments may be shorter than
 * 128 tokens. */
static void relay_cuts(void)
{
    static const struct {
        int64_t tokens, heads;
        int chunks[8]; /* of each segment */
        int spare_pairs;
    } rows[] = {
        {.tokens = 8192, .heads = 24, .chunks = {65, 72, 34, 14, 71}},
        {.tokens = 2048, .heads = 12, .chunks = {10, 11, 11, 10, 11, 11}, .spare_pairs = 6},
        {.tokens = 1664, .heads = 13, .chunks = {2, 10, 10, 10, 10, 10}},
        {.tokens = 2048, .heads = 16, .chunks = {7, 15, 14, 15, 13}},
        {.tokens = 8192, .heads = 16, .chunks = {46, 53, 53, 53, 51}},
        {.tokens = 8192, .heads = 36, .chunks = {91, 47, 21, 97}},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const fkda_shape s = shape_of(rows[i].tokens, rows[i].heads, 1, 0);
        trying("%lld tokens, %lld heads", (long long)s.tokens, (long long)s.heads);
        const fkda_hopper_plan p = fkda_hopper_plan_for(&s, H100_SMS);
        if (!CHECK(p.strategy == FKDA_HOPPER_RELAY, "the strategy is %s", strategy_names[p.strategy]))
            continue;
        for (int n = 0; n < 8 && rows[i].chunks[n]; n++)
            CHECK(n < p.relay.segments && segment_chunks(&p.relay, n) == rows[i].chunks[n],
                  "segment %d has %lld chunks, expected %d", n, (long long)segment_chunks(&p.relay, n),
                  rows[i].chunks[n]);
        CHECK(p.relay.spare_pairs == rows[i].spare_pairs, "%d spare pairs, expected %d", p.relay.spare_pairs,
              rows[i].spare_pairs);
    }
}

static void check_relay(const fkda_shape *s, const fkda_hopper_plan *p)
{
    const fkda_relay *r = &p->relay;
    const int64_t heads = s->sequences * s->heads;
    int64_t needed = heads * (r->inner + 1);
    int shared = 0;
    for (int i = 0; i < FKDA_RELAY_SHARED; i++) {
        if (!r->shared[i].heads) continue;
        needed += r->shared[i].pairs, shared++;
        CHECK((int64_t)r->shared[i].heads * r->shared[i].pairs >= heads, "some head has no shared segment %d",
              i);
    }
    CHECK(r->needed_pairs == needed && p->relay_pairs == needed + r->spare_pairs,
          "%d pairs, %d of them needed and %d spare; expected %lld needed", p->relay_pairs, r->needed_pairs,
          r->spare_pairs, (long long)needed);
    CHECK(p->relay_pairs <= fkda_hopper_pairs(p->sms), "%d pairs on %d SMs", p->relay_pairs, p->sms);
    CHECK(r->segments == r->inner + shared + 2 && r->segments - 2 <= FKDA_MAPS_CHAINED, "%d segments",
          r->segments);
    CHECK(r->first_chunk[0] == 0 && r->first_chunk[r->segments] == r->chunks &&
              r->chunks == (s->tokens + CHUNK - 1) / CHUNK,
          "segments cover chunks %d to %d of %d", r->first_chunk[0], r->first_chunk[r->segments], r->chunks);
    for (int i = 0; i < r->segments; i++)
        CHECK(segment_chunks(r, i) >= 1, "segment %d has %lld chunks", i, (long long)segment_chunks(r, i));
}

/* Areas of the workspace begin at multiples of 64 bytes and do not overlap. */
static void check_memory(const fkda_shape *s, const fkda_hopper_plan *p)
{
    const fkda_hopper_memory *m = &p->memory;
    const size_t matrices = (size_t)s->heads * FKDA_DIM * FKDA_DIM * sizeof(float), slots = (size_t)p->slots;
    const struct {
        size_t begin, bytes;
    } areas[] = {
        {m->handoff,
         (size_t)p->sms * (FKDA_DIM * FKDA_DIM * sizeof(float) + FKDA_HANDOFF_FLAGS * sizeof(int))},
        {m->flags, (size_t)(m->relay_flags + m->mixed_handoff_flags) * sizeof(int)},
        {m->counts, sizeof(fkda_list_counts)},
        {m->inner, slots * sizeof(fkda_segment)},
        {m->later, (slots + (size_t)s->sequences) * sizeof(fkda_segment)},
        {m->cut_sequences, slots / 2 * sizeof(fkda_cut_sequence)},
        {m->states, slots * matrices},
        {m->maps, slots * matrices},
        {m->composed, (size_t)p->groups * matrices},
    };
    enum { COUNT = sizeof areas / sizeof *areas };
    for (int i = 0; i < COUNT; i++) {
        const size_t end = i + 1 < COUNT ? areas[i + 1].begin : m->bytes;
        CHECK(areas[i].begin % 64 == 0 && areas[i].begin + areas[i].bytes <= end,
              "area %d is %zu bytes at %zu, and the next one begins at %zu", i, areas[i].bytes,
              areas[i].begin, end);
    }
}

static int64_t random_between(rng *r, int64_t low, int64_t high)
{
    return low + (int64_t)(rng_bits(r) % (uint64_t)(high - low + 1));
}

/* Small numbers as often as large ones. */
static int64_t random_size(rng *r, int64_t most)
{
    return random_between(r, 0, most >> random_between(r, 0, 16));
}

/* What every plan must satisfy, for shapes and GPUs drawn at random. */
static void random_shapes(void)
{
    const int count = test.quick ? 20000 : 200000;
    int strategies[4] = {0};
    rng r = rng_seed(11);
    for (int i = 0; i < count; i++) {
        const int64_t tokens = random_size(&r, 1 << 20), heads = 1 + random_size(&r, 255),
                      sequences = random_between(&r, 0, 1) ? 1 : 1 + random_size(&r, 255);
        fkda_shape s = shape_of(tokens, heads, sequences, 0);
        if (random_between(&r, 0, 1)) s.max_seqlen = random_between(&r, 0, tokens);
        if (random_between(&r, 0, 3) == 0) s.batch = s.sequences, s.has_cu_seqlens = 0;
        s.cut = (int32_t)(random_between(&r, 0, 1) * random_between(&r, 0, 3));
        s.batch_invariant = random_between(&r, 0, 5) == 0;
        const int sms = (int)random_between(&r, 2, 200);
        trying(
            "draw %d: B = %lld, T = %lld, H = %lld, N = %lld, max_seqlen %lld, cut %d, invariant %d, %d SMs",
            i, (long long)s.batch, (long long)s.tokens, (long long)s.heads, (long long)s.sequences,
            (long long)s.max_seqlen, s.cut, s.batch_invariant, sms);
        const fkda_hopper_plan p = fkda_hopper_plan_for(&s, sms), again = fkda_hopper_plan_for(&s, sms);
        strategies[p.strategy]++;
        CHECK(p.strategy == again.strategy && p.memory.bytes == again.memory.bytes &&
                  memcmp(&p.relay, &again.relay, sizeof p.relay) == 0,
              "the plan differs when it is made again");
        CHECK(p.whole.workers >= 1 && p.whole.workers <= sms, "%lld workers on %d SMs",
              (long long)p.whole.workers, sms);
        CHECK(!s.batch_invariant || (!p.whole.divides && p.whole.chunk == CHUNK),
              "the batch changes the result");
        if (p.strategy == FKDA_HOPPER_WHOLE) continue;
        CHECK(s.cut != FLASH_KDA_CUT_NEVER, "a sequence is cut");
        CHECK(p.slots >= 2 && p.shortest >= (s.batch_invariant ? 1024 : 128),
              "%lld slots, %lld tokens or more", (long long)p.slots, (long long)p.shortest);
        check_memory(&s, &p);
        if (p.strategy == FKDA_HOPPER_RELAY) check_relay(&s, &p);
        if (p.strategy == FKDA_HOPPER_MIXED)
            CHECK(p.mixed.most_long >= 1 && p.mixed.most_long * s.heads < p.mixed.pairs &&
                      p.mixed.pairs <= sms / 2,
                  "%d long sequences of %lld heads on %d pairs", p.mixed.most_long, (long long)s.heads,
                  p.mixed.pairs);
        if (s.cut == FLASH_KDA_CUT_AUTO && s.batch * s.tokens * s.heads > 1 << 20)
            CHECK(p.memory.bytes < (size_t)(s.batch * s.tokens * s.heads) * FKDA_DIM * 4 * 2 / 4,
                  "%zu bytes of workspace", p.memory.bytes);
    }
    for (int i = 0; i < 4; i++)
        CHECK(strategies[i] > count / 200, "only %d draws are %s", strategies[i], strategy_names[i]);
}

static int plans_made;
static flash_kda_status plan_to_give = FLASH_KDA_OK;

static flash_kda_status count_plan(fkda_plan *plan)
{
    plans_made++;
    plan->workspace_bytes = (size_t)plan->shape.tokens;
    return plan_to_give;
}

static void find(const fkda_kernel *kernel, int64_t tokens, int expected_plans)
{
    fkda_shape s = shape_of(tokens, 1, 1, 0);
    s.kernel = kernel;
    const fkda_plan *plan;
    const flash_kda_status status = fkda_find_plan(&s, &plan);
    trying("T = %lld", (long long)tokens);
    CHECK(status == plan_to_give, "status %d", status);
    CHECK(plan->workspace_bytes == (size_t)tokens, "the plan is of another shape");
    CHECK(plans_made == expected_plans, "%d plans were made, expected %d", plans_made, expected_plans);
}

/* A repeated shape finds its plan, eight shapes fit, and a plan that failed is not kept. */
static void cache(void)
{
    static const fkda_kernel kernel = {.plan = count_plan};
    plans_made = 0, plan_to_give = FLASH_KDA_OK;
    for (int round = 0; round < 3; round++)
        for (int i = 0; i < 8; i++) find(&kernel, 100 + i, round == 0 ? i + 1 : 8);
    find(&kernel, 108, 9);
    find(&kernel, 108, 9);
    find(&kernel, 107, 9);
    find(&kernel, 100, 10); /* 108 has taken its place */
    plan_to_give = FLASH_KDA_UNAVAILABLE;
    find(&kernel, 200, 11);
    find(&kernel, 200, 12);
}

/* A sequence with more than 46,340 segments, whose square leaves 32 bits, has a plan on GPUs that exist: one
 * head of 50 million tokens, whose tensors and workspace have 80 GB. How the kernels cut the sequence is
 * tested in tests/emulator/test_cut.cpp. */
static void many_segments(void)
{
    fkda_shape s = shape_of(48 << 20, 1, 1, 48 << 20);
    s.batch_invariant = 1;
    const fkda_hopper_plan p = fkda_hopper_plan_for(&s, H100_SMS);
    const double bytes = (double)s.tokens * (5 * 256 + 2) + (double)p.memory.bytes;
    CHECK(p.strategy == FKDA_HOPPER_PASSES && p.slots > 46340, "%lld segments", (long long)p.slots);
    CHECK(bytes < 80e9, "%.0f GB", 1e-9 * bytes);
}

int main(int argc, char **argv)
{
    static const group groups[] = {
        {"decisions", decisions},   {"many-segments", many_segments},
        {"relay-cuts", relay_cuts}, {"random-shapes", random_shapes},
        {"cache", cache},
    };
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
