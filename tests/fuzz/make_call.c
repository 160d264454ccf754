/* Makes a call out of bytes, and mutates it. */
#include <stdlib.h>
#include <string.h>

#include "fuzz_call.h"

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
    [SLOT_INDICES] = offsetof(flash_kda_fwd_params, state_indices),
    [HAS_INITIAL] = offsetof(flash_kda_fwd_params, has_initial_state),
    [CHECKPOINTS] = offsetof(flash_kda_fwd_params, checkpoint_states),
    [OFFSETS] = offsetof(flash_kda_fwd_params, checkpoint_offsets),
    [ROW_INDICES] = offsetof(flash_kda_fwd_params, checkpoint_indices),
    [STARTS] = offsetof(flash_kda_fwd_params, checkpoint_starts),
};

static const int of_integers[] = {SEQLENS, SLOT_INDICES, OFFSETS, ROW_INDICES, STARTS};
enum { INTEGER_TENSORS = sizeof of_integers / sizeof *of_integers };

/* The kernels of the good calls, then other names. */
static const char *const kernels[] = {NULL,     "cpu",      "cpu-avx512", "cpu-avx2", "cpu-portable",
                                      "hopper", "portable", "",           "CPU",      "%s%n"};
enum { CPU_KERNELS = 5, KERNELS = 10 };

flash_kda_tensor *tensor(state *s, int which)
{
    return (flash_kda_tensor *)((char *)&s->p + offsets[which]);
}

/* ---- A good call --------------------------------------------------------------------------------------- */

/* The sizes of a good call. */
typedef struct sizes {
    int64_t B, T, H, HV, N;
} sizes;

static void take_layouts(state *s, input *from)
{
    if (!take_bool(from)) return;
    for (int i = Q; i <= OUT; i++) take_layout(tensor(s, i), from);
    if (take_bool(from)) s->p.q.stride[2] = 0; /* one head of queries for all */
    flash_kda_tensor *const states[] = {&s->p.initial_state, &s->p.final_state, &s->p.checkpoint_states};
    for (int i = 0; i < 3; i++)
        if (states[i]->ndim) states[i]->stride[0] += take_between(from, 0, 9) * 8;
}

static void take_kinds(state *s, input *from, sizes z)
{
    const int64_t kinds = take_between(from, 0, 255);
    flash_kda_fwd_params *p = &s->p;
    p->gate = (int32_t)(kinds % 3);
    p->beta_kind = (int32_t)(kinds / 3 % 3);
    p->qk_is_normalised = (int32_t)(kinds / 9 % 2);
    p->state_k_first = (int32_t)(kinds / 18 % 2);
    if (kinds / 36 % 2) p->g.dtype = FLASH_KDA_F32;
    if (kinds / 72 % 2) p->beta.dtype = FLASH_KDA_F32;
    const int64_t absent = take_between(from, 0, 7), flat[] = {1, z.HV, 1, DIM};
    if (p->gate == FLASH_KDA_GATE_ACTIVATED || absent & 1) p->dt_bias = (flash_kda_tensor){0};
    if (p->gate == FLASH_KDA_GATE_ACTIVATED || (p->gate == FLASH_KDA_GATE_BOUNDED && absent & 2))
        p->A_log = (flash_kda_tensor){0};
    if (absent & 4 && p->A_log.ndim) p->A_log = shaped(FLASH_KDA_F32, 3, flat);
    if (absent & 4 && p->dt_bias.ndim) p->dt_bias = shaped(FLASH_KDA_F32, 4, flat);
}

static void take_pool(state *s, input *from, sizes z)
{
    const int64_t how = take_between(from, 0, 7), first = take_between(from, 0, 2);
    flash_kda_tensor *const states[] = {&s->p.initial_state, &s->p.final_state};
    if (how & 1) {
        const int64_t slots[] = {z.N + first + (how >> 1 & 1), z.HV, DIM, DIM};
        s->p.first_slot = first;
        s->p.state_indices = shaped(take_integer_type(from), 1, &z.N);
        for (int64_t n = 0; n < z.N; n++) {
            const int64_t what = take_between(from, 0, 5);
            s->integers[SLOT_INDICES][n] = what == 5 ? -1 : what == 4 ? first - 1 : slots[0] - 1 - n;
        }
        for (int i = 0; i < 2; i++)
            if (states[i]->ndim) *states[i] = shaped((flash_kda_dtype)states[i]->dtype, 4, slots);
    }
    if (how & 4) s->p.has_initial_state = shaped(FLASH_KDA_BOOL, 1, &z.N);
}

