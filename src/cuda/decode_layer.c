/* decode_layer on a GPU: launches kernels/decode/layer.cu. */
#include "../../kernels/decode/decode_layer_args.h"
#include "../../kernels/decode/layer_shape.h"
#include "../decode_layer_problem.h"
#include "cuda.h"
#include "decode_args_of.h"
#include "decode_launch.h"

extern const unsigned char fkda_fatbin_decode_layer[];

/* The kernels for a type and a layout of states, in the order of `module.names`. */
enum { ONE, STEPS, KERNELS };

#define FKDA_NAMES(suffix) "fkda_layer_one_" suffix, "fkda_layer_steps_" suffix

static fkda_module module = {
    .image = fkda_fatbin_decode_layer,
    .names = {FKDA_NAMES("f32"), FKDA_NAMES("bf16"), FKDA_NAMES("k_first_f32"), FKDA_NAMES("k_first_bf16")},
    .shared_bytes = FKDA_LAYER_SHARED_BYTES(FKDA_DECODE_MAX_TOKENS),
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

static fkda_channel_args channel_args(const fkda_channel_view *c)
{
    return (fkda_channel_args){c->data, c->part_stride, c->channel_stride, c->column_stride};
}

static fkda_decode_layer_args args_of(const fkda_decode_layer_problem *p)
{
    return (fkda_decode_layer_args){
        .decode = fkda_decode_args_of(&p->decode),
        .x = p->x.data,
        .x_strides = fkda_strides_of(&p->x),
        .x_part = p->x_part_stride,
        .weight = channel_args(&p->weight),
        .bias = channel_args(&p->bias),
        .conv_state = channel_args(&p->conv_state),
        .windows = channel_args(&p->windows),
        .conv_slot_stride = p->conv_slot_stride,
        .windows_sequence = p->windows_sequence_stride,
        .windows_token = p->windows_token_stride,
        .output_gate = p->output_gate.data,
        .output_gate_strides = fkda_strides_of(&p->output_gate),
        .norm_weight = p->norm_weight,
        .norm_eps = p->norm_eps,
        .windows_columns = (int)p->windows_columns,
        .window_columns = (int)p->window_columns,
        .keeps_drafts = fkda_keeps_drafts(p),
        .write_windows = p->decode.has_written_states ? FLASH_KDA_WRITE_NONE : p->decode.write_states,
        .weight_is_f32 = p->weight.dtype == FLASH_KDA_F32,
        .bias_is_f32 = p->bias.dtype == FLASH_KDA_F32,
        .output_gate_is_f32 = p->output_gate.dtype == FLASH_KDA_F32,
        .norm_weight_is_f32 = p->norm_weight_dtype == FLASH_KDA_F32,
    };
}

static fkda_decode_launch launch_of(const fkda_decode_problem *d)
{
    const int tokens = d->tokens < FKDA_DECODE_MAX_TOKENS ? (int)d->tokens : FKDA_DECODE_MAX_TOKENS,
              which = !d->cu_seqlens.data && d->tokens == 1 ? ONE : STEPS;
    return (fkda_decode_launch){
        .kernel = KERNELS * ((d->state.dtype == FLASH_KDA_BF16) + 2 * d->state_k_first) + which,
        .threads = FKDA_LAYER_THREADS,
        .shared_bytes = FKDA_LAYER_SHARED_BYTES(tokens),
        .heads = d->sequences * d->heads,
    };
}

flash_kda_status fkda_cuda_decode_layer(const fkda_decode_layer_problem *p)
{
    const fkda_decode_problem *d = &p->decode;
    fkda_decode_layer_args args = args_of(p);
    fkda_decode_launch launch = launch_of(d);
    launch.args = &args;
    if (d->tokens == 0) return FLASH_KDA_OK;
    return fkda_launch_decode(d->device, d->stream, &module, &launch);
}

void fkda_cuda_explain_decode_layer(const fkda_decode_layer_problem *p, char *text, size_t size)
{
    const fkda_decode_launch l = launch_of(&p->decode);
    fkda_explain_launch(module.names[l.kernel],
                        "convolution, tokens one after the other with states in registers, and norm", &l,
                        text, size);
}
