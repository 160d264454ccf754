#include "strided.h"

#include <string.h>

int64_t elements_of(const flash_kda_tensor *t)
{
    int64_t count = 1;
    for (int i = 0; i < t->ndim; i++) count *= t->shape[i];
    return count;
}

/* A walk over the elements of a tensor in the order of their indices, row by row of the last dimension. */
typedef struct walk {
    const flash_kda_tensor *t;
    int64_t index[4];
    int64_t at; /* elements from the tensor's first one to the row's first one */
    int64_t width, step;
    int64_t left; /* rows */
} walk;

static walk walk_start(const flash_kda_tensor *t)
{
    walk w = {.t = t, .width = 1, .step = 1};
    if (t->ndim) w.width = t->shape[t->ndim - 1], w.step = t->stride[t->ndim - 1];
    w.left = w.width ? elements_of(t) / w.width : 0;
    return w;
}

static void walk_on(walk *w)
{
    w->left--;
    for (int i = w->t->ndim - 2; i >= 0; i--) {
        w->at += w->t->stride[i];
        if (++w->index[i] < w->t->shape[i]) return;
        w->at -= w->index[i] * w->t->stride[i];
        w->index[i] = 0;
    }
}

void gather(const flash_kda_tensor *t, const unsigned char *strided, unsigned char *contiguous)
{
    const size_t size = dtype_size(t->dtype);
    for (walk w = walk_start(t); w.left > 0; walk_on(&w), contiguous += (size_t)w.width * size) {
        const unsigned char *row = strided + w.at * (int64_t)size;
        if (w.step == 1)
            memcpy(contiguous, row, (size_t)w.width * size);
        else
            for (int64_t i = 0; i < w.width; i++)
                memcpy(contiguous + (size_t)i * size, row + i * w.step * (int64_t)size, size);
    }
}

void scatter(const flash_kda_tensor *t, unsigned char *strided, const unsigned char *contiguous)
{
    const size_t size = dtype_size(t->dtype);
    for (walk w = walk_start(t); w.left > 0; walk_on(&w), contiguous += (size_t)w.width * size) {
        unsigned char *row = strided + w.at * (int64_t)size;
        if (w.step == 1)
            memcpy(row, contiguous, (size_t)w.width * size);
        else
            for (int64_t i = 0; i < w.width; i++)
                memcpy(row + i * w.step * (int64_t)size, contiguous + (size_t)i * size, size);
    }
}

int64_t lay_out(flash_kda_tensor *t, const int *order, const int64_t *gaps)
{
    int64_t step = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        const int d = order[i];
        t->stride[d] = step;
        step = step * t->shape[d] + gaps[i];
    }
    return step;
}
