#include "bwd_call.h"

#include <stdlib.h>
#include <string.h>

#include "strided.h"

const char *const gradient_names[GRADIENTS] = {
    "dout", "dfinal_state", "dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias", "dinitial_state"};

static bool is_state(gradient which)
{
    return which == GRAD_FINAL_STATE || which == GRAD_INITIAL_STATE;
}

/* ---- Problems ------------------------------------------------------------------------------------------ */

bwd_problem *bwd_problem_create(problem *forward, uint64_t seed)
{
    rng r = rng_seed(seed);
    bwd_problem *b = allocate(1, sizeof *b);
    const int64_t values = problem_rows(forward) * DIM, states = problem_states(forward) * DIM * DIM;
    b->forward = forward;
    b->dout = allocate((size_t)values, sizeof *b->dout);
    b->dfinal_state = allocate((size_t)states, sizeof *b->dfinal_state);
    for (int64_t i = 0; i < values; i++) b->dout[i] = bf16_from_float((float)rng_normal(&r));
    for (int64_t i = 0; i < states; i++)
        b->dfinal_state[i] = float_from_bf16(bf16_from_float(0.1f * (float)rng_normal(&r)));
    return b;
}

void bwd_problem_free(bwd_problem *b)
{
    problem_free(b->forward);
    free(b->dout);
    free(b->dfinal_state);
    free(b);
}

/* The shape of a gradient of a problem, contiguous. */
static flash_kda_tensor shape_of(const bwd_problem *b, gradient which)
{
    const problem *p = b->forward;
    const int64_t channels[] = {p->batch, p->tokens, p->heads, DIM},
                  qk_channels[] = {p->batch, p->tokens, p->qk_heads, DIM},
                  states[] = {p->sequences, p->heads, DIM, DIM}, heads[] = {p->heads, DIM};
    switch (which) {
    case GRAD_OUT:
    case GRAD_V: return tensor_of(NULL, FLASH_KDA_BF16, 4, channels);
    case GRAD_Q:
    case GRAD_K: return tensor_of(NULL, FLASH_KDA_BF16, 4, qk_channels);
    case GRAD_G: return tensor_of(NULL, p->g_f32 ? FLASH_KDA_F32 : FLASH_KDA_BF16, 4, channels);
    case GRAD_BETA: return tensor_of(NULL, p->beta_f32 ? FLASH_KDA_F32 : FLASH_KDA_BF16, 3, channels);
    case GRAD_A_LOG: return tensor_of(NULL, FLASH_KDA_F32, 1, heads);
    case GRAD_DT_BIAS: return tensor_of(NULL, FLASH_KDA_F32, 2, heads);
    default: return tensor_of(NULL, FLASH_KDA_F32, 4, states);
    }
}

int64_t gradient_elements(const bwd_problem *b, gradient which)
{
    const flash_kda_tensor t = shape_of(b, which);
    return elements_of(&t);
}

/* The fields that the forward pass's arguments have too. */
static flash_kda_bwd_params params_like(const flash_kda_fwd_params *p)
{
    return (flash_kda_bwd_params){
        .struct_size = sizeof(flash_kda_bwd_params),
        .device = p->device,
        .q = p->q,
        .k = p->k,
        .v = p->v,
        .g = p->g,
        .beta = p->beta,
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
        .max_seqlen = p->max_seqlen,
    };
}

flash_kda_bwd_params bwd_problem_params(const bwd_problem *b)
{
    const flash_kda_fwd_params forward = problem_params(b->forward, !b->without_initial_state);
    flash_kda_bwd_params params = params_like(&forward);
    if (!b->without_dout) {
        params.dout = shape_of(b, GRAD_OUT);
        params.dout.data = b->dout;
    }
    if (!b->without_dfinal_state) {
        params.dfinal_state = shape_of(b, GRAD_FINAL_STATE);
        params.dfinal_state.data = b->dfinal_state;
    }
    return params;
}

bwd_answer bwd_problem_solve(const bwd_problem *b)
{
    bwd_answer a = {{NULL}};
    const flash_kda_bwd_params params = bwd_problem_params(b);
    for (int i = READ_GRADIENTS; i < GRADIENTS; i++)
        a.of[i] = allocate((size_t)gradient_elements(b, (gradient)i), sizeof(double));
    const flash_kda_gradients64 to = {
        .struct_size = sizeof to,
        .dq = a.of[GRAD_Q],
        .dk = a.of[GRAD_K],
        .dv = a.of[GRAD_V],
        .dg = a.of[GRAD_G],
        .dbeta = a.of[GRAD_BETA],
        .dA_log = a.of[GRAD_A_LOG],
        .ddt_bias = a.of[GRAD_DT_BIAS],
        .dinitial_state = a.of[GRAD_INITIAL_STATE],
    };
    must(flash_kda_bwd_reference(&params, &to));
    return a;
}

