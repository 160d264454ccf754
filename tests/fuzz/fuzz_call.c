/*
 * The C call on the CPU. The first bytes make a good call; up to three mutations make a wrong one of most.
 * Every tensor has exactly the bytes that its fields ask for, so AddressSanitizer sees each access beside it.
 *
 * Rules: a refusal has a sentence and writes nothing, a good call is taken, a call that is taken writes its
 * outputs alone, and these are those of the fp64 reference.
 */
#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"
#include "compare.h"
#include "fuzz.h"
#include "problem.h"

enum { Q, K, V, G, BETA, OUT, A_LOG, DT_BIAS, INITIAL, FINAL, SEQLENS, NONFINITE, TENSORS };

static const size_t offsets[TENSORS] = {
    [Q] = offsetof(flash_kda_fwd_params, q),
    [K] = offsetof(flash_kda_fwd_params, k),
    [V] = offsetof(flash_kda_fwd_params, v),
    [G] = offsetof(flash_kda_fwd_params, g),
    [BETA] = offsetof(flash_kda_fwd_params, beta),
    [OUT] = offsetof(flash_kda_fwd_params, out),
    [A_LOG] = offsetof(flash_kda_fwd_params, A_log),
    [DT_BIAS] = offsetof(flash_kda_fwd_params, dt_bias),
    [INITIAL] = offsetof(flash_kda_fwd_params, initial_state),
    [FINAL] = offsetof(flash_kda_fwd_params, final_state),
    [SEQLENS] = offsetof(flash_kda_fwd_params, cu_seqlens),
    [NONFINITE] = offsetof(flash_kda_fwd_params, nonfinite),
};

/* The kernels of the good calls, then other names. */
static const char *const kernels[] = {NULL,     "cpu",      "cpu-avx512", "cpu-avx2", "cpu-portable",
                                      "hopper", "portable", "",           "CPU",      "%s%n"};
enum { CPU_KERNELS = 5, KERNELS = 10, MOST_BYTES = 4 << 20 };

typedef struct memory {
    unsigned char *bytes, *before; /* `before`: a copy of the contents before the call */
    size_t count;
} memory;

typedef struct state {
    flash_kda_fwd_params p;
    memory tensors[TENSORS], workspace;
    bool mutated;
    bool huge;     /* consistent sizes that no memory has; pointers are null */
    bool compares; /* the result with the reference, which takes most of the time */
    bool unreal;   /* a pointer does not lead to memory of that size, so that the call must not be tried */
    rng numbers;
} state;

static flash_kda_tensor *tensor(state *s, int which)
{
    return (flash_kda_tensor *)((char *)&s->p + offsets[which]);
}

static flash_kda_tensor shaped(flash_kda_dtype dtype, int ndim, const int64_t *shape)
{
    flash_kda_tensor t = {.dtype = dtype, .ndim = ndim};
    uint64_t step = 1; /* hostile sizes wrap */
    for (int i = ndim - 1; i >= 0; i--) {
        t.shape[i] = shape[i];
        t.stride[i] = (int64_t)step;
        step *= (uint64_t)shape[i];
    }
    return t;
}

