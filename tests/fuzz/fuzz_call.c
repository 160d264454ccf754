/*
 * The C call on the CPU. The first bytes make a good call; up to three mutations make a wrong one of most.
 * Every tensor has exactly the bytes from its first element to its last one in memory, so AddressSanitizer
 * sees each access beside it.
 *
 * Rules: a refusal has a sentence and writes nothing, a good call is taken, a call that is taken writes
 * elements of its outputs alone, and these are those of the fp64 reference.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"
#include "compare.h"
#include "fuzz_call.h"
#include "problem.h"

/* ---- What a call may write ----------------------------------------------------------------------------- */

/* The parameters as the library sees them: fields behind a smaller struct are zero. */
static flash_kda_fwd_params seen(const state *s)
{
    flash_kda_fwd_params p = s->p;
    if (p.struct_size < sizeof p) memset((char *)&p + p.struct_size, 0, sizeof p - p.struct_size);
    return p;
}

static int64_t sequences_of(const flash_kda_fwd_params *p)
{
    return p->cu_seqlens.data ? p->cu_seqlens.shape[0] - 1 : p->q.shape[0];
}

static int64_t length_of(const flash_kda_fwd_params *p, int64_t n)
{
    if (!p->cu_seqlens.data) return p->q.shape[1];
    return integer_at(&p->cu_seqlens, n + 1) - integer_at(&p->cu_seqlens, n);
}

/* Whether sequence n ends in a slot, and in which. */
static bool ends_in(const flash_kda_fwd_params *p, int64_t n, int64_t *slot)
{
    *slot = p->state_indices.data ? integer_at(&p->state_indices, n) : n;
    return !p->state_indices.data || *slot >= p->first_slot;
}

static bool writes_slot(const flash_kda_fwd_params *p, int64_t slot)
{
    int64_t found;
    for (int64_t n = 0; n < sequences_of(p); n++)
        if (ends_in(p, n, &found) && found == slot) return true;
    return false;
}

static bool writes_row(const flash_kda_fwd_params *p, int64_t row)
{
    const flash_kda_tensor *offsets = &p->checkpoint_offsets;
    int64_t first = 0;
    for (int64_t n = 0; n < sequences_of(p); n++) {
        if (p->checkpoint_every) {
            const int64_t count = length_of(p, n) / p->checkpoint_every;
            if (p->checkpoint_starts.data) first = integer_at(&p->checkpoint_starts, n);
            if (row >= first && row < first + count) return true;
            first += count;
            continue;
        }
        const int64_t columns = offsets->ndim == 2 ? offsets->shape[1] : 1;
        for (int64_t i = n * columns; i < (n + 1) * columns; i++)
            if (integer_at(offsets, i) > 0 &&
                row == (p->checkpoint_indices.data ? integer_at(&p->checkpoint_indices, i) : i))
                return true;
    }
    return false;
}

/* Puts back all elements of an output that the call may write. */
static void put_back_output(const flash_kda_fwd_params *p, const flash_kda_tensor *t, const memory *m)
{
    const int64_t count = count_of(t);
    if (t != &p->final_state && t != &p->checkpoint_states) {
        put_back(t, m, 0, count);
        return;
    }
    const int64_t slots = count ? t->shape[0] : 0;
    for (int64_t slot = 0; slot < slots; slot++)
        if (t == &p->final_state ? writes_slot(p, slot) : writes_row(p, slot))
            put_back(t, m, slot * (count / slots), count / slots);
}

/* What m holds is lost where the call may have written it. */
static void check_unchanged(const state *s, bool taken)
{
    const flash_kda_fwd_params p = seen(s);
    const flash_kda_tensor *const outputs[] = {&p.out, &p.final_state, &p.nonfinite, &p.checkpoint_states};
    for (int i = 0; i < TENSORS; i++) {
        const memory *m = &s->tensors[i];
        if (!m->bytes) continue;
        for (int o = 0; taken && o < 4; o++) put_back_output(&p, outputs[o], m);
        if (memcmp(m->bytes, m->before, m->count) != 0) wrong("tensor %d changed", i);
    }
    if (!taken && s->workspace.bytes &&
        memcmp(s->workspace.bytes, s->workspace.before, s->workspace.count) != 0)
        wrong("a refused call wrote to the workspace");
}

/* ---- Results ------------------------------------------------------------------------------------------- */

/* The error of a part of a tensor that begins at element `first`. */
static double error_of(const double *truth, const flash_kda_tensor *t, int64_t first, int64_t count)
{
    void *part = copy_elements(t, first, count);
    const double error = relative_rms(truth, part, (flash_kda_dtype)t->dtype, count);
    free(part);
    return error;
}

/* A slot of states, which may be K-first, against the V-first truth. */
static void check_state(const flash_kda_fwd_params *p, const flash_kda_tensor *states, int64_t slot,
                        const double *truth, const char *name)
{
    const int64_t count = p->v.shape[2] * DIM * DIM;
    const bars most = find_case("random")->cpu;
    const double bar = states->dtype == FLASH_KDA_BF16 ? bar_of_bf16_state(most.state) * 1.5 : most.state;
    double *ordered = malloc((size_t)count * sizeof *ordered);
    if (!ordered) wrong("no memory");
    for (int64_t i = 0; i < count; i++) {
        const int64_t head = i / (DIM * DIM), row = i / DIM % DIM, column = i % DIM;
        ordered[i] = p->state_k_first ? truth[head * DIM * DIM + column * DIM + row] : truth[i];
    }
    const double error = error_of(ordered, states, slot * count, count);
    if (error > bar) wrong("%s %lld has error %g", name, (long long)slot, error);
    free(ordered);
}

