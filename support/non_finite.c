#include "non_finite.h"

#include <math.h>
#include <stdio.h>

/* A tensor of `ndim` dimensions, in bf16 or f32. */
typedef struct input {
    const char *name;
    const uint16_t *bf16;
    const float *f32;
    int ndim;
    int64_t shape[4];
} input;

static void say_where(const input *t, int64_t element, char text[64])
{
    int64_t at[4];
    int used = 0;
    for (int i = t->ndim - 1; i >= 0; i--) {
        at[i] = element % t->shape[i];
        element /= t->shape[i];
    }
    for (int i = 0; i < t->ndim; i++)
        used += snprintf(text + used, (size_t)(64 - used), i ? ", %lld" : "[%lld", (long long)at[i]);
    snprintf(text + used, (size_t)(64 - used), "]");
}

static bool look(const input *t, non_finite *found)
{
    int64_t elements = 1;
    *found = (non_finite){.name = t->name};
    for (int i = 0; i < t->ndim; i++) elements *= t->shape[i];
    for (int64_t i = 0; i < elements; i++) {
        const float x = t->bf16 ? float_from_bf16(t->bf16[i]) : t->f32[i];
        if (!isfinite(x) && found->count++ == 0) say_where(t, i, found->first);
    }
    return found->count > 0;
}

int find_non_finite(const problem *p, non_finite found[NON_FINITE_TENSORS])
{
    const int64_t B = p->batch, T = p->tokens, H = p->heads;
    const input inputs[NON_FINITE_TENSORS] = {
        {"q", p->q, NULL, 4, {B, T, H, DIM}},       {"k", p->k, NULL, 4, {B, T, H, DIM}},
        {"v", p->v, NULL, 4, {B, T, H, DIM}},       {"g", p->g, NULL, 4, {B, T, H, DIM}},
        {"beta", p->beta, NULL, 3, {B, T, H}},      {"A_log", NULL, p->A_log, 1, {H}},
        {"dt_bias", NULL, p->dt_bias, 2, {H, DIM}},
    };
    int count = 0;
    for (int i = 0; i < NON_FINITE_TENSORS; i++) count += look(&inputs[i], &found[count]);
    return count;
}
