/*
 * Decode on the CPU. The first bytes make a good call; up to three mutations make a wrong one of most.
 *
 * Rules: a refusal has a sentence and writes nothing, a good call is taken, a call that is taken writes out,
 * records of its tokens and the slots of its states alone, and outputs and states are those of the fp64
 * reference.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "decode_compare.h"
#include "fuzz_decode.h"

/* ---- What a call reads and writes ---------------------------------------------------------------------- */

static int64_t sequences_of(const flash_kda_decode_params *p)
{
    return p->cu_seqlens.data ? p->cu_seqlens.shape[0] - 1 : p->q.shape[0];
}

/* The number of a sequence's first token among all tokens. */
static int64_t begin_of(const flash_kda_decode_params *p, int64_t n)
{
    return p->cu_seqlens.data ? integer_at(&p->cu_seqlens, n) : n * p->q.shape[1];
}

static int64_t length_of(const flash_kda_decode_params *p, int64_t n)
{
    return begin_of(p, n + 1) - begin_of(p, n);
}

static int64_t slot_at(const flash_kda_decode_params *p, int64_t n, int64_t column)
{
    const int64_t columns = p->state_indices.ndim == 2 ? p->state_indices.shape[1] : 1,
                  slot = p->state_indices.data ? integer_at(&p->state_indices, n * columns + column) : n;
    return slot < p->first_slot ? -1 : slot;
}

/* The slot that sequence n starts from, or -1: it has no state. */
static int64_t first_slot(const flash_kda_decode_params *p, int64_t n)
{
    const bool starts = p->num_accepted_tokens.data && !p->past_records.data;
    return slot_at(p, n, starts ? integer_at(&p->num_accepted_tokens, n) - 1 : 0);
}

/* The slot to which past records are applied, or -1. */
static int64_t slot_of_past(const flash_kda_decode_params *p, int64_t n)
{
    if (!p->past_records.data || integer_at(&p->num_accepted_tokens, n) == 0) return -1;
    return first_slot(p, n);
}

/* The pool that takes states, and its slot for the state after token i of sequence n; -1 if none does. */
static const flash_kda_tensor *written_pool(const flash_kda_decode_params *p)
{
    return p->written_states.data ? &p->written_states : &p->state;
}

static int64_t slot_after(const flash_kda_decode_params *p, int64_t n, int64_t i)
{
    const bool each = p->write_states == FLASH_KDA_WRITE_EACH;
    if (p->write_states == FLASH_KDA_WRITE_NONE || first_slot(p, n) < 0) return -1;
    if (!each && i != length_of(p, n) - 1) return -1;
    if (!p->written_states.data) return each ? slot_at(p, n, i) : first_slot(p, n);
    if (!p->written_indices.data) return each ? begin_of(p, n) + i : n;
    const int64_t slot = integer_at(&p->written_indices, each ? n * p->written_indices.shape[1] + i : n);
    return slot < 0 ? -1 : slot;
}

/* Whether a slot that takes a state takes another one, or another sequence starts from it. */
static bool shares_slots(const flash_kda_decode_params *p)
{
    int64_t slots = written_pool(p)->shape[0];
    int64_t *writer = malloc((size_t)slots * sizeof *writer + 1); /* a sequence for each slot, or -1 */
    bool shared = false;
    if (!writer) wrong("no memory");
    for (int64_t slot = 0; slot < slots; slot++) writer[slot] = -1;
    for (int64_t n = 0; n < sequences_of(p); n++)
        for (int64_t i = 0; i < length_of(p, n); i++) {
            const int64_t slot = slot_after(p, n, i);
            if (slot < 0) continue;
            shared |= writer[slot] >= 0;
            writer[slot] = n;
        }
    for (int64_t n = 0; n < sequences_of(p); n++) {
        const int64_t slot = slot_of_past(p, n);
        if (slot < 0) continue;
        shared |= writer[slot] >= 0;
        writer[slot] = n;
    }
    for (int64_t n = 0; n < sequences_of(p) && !p->written_states.data; n++) {
        const int64_t slot = first_slot(p, n);
        shared |= slot >= 0 && writer[slot] >= 0 && writer[slot] != n;
    }
    free(writer);
    return shared;
}

