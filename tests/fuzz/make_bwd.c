/* Makes a call of the backward pass out of bytes, and mutates it. */
#include <math.h>
#include <string.h>

#include "fuzz_bwd.h"

_Static_assert(offsetof(flash_kda_bwd_params, dinitial_state) ==
                   offsetof(flash_kda_bwd_params, q) + DINITIAL * sizeof(flash_kda_tensor),
               "the tensors must be numbered in the order of the struct");

/* The kernels of the good calls, then other names. */
static const char *const kernels[] = {NULL,     "cpu",      "cpu-avx512", "cpu-avx2", "cpu-portable",
                                      "hopper", "portable", "",           "CPU",      "%s%n"};
enum { CPU_KERNELS = 5, KERNELS = 10 };

flash_kda_tensor *tensor(flash_kda_bwd_params *p, int which)
{
    return (flash_kda_tensor *)((char *)p + offsetof(flash_kda_bwd_params, q)) + which;
}

/* ---- A good call --------------------------------------------------------------------------------------- */

/* The sizes of a good call. */
typedef struct sizes {
    int64_t B, T, H, HV, N;
} sizes;

static sizes take_hostile_sizes(bool ragged, input *from)
{
    const int64_t B = ragged ? 1 : take_hostile(from), T = take_hostile(from), H = take_hostile(from),
                  group = take_between(from, 1, 2);
    return (sizes){B, T, H, (int64_t)((uint64_t)H * (uint64_t)group), ragged ? take_hostile(from) : B};
}

static sizes take_sizes(state *s, bool ragged, input *from)
{
    enum { MOST_TOKENS = 40, MOST_TOKENS_OF_STRETCHES = 700 };
    const bool is_long = take_between(from, 0, 31) == 31; /* states are kept or saved inside of a sequence */
    int64_t *borders = s->borders;
    sizes z = {.B = ragged ? 1 : take_between(from, 1, 2)};
    z.T = take_between(from, 0, is_long ? MOST_TOKENS_OF_STRETCHES : MOST_TOKENS);
    z.H = is_long ? 1 : take_between(from, 1, 2);
    z.HV = z.H * take_between(from, 1, 2);
    z.N = z.B;
    if (!ragged) return z;
    z.N = take_between(from, 1, 3);
    for (int64_t n = 1; n < z.N; n++) borders[n] = take_between(from, borders[n - 1], z.T);
    for (int64_t n = z.N; n < MOST_INTEGERS; n++) borders[n] = z.T;
    return z;
}

static void take_options(state *s, input *from, sizes z)
{
    flash_kda_bwd_params *p = &s->p;
    p->scale = 0.088f;
    p->lower_bound = -(float)take_between(from, 0, 5);
    p->kernel = kernels[take_between(from, 0, CPU_KERNELS - 1)];
    p->cpu_threads = (int32_t)take_between(from, 0, 2);
    p->batch_invariant = take_bool(from);
    if (take_bool(from)) p->workspace_limit = take_bool(from) ? 1 : SIZE_MAX;
    if (take_bool(from) && !s->huge) p->max_seqlen = z.T;
    const int64_t kinds = take_between(from, 0, 35);
    p->gate = (int32_t)(kinds % 3);
    p->beta_kind = (int32_t)(kinds / 3 % 3);
    p->qk_is_normalised = (int32_t)(kinds / 9 % 2);
    p->state_k_first = (int32_t)(kinds / 18);
    if (take_bool(from)) p->interrupt = &s->interrupt[0];
    s->saves = (saving)take_between(from, SAVED_NOTHING, SAVED_STATES);
}