static int64_t length_of(const state *s, sizes z, int64_t n)
{
    return s->p.cu_seqlens.ndim ? s->integers[SEQLENS][n + 1] - s->integers[SEQLENS][n] : z.T;
}

static int64_t take_offsets(state *s, input *from, sizes z)
{
    const int64_t columns = take_between(from, 1, 2), shape[] = {z.N, columns};
    const int ndim = columns == 1 && take_bool(from) ? 1 : 2;
    s->p.checkpoint_offsets = shaped(take_integer_type(from), ndim, shape);
    for (int64_t i = 0; i < z.N * columns; i++)
        s->integers[OFFSETS][i] = 16 * take_between(from, -1, length_of(s, z, i / columns) / 16);
    const int64_t rows = z.N * columns + take_between(from, 0, 1);
    if (take_bool(from)) {
        s->p.checkpoint_indices = shaped(take_integer_type(from), ndim, shape);
        for (int64_t i = 0; i < z.N * columns; i++) s->integers[ROW_INDICES][i] = rows - 1 - i;
    }
    return rows;
}

static int64_t take_every(state *s, input *from, sizes z)
{
    int64_t rows = 0;
    s->p.checkpoint_every = 16 * take_between(from, 1, 3);
    const bool starts = take_bool(from);
    if (starts) s->p.checkpoint_starts = shaped(take_integer_type(from), 1, &z.N);
    for (int64_t n = z.N - 1; n >= 0; n--) {
        s->integers[STARTS][n] = rows;
        rows += length_of(s, z, n) / s->p.checkpoint_every;
    }
    return rows + 1;
}

static void take_checkpoints(state *s, input *from, sizes z)
{
    const int64_t how = take_between(from, 0, 5);
    if (how < 2) return;
    const int64_t rows[] = {how < 4 ? take_offsets(s, from, z) : take_every(s, from, z), z.HV, DIM, DIM};
    s->p.checkpoint_states = shaped(take_bool(from) ? FLASH_KDA_BF16 : FLASH_KDA_F32, 4, rows);
}

void make_good(state *s, input *from)
{
    static const flash_kda_dtype state_dtypes[] = {FLASH_KDA_F32, FLASH_KDA_BF16};
    const bool ragged = take_bool(from);
    int64_t *borders = s->integers[SEQLENS];
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
    s->p = (flash_kda_fwd_params){.struct_size = sizeof s->p, .scale = 0.088f, .workspace_size = SIZE_MAX};
    s->p.lower_bound = -(float)take_between(from, 0, 5);
    s->p.kernel = kernels[take_between(from, 0, CPU_KERNELS - 1)];
    s->p.cpu_threads = (int32_t)take_between(from, 0, 2);
    s->p.batch_invariant = take_bool(from);
    if (take_bool(from) && !s->huge) s->p.max_seqlen = T;
    const uint64_t seed = take(from, 2);
    s->numbers = rng_seed(seed);
    s->compares = take_between(from, 0, 7) == 7;

    const bool options = !s->huge && take_bool(from);
    const int64_t group = options ? take_between(from, 1, 2) : 1, HV = H * group;
    const int64_t qk_rows[] = {B, T, H, DIM}, rows[] = {B, T, HV, DIM}, heads[] = {HV, DIM},
                  states[] = {N, HV, DIM, DIM}, ends = (int64_t)((uint64_t)N + 1),
                  records[] = {FLASH_KDA_CHECKED_TENSORS, 2};
    s->p.q = s->p.k = shaped(FLASH_KDA_BF16, 4, qk_rows);
    s->p.v = s->p.g = s->p.out = shaped(FLASH_KDA_BF16, 4, rows);
    s->p.beta = shaped(FLASH_KDA_BF16, 3, rows);
    s->p.A_log = shaped(FLASH_KDA_F32, 1, heads);
    s->p.dt_bias = shaped(FLASH_KDA_F32, 2, heads);
    if (initial) s->p.initial_state = shaped(dtype, 4, states);
    if (final) s->p.final_state = shaped(dtype, 4, states);
    if (ragged) s->p.cu_seqlens = shaped(i32 ? FLASH_KDA_I32 : FLASH_KDA_I64, 1, &ends);
    if (seed % 4 == 1) s->p.nonfinite = shaped(FLASH_KDA_I64, 2, records);
    if (!options) return;
    const sizes z = {B, T, H, HV, N};
    take_kinds(s, from, z);
    take_pool(s, from, z);
    take_checkpoints(s, from, z);
    take_layouts(s, from);
}

