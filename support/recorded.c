#define _POSIX_C_SOURCE 200809L
#include "recorded.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "safetensors.h"

bool recorded_find(const char *file, char path[1024])
{
    static const char *const places[] = {"/data", "/../data", "/../share/flash_kda"};
    char folder[900] = "";
    snprintf(path, 1024, "data/%s", file);
    if (access(path, R_OK) == 0) return true;
    ssize_t length = readlink("/proc/self/exe", folder, sizeof folder - 1);
    if (length <= 0) return false;
    folder[length] = 0;
    *strrchr(folder, '/') = 0;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        snprintf(path, 1024, "%s%s/%s", folder, places[i], file);
        if (access(path, R_OK) == 0) return true;
    }
    return false;
}

/* "[1, 8, 2, 128]" */
static const char *shape_text(const flash_kda_tensor *t, char text[96])
{
    int used = snprintf(text, 96, "[");
    for (int i = 0; i < t->ndim; i++)
        used += snprintf(text + used, (size_t)(96 - used), i ? ", %lld" : "%lld", (long long)t->shape[i]);
    snprintf(text + used, (size_t)(96 - used), "]");
    return text;
}

/* Copies a tensor of `elements` elements, whose shape in the file may be another one of as many elements. */
static bool take(const safetensors *file, const char *name, flash_kda_dtype dtype, int64_t elements, void *to,
                 char why[256])
{
    char shape[96];
    flash_kda_tensor t = safetensors_get(file, name, why);
    if (!t.data) return false;
    if (t.dtype != (int32_t)dtype) {
        snprintf(why, 256, "%s has dtype %s; it must be %s", name, safetensors_dtype(t.dtype),
                 safetensors_dtype((int32_t)dtype));
        return false;
    }
    int64_t count = 1;
    for (int i = 0; i < t.ndim; i++) count *= t.shape[i];
    if (count != elements) {
        snprintf(why, 256, "%s has shape %s, %lld numbers; beside q it must have %lld", name,
                 shape_text(&t, shape), (long long)count, (long long)elements);
        return false;
    }
    memcpy(to, t.data, (size_t)count * dtype_size(t.dtype));
    return true;
}

problem *recorded_load(const char *path, char why[256])
{
    safetensors *file = safetensors_open(path, why);
    if (!file) return NULL;
    char shape[96];
    flash_kda_tensor q = safetensors_get(file, "q", why);
    /* Without tokens the file's size would not bound B and H. */
    const bool fits = q.data && q.ndim == 4 && q.shape[3] == DIM && q.shape[0] && q.shape[1] && q.shape[2];
    if (q.data && !fits)
        snprintf(why, 256, "q has shape %s; it must be [B, T, H, 128], and not empty", shape_text(&q, shape));
    if (!fits) {
        safetensors_close(file);
        return NULL;
    }
    problem *p = problem_create(q.shape[0], q.shape[1], q.shape[2]);
    int64_t rows = problem_rows(p), channels = rows * DIM;
    bool good = take(file, "q", FLASH_KDA_BF16, channels, p->q, why) &&
                take(file, "k", FLASH_KDA_BF16, channels, p->k, why) &&
                take(file, "v", FLASH_KDA_BF16, channels, p->v, why) &&
                take(file, "g", FLASH_KDA_BF16, channels, p->g, why) &&
                take(file, "beta", FLASH_KDA_BF16, rows, p->beta, why) &&
                take(file, "A_log", FLASH_KDA_F32, p->heads, p->A_log, why) &&
                take(file, "dt_bias", FLASH_KDA_F32, p->heads * DIM, p->dt_bias, why);
    safetensors_close(file);
    if (good) return p;
    problem_free(p);
    return NULL;
}