static void shape_inputs(state *s, input *from, sizes z, bool ragged)
{
    flash_kda_bwd_params *p = &s->p;
    const int64_t kinds = take_between(from, 0, 255), ends = (int64_t)((uint64_t)z.N + 1);
    const int64_t qk_rows[] = {z.B, z.T, z.H, DIM}, rows[] = {z.B, z.T, z.HV, DIM}, heads[] = {z.HV, DIM},
                  flat[] = {1, z.HV, 1, DIM}, states[] = {z.N, z.HV, DIM, DIM};
    const flash_kda_dtype dtypes[] = {FLASH_KDA_BF16, FLASH_KDA_F32};
    p->q = p->k = shaped(FLASH_KDA_BF16, 4, qk_rows);
    p->v = shaped(FLASH_KDA_BF16, 4, rows);
    p->g = shaped(dtypes[kinds & 1], 4, rows);
    p->beta = shaped(dtypes[kinds >> 1 & 1], 3, rows);
    if (p->gate == FLASH_KDA_GATE_SOFTPLUS || (p->gate == FLASH_KDA_GATE_BOUNDED && kinds & 4))
        p->A_log = kinds & 8 ? shaped(FLASH_KDA_F32, 3, flat) : shaped(FLASH_KDA_F32, 1, heads);
    if (p->gate != FLASH_KDA_GATE_ACTIVATED && kinds & 16)
        p->dt_bias = kinds & 8 ? shaped(FLASH_KDA_F32, 4, flat) : shaped(FLASH_KDA_F32, 2, heads);
    if (kinds & 32) p->initial_state = shaped(dtypes[kinds >> 6 & 1], 4, states);
    if (ragged) p->cu_seqlens = shaped(kinds & 128 ? FLASH_KDA_I32 : FLASH_KDA_I64, 1, &ends);
    const int64_t present = take_between(from, 0, 7); /* mostly both */
    if (present & 3) p->dout = shaped(FLASH_KDA_BF16, 4, rows);
    if (present > 2) p->dfinal_state = shaped(dtypes[present & 1], 4, states);
}

/* The gradients that are wanted. There must be one at least. */
static void shape_gradients(state *s, input *from, sizes z)
{
    flash_kda_bwd_params *p = &s->p;
    const int64_t absent = take_bool(from) ? take_between(from, 0, 255) : 0, states[] = {z.N, z.HV, DIM, DIM};
    p->dq = p->q;
    p->dk = p->k;
    p->dv = p->v;
    p->dg = p->g;
    p->dbeta = p->beta;
    p->dA_log = p->A_log;
    p->ddt_bias = p->dt_bias;
    p->dinitial_state = shaped(FLASH_KDA_F32, 4, states);
    int left = 0;
    for (int i = INPUTS; i < TENSORS; i++) {
        if (absent >> (i - INPUTS) & 1) *tensor(p, i) = (flash_kda_tensor){0};
        left += tensor(p, i)->ndim != 0;
    }
    if (!left) p->dq = p->q;
}

static void take_layouts(state *s, input *from)
{
    flash_kda_bwd_params *p = &s->p;
    static const int of_tokens[] = {Q, K, V, G, BETA, DOUT, DQ, DK, DV, DG, DBETA},
                     of_states[] = {INITIAL, DFINAL, DINITIAL};
    if (!take_bool(from)) return;
    for (size_t i = 0; i < sizeof of_tokens / sizeof *of_tokens; i++)
        if (tensor(p, of_tokens[i])->ndim) take_layout(tensor(p, of_tokens[i]), from);
    if (take_bool(from)) p->q.stride[2] = 0; /* one head of queries for all */
    for (size_t i = 0; i < sizeof of_states / sizeof *of_states; i++)
        if (tensor(p, of_states[i])->ndim) tensor(p, of_states[i])->stride[0] += take_between(from, 0, 9) * 8;
}

void make_good(state *s, input *from)
{
    const bool ragged = take_bool(from);
    s->huge = take_between(from, 0, 15) == 15;
    const sizes z = s->huge ? take_hostile_sizes(ragged, from) : take_sizes(s, ragged, from);
    s->p = (flash_kda_bwd_params){.struct_size = sizeof s->p, .workspace_size = SIZE_MAX};
    s->set.count = TENSORS;
    for (int i = 0; i < TENSORS; i++) s->set.tensors[i] = tensor(&s->p, i);
    s->numbers = rng_seed(take(from, 2));
    const int64_t how = take_between(from, 0, 15);
    s->compares = how == 15 || (how > 11 && !s->huge && z.B * z.T * z.HV <= 60);
    take_options(s, from, z);
    shape_inputs(s, from, z, ragged);
    shape_gradients(s, from, z);
    if (!s->huge) take_layouts(s, from);
}

/* ---- Mutations of fields ------------------------------------------------------------------------------- */

