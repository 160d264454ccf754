#include "pretended.h"

#include <dlfcn.h>
#include <string.h>

const pretended_counts *pretended_counts_find(void)
{
    pretended_counts *(*find)(void) = NULL;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    void *symbol = driver ? dlsym(driver, "pretended_counts_of_thread") : NULL;
    if (!symbol)
        die("LD_LIBRARY_PATH must name the folder of the pretended driver, as `make host-time` does");
    memcpy(&find, &symbol, sizeof find);
    return find();
}

/* No kernel runs, so a tensor needs an address alone: 16 TiB from the next, more than any tensor has. */
static void *address(int tensor)
{
    return (void *)((uintptr_t)(tensor + 1) << 44);
}

flash_kda_fwd_params pretended_params(pretended_shape shape)
{
    const int64_t sequences = shape.sequences ? shape.sequences : shape.batch;
    const int64_t rows[] = {shape.batch, shape.tokens, shape.heads, DIM}, bias[] = {shape.heads, DIM};
    const int64_t states[] = {sequences, shape.heads, DIM, DIM}, borders = sequences + 1;
    flash_kda_fwd_params p = {
        .struct_size = sizeof p,
        .device = {FLASH_KDA_CUDA, 0},
        .q = tensor_of(address(0), FLASH_KDA_BF16, 4, rows),
        .k = tensor_of(address(1), FLASH_KDA_BF16, 4, rows),
        .v = tensor_of(address(2), FLASH_KDA_BF16, 4, rows),
        .g = tensor_of(address(3), FLASH_KDA_BF16, 4, rows),
        .beta = tensor_of(address(4), FLASH_KDA_BF16, 3, rows),
        .out = tensor_of(address(5), FLASH_KDA_BF16, 4, rows),
        .A_log = tensor_of(address(6), FLASH_KDA_F32, 1, bias),
        .dt_bias = tensor_of(address(7), FLASH_KDA_F32, 2, bias),
        .initial_state = tensor_of(address(8), FLASH_KDA_F32, 4, states),
        .final_state = tensor_of(address(9), FLASH_KDA_F32, 4, states),
        .scale = 0.088F,
        .lower_bound = -5,
        .workspace = address(10),
        .workspace_size = (size_t)1 << 40,
        .max_seqlen = shape.longest,
    };
    if (shape.sequences) p.cu_seqlens = tensor_of(address(11), FLASH_KDA_I64, 1, &borders);
    return p;
}

static flash_kda_tensor pool(int tensor, int64_t slots, int64_t heads)
{
    return tensor_of(address(tensor), FLASH_KDA_F32, 4, (const int64_t[]){slots, heads, DIM, DIM});
}

/* i32 [rows], or [rows, columns] unless columns is 0. */
static flash_kda_tensor integers(int tensor, int64_t rows, int64_t columns)
{
    return tensor_of(address(tensor), FLASH_KDA_I32, columns ? 2 : 1, (const int64_t[]){rows, columns});
}

flash_kda_decode_params pretended_decode_params(pretended_decode s)
{
    const int64_t rows[] = {s.sequences, s.tokens, s.heads, DIM}, bias[] = {s.heads, DIM},
                  records[] = {s.sequences, s.tokens, s.heads, (int64_t)FLASH_KDA_RECORD_ROWS * DIM};
    const bool each = s.writes == FLASH_KDA_WRITE_EACH;
    flash_kda_decode_params p = {
        .struct_size = sizeof p,
        .device = {FLASH_KDA_CUDA, 0},
        .q = tensor_of(address(0), FLASH_KDA_BF16, 4, rows),
        .k = tensor_of(address(1), FLASH_KDA_BF16, 4, rows),
        .v = tensor_of(address(2), FLASH_KDA_BF16, 4, rows),
        .g = tensor_of(address(3), FLASH_KDA_BF16, 4, rows),
        .beta = tensor_of(address(4), FLASH_KDA_BF16, 3, rows),
        .out = tensor_of(address(5), FLASH_KDA_BF16, 4, rows),
        .A_log = tensor_of(address(6), FLASH_KDA_F32, 1, bias),
        .dt_bias = tensor_of(address(7), FLASH_KDA_F32, 2, bias),
        .state = pool(8, s.sequences * s.tokens, s.heads),
        .state_indices = integers(9, s.sequences, each ? s.tokens : 0),
        .scale = 0.088F,
        .lower_bound = -5,
        .write_states = s.writes,
        .first_slot = 1,
    };
    if (each) p.num_accepted_tokens = integers(10, s.sequences, 0);
    if (s.is_tree) p.parents = integers(11, s.sequences, s.tokens);
    if (s.has_records) p.records = tensor_of(address(12), FLASH_KDA_F32, 4, records);
    return p;
}

flash_kda_decode_layer_params pretended_layer_params(pretended_decode s)
{
    const int64_t channels = 3 * s.heads * DIM, rows[] = {s.sequences, s.tokens, s.heads, DIM},
                  bias[] = {s.heads, DIM}, x[] = {s.sequences, s.tokens, channels}, weight[] = {channels, 4},
                  windows[] = {s.sequences * s.tokens, channels, 3}, norm[] = {DIM};
    flash_kda_decode_layer_params p = {
        .struct_size = sizeof p,
        .device = {FLASH_KDA_CUDA, 0},
        .x = tensor_of(address(0), FLASH_KDA_BF16, 3, x),
        .weight = tensor_of(address(1), FLASH_KDA_F32, 2, weight),
        .conv_state = tensor_of(address(2), FLASH_KDA_BF16, 3, windows),
        .g = tensor_of(address(3), FLASH_KDA_BF16, 4, rows),
        .beta = tensor_of(address(4), FLASH_KDA_BF16, 3, rows),
        .out = tensor_of(address(5), FLASH_KDA_BF16, 4, rows),
        .A_log = tensor_of(address(6), FLASH_KDA_F32, 1, bias),
        .dt_bias = tensor_of(address(7), FLASH_KDA_F32, 2, bias),
        .output_gate = tensor_of(address(10), FLASH_KDA_BF16, 4, rows),
        .norm_weight = tensor_of(address(11), FLASH_KDA_F32, 1, norm),
        .state = pool(8, s.sequences * s.tokens, s.heads),
        .state_indices = integers(9, s.sequences, 0),
        .scale = 0.088F,
        .lower_bound = -5,
        .norm_eps = 1e-5F,
        .first_slot = 1,
    };
    return p;
}

flash_kda_apply_params pretended_apply_params(pretended_decode s)
{
    const int64_t records[] = {s.sequences, s.tokens, s.heads, (int64_t)FLASH_KDA_RECORD_ROWS * DIM};
    flash_kda_apply_params p = {
        .struct_size = sizeof p,
        .device = {FLASH_KDA_CUDA, 0},
        .records = tensor_of(address(0), FLASH_KDA_F32, 4, records),
        .num_accepted_tokens = integers(1, s.sequences, 0),
        .state = pool(8, s.sequences, s.heads),
        .state_indices = integers(9, s.sequences, 0),
        .first_slot = 1,
    };
    return p;
}