static void make_good(state *s, input *from, int64_t *borders)
{
    static const flash_kda_dtype state_dtypes[] = {FLASH_KDA_F32, FLASH_KDA_BF16};
    const bool ragged = take_bool(from);
    int64_t B = ragged ? 1 : take_between(from, 1, 2), H = take_between(from, 1, 2),
            T = take_between(from, 0, 40), N = B;
    if (ragged) {
        N = take_between(from, 1, 3);
        for (int64_t n = 1; n < N; n++) borders[n] = take_between(from, borders[n - 1], T);
        borders[N] = T;
    }
    const bool i32 = take_bool(from), initial = take_bool(from), final = take_bool(from);
    const flash_kda_dtype dtype = state_dtypes[take_bool(from)];
    s->huge = take_between(from, 0, 15) == 15;
    if (s->huge) {
        B = ragged ? 1 : take_hostile(from);
        T = take_hostile(from), H = take_hostile(from), N = ragged ? take_hostile(from) : B;
    }
    const int64_t rows[] = {B, T, H, DIM}, heads[] = {H, DIM}, states[] = {N, H, DIM, DIM},
                  ends = (int64_t)((uint64_t)N + 1);
    s->p = (flash_kda_fwd_params){.struct_size = sizeof s->p, .scale = 0.088f, .workspace_size = SIZE_MAX};
    s->p.q = s->p.k = s->p.v = s->p.g = s->p.out = shaped(FLASH_KDA_BF16, 4, rows);
    s->p.beta = shaped(FLASH_KDA_BF16, 3, rows);
    s->p.A_log = shaped(FLASH_KDA_F32, 1, heads);
    s->p.dt_bias = shaped(FLASH_KDA_F32, 2, heads);
    if (initial) s->p.initial_state = shaped(dtype, 4, states);
    if (final) s->p.final_state = shaped(dtype, 4, states);
    if (ragged) s->p.cu_seqlens = shaped(i32 ? FLASH_KDA_I32 : FLASH_KDA_I64, 1, &ends);
    s->p.lower_bound = -(float)take_between(from, 0, 5);
    s->p.kernel = kernels[take_between(from, 0, CPU_KERNELS - 1)];
    s->p.cpu_threads = (int32_t)take_between(from, 0, 2);
    s->p.batch_invariant = take_bool(from);
    if (take_bool(from) && !s->huge) s->p.max_seqlen = T;
    const uint64_t seed = take(from, 2);
    const int64_t records[] = {FLASH_KDA_CHECKED_TENSORS, 2};
    if (seed % 4 == 1) s->p.nonfinite = shaped(FLASH_KDA_I64, 2, records);
    s->numbers = rng_seed(seed);
    s->compares = take_between(from, 0, 7) == 7;
}

/* Changes that decide how much memory a tensor has. */
static void mutate_fields(state *s, input *from)
{
    flash_kda_tensor *t = tensor(s, (int)take_between(from, 0, TENSORS - 1));
    const uint32_t bits = (uint32_t)take(from, 4);
    s->mutated = true;
    switch (take_between(from, 0, 13)) {
    case 0: t->dtype = (int32_t)take_between(from, -1, 9); break;
    case 1: t->ndim = (int32_t)take_between(from, -1, 6); break;
    case 2: t->ndim = (int32_t)bits; break;
    case 3: t->shape[bits % 4] = take_hostile(from); break;
    case 4: t->stride[bits % 4] = take_hostile(from); break;
    case 5: memcpy(&s->p.scale, &bits, sizeof bits); break;
    case 6: memcpy(&s->p.lower_bound, &bits, sizeof bits); break;
    case 7: s->p.kernel = kernels[bits % KERNELS]; break;
    case 8: s->p.cpu_threads = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 63); break;
    case 9: s->p.batch_invariant = (int32_t)bits; break;
    case 10: s->p.max_seqlen = take_hostile(from); break;
    case 11: s->p.device.type = (int32_t)take_between(from, -1, 3); break;
    case 12: s->p.device.index = (int32_t)bits; break;
    default: s->p.struct_size = bits & 1 ? (size_t)take_hostile(from) : bits % (sizeof s->p + 64); break;
    }
}

static memory allocate_memory(size_t count)
{
    memory m = {.count = count};
    void *block;
    if (posix_memalign(&block, 64, count ? count : 1) != 0) wrong("no memory");
    m.bytes = block;
    return m;
}

/* The bytes of a tensor; SIZE_MAX if no memory has them. */
static size_t bytes_of(const flash_kda_tensor *t)
{
    size_t bytes = dtype_size(t->dtype);
    if (t->ndim < 0 || t->ndim > 4) return SIZE_MAX;
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] < 0 || __builtin_mul_overflow(bytes, (size_t)t->shape[i], &bytes) ||
            bytes > MOST_BYTES)
            return SIZE_MAX;
    return bytes;
}

