/*
 * The backward pass on the CPU. The first bytes make a good call; up to three mutations make a wrong one of
 * most.
 *
 * Rules: a refusal has a sentence and writes nothing, a good call is taken, a call that is taken writes
 * elements of its gradients alone, which no other tensor has, and these are those of the fp64 reference.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bwd_compare.h"
#include "fuzz_bwd.h"

static const char *const names[TENSORS] = {"q",
                                           "k",
                                           "v",
                                           "g",
                                           "beta",
                                           "A_log",
                                           "dt_bias",
                                           "initial_state",
                                           "cu_seqlens",
                                           "dout",
                                           "dfinal_state",
                                           "dq",
                                           "dk",
                                           "dv",
                                           "dg",
                                           "dbeta",
                                           "dA_log",
                                           "ddt_bias",
                                           "dinitial_state"};

/* What the workspace holds before a call. As a number it is NaN, so that a gradient shows if it was read. */
enum { WORKSPACE_BYTE = 0xff };

/* A bit for each. */
static const uint32_t GRADIENTS_THAT_ARE_WRITTEN = ((1u << TENSORS) - 1) & ~((1u << INPUTS) - 1);

/* More workspace than this is not given, and the call is refused. */
static const size_t MOST_WORKSPACE = (size_t)64 << 20;

/* ---- Memory that is no tensor -------------------------------------------------------------------------- */

static memory allocate_workspace(size_t bytes)
{
    const memory m = allocate_memory(bytes);
    memset(m.bytes, WORKSPACE_BYTE, bytes);
    return m;
}

/* The size call needs no pointers, so it gets none. */
static void size_workspace(state *s)
{
    flash_kda_bwd_params shapes = s->p;
    size_t bytes = SIZE_MAX;
    for (int i = 0; i < TENSORS; i++) tensor(&shapes, i)->data = NULL;
    shapes.saved = NULL;
    const flash_kda_status status = flash_kda_bwd_workspace_size(&shapes, &bytes);
    if (status != FLASH_KDA_OK) {
        check_sentence("bwd_workspace_size");
        if (bytes != SIZE_MAX) wrong("a refused size call wrote");
        return;
    }
    s->p.workspace_size = bytes;
    if (s->huge || s->set.unreal || bytes > MOST_WORKSPACE) return;
    s->workspace = allocate_workspace(bytes);
    s->p.workspace = s->workspace.bytes;
}

/* The forward pass of which the call computes gradients. */
static flash_kda_fwd_params forward_of(const flash_kda_bwd_params *p)
{
    return (flash_kda_fwd_params){
        .struct_size = sizeof(flash_kda_fwd_params),
        .device = p->device,
        .q = p->q,
        .k = p->k,
        .v = p->v,
        .g = p->g,
        .beta = p->beta,
        .out = shaped(FLASH_KDA_BF16, 4, p->v.shape),
        .A_log = p->A_log,
        .dt_bias = p->dt_bias,
        .initial_state = p->initial_state,
        .cu_seqlens = p->cu_seqlens,
        .scale = p->scale,
        .lower_bound = p->lower_bound,
        .kernel = p->kernel,
        .cpu_threads = p->cpu_threads,
        .gate = p->gate,
        .beta_kind = p->beta_kind,
        .qk_is_normalised = p->qk_is_normalised,
        .state_k_first = p->state_k_first,
    };
}

/* Lets a forward pass save states. Returns whether it was taken. */
static bool save_states(state *s)
{
    flash_kda_fwd_params forward = forward_of(&s->p);
    size_t in_front, bytes;
    const size_t out_bytes = bytes_of(&forward.out, &in_front);
    if (out_bytes == SIZE_MAX || flash_kda_fwd_workspace_size(&forward, &bytes) != FLASH_KDA_OK ||
        bytes > MOST_WORKSPACE)
        return false;
    memory out = allocate_memory(out_bytes), workspace = allocate_workspace(bytes);
    forward.out.data = out.bytes;
    forward.saved = s->saved.bytes;
    forward.saved_size = s->saved.count;
    forward.workspace = workspace.bytes;
    forward.workspace_size = bytes;
    const bool taken = flash_kda_fwd(&forward) == FLASH_KDA_OK;
    forget(&out);
    forget(&workspace);
    return taken;
}

