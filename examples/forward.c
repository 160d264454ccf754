/* The forward pass from C: one head writes the same value under the same key for 64 tokens and never
 * forgets, so what it reads back approaches scale * value. Prints that approach. */
#include <stdio.h>
#include <stdlib.h>

#include "flash_kda.h"

enum { T = 64, H = 1, D = 128 };

/* A contiguous tensor in CPU memory with every element set to the same value. */
static flash_kda_tensor filled(flash_kda_dtype dtype, float value, int ndim, const int64_t *shape)
{
    flash_kda_tensor x = {.dtype = dtype, .ndim = ndim};
    int64_t count = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        x.shape[i] = shape[i];
        x.stride[i] = count;
        count *= shape[i];
    }
    x.data = aligned_alloc(64, ((size_t)count * 4 + 63) / 64 * 64);
    if (!x.data) exit(1);
    for (int64_t i = 0; i < count; i++) {
        union {
            float f;
            uint32_t bits;
        } u = {value};
        if (dtype == FLASH_KDA_BF16)
            ((uint16_t *)x.data)[i] = (uint16_t)(u.bits >> 16); /* bf16 is the upper half of an fp32 */
        else
            ((float *)x.data)[i] = value;
    }
    return x;
}

int main(void)
{
    const int64_t tokens[] = {1, T, H, D}; /* beta takes the first three */
    const int64_t head[] = {H, D};         /* A_log takes the first */
    flash_kda_fwd_params p = {
        .struct_size = sizeof p,
        .device = {FLASH_KDA_CPU, 0},
        .q = filled(FLASH_KDA_BF16, 1, 4, tokens),
        .k = filled(FLASH_KDA_BF16, 1, 4, tokens),
        .v = filled(FLASH_KDA_BF16, 1, 4, tokens),
        .g = filled(FLASH_KDA_BF16, 0, 4, tokens),
        .beta =
            filled(FLASH_KDA_BF16, 0, 3, tokens), /* sigmoid(0): each token writes half of what is missing */
        .out = filled(FLASH_KDA_BF16, 0, 4, tokens),
        .A_log = filled(FLASH_KDA_F32, 0, 1, head),
        .dt_bias = filled(FLASH_KDA_F32, 0, 2, head),
        .scale = 1,
        .lower_bound = 0, /* no decay */
    };
    flash_kda_status status = flash_kda_fwd_workspace_size(&p, &p.workspace_size);
    if (status == FLASH_KDA_OK && p.workspace_size > 0)
        p.workspace = aligned_alloc(64, (p.workspace_size + 63) / 64 * 64);
    if (status == FLASH_KDA_OK) status = flash_kda_fwd(&p);
    if (status != FLASH_KDA_OK) {
        fprintf(stderr, "%s: %s\n", flash_kda_status_string(status), flash_kda_last_error());
        return 1;
    }
    float last = 0;
    for (int t = 0; t < T; t += t < 4 ? 1 : 20) {
        union {
            uint32_t bits;
            float f;
        } u = {(uint32_t)((uint16_t *)p.out.data)[(int64_t)t * H * D] << 16};
        last = u.f;
        printf("token %2d reads %.4f\n", t, last);
    }
    free(p.workspace);
    void *memory[] = {p.q.data,    p.k.data,   p.v.data,     p.g.data,
                      p.beta.data, p.out.data, p.A_log.data, p.dt_bias.data};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    return last > 0.99F && last < 1.01F ? 0 : 1;
}
