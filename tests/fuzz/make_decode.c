/* Makes a call of decode out of bytes, and mutates it. */
#include <math.h>
#include <string.h>

#include "fuzz_decode.h"

_Static_assert(offsetof(flash_kda_decode_params, rounding) ==
                   offsetof(flash_kda_decode_params, q) + ROUNDING * sizeof(flash_kda_tensor),
               "the tensors must be numbered in the order of the struct");

enum { RECORD = FLASH_KDA_RECORD_ROWS * DIM };

static const int of_integers[] = {SLOT_INDICES, ACCEPTED,        SEQLENS,    PARENTS,
                                  ROUNDING,     WRITTEN_INDICES, PAST_TOKENS};
enum { INTEGER_TENSORS = sizeof of_integers / sizeof *of_integers };

/* The kernels of the good calls, then other names. */
static const char *const kernels[] = {NULL,     "cpu",      "cpu-avx512", "cpu-avx2", "cpu-portable",
                                      "hopper", "portable", "",           "CPU",      "%s%n"};
enum { CPU_KERNELS = 5, KERNELS = 10 };

/* ---- A good call --------------------------------------------------------------------------------------- */

/* The sizes of a good call. T is the total with packed sequences. */
typedef struct sizes {
    bool packed;
    int64_t N, T, longest, H, HV;
} sizes;

static sizes take_hostile_sizes(bool packed, input *from)
{
    const int64_t N = take_hostile(from), T = take_hostile(from), H = take_hostile(from);
    return (sizes){packed, N, T, T, H, H};
}

static sizes take_sizes(state *s, bool packed, input *from)
{
    int64_t *borders = s->integers[SEQLENS];
    const bool is_long = take_between(from, 0, 7) == 7;
    sizes z = {.packed = packed, .N = is_long ? 1 : take_between(from, 1, 3)};
    z.T = take_between(from, 0, is_long ? FLASH_KDA_MAX_DECODE_TOKENS : 4);
    z.H = take_between(from, 1, 2);
    z.HV = z.H * take_between(from, 1, 2);
    z.longest = z.T;
    if (!packed) return z;
    z.longest = 0;
    for (int64_t n = 0; n < z.N; n++) {
        const int64_t length = take_between(from, 0, z.T);
        borders[n + 1] = borders[n] + length;
        if (length > z.longest) z.longest = length;
    }
    z.T = borders[z.N];
    for (int64_t n = z.N; n < MOST_INTEGERS; n++) borders[n] = z.T;
    return z;
}

static void take_options(state *s, input *from)
{
    flash_kda_decode_params *p = &s->p;
    p->scale = 0.088f;
    p->lower_bound = -(float)take_between(from, 0, 5);
    p->kernel = kernels[take_between(from, 0, CPU_KERNELS - 1)];
    p->cpu_threads = (int32_t)take_between(from, 0, 2);
    const int64_t kinds = take_between(from, 0, 107);
    p->gate = (int32_t)(kinds % 3);
    p->beta_kind = (int32_t)(kinds / 3 % 3);
    p->qk_is_normalised = (int32_t)(kinds / 9 % 2);
    p->state_k_first = (int32_t)(kinds / 18 % 2);
    p->write_states = (int32_t)(kinds / 36);
    if (take_bool(from)) p->interrupt = &s->interrupt[0];
}

static void shape_tokens(state *s, input *from, sizes z)
{
    flash_kda_decode_params *p = &s->p;
    const int64_t kinds = take_between(from, 0, 63), rows = z.packed ? 1 : z.N;
    const int64_t qk[] = {rows, z.T, z.H, DIM}, values[] = {rows, z.T, z.HV, DIM}, heads[] = {z.HV, DIM},
                  flat[] = {1, z.HV, 1, DIM}, ends = (int64_t)((uint64_t)z.N + 1);
    const flash_kda_dtype dtypes[] = {FLASH_KDA_BF16, FLASH_KDA_F32};
    p->q = p->k = shaped(FLASH_KDA_BF16, 4, qk);
    p->v = p->out = shaped(FLASH_KDA_BF16, 4, values);
    p->g = shaped(dtypes[kinds & 1], 4, values);
    p->beta = shaped(dtypes[kinds >> 1 & 1], 3, values);
    if (p->gate == FLASH_KDA_GATE_SOFTPLUS || (p->gate == FLASH_KDA_GATE_BOUNDED && kinds & 4))
        p->A_log = kinds & 8 ? shaped(FLASH_KDA_F32, 3, flat) : shaped(FLASH_KDA_F32, 1, heads);
    if (p->gate != FLASH_KDA_GATE_ACTIVATED && kinds & 16)
        p->dt_bias = kinds & 8 ? shaped(FLASH_KDA_F32, 4, flat) : shaped(FLASH_KDA_F32, 2, heads);
    if (z.packed) p->cu_seqlens = shaped(kinds & 32 ? FLASH_KDA_I32 : FLASH_KDA_I64, 1, &ends);
}