static void put_back_outputs(const flash_kda_decode_params *p, const memory *m)
{
    const flash_kda_tensor *pool = written_pool(p), *records = &p->records;
    const int64_t of_state = count_of(pool) / (pool->shape[0] ? pool->shape[0] : 1);
    put_back(&p->out, m, 0, count_of(&p->out));
    for (int64_t n = 0; n < sequences_of(p); n++) {
        const int64_t of_record = count_of(records) ? records->shape[2] * records->shape[3] : 0;
        if (of_record) put_back(records, m, n * records->shape[1] * of_record, length_of(p, n) * of_record);
        for (int64_t i = 0; i < length_of(p, n); i++)
            if (slot_after(p, n, i) >= 0) put_back(pool, m, slot_after(p, n, i) * of_state, of_state);
        if (slot_of_past(p, n) >= 0) put_back(pool, m, slot_of_past(p, n) * of_state, of_state);
    }
}

/* The parameters as the library sees them: fields behind a smaller struct are zero. */
static flash_kda_decode_params seen(const state *s)
{
    flash_kda_decode_params p = s->p;
    if (p.struct_size < sizeof p) memset((char *)&p + p.struct_size, 0, sizeof p - p.struct_size);
    return p;
}

/* What memory holds is lost where the call may have written it. */
static void check_unchanged(const state *s, bool taken)
{
    const flash_kda_decode_params p = seen(s);
    for (int i = 0; i < TENSORS; i++) {
        const memory *m = &s->set.memory[i];
        if (!m->bytes) continue;
        if (taken) put_back_outputs(&p, m);
        if (memcmp(m->bytes, m->before, m->count) != 0) wrong("memory of tensor %d changed", i);
    }
}

/* ---- Results ------------------------------------------------------------------------------------------- */

static double element_of(const void *elements, int32_t dtype, int64_t i)
{
    return dtype == FLASH_KDA_BF16 ? (double)float_from_bf16(((const uint16_t *)elements)[i])
                                   : (double)((const float *)elements)[i];
}

/* Whether the state on the way to a token may have been rounded more often than the reference knows: a
 * kernel may take the state of a parent that is not the token before from the slot it went to, and past
 * records leave a state that is rounded. */
static bool is_rounded_often(const flash_kda_decode_params *p)
{
    const bool by_tree = p->parents.data && p->write_states == FLASH_KDA_WRITE_EACH;
    return (by_tree || p->past_records.data) && p->state.dtype == FLASH_KDA_BF16;
}

/* Holds the state of a head, which may be K-first, to the truth, which is V-first. */
static void check_state(const flash_kda_decode_params *p, int64_t slot, int64_t h, const double *truth)
{
    enum { OF_HEAD = DIM * DIM };
    const flash_kda_tensor *pool = written_pool(p);
    const bool narrow = pool->dtype == FLASH_KDA_BF16;
    const double size = rms_of(truth, OF_HEAD), steps = !narrow            ? 0.0
                                                        : p->rounding.data ? DECODE_AT_RANDOM
                                                                           : DECODE_TO_NEAREST;
    void *got = copy_elements(pool, (slot * p->v.shape[2] + h) * OF_HEAD, OF_HEAD);
    for (int e = 0; e < OF_HEAD; e++) {
        const double right = truth[p->state_k_first ? e % DIM * DIM + e / DIM : e],
                     excess = decode_excess(right, element_of(got, pool->dtype, e), size, steps);
        if (!(excess <= 1.0))
            wrong("element %d of head %lld in slot %lld is %g times as far off as it may be", e, (long long)h,
                  (long long)slot, excess);
    }
    free(got);
}

/* A row of out. The size that its elements usually have follows from the state after the token. */
static void check_row(const flash_kda_decode_params *p, int64_t row, const double *truth, const double *after)
{
    const double size = after ? fabs((double)p->scale) * rms_of(after, DIM * DIM) : 0.0;
    void *got = copy_elements(&p->out, row * DIM, DIM);
    for (int i = 0; i < DIM; i++) {
        const double excess =
            decode_excess(truth[i], element_of(got, FLASH_KDA_BF16, i), size, DECODE_TO_NEAREST);
        if (!(excess <= 1.0))
            wrong("element %d of row %lld of out is %g times as far off as it may be", i, (long long)row,
                  excess);
    }
    free(got);
}