static void make_saved(state *s)
{
    const flash_kda_fwd_params forward = forward_of(&s->p);
    size_t bytes;
    if (s->saves == SAVED_NOTHING || s->set.unreal || s->huge || s->p.device.type != FLASH_KDA_CPU) return;
    if (flash_kda_fwd_saved_size(&forward, &bytes) != FLASH_KDA_OK || bytes > MOST_WORKSPACE) return;
    s->saved = allocate_memory(bytes);
    fill(&s->saved, FLASH_KDA_F32, &s->numbers);
    s->p.saved = s->saved.bytes;
    s->p.saved_size = bytes;
    if (s->saves == SAVED_RUBBISH || !save_states(s)) s->unspecified = true;
}

/* ---- What a call may write ----------------------------------------------------------------------------- */

/* The bytes of workspace that the call needs as it is, which may be more than it has. */
static size_t needed_workspace(const state *s)
{
    flash_kda_bwd_params now = s->p;
    size_t bytes = SIZE_MAX;
    for (int i = 0; i < TENSORS; i++)
        if (!tensor(&now, i)->data) tensor(&now, i)->ndim = 0;
    return flash_kda_bwd_workspace_size(&now, &bytes) == FLASH_KDA_OK ? bytes : 0;
}

/* Whether a call that is taken stays inside memory that exists: a pointer or a size that promises too much is
 * the caller's lie. A GPU, if there is one, must not get this memory. */
static bool may_be_tried(const state *s)
{
    const flash_kda_bwd_params *p = &s->p;
    if (p->device.type == FLASH_KDA_CUDA) return false;
    if (s->huge) return true; /* null pointers must be refused */
    if (s->set.unreal) return false;
    const uintptr_t moved = (uintptr_t)p->workspace - (uintptr_t)s->workspace.bytes;
    if (p->workspace && moved && moved % 64 == 0) return false; /* by several mutations */
    if (p->workspace && p->workspace_size > s->workspace.count && needed_workspace(s) > s->workspace.count)
        return false;
    if (p->saved && (uintptr_t)p->saved % 64 == 0) {
        bool inside = false;
        for (int i = 0; i <= TENSORS; i++) {
            const memory *m = i < TENSORS ? &s->set.memory[i] : &s->saved;
            inside |= m->bytes == p->saved && m->count >= p->saved_size;
        }
        if (!inside) return false;
    }
    return all_are_inside(&s->set, &s->workspace, &s->saved);
}

static void check_workspace(const memory *m)
{
    if (!m->count) return;
    if (m->bytes[0] != WORKSPACE_BYTE || memcmp(m->bytes, m->bytes + 1, m->count - 1) != 0)
        wrong("a refused call wrote to the workspace");
}

/* Everything but the gradients is as before the call. What memory holds is lost where the call may have
 * written it. */
static void check_unchanged(state *s, bool taken)
{
    for (int i = 0; i <= TENSORS; i++) {
        const memory *m = i < TENSORS ? &s->set.memory[i] : &s->saved;
        if (!m->bytes) continue;
        for (int o = INPUTS; taken && o < TENSORS; o++)
            put_back(tensor(&s->p, o), m, 0, count_of(tensor(&s->p, o)));
        if (memcmp(m->bytes, m->before, m->count) != 0)
            wrong("memory of %s changed", i < TENSORS ? names[i] : "saved");
    }
    if (!taken) check_workspace(&s->workspace);
    for (int i = 0; taken && i < TENSORS; i++)
        if (count_of(tensor(&s->p, i)) && lies_in(tensor(&s->p, i), &s->workspace))
            wrong("a call was taken with %s in the workspace", names[i]);
}

/* ---- Results ------------------------------------------------------------------------------------------- */

typedef struct answer {
    double *of[TENSORS]; /* of gradients that are written alone */
} answer;

static double *allocate_doubles(int64_t count)
{
    double *values = calloc((size_t)count + 1, sizeof *values);
    if (!values) wrong("no memory");
    return values;
}

/* All gradients, wanted or not, except that A_log has one only if it is there. */
static answer solve(const flash_kda_bwd_params *p)
{
    const int64_t *q = p->q.shape, *v = p->v.shape, rows = v[0] * v[1] * v[2], heads = v[2],
                  sequences = p->cu_seqlens.data ? p->cu_seqlens.shape[0] - 1 : q[0];
    answer a = {{NULL}};
    a.of[DQ] = allocate_doubles(q[0] * q[1] * q[2] * DIM);
    a.of[DK] = allocate_doubles(q[0] * q[1] * q[2] * DIM);
    a.of[DV] = allocate_doubles(rows * DIM);
    a.of[DG] = allocate_doubles(rows * DIM);
    a.of[DBETA] = allocate_doubles(rows);
    a.of[DA_LOG] = allocate_doubles(heads);
    a.of[DDT_BIAS] = allocate_doubles(heads * DIM);
    a.of[DINITIAL] = allocate_doubles(sequences * heads * DIM * DIM);
    const flash_kda_gradients64 to = {
        .struct_size = sizeof to,
        .dq = a.of[DQ],
        .dk = a.of[DK],
        .dv = a.of[DV],
        .dg = a.of[DG],
        .dbeta = a.of[DBETA],
        .dA_log = a.of[DA_LOG],
        .ddt_bias = a.of[DDT_BIAS],
        .dinitial_state = a.of[DINITIAL],
    };
    if (flash_kda_bwd_reference(p, &to) != FLASH_KDA_OK)
        wrong("the reference refused: %s", flash_kda_last_error());
    return a;
}