void bwd_answer_free(bwd_answer *a)
{
    for (int i = 0; i < GRADIENTS; i++) free(a->of[i]);
    *a = (bwd_answer){{NULL}};
}

/* ---- Calls --------------------------------------------------------------------------------------------- */

static flash_kda_tensor *param_of(flash_kda_bwd_params *p, gradient which)
{
    flash_kda_tensor *const all[GRADIENTS] = {
        &p->dout, &p->dfinal_state, &p->dq,     &p->dk,       &p->dv,
        &p->dg,   &p->dbeta,        &p->dA_log, &p->ddt_bias, &p->dinitial_state};
    return all[which];
}

static bool is_there(const bwd_call *c, gradient which)
{
    const bwd_problem *b = c->problem;
    switch (which) {
    case GRAD_OUT: return !b->without_dout;
    case GRAD_FINAL_STATE: return !b->without_dfinal_state;
    case GRAD_A_LOG: return c->inputs.params.A_log.data && !(c->options.absent >> which & 1);
    case GRAD_DT_BIAS: return c->inputs.params.dt_bias.data && !(c->options.absent >> which & 1);
    default: return !(c->options.absent >> which & 1);
    }
}

static void place(bwd_call *c, gradient which)
{
    static const int plain[] = {0, 1, 2, 3}, head_major[] = {0, 2, 1, 3};
    const layout how = c->options.layouts[which];
    flash_kda_tensor t = shape_of(c->problem, which);
    if (which == GRAD_FINAL_STATE && c->options.bf16_dfinal_state) t.dtype = FLASH_KDA_BF16;
    const size_t size = dtype_size(t.dtype);
    const int64_t unit = c->options.forward.odd_gaps ? 1 : 16 / (int64_t)size, none[4] = {0},
                  gaps[4] = {3 * unit, 2 * unit, unit, 0}, of_state[4] = {8, 0, 0, 0};
    int64_t elements = elements_of(&t);
    if (is_state(which) && how == LAYOUT_PADDED) {
        t.stride[0] += 16;
        elements = t.stride[0] * t.shape[0] + of_state[0];
    } else if (which == GRAD_BETA && how == LAYOUT_PADDED) {
        t.stride[2] = 2;
        t.stride[1] = 2 * t.shape[2] + 3;
        t.stride[0] = t.stride[1] * t.shape[1] + 7;
        elements = t.stride[0] * t.shape[0];
    } else if (t.ndim >= 3 && !is_state(which)) {
        elements = lay_out(&t, how == LAYOUT_HEAD_MAJOR ? head_major : plain,
                           how == LAYOUT_PADDED && t.ndim == 4 ? gaps : none);
    }
    if (is_state(which) && c->options.forward.k_first) t.stride[2] = 1, t.stride[3] = DIM;
    c->places[which] = (tensor_place){.buffer = which, .view = t};
    c->buffers[which] = (buffer){.device = c->options.forward.device,
                                 .bytes = (size_t)elements * size,
                                 .band = which < READ_GRADIENTS ? NAN_BYTE : OUTPUT_BAND_BYTE};
}

/* What the buffer of a gradient holds before a call. */
static unsigned char *image_of(const bwd_call *c, gradient which)
{
    const bwd_problem *b = c->problem;
    const tensor_place *at = &c->places[which];
    unsigned char *image = allocate(c->buffers[which].bytes, 1);
    memset(image, NAN_BYTE, c->buffers[which].bytes);
    if (which == GRAD_OUT) scatter(&at->view, image, (const unsigned char *)b->dout);
    if (which != GRAD_FINAL_STATE) return image;
    const int64_t count = elements_of(&at->view);
    uint16_t *narrow = allocate((size_t)count, sizeof *narrow);
    for (int64_t i = 0; i < count; i++) narrow[i] = bf16_from_float(b->dfinal_state[i]);
    scatter(&at->view, image,
            at->view.dtype == FLASH_KDA_BF16 ? (unsigned char *)narrow : (unsigned char *)b->dfinal_state);
    free(narrow);
    return image;
}

/* The argument as the call gets it, still without memory. */
static flash_kda_tensor argument_of(const bwd_call *c, gradient which)
{
    flash_kda_tensor t = c->places[which].view;
    if (is_state(which) && c->options.forward.k_first) t.stride[2] = DIM, t.stride[3] = 1;
    for (int i = 0; c->options.forward.rubbish_strides && i < t.ndim; i++)
        if (t.shape[i] == 1) t.stride[i] = i % 2 ? -77 : INT64_MAX / 3;
    return t;
}