/* Slots of a pool, which begin with as many as are needed, each once. Some are below the first slot. */
static void take_slots(state *s, int which, int64_t count, int64_t slots, int64_t none, input *from)
{
    for (int64_t i = 0; i < count; i++)
        s->integers[which][i] = take_between(from, 0, 7) == 7 ? none : slots - 1 - i;
}

static void shape_pool(state *s, input *from, sizes z)
{
    flash_kda_decode_params *p = &s->p;
    const int64_t how = take_between(from, 0, 15), first = take_between(from, 0, 2);
    const bool each = p->write_states == FLASH_KDA_WRITE_EACH && !p->written_states.ndim;
    const int64_t columns = each ? z.longest + (how & 1) + (z.longest == 0) : 1;
    const bool has_indices = each || how & 2;
    const int64_t indices[] = {z.N, columns}, count = z.N * columns,
                  slots[] = {has_indices ? first + count + (how >> 2 & 1) : z.N + (how >> 2 & 1), z.HV, DIM,
                             DIM};
    p->state = shaped(how & 8 ? FLASH_KDA_BF16 : FLASH_KDA_F32, 4, slots);
    if (take_bool(from)) p->state.stride[0] += 8 * take_between(from, 0, 9);
    if (has_indices) {
        p->first_slot = first;
        p->state_indices = shaped(take_integer_type(from), each ? 2 : 1, indices);
        take_slots(s, SLOT_INDICES, count, slots[0], first - 1, from);
    }
    if (!each || !take_bool(from)) return;
    p->num_accepted_tokens = shaped(take_integer_type(from), 1, &z.N);
    for (int64_t n = 0; n < z.N; n++) s->integers[ACCEPTED][n] = take_between(from, 1, columns);
}

/* A second pool, which comes before the first one, because state_indices depend on it. */
static void shape_written(state *s, input *from, sizes z)
{
    flash_kda_decode_params *p = &s->p;
    const bool each = p->write_states == FLASH_KDA_WRITE_EACH;
    const int64_t how = take_between(from, 0, 7), columns = each ? z.longest + (how & 1) : 1,
                  indices[] = {z.N, columns}, count = z.N * columns,
                  states = each ? (z.packed ? z.T : z.N * z.T) : z.N,
                  slots[] = {(how & 2 ? count : states) + 1, z.HV, DIM, DIM};
    if (p->write_states == FLASH_KDA_WRITE_NONE || !take_bool(from)) return;
    p->written_states = shaped(FLASH_KDA_F32, 4, slots);
    p->written_states.stride[0] += how & 4 ? 8 : 0;
    if (!(how & 2)) return;
    p->written_indices = shaped(take_integer_type(from), each ? 2 : 1, indices);
    take_slots(s, WRITTEN_INDICES, count, slots[0], -1, from);
}

static void shape_drafts(state *s, input *from, sizes z)
{
    flash_kda_decode_params *p = &s->p;
    const int64_t how = take_between(from, 0, 15), columns = z.longest + (how & 1), tree[] = {z.N, columns},
                  records[] = {z.N, columns, z.HV, RECORD}, two = 2;
    if (how & 2) p->records = shaped(FLASH_KDA_F32, 4, records);
    if (how & 4) p->rounding = shaped(FLASH_KDA_I64, 1, &two);
    s->integers[ROUNDING][0] = how;
    s->integers[ROUNDING][1] = take_between(from, 0, 255);
    if (p->write_states == FLASH_KDA_WRITE_LAST || !(how & 8)) return;
    p->parents = shaped(take_integer_type(from), 2, tree);
    for (int64_t i = 0; i < z.N * columns; i++)
        s->integers[PARENTS][i] = take_between(from, -1, i % columns - 1);
}

/* Records of earlier tokens, which the call applies. */
static void shape_past(state *s, input *from, sizes z)
{
    flash_kda_decode_params *p = &s->p;
    if (p->write_states != FLASH_KDA_WRITE_NONE || !take_bool(from)) return;
    const int64_t columns = take_between(from, 0, 4), records[] = {z.N, columns, z.HV, RECORD},
                  tokens[] = {z.N, columns};
    p->past_records = shaped(FLASH_KDA_F32, 4, records);
    p->num_accepted_tokens = shaped(take_integer_type(from), 1, &z.N);
    for (int64_t n = 0; n < z.N; n++) s->integers[ACCEPTED][n] = take_between(from, 0, columns);
    if (!take_bool(from)) return;
    p->accepted = shaped(take_integer_type(from), 2, tokens);
    for (int64_t i = 0; i < z.N * columns; i++)
        s->integers[PAST_TOKENS][i] = take_between(from, 0, columns - 1);
}

static void take_layouts(state *s, input *from)
{
    if (!take_bool(from)) return;
    for (int i = Q; i <= OUT; i++) take_layout(s->set.tensors[i], from);
    if (take_bool(from)) s->p.q.stride[2] = 0; /* one head of queries for all */
}

