#include "tensors.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Layouts ------------------------------------------------------------------------------------------- */

flash_kda_tensor shaped(flash_kda_dtype dtype, int ndim, const int64_t *shape)
{
    flash_kda_tensor t = {.dtype = dtype, .ndim = ndim};
    uint64_t step = 1; /* hostile sizes wrap */
    for (int i = ndim - 1; i >= 0; i--) {
        t.shape[i] = shape[i];
        t.stride[i] = (int64_t)step;
        step *= (uint64_t)shape[i];
    }
    return t;
}

flash_kda_dtype take_integer_type(input *from)
{
    return take_bool(from) ? FLASH_KDA_I32 : FLASH_KDA_I64;
}

void take_layout(flash_kda_tensor *t, input *from)
{
    const int64_t inner = t->ndim == 4 ? DIM : 1, how = take_between(from, 0, 5);
    if (how == 3) {
        t->stride[2] = inner + take_between(from, 0, 9);
        t->stride[1] = t->stride[2] * t->shape[2] + take_between(from, 0, 9);
        t->stride[0] = t->stride[1] * t->shape[1] + take_between(from, 0, 9);
    } else if (how == 4) {
        t->stride[1] = inner;
        t->stride[2] = inner * (t->shape[1] + take_between(from, 0, 1));
        t->stride[0] = t->stride[2] * t->shape[2];
    } else if (how == 5) {
        t->stride[1] = -t->stride[1];
        if (take_bool(from)) t->stride[2] = -t->stride[2];
    }
}

/* ---- Memory -------------------------------------------------------------------------------------------- */

memory allocate_memory(size_t count)
{
    memory m = {.count = count};
    void *block;
    if (posix_memalign(&block, 64, count ? count : 1) != 0) wrong("no memory");
    m.bytes = block;
    return m;
}

size_t bytes_of(const flash_kda_tensor *t, size_t *in_front)
{
    const int64_t size = (int64_t)dtype_size(t->dtype), most = MOST_BYTES;
    int64_t before = 0, after = 0;
    *in_front = 0;
    if (t->ndim < 0 || t->ndim > 4) return SIZE_MAX;
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] < 0 || t->shape[i] > most) return SIZE_MAX;
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] == 0) return 0;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 1) continue;
        if (t->stride[i] < -most || t->stride[i] > most) return SIZE_MAX;
        const int64_t over = t->stride[i] * (t->shape[i] - 1);
        if (over < 0) before -= over;
        if (over > 0) after += over;
    }
    if ((before + after + 1) * size > most) return SIZE_MAX;
    *in_front = (size_t)(before * size);
    return (size_t)((before + after + 1) * size);
}

bool is_too_far(const flash_kda_tensor *t)
{
    if (t->ndim < 0 || t->ndim > 4) return false;
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] <= 0 || t->shape[i] > 1 << 20) return false;
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] > 1 && (t->stride[i] > (int64_t)1 << 48 || t->stride[i] < -((int64_t)1 << 48)))
            return true;
    return false;
}

void fill(const memory *m, int32_t dtype, rng *numbers)
{
    enum { COUNT = 4096 };
    static uint16_t narrow[COUNT];
    static float wide[COUNT];
    if (!narrow[0]) {
        rng r = rng_seed(1);
        for (int i = 0; i < COUNT; i++) {
            wide[i] = (float)rng_uniform(&r, -2, 2);
            narrow[i] = bf16_from_float(wide[i]);
        }
    }
    const unsigned char *from = dtype_size(dtype) == 2 ? (unsigned char *)narrow : (unsigned char *)wide;
    const size_t room = dtype_size(dtype) == 2 ? sizeof narrow : sizeof wide;
    size_t skip = rng_bits(numbers) % 64 * 64;
    for (size_t done = 0, now; done < m->count; done += now, skip = 0) {
        now = m->count - done < room - skip ? m->count - done : room - skip;
        memcpy(m->bytes + done, from + skip, now);
    }
}

/* A sign of 0 leaves the signs as they are. */
static void change(const memory *m, int32_t dtype, int sign, float factor)
{
    const size_t size = dtype == FLASH_KDA_F32 ? 4 : 2;
    if (dtype != FLASH_KDA_F32 && dtype != FLASH_KDA_BF16) return;
    for (size_t at = 0; at + size <= m->count; at += size) {
        uint16_t narrow;
        float value;
        memcpy(&narrow, m->bytes + at, sizeof narrow);
        if (size == 4)
            memcpy(&value, m->bytes + at, sizeof value);
        else
            value = float_from_bf16(narrow);
        if (sign && (value < 0) != (sign < 0)) value = -value;
        value *= factor;
        narrow = bf16_from_float(value);
        memcpy(m->bytes + at, size == 4 ? (const void *)&value : &narrow, size);
    }
}