/* As far as the reference is finite, and the scale leaves outputs in the range in which bf16 has its whole
 * precision. A state that is written in place must have been kept. */
static void check_results(const state *s)
{
    flash_kda_fwd_params p = s->p;
    const int64_t HV = p.v.shape[2], values = p.q.shape[0] * p.q.shape[1] * HV * DIM, N = sequences_of(&p),
                  of_state = HV * DIM * DIM, states = N * of_state,
                  rows = p.checkpoint_states.data ? p.checkpoint_states.shape[0] * of_state : 0;
    double *out = calloc((size_t)values + 1, sizeof *out), *final = calloc((size_t)states, sizeof *final),
           *checkpoints = calloc((size_t)rows + 1, sizeof *checkpoints);
    if (!out || !final || !checkpoints) wrong("no memory");
    void *initial = NULL;
    for (int i = 0; p.initial_state.data && p.initial_state.data == p.final_state.data && i < TENSORS; i++) {
        const memory *m = &s->tensors[i];
        const unsigned char *at = p.initial_state.data;
        if (!m->bytes || at < m->bytes || at >= m->bytes + m->count) continue;
        if (posix_memalign(&initial, 64, m->count) != 0) wrong("no memory");
        memcpy(initial, m->before, m->count);
        p.initial_state.data = (unsigned char *)initial + (at - m->bytes);
    }
    if (flash_kda_reference(&p, out, final, rows ? checkpoints : NULL) != FLASH_KDA_OK)
        wrong("the reference refused: %s", flash_kda_last_error());
    const bool full_precision = fabsf(p.scale) > 1e-30f, ordinary = all_ordinary(out, values) &&
                                                                    all_ordinary(final, states) &&
                                                                    all_ordinary(checkpoints, rows);
    if (ordinary && full_precision && error_of(out, &p.out, 0, values) > 1.5 * find_case("random")->cpu.out)
        wrong("out has error %g", error_of(out, &p.out, 0, values));
    for (int64_t n = 0, slot; ordinary && p.final_state.data && n < N; n++)
        if (ends_in(&p, n, &slot)) check_state(&p, &p.final_state, slot, final + n * of_state, "final_state");
    for (int64_t row = 0; ordinary && row < rows / of_state; row++)
        if (writes_row(&p, row))
            check_state(&p, &p.checkpoint_states, row, checkpoints + row * of_state, "checkpoint");
    free(initial);
    free(checkpoints);
    free(out);
    free(final);
}

static void explain(const flash_kda_fwd_params *p, size_t capacity)
{
    char *text = malloc(capacity + 1);
    if (!text) wrong("no memory");
    if (flash_kda_explain(p, text, capacity) != FLASH_KDA_OK)
        check_sentence("explain");
    else if (!memchr(text, 0, capacity))
        wrong("the explanation has no end");
    free(text);
}

static void size_workspace(state *s)
{
    size_t bytes = SIZE_MAX;
    const flash_kda_status status = flash_kda_fwd_workspace_size(&s->p, &bytes);
    if (status != FLASH_KDA_OK) {
        check_sentence("workspace_size");
        if (bytes != SIZE_MAX) wrong("a refused size call wrote");
        return;
    }
    s->p.workspace_size = bytes;
    if (s->huge || s->unreal || bytes > MOST_BYTES * 4) return;
    s->workspace = allocate_memory(bytes);
    memset(s->workspace.bytes, 0xa5, bytes);
    s->p.workspace = s->workspace.bytes;
}

/* Whether a call that is taken stays inside memory that exists. A workspace_size that promises too much is
 * the caller's lie as long as the workspace is large enough for the call. */
static bool may_be_tried(const state *s)
{
    if (s->huge) return true; /* null pointers must be refused */
    if (s->unreal) return false;
    const uintptr_t moved = (uintptr_t)s->p.workspace - (uintptr_t)s->workspace.bytes;
    if (moved && moved % 64 == 0) return false; /* by several mutations */
    for (int i = 0; i < TENSORS; i++) {
        const flash_kda_tensor *t = tensor((state *)s, i);
        size_t in_front;
        const size_t bytes = bytes_of(t, &in_front);
        if (!t->data || bytes == SIZE_MAX) continue; /* In the second case the call is refused. */
        bool inside = false;
        for (int m = 0; m < TENSORS; m++)
            inside |= s->tensors[m].bytes && s->tensors[m].bytes + in_front == t->data &&
                      s->tensors[m].count >= bytes;
        if (!inside) return false;
    }
    return true;
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
    size_workspace(&s);
    for (int i = 0; i < mutations && late; i++) mutate_memory(&s, &from);
    for (int i = 0; i < TENSORS; i++) keep_copy(&s.tensors[i]);
    keep_copy(&s.workspace);
    explain(&s.p, (size_t)take_between(&from, 0, 1300));
    if (may_be_tried(&s)) {
        const flash_kda_status status = flash_kda_fwd(&s.p);
        if (status != FLASH_KDA_OK) check_sentence("fwd");
        if (status != FLASH_KDA_OK && !s.mutated && !s.huge && status != FLASH_KDA_UNAVAILABLE)
            wrong("a good call was refused: %s", flash_kda_last_error());
        if (status == FLASH_KDA_OK && s.compares && s.p.struct_size == sizeof s.p && !s.huge &&
            !s.unspecified)
            check_results(&s);
        if (!s.huge) check_unchanged(&s, status == FLASH_KDA_OK);
    }
    for (int i = 0; i < TENSORS; i++) forget(&s.tensors[i]);
    forget(&s.workspace);
    return 0;
}