/* ---- Mutations of fields ------------------------------------------------------------------------------- */

/* Changes that decide how much memory a tensor has. */
void mutate_fields(state *s, input *from)
{
    const int which = (int)take_between(from, 0, TENSORS - 1);
    flash_kda_tensor *t = tensor(s, which);
    const uint32_t bits = (uint32_t)take(from, 4);
    const int64_t how = take_between(from, 0, 20);
    s->mutated = true;
    s->unspecified |= which >= SLOT_INDICES || how == 17 || how == 18;
    switch (how) {
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
    case 13: s->p.gate = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 3); break;
    case 14: s->p.beta_kind = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 3); break;
    case 15: s->p.qk_is_normalised = (int32_t)bits; break;
    case 16: s->p.state_k_first = bits & 1 ? (int32_t)bits : !s->p.state_k_first; break;
    case 17: s->p.first_slot = take_hostile(from); break;
    case 18: s->p.checkpoint_every = bits & 1 ? take_hostile(from) : 16 * (int64_t)(bits >> 1 & 3); break;
    case 19: *t = (flash_kda_tensor){0}; break;
    default: s->p.struct_size = bits & 1 ? (size_t)take_hostile(from) : bits % (sizeof s->p + 64); break;
    }
}

/* ---- Memory -------------------------------------------------------------------------------------------- */

static bool has_integers(int which)
{
    for (int i = 0; i < INTEGER_TENSORS; i++)
        if (of_integers[i] == which) return true;
    return false;
}

void make_memory(state *s)
{
    for (int i = 0; i < TENSORS; i++) {
        flash_kda_tensor *t = tensor(s, i);
        memory *m = &s->tensors[i];
        size_t in_front;
        const bool present = i < A_LOG || t->ndim;
        const size_t bytes = bytes_of(t, &in_front);
        if (!present || s->huge) continue;
        if (bytes == SIZE_MAX && !is_too_far(t)) s->unreal = true;
        *m = allocate_memory(bytes == SIZE_MAX ? 0 : bytes);
        t->data = m->bytes + in_front;
        if (has_integers(i))
            fill_integers(m, t->dtype, s->integers[i]);
        else
            fill(m, t->dtype, &s->numbers);
        adapt(m, t->dtype, i, (input_kinds){s->p.gate, s->p.beta_kind, s->p.qk_is_normalised});
    }
}

/* ---- Mutations of pointers and contents ---------------------------------------------------------------- */

static void mutate_integer(state *s, input *from)
{
    const int which = of_integers[take_between(from, 0, INTEGER_TENSORS - 1)];
    memory *m = &s->tensors[which];
    const flash_kda_tensor *t = tensor(s, which);
    const size_t size = dtype_size(t->dtype);
    const uint64_t at = take(from, 1);
    const int64_t value = take_hostile(from);
    if (m->count < size) return;
    memcpy(m->bytes + at % (m->count / size) * size, &value, size);
    s->unspecified = true;
}

void mutate_memory(state *s, input *from)
{
    const int which = (int)take_between(from, 0, TENSORS - 1),
              other = (int)take_between(from, 0, TENSORS - 1);
    flash_kda_tensor *t = tensor(s, which);
    memory *m = &s->tensors[which];
    size_t in_front;
    s->mutated = true;
    switch (take_between(from, 0, 7)) {
    case 0: t->data = NULL; break;
    case 1:
        t->data = (void *)((uintptr_t)t->data + (uintptr_t)take_between(from, 1, 15));
        s->unreal = true;
        break;
    case 2:
        t->data = (void *)(UINTPTR_MAX - 15);
        s->unreal = true;
        break;
    case 3:
    case 4: mutate_integer(s, from); break;
    case 5: s->p.workspace_size = (size_t)take_hostile(from); break;
    case 6:
        s->p.workspace = (void *)((uintptr_t)s->p.workspace + (uintptr_t)take_between(from, 1, 63));
        break;
    default:
        if (!s->tensors[other].bytes || s->tensors[other].count < m->count || !t->data) break;
        bytes_of(t, &in_front);
        t->data = s->tensors[other].bytes + in_front;
        s->unspecified |= has_integers(which);
        break;
    }
}