bool is_of_a_kind(int which, input_kinds kinds)
{
    switch (which) {
    case Q:
    case K: return kinds.qk_is_normalised;
    case G: return kinds.gate == FLASH_KDA_GATE_ACTIVATED;
    case BETA: return kinds.beta_kind == FLASH_KDA_BETA_ACTIVATED;
    default: return false;
    }
}

void adapt(const memory *m, int32_t dtype, int which, input_kinds kinds)
{
    if (!is_of_a_kind(which, kinds)) return;
    if (which == G)
        change(m, dtype, -1, 1.0f);
    else if (which == BETA)
        change(m, dtype, 1, 0.5f);
    else
        change(m, dtype, 0, 0.07f);
}

bool all_ordinary(const double *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (!(fabs(values[i]) < 1e37)) return false;
    return true;
}

void fill_integers(const memory *m, int32_t dtype, const int64_t *integers)
{
    const size_t size = dtype_size(dtype);
    for (size_t i = 0; size >= 4 && i < m->count / size; i++) {
        const int64_t wide = integers[i < MOST_INTEGERS ? i : MOST_INTEGERS - 1];
        const int32_t narrow = (int32_t)wide;
        memcpy(m->bytes + i * size, size == 8 ? (const void *)&wide : &narrow, size);
    }
}

int64_t integer_at(const flash_kda_tensor *t, int64_t i)
{
    return t->dtype == FLASH_KDA_I32 ? ((const int32_t *)t->data)[i] : ((const int64_t *)t->data)[i];
}

void keep_copy(memory *m)
{
    if (!m->bytes) return;
    m->before = malloc(m->count + 1);
    if (!m->before) wrong("no memory");
    memcpy(m->before, m->bytes, m->count);
}

void forget(memory *m)
{
    free(m->bytes);
    free(m->before);
}

int64_t count_of(const flash_kda_tensor *t)
{
    int64_t count = t->data ? 1 : 0;
    for (int d = 0; count && d < t->ndim; d++) count *= t->shape[d];
    return count;
}

/* ---- What a call has done ------------------------------------------------------------------------------ */

void check_sentence(const char *call)
{
    const char *sentence = flash_kda_last_error();
    if (strlen(sentence) < 10) wrong("%s was refused with the sentence \"%s\"", call, sentence);
    for (const char *at = sentence; *at; at++)
        if (iscntrl((unsigned char)*at)) wrong("a control character in: %s", sentence);
}

/* The elements from the first element of a tensor to element i, counted in the order of its indices. */
static int64_t distance(const flash_kda_tensor *t, int64_t i)
{
    int64_t at = 0;
    for (int d = t->ndim - 1; d >= 0; d--) {
        if (t->shape[d] > 1) at += i % t->shape[d] * t->stride[d];
        i /= t->shape[d];
    }
    return at;
}

/* The elements from element i on that lie one behind the other in memory, up to the end of their row, but at
 * most `left`. */
static int64_t run_from(const flash_kda_tensor *t, int64_t i, int64_t left)
{
    const int last = t->ndim - 1;
    const int64_t width = last < 0 || (t->shape[last] > 1 && t->stride[last] != 1) ? 1 : t->shape[last],
                  run = width - i % width;
    return run < left ? run : left;
}

void *copy_elements(const flash_kda_tensor *t, int64_t first, int64_t count)
{
    const int64_t size = (int64_t)dtype_size(t->dtype);
    const unsigned char *data = t->data;
    unsigned char *copy = malloc((size_t)(count * size) + 1);
    if (!copy) wrong("no memory");
    for (int64_t done = 0, run; done < count; done += run) {
        run = run_from(t, first + done, count - done);
        memcpy(copy + done * size, data + distance(t, first + done) * size, (size_t)(run * size));
    }
    return copy;
}

bool mark_bytes(const flash_kda_tensor *t, const memory *m, unsigned char *marks, bool sets)
{
    const int64_t size = (int64_t)dtype_size(t->dtype), count = count_of(t);
    const unsigned char *data = t->data;
    bool marked = false;
    if (!data || data < m->bytes || data >= m->bytes + m->count) return false;
    for (int64_t done = 0, run; done < count; done += run) {
        run = run_from(t, done, count - done);
        unsigned char *at = marks + (data - m->bytes) + distance(t, done) * size;
        marked |= memchr(at, 1, (size_t)(run * size)) != NULL;
        if (sets) memset(at, 1, (size_t)(run * size));
    }
    return marked;
}

void put_back(const flash_kda_tensor *t, const memory *m, int64_t first, int64_t count)
{
    const int64_t size = (int64_t)dtype_size(t->dtype);
    const unsigned char *data = t->data;
    if (!data || data < m->bytes || data >= m->bytes + m->count) return;
    for (int64_t done = 0, run; done < count; done += run) {
        run = run_from(t, first + done, count - done);
        const int64_t at = data - m->bytes + distance(t, first + done) * size;
        memcpy(m->bytes + at, m->before + at, (size_t)(run * size));
    }
}