/* Random numbers, drawn once, since drawing takes longer than a call. */
static void fill(const memory *m, int32_t dtype, rng *numbers)
{
    enum { COUNT = 4096 };
    static uint16_t narrow[COUNT];
    static float wide[COUNT];
    if (!narrow[0]) {
        rng r = rng_seed(1);
        for (int i = 0; i < COUNT; i++) {
            wide[i] = (float)rng_uniform(&r, -2, 2);
            narrow[i] = bf16_from_float(wide[i]);
        }
    }
    const unsigned char *from = dtype_size(dtype) == 2 ? (unsigned char *)narrow : (unsigned char *)wide;
    const size_t room = dtype_size(dtype) == 2 ? sizeof narrow : sizeof wide;
    size_t skip = rng_bits(numbers) % 64 * 64;
    for (size_t done = 0, now; done < m->count; done += now, skip = 0) {
        now = m->count - done < room - skip ? m->count - done : room - skip;
        memcpy(m->bytes + done, from + skip, now);
    }
}

static void fill_borders(const memory *m, int32_t dtype, const int64_t *borders)
{
    const size_t size = dtype_size(dtype);
    for (size_t i = 0; size >= 4 && i < m->count / size; i++) {
        const int64_t wide = borders[i < 4 ? i : 3];
        const int32_t narrow = (int32_t)wide;
        memcpy(m->bytes + i * size, size == 8 ? (const void *)&wide : &narrow, size);
    }
}

static void make_memory(state *s, const int64_t *borders)
{
    for (int i = 0; i < TENSORS; i++) {
        flash_kda_tensor *t = tensor(s, i);
        const bool present = i < INITIAL || t->ndim;
        const size_t bytes = bytes_of(t);
        if (!present || s->huge) continue;
        if (bytes == SIZE_MAX) s->unreal = true;
        s->tensors[i] = allocate_memory(bytes == SIZE_MAX ? 0 : bytes);
        if (i == SEQLENS)
            fill_borders(&s->tensors[i], t->dtype, borders);
        else
            fill(&s->tensors[i], t->dtype, &s->numbers);
        t->data = s->tensors[i].bytes;
    }
}

/* Changes of pointers and contents. */
static void mutate_memory(state *s, input *from)
{
    const int which = (int)take_between(from, 0, TENSORS - 1),
              other = (int)take_between(from, 0, TENSORS - 1);
    flash_kda_tensor *t = tensor(s, which);
    memory *m = &s->tensors[which];
    s->mutated = true;
    switch (take_between(from, 0, 6)) {
    case 0: t->data = NULL; break;
    case 1:
        t->data = (void *)((uintptr_t)t->data + (uintptr_t)take_between(from, 1, 15));
        s->unreal = true;
        break;
    case 2:
        t->data = (void *)(UINTPTR_MAX - 15);
        s->unreal = true;
        break;
    case 3: /* one border */
        m = &s->tensors[SEQLENS];
        t = &s->p.cu_seqlens;
        if (m->count >= dtype_size(t->dtype)) {
            const int64_t value = take_hostile(from);
            const size_t size = dtype_size(t->dtype), at = (size_t)other % (m->count / size) * size;
            memcpy(m->bytes + at, &value, size);
        }
        break;
    case 4: s->p.workspace_size = (size_t)take_hostile(from); break;
    case 5:
        s->p.workspace = (void *)((uintptr_t)s->p.workspace + (uintptr_t)take_between(from, 1, 63));
        break;
    default:
        if (s->tensors[other].bytes && s->tensors[other].count >= m->count) t->data = s->tensors[other].bytes;
        break;
    }
}

static void keep_copy(memory *m)
{
    if (!m->bytes) return;
    m->before = malloc(m->count + 1);
    if (!m->before) wrong("no memory");
    memcpy(m->before, m->bytes, m->count);
}