/* Transposes states that are V before K. */
static void put_k_first(double *states, int64_t count)
{
    for (double *matrix = states; matrix < states + count; matrix += DIM * DIM)
        for (int v = 0; v < DIM; v++)
            for (int k = 0; k < v; k++) {
                const double kept = matrix[v * DIM + k];
                matrix[v * DIM + k] = matrix[k * DIM + v];
                matrix[k * DIM + v] = kept;
            }
}

static double error_of_rates(const flash_kda_bwd_params *p, const answer *a, const void *got,
                             double cancelling)
{
    const int64_t count = count_of(&p->g);
    void *from = copy_elements(&p->g, 0, count);
    double *g = allocate_doubles(count);
    for (int64_t i = 0; i < count; i++)
        g[i] = p->g.dtype == FLASH_KDA_F32 ? (double)((float *)from)[i]
                                           : (double)float_from_bf16(((uint16_t *)from)[i]);
    const rate_terms terms = {.g = g,
                              .dt_bias = p->dt_bias.data,
                              .rows = p->v.shape[0] * p->v.shape[1],
                              .heads = p->v.shape[2],
                              .gate = (flash_kda_gate)p->gate};
    const double error = rate_error(&terms, a->of[DG], a->of[DA_LOG], got, cancelling);
    free(g);
    free(from);
    return error;
}

static void hold(const flash_kda_bwd_params *p, const answer *a, const flash_kda_tensor *t, int which)
{
    const gradient_bars bars = gradient_bars_of(p->device);
    const int64_t count = count_of(t);
    const bool narrow = t->dtype == FLASH_KDA_BF16;
    void *got = copy_elements(t, 0, count);
    const double *truth = a->of[which],
                 error = which == DA_LOG ? error_of_rates(p, a, got, bars.cancelling)
                                         : gradient_error(truth, got, narrow, count, false, GRADIENT_FLOOR),
                 beyond = narrow ? gradient_error(truth, got, true, count, true, GRADIENT_FLOOR) : 0.0;
    if (!(error <= gradient_bar(&bars, narrow, count))) wrong("%s has error %g", names[which], error);
    if (!(beyond <= bars.beyond_rounding)) wrong("%s has error %g beyond its rounding", names[which], beyond);
    free(got);
}

/* As far as the reference is finite. */
static void check_results(state *s)
{
    answer a = solve(&s->p);
    bool ordinary = true;
    for (int i = INPUTS; i < TENSORS; i++) ordinary &= all_ordinary(a.of[i], count_of(tensor(&s->p, i)));
    if (s->p.state_k_first) put_k_first(a.of[DINITIAL], count_of(tensor(&s->p, DINITIAL)));
    for (int i = INPUTS; ordinary && i < TENSORS; i++)
        if (tensor(&s->p, i)->data) hold(&s->p, &a, tensor(&s->p, i), i);
    for (int i = INPUTS; i < TENSORS; i++) free(a.of[i]);
}

/* ---- A call -------------------------------------------------------------------------------------------- */

static void try_call(state *s)
{
    const flash_kda_status status = flash_kda_bwd(&s->p);
    const bool taken = status == FLASH_KDA_OK, good = !s->mutated && !s->huge;
    if (!taken) check_sentence("bwd");
    if (!taken && good && status != FLASH_KDA_UNAVAILABLE)
        wrong("a good call was refused: %s", flash_kda_last_error());
    if (s->huge) return;
    if (taken && s->mutated) check_apart(&s->set, GRADIENTS_THAT_ARE_WRITTEN);
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
    make_saved(&s);
    size_workspace(&s);
    for (int i = 0; i < mutations && late; i++) mutate_memory(&s, &from);
    keep_copies(&s.set);
    keep_copy(&s.saved);
    if (may_be_tried(&s)) try_call(&s);
    forget_all(&s.set);
    forget(&s.workspace);
    forget(&s.saved);
    return 0;
}