/* Runs the forward pass, which saves states into a buffer of the call. */
static void save_states(bwd_call *c)
{
    flash_kda_fwd_params p = c->inputs.params;
    buffer workspace = {.device = c->options.forward.device, .band = OUTPUT_BAND_BYTE};
    must(flash_kda_fwd_saved_size(&p, &p.saved_size));
    c->saved = (buffer){.device = workspace.device, .bytes = p.saved_size, .band = OUTPUT_BAND_BYTE};
    buffer_create(&c->saved);
    p.saved = buffer_start(&c->saved);
    must(flash_kda_fwd_workspace_size(&p, &workspace.bytes));
    buffer_create(&workspace);
    p.workspace = buffer_start(&workspace);
    p.workspace_size = workspace.bytes;
    must(flash_kda_fwd(&p));
    must(flash_kda_synchronize(p.device, p.stream));
    buffer_free(&workspace);
    call_poison(&c->inputs); /* out is as it was */
    c->params.saved = p.saved;
    c->params.saved_size = p.saved_size;
}

flash_kda_status bwd_call_open(bwd_call *c, const bwd_problem *b, bwd_options options)
{
    memset(c, 0, sizeof *c);
    options.forward.mode = b->without_initial_state ? STATE_NONE : STATE_IN;
    options.forward.for_reference = true;
    c->problem = b;
    c->options = options;
    must(call_open(&c->inputs, b->forward, options.forward));
    c->params = params_like(&c->inputs.params);
    if (options.saves) save_states(c);
    for (int i = 0; i < GRADIENTS; i++) {
        const gradient which = (gradient)i;
        if (!is_there(c, which)) continue;
        place(c, which);
        *param_of(&c->params, which) = argument_of(c, which);
        buffer_create(&c->buffers[i]);
        unsigned char *image = image_of(c, which);
        buffer_write(&c->buffers[i], image);
        free(image);
        param_of(&c->params, which)->data = buffer_start(&c->buffers[i]);
    }
    c->params.batch_invariant = options.batch_invariant;
    c->params.workspace_limit = options.workspace_limit;
    size_t bytes;
    const flash_kda_status status = flash_kda_bwd_workspace_size(&c->params, &bytes);
    if (status != FLASH_KDA_OK) {
        bwd_call_close(c);
        return status;
    }
    c->workspace = (buffer){.device = options.forward.device, .bytes = bytes, .band = OUTPUT_BAND_BYTE};
    buffer_create(&c->workspace);
    unsigned char *poison = allocate(bytes, 1);
    memset(poison, NAN_BYTE, bytes);
    buffer_write(&c->workspace, poison);
    free(poison);
    c->params.workspace = buffer_start(&c->workspace);
    c->params.workspace_size = bytes;
    return FLASH_KDA_OK;
}

void bwd_call_close(bwd_call *c)
{
    for (int i = 0; i < GRADIENTS; i++) buffer_free(&c->buffers[i]);
    buffer_free(&c->workspace);
    buffer_free(&c->saved);
    call_close(&c->inputs);
}

flash_kda_status bwd_call_run(bwd_call *c)
{
    return flash_kda_bwd(&c->params);
}

void *bwd_call_read(const bwd_call *c, gradient which)
{
    const tensor_place *at = &c->places[which];
    unsigned char *all = buffer_read(&c->buffers[which]),
                  *elements = allocate((size_t)elements_of(&at->view), dtype_size(at->view.dtype));
    gather(&at->view, all, elements);
    free(all);
    return elements;
}

/* Whether the buffer of a gradient is as before the call, apart from elements that the call may write. */
static bool is_intact(const bwd_call *c, gradient which, bool may_be_written)
{
    const buffer *b = &c->buffers[which];
    if (!b->base) return true;
    if (!buffer_is_intact(b)) return false;
    unsigned char *now = buffer_read(b), *image = image_of(c, which);
    if (may_be_written && which >= READ_GRADIENTS) {
        const flash_kda_tensor *t = &c->places[which].view;
        unsigned char *before = allocate((size_t)elements_of(t), dtype_size(t->dtype));
        gather(t, image, before);
        scatter(t, now, before);
        free(before);
    }
    const bool same = memcmp(now, image, b->bytes) == 0;
    free(now);
    free(image);
    return same;
}

const char *bwd_call_damage(const bwd_call *c)
{
    for (int i = 0; i < GRADIENTS; i++)
        if (!is_intact(c, (gradient)i, true)) return gradient_names[i];
    if (!buffer_is_intact(&c->workspace)) return "workspace";
    if (!buffer_is_intact(&c->saved)) return "saved";
    return call_untouched(&c->inputs) ? call_damage(&c->inputs, c->problem->forward) : "an input";
}

bool bwd_call_untouched(const bwd_call *c)
{
    for (int i = 0; i < GRADIENTS; i++)
        if (!is_intact(c, (gradient)i, false)) return false;
    return call_untouched(&c->inputs);
}