static void check_unchanged(const state *s, bool taken)
{
    const void *out = s->p.out.data, *final = s->p.struct_size ? s->p.final_state.data : NULL,
               *nonfinite = s->p.nonfinite.data;
    for (int i = 0; i < TENSORS; i++) {
        const memory *m = &s->tensors[i];
        if (!m->bytes ||
            (taken && m->count && (m->bytes == out || m->bytes == final || m->bytes == nonfinite)))
            continue;
        if (memcmp(m->bytes, m->before, m->count) != 0) wrong("tensor %d changed", i);
    }
    if (!taken && s->workspace.bytes &&
        memcmp(s->workspace.bytes, s->workspace.before, s->workspace.count) != 0)
        wrong("a refused call wrote to the workspace");
}

static void check_sentence(const char *call)
{
    const char *sentence = flash_kda_last_error();
    if (strlen(sentence) < 10) wrong("%s was refused with the sentence \"%s\"", call, sentence);
    for (const char *at = sentence; *at; at++)
        if (iscntrl((unsigned char)*at)) wrong("a control character in: %s", sentence);
}

/* As far as the reference is finite, and the scale leaves outputs in the range in which bf16 has its whole
 * precision. A state that is written in place must have been kept. */
static void check_results(const state *s)
{
    flash_kda_fwd_params p = s->p;
    const int64_t rows = p.q.shape[0] * p.q.shape[1] * p.q.shape[2],
                  N = p.cu_seqlens.data ? p.cu_seqlens.shape[0] - 1 : p.q.shape[0],
                  states = N * p.q.shape[2] * DIM * DIM;
    double *out = calloc((size_t)rows * DIM + 1, sizeof *out), *final = calloc((size_t)states, sizeof *final);
    if (!out || !final) wrong("no memory");
    void *initial = NULL;
    if (p.initial_state.data && p.initial_state.data == p.final_state.data) {
        const memory *m = &s->tensors[s->tensors[INITIAL].bytes == p.initial_state.data ? INITIAL : FINAL];
        if (posix_memalign(&initial, 64, m->count) != 0) wrong("no memory");
        memcpy(initial, m->before, m->count);
        p.initial_state.data = initial;
    }
    if (flash_kda_reference(&p, out, final, NULL) != FLASH_KDA_OK)
        wrong("the reference refused: %s", flash_kda_last_error());
    const bars most = find_case("random")->cpu;
    const bool full_precision = fabsf(p.scale) > 1e-30f;
    bool finite = true;
    for (int64_t i = 0; i < rows * DIM; i++) finite &= fabs(out[i]) < 1e37;
    for (int64_t i = 0; i < states; i++) finite &= fabs(final[i]) < 1e37;
    if (finite && full_precision &&
        relative_rms(out, p.out.data, FLASH_KDA_BF16, rows * DIM) > 1.5 * most.out)
        wrong("out has error %g", relative_rms(out, p.out.data, FLASH_KDA_BF16, rows * DIM));
    if (finite && p.final_state.data) {
        const bool narrow = p.final_state.dtype == FLASH_KDA_BF16;
        const double error = relative_rms(final, p.final_state.data, p.final_state.dtype, states);
        if (error > (narrow ? bar_of_bf16_state(most.state) * 1.5 : most.state))
            wrong("final_state has error %g", error);
    }
    free(initial);
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
        if (!t->data) continue;
        bool inside = false;
        for (int m = 0; m < TENSORS; m++)
            inside |= s->tensors[m].bytes == t->data && s->tensors[m].count >= bytes_of(t);
        if (!inside) return false;
    }
    return true;
}

static void forget(memory *m)
{
    free(m->bytes);
    free(m->before);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input from = {data, size};
    state s = {0};
    int64_t borders[4] = {0};
    make_good(&s, &from, borders);
    const int mutations = (int)take_between(&from, 0, 3);
    const bool late = take_bool(&from);
    for (int i = 0; i < mutations && !late; i++) mutate_fields(&s, &from);
    make_memory(&s, borders);
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
        if (!s.huge) check_unchanged(&s, status == FLASH_KDA_OK);
        if (status == FLASH_KDA_OK && s.compares && s.p.struct_size == sizeof s.p && !s.huge)
            check_results(&s);
    }
    for (int i = 0; i < TENSORS; i++) forget(&s.tensors[i]);
    forget(&s.workspace);
    return 0;
}
