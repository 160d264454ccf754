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