/* Copies the state tensor as it was before the call. The caller frees the copy. */
static void *restore(const state *s, flash_kda_tensor *t)
{
    for (int i = 0; i < TENSORS; i++) {
        const memory *m = &s->set.memory[i];
        const unsigned char *data = t->data;
        if (!m->bytes || data < m->bytes || data > m->bytes + m->count) continue;
        const memory copy = allocate_memory(m->count);
        memcpy(copy.bytes, m->before, m->count);
        t->data = copy.bytes + (data - m->bytes);
        return copy.bytes;
    }
    wrong("the state lies nowhere");
}

static void check_results(const state *s)
{
    const flash_kda_decode_params p = seen(s);
    flash_kda_decode_params before = p;
    const int64_t HV = p.v.shape[2], tokens = p.q.shape[0] * p.q.shape[1], rows = tokens * HV,
                  of_head = DIM * DIM;
    double *out = calloc((size_t)(rows * DIM) + 1, sizeof *out),
           *states = calloc((size_t)(rows * of_head) + 1, sizeof *states);
    void *memory_before = restore(s, &before.state);
    if (!out || !states) wrong("no memory");
    before.struct_size = sizeof before;
    if (flash_kda_decode_reference(&before, out, states) != FLASH_KDA_OK)
        wrong("the reference refused: %s", flash_kda_last_error());
    const bool ordinary = all_ordinary(out, rows * DIM) && all_ordinary(states, rows * of_head) &&
                          !is_rounded_often(&p) && !shares_slots(&p);
    for (int64_t n = 0; ordinary && n < sequences_of(&p); n++)
        for (int64_t row = begin_of(&p, n) * HV; row < begin_of(&p, n + 1) * HV; row++) {
            const int64_t slot = slot_after(&p, n, row / HV - begin_of(&p, n));
            const double *after = states + row * of_head;
            check_row(&p, row, out + row * DIM, first_slot(&p, n) < 0 ? NULL : after);
            if (slot >= 0) check_state(&p, slot, row % HV, after);
        }
    free(memory_before);
    free(out);
    free(states);
}

/* ---- A call -------------------------------------------------------------------------------------------- */

static void explain(const flash_kda_decode_params *p, size_t capacity)
{
    char *text = malloc(capacity + 1);
    if (!text) wrong("no memory");
    if (flash_kda_check_decode(p) != FLASH_KDA_OK) check_sentence("check_decode");
    if (flash_kda_explain_decode(p, text, capacity) != FLASH_KDA_OK)
        check_sentence("explain_decode");
    else if (!memchr(text, 0, capacity))
        wrong("the explanation has no end");
    free(text);
}

/* Whether a call that is taken stays inside memory that exists. A GPU, if there is one, must not get this
 * memory. */
static bool may_be_tried(const state *s)
{
    if (s->p.device.type == FLASH_KDA_CUDA) return false;
    return s->huge || (!s->set.unreal && all_are_inside(&s->set, NULL, NULL)); /* null pointers are refused */
}

/* A bit for each. */
static uint32_t outputs_of(const state *s)
{
    const flash_kda_decode_params p = seen(s);
    const bool none = p.write_states == FLASH_KDA_WRITE_NONE,
               writes_state = none ? p.past_records.data != NULL : !p.written_states.data;
    return 1u << OUT | 1u << RECORDS | 1u << WRITTEN | (writes_state ? 1u << STATE : 0);
}

static void try_call(state *s)
{
    const flash_kda_status status = flash_kda_decode(&s->p);
    const bool taken = status == FLASH_KDA_OK, good = !s->mutated && !s->huge;
    if (!taken) check_sentence("decode");
    if (!taken && good && status != FLASH_KDA_UNAVAILABLE)
        wrong("a good call was refused: %s", flash_kda_last_error());
    if (s->huge) return;
    if (taken && s->mutated && s->p.struct_size == sizeof s->p) check_apart(&s->set, outputs_of(s));
    if (taken && s->compares && !s->unspecified) check_results(s);
    check_unchanged(s, taken);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input from = {data, size};
    state s = {0};
    make_good(&s, &from);
    const int mutations = (int)take_between(&from, 0, 3);
    const bool late = take_bool(&from);
    for (int i = 0; i < mutations && !late; i++) mutate_fields(&s, &from);
    make_memory(&s);
    for (int i = 0; i < mutations && late; i++) mutate_memory(&s, &from);
    keep_copies(&s.set);
    explain(&s.p, (size_t)take_between(&from, 0, 1300));
    if (may_be_tried(&s)) try_call(&s);
    forget_all(&s.set);
    return 0;
}