/* Numbers and flags, and what decides where the memory of a tensor begins and how much it is. */
void mutate_fields(state *s, input *from)
{
    flash_kda_bwd_params *p = &s->p;
    const uint32_t bits = (uint32_t)take(from, 4);
    s->mutated = true;
    switch (take_between(from, 0, 20)) {
    case 0: memcpy(&p->scale, &bits, sizeof bits); break;
    case 1: memcpy(&p->lower_bound, &bits, sizeof bits); break;
    case 2: p->kernel = kernels[bits % KERNELS]; break;
    case 3: p->cpu_threads = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 63); break;
    case 4: p->batch_invariant = (int32_t)bits; break;
    case 5: p->max_seqlen = take_hostile(from); break;
    case 6: p->device.type = (int32_t)take_between(from, -1, 3); break;
    case 7: p->device.index = (int32_t)bits; break;
    case 8: p->gate = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 3); break;
    case 9: p->beta_kind = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 3); break;
    case 10: p->qk_is_normalised = bits & 1 ? (int32_t)bits : !p->qk_is_normalised; break;
    case 11: p->state_k_first = bits & 1 ? (int32_t)bits : !p->state_k_first; break;
    case 12: p->workspace_limit = (size_t)take_hostile(from); break;
    case 13: p->struct_size = bits & 1 ? (size_t)take_hostile(from) : sizeof *p - 64 + bits / 2 % 128; break;
    default: mutate_tensor(&s->set, from); break;
    }
}

/* ---- Memory -------------------------------------------------------------------------------------------- */

static input_kinds kinds_of(const state *s)
{
    return (input_kinds){s->p.gate, s->p.beta_kind, s->p.qk_is_normalised};
}

/* Gives a tensor what its kind asks for. */
static void fill_tensor(state *s, int which, memory m)
{
    const int32_t dtype = tensor(&s->p, which)->dtype;
    if (which == SEQLENS) {
        fill_integers(&m, dtype, s->borders);
        return;
    }
    fill(&m, dtype, &s->numbers);
    adapt(&m, dtype, which, kinds_of(s));
}

void make_memory(state *s)
{
    for (int i = 0; i < TENSORS && !s->huge; i++)
        if (i <= BETA || tensor(&s->p, i)->ndim) fill_tensor(s, i, place(&s->set, i));
}

/* ---- Mutations of pointers and contents ---------------------------------------------------------------- */

static void share_memory(state *s, int which, input *from)
{
    const int other = (int)take_between(from, 0, TENSORS + 1);
    const memory *to = other < TENSORS ? &s->set.memory[other] : other == TENSORS ? &s->workspace : &s->saved;
    if (!share(&s->set, which, to, from)) return;
    s->unspecified |= is_of_a_kind(which, kinds_of(s)) || other >= TENSORS ||
                      tensor(&s->p, other)->dtype != tensor(&s->p, which)->dtype;
}

static void mutate_saved(state *s, input *from)
{
    flash_kda_bwd_params *p = &s->p;
    switch (take_between(from, 0, 4)) {
    case 0: p->saved = NULL; break;
    case 1: p->saved_size = (size_t)take_hostile(from); break;
    case 2: p->saved_size--; break;
    case 3: p->saved = (const void *)((uintptr_t)p->saved + (uintptr_t)take_between(from, 1, 63)); break;
    default:
        p->saved = s->set.memory[take_between(from, 0, TENSORS - 1)].bytes;
        s->unspecified = true;
        break;
    }
}

void mutate_memory(state *s, input *from)
{
    flash_kda_bwd_params *p = &s->p;
    const int which = (int)take_between(from, 0, TENSORS - 1);
    s->mutated = true;
    switch (take_between(from, 0, 10)) {
    case 0: tensor(p, which)->data = NULL; break;
    case 1:
    case 2:
    case 3: share_memory(s, which, from); break;
    case 4:
    case 5: plant_integer(&s->set, SEQLENS, from); break;
    case 6:
        if (which < INPUTS && which != SEQLENS)
            s->unspecified |= !isfinite(plant(&s->set, which, from)) || is_of_a_kind(which, kinds_of(s));
        break;
    case 7: mutate_saved(s, from); break;
    case 8: p->workspace_size = take_bool(from) ? (size_t)take_hostile(from) : p->workspace_size - 1; break;
    case 9:
        if (take_bool(from)) p->workspace = NULL;
        p->workspace = (void *)((uintptr_t)p->workspace + (uintptr_t)take_between(from, 0, 63));
        break;
    default:
        s->interrupt[0] = take_bool(from);
        p->interrupt = (const void *)((uintptr_t)s->interrupt + (uintptr_t)take_between(from, 0, 4));
        break;
    }
}