static void list_tensors(state *s)
{
    flash_kda_tensor *const first = &s->p.q;
    s->set.count = TENSORS;
    for (int i = Q; i <= ROUNDING; i++) s->set.tensors[i] = first + i;
    s->set.tensors[WRITTEN] = &s->p.written_states;
    s->set.tensors[WRITTEN_INDICES] = &s->p.written_indices;
    s->set.tensors[PAST] = &s->p.past_records;
    s->set.tensors[PAST_TOKENS] = &s->p.accepted;
}

void make_good(state *s, input *from)
{
    const bool packed = take_bool(from);
    s->huge = take_between(from, 0, 15) == 15;
    const sizes z = s->huge ? take_hostile_sizes(packed, from) : take_sizes(s, packed, from);
    s->p = (flash_kda_decode_params){.struct_size = sizeof s->p};
    list_tensors(s);
    s->numbers = rng_seed(take(from, 2));
    s->compares = take_between(from, 0, 3) == 3;
    take_options(s, from);
    shape_tokens(s, from, z);
    if (s->huge) {
        const int64_t slots[] = {z.N, z.HV, DIM, DIM};
        s->p.write_states = FLASH_KDA_WRITE_LAST;
        s->p.state = shaped(FLASH_KDA_F32, 4, slots);
        return;
    }
    shape_written(s, from, z);
    shape_pool(s, from, z);
    shape_drafts(s, from, z);
    shape_past(s, from, z);
    if (s->p.written_states.ndim) s->p.written_states.dtype = s->p.state.dtype;
    take_layouts(s, from);
}

/* ---- Mutations of fields ------------------------------------------------------------------------------- */

void mutate_fields(state *s, input *from)
{
    flash_kda_decode_params *p = &s->p;
    const uint32_t bits = (uint32_t)take(from, 4);
    s->mutated = true;
    switch (take_between(from, 0, 20)) {
    case 0: memcpy(&p->scale, &bits, sizeof bits); break;
    case 1: memcpy(&p->lower_bound, &bits, sizeof bits); break;
    case 2: p->kernel = kernels[bits % KERNELS]; break;
    case 3: p->cpu_threads = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 63); break;
    case 4: p->write_states = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 3); break;
    case 5: p->first_slot = bits & 1 ? take_hostile(from) : (int64_t)(bits >> 1 & 7); break;
    case 6: p->device.type = (int32_t)take_between(from, -1, 3); break;
    case 7: p->device.index = (int32_t)bits; break;
    case 8: p->gate = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 3); break;
    case 9: p->beta_kind = bits & 1 ? (int32_t)bits : (int32_t)(bits >> 1 & 3); break;
    case 10: p->qk_is_normalised = bits & 1 ? (int32_t)bits : !p->qk_is_normalised; break;
    case 11: p->state_k_first = bits & 1 ? (int32_t)bits : !p->state_k_first; break;
    case 12: p->struct_size = bits & 1 ? (size_t)take_hostile(from) : sizeof *p - bits / 2 % 256; break;
    default: mutate_tensor(&s->set, from); break;
    }
}

/* ---- Memory -------------------------------------------------------------------------------------------- */

static bool has_integers(int which)
{
    for (int i = 0; i < INTEGER_TENSORS; i++)
        if (of_integers[i] == which) return true;
    return false;
}

static input_kinds kinds_of(const state *s)
{
    return (input_kinds){s->p.gate, s->p.beta_kind, s->p.qk_is_normalised};
}

/* Gives a tensor what its kind asks for. */
static void fill_tensor(state *s, int which, memory m)
{
    const int32_t dtype = s->set.tensors[which]->dtype;
    if (has_integers(which)) {
        fill_integers(&m, dtype, s->integers[which]);
        return;
    }
    fill(&m, dtype, &s->numbers);
    adapt(&m, dtype, which, kinds_of(s));
}

void make_memory(state *s)
{
    for (int i = 0; i < TENSORS && !s->huge; i++)
        if (i <= OUT || s->set.tensors[i]->ndim) fill_tensor(s, i, place(&s->set, i));
}

/* ---- Mutations of pointers and contents ---------------------------------------------------------------- */

static void share_memory(state *s, int which, input *from)
{
    const int other = (int)take_between(from, 0, TENSORS - 1);
    if (!share(&s->set, which, &s->set.memory[other], from)) return;
    s->unspecified |=
        is_of_a_kind(which, kinds_of(s)) || s->set.tensors[other]->dtype != s->set.tensors[which]->dtype;
}

void mutate_memory(state *s, input *from)
{
    const int which = (int)take_between(from, 0, TENSORS - 1);
    s->mutated = true;
    switch (take_between(from, 0, 7)) {
    case 0: s->set.tensors[which]->data = NULL; break;
    case 1:
    case 2: share_memory(s, which, from); break;
    case 3:
    case 4:
    case 5: plant_integer(&s->set, of_integers[which % INTEGER_TENSORS], from); break;
    case 6:
        if (!has_integers(which))
            s->unspecified |= !isfinite(plant(&s->set, which, from)) || is_of_a_kind(which, kinds_of(s));
        break;
    default:
        s->interrupt[0] = take_bool(from);
        s->p.interrupt = (const void *)((uintptr_t)s->interrupt + (uintptr_t)take_between(from, 0, 4));
        break;
    }
}
