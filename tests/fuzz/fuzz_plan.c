/* The planner of the kernel "hopper": any shape that the checks of arguments let pass, on any number of SMs.
 * */
#include <string.h>

#include "../../src/cuda/hopper/plan.h"
#include "fuzz.h"

/* The limits of src/check.c: tokens and states, and B * T * H. */
static const int64_t MOST = INT32_MAX - 1024, MOST_ROWS = (int64_t)1 << 41;
enum { MOST_HEADS = INT32_MAX / FKDA_DIM, MOST_SMS = 1000 };

/* Numbers of every magnitude. */
static int64_t take_size(input *from, int64_t least, int64_t most)
{
    const int64_t shift = take_between(from, 0, 31);
    return take_between(from, least, least + ((most - least) >> shift));
}

static fkda_shape take_shape(input *from)
{
    fkda_shape s;
    memset(&s, 0, sizeof s);
    s.heads = take_size(from, 1, MOST_HEADS);
    s.sequences = take_size(from, 1, MOST / s.heads);
    s.batch = take_bool(from) ? s.sequences : 1;
    int64_t most = MOST / s.batch;
    if (most > MOST_ROWS / s.heads / s.batch) most = MOST_ROWS / s.heads / s.batch;
    s.tokens = take_size(from, 0, most);
    s.has_cu_seqlens = s.batch != s.sequences || (s.batch == 1 && take_bool(from));
    s.max_seqlen = take_bool(from) ? take_between(from, 0, s.tokens) : 0;
    s.cut = (int32_t)take_between(from, FLASH_KDA_CUT_AUTO, FLASH_KDA_CUT_MIXED);
    s.batch_invariant = take_bool(from);
    return s;
}

#define RULE(holds)                                                                                          \
    if (!(holds))                                                                                            \
    wrong("%s: B %lld, T %lld, H %lld, N %lld, longest %lld, cut %d, invariant %d, %d SMs", #holds,          \
          (long long)s->batch, (long long)s->tokens, (long long)s->heads, (long long)s->sequences,           \
          (long long)s->max_seqlen, s->cut, s->batch_invariant, p->sms)

static void check_whole(const fkda_shape *s, const fkda_hopper_plan *p)
{
    RULE(p->whole.workers >= 1 && p->whole.workers <= p->sms);
    RULE(p->whole.heads == s->sequences * s->heads);
    RULE(p->whole.chunk == FKDA_HOPPER_CHUNK_PAIR || p->whole.chunk == FKDA_HOPPER_CHUNK_SOLO);
    RULE(p->whole.chunk == FKDA_HOPPER_CHUNK_SOLO || p->whole.workers <= fkda_hopper_pairs(p->sms));
    RULE(!s->batch_invariant || (!p->whole.divides && p->whole.chunk == FKDA_HOPPER_CHUNK_PAIR));
}

static void check_relay(const fkda_shape *s, const fkda_hopper_plan *p)
{
    const fkda_relay *r = &p->relay;
    RULE(p->relay_pairs >= 1 && p->relay_pairs <= fkda_hopper_pairs(p->sms));
    RULE(r->needed_pairs + r->spare_pairs == p->relay_pairs);
    RULE(r->segments >= 2 && r->first_chunk[0] == 0 && r->first_chunk[r->segments] == r->chunks);
    for (int i = 0; i < r->segments; i++) RULE(r->first_chunk[i] < r->first_chunk[i + 1]);
}

/* Each area ends where the next one begins, or before. */
static void check_memory(const fkda_shape *s, const fkda_hopper_plan *p)
{
    const fkda_hopper_memory *m = &p->memory;
    const size_t begins[] = {m->handoff,       m->flags,  m->counts, m->inner,    m->later,
                             m->cut_sequences, m->states, m->maps,   m->composed, m->bytes};
    const unsigned __int128 matrices = (unsigned __int128)s->heads * FKDA_DIM * FKDA_DIM * sizeof(float);
    for (size_t i = 0; i + 1 < sizeof begins / sizeof *begins; i++) {
        RULE(begins[i] <= begins[i + 1]);
        RULE(begins[i] % 64 == 0);
    }
    RULE(m->bytes - m->composed >= (unsigned __int128)p->groups * matrices);
    RULE(m->composed - m->maps >= (unsigned __int128)p->slots * matrices);
    RULE(m->maps - m->states >= (unsigned __int128)p->slots * matrices);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input from = {data, size};
    const fkda_shape shape = take_shape(&from), *s = &shape;
    const fkda_hopper_plan plan = fkda_hopper_plan_for(s, (int)take_between(&from, 2, MOST_SMS)), *p = &plan;
    const fkda_hopper_plan again = fkda_hopper_plan_for(s, p->sms);
    RULE(again.strategy == p->strategy && again.memory.bytes == p->memory.bytes);
    check_whole(s, p);
    if (p->strategy == FKDA_HOPPER_WHOLE) return 0;
    RULE(s->cut != FLASH_KDA_CUT_NEVER);
    RULE(p->slots >= 2 && p->shortest >= 1);
    check_memory(s, p);
    if (p->strategy == FKDA_HOPPER_RELAY) check_relay(s, p);
    if (p->strategy == FKDA_HOPPER_MIXED) {
        RULE(p->mixed.pairs >= 1 && p->mixed.pairs <= fkda_hopper_pairs(p->sms));
        RULE(p->mixed.most_long >= 1 && p->mixed.most_long * s->heads < p->mixed.pairs);
    }
    return 0;
}
