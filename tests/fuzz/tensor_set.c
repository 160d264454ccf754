#include "tensor_set.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void mutate_tensor(tensor_set *set, input *from)
{
    const int which = (int)take_between(from, 0, set->count - 1);
    flash_kda_tensor *t = set->tensors[which];
    const uint32_t bits = (uint32_t)take(from, 4);
    switch (take_between(from, 0, 8)) {
    case 0: t->dtype = (int32_t)take_between(from, -1, 9); break;
    case 1: t->ndim = (int32_t)take_between(from, -1, 6); break;
    case 2: t->ndim = (int32_t)bits; break;
    case 3: t->shape[bits % 4] = take_hostile(from); break;
    case 4: t->stride[bits % 4] = take_hostile(from); break;
    case 5: *t = (flash_kda_tensor){0}; break;
    case 6: *t = *set->tensors[bits % (uint32_t)set->count]; break;
    default: set->misaligned_by[which] = bits % 16; break;
    }
}

static memory part_of(const tensor_set *set, int which)
{
    const memory all = set->memory[which];
    const size_t skip = set->misaligned_by[which];
    if (!all.bytes) return all;
    return (memory){.bytes = all.bytes + skip, .count = all.count - skip};
}

memory place(tensor_set *set, int which)
{
    flash_kda_tensor *t = set->tensors[which];
    const size_t skip = set->misaligned_by[which];
    size_t in_front, bytes = bytes_of(t, &in_front);
    if (bytes == SIZE_MAX) {
        if (!is_too_far(t)) set->unreal = true;
        bytes = in_front = 0;
    }
    set->memory[which] = allocate_memory(bytes + skip);
    memset(set->memory[which].bytes, 0, skip);
    t->data = set->memory[which].bytes + skip + in_front;
    return part_of(set, which);
}

bool share(tensor_set *set, int which, const memory *to, input *from)
{
    flash_kda_tensor *t = set->tensors[which];
    size_t in_front;
    const size_t count = bytes_of(t, &in_front);
    if (!to->bytes || to->count < count || !t->data || to == &set->memory[which]) return false;
    const size_t room = (to->count - count) / 16;
    t->data = to->bytes + 16 * (take(from, 2) % (room + 1)) + in_front;
    return true;
}

void plant_integer(tensor_set *set, int which, input *from)
{
    const memory m = part_of(set, which);
    const size_t size = dtype_size(set->tensors[which]->dtype);
    const uint64_t at = take(from, 1);
    const int64_t value = take_hostile(from);
    if (m.count >= size) memcpy(m.bytes + at % (m.count / size) * size, &value, size);
}

float plant(tensor_set *set, int which, input *from)
{
    static const float values[] = {NAN, INFINITY, -INFINITY, 0.0f, -3.0f, 8.0f};
    const float value = values[take_between(from, 0, 5)];
    const uint16_t narrow = bf16_from_float(value);
    const memory m = part_of(set, which);
    const size_t size = dtype_size(set->tensors[which]->dtype), at = (size_t)take(from, 2);
    if (m.count >= size && size <= sizeof value)
        memcpy(m.bytes + at % (m.count / size) * size, size == 4 ? (const void *)&value : &narrow, size);
    return value;
}

bool lies_in(const flash_kda_tensor *t, const memory *m)
{
    size_t in_front;
    const size_t bytes = bytes_of(t, &in_front);
    if (!m || !m->bytes) return false;
    const uintptr_t begin = (uintptr_t)t->data - in_front - (uintptr_t)m->bytes;
    return begin <= m->count && m->count - begin >= bytes;
}

bool all_are_inside(const tensor_set *set, const memory *other, const memory *another)
{
    for (int i = 0; i < set->count; i++) {
        const flash_kda_tensor *t = set->tensors[i];
        size_t in_front;
        if (!t->data || bytes_of(t, &in_front) == SIZE_MAX) continue; /* In the second case it is refused. */
        bool inside = lies_in(t, other) || lies_in(t, another);
        for (int m = 0; m < set->count && !inside; m++) inside = lies_in(t, &set->memory[m]);
        if (!inside) return false;
    }
    return true;
}

void check_apart(const tensor_set *set, uint32_t outputs)
{
    for (int m = 0; m < set->count; m++) {
        const memory *in = &set->memory[m];
        unsigned char *marks = calloc(in->count + 1, 1);
        if (!marks) wrong("no memory");
        for (int pass = 0; in->bytes && pass < 2; pass++) /* outputs, then inputs */
            for (int i = 0; i < set->count; i++)
                if ((outputs >> i & 1) == !pass && mark_bytes(set->tensors[i], in, marks, !pass))
                    wrong("a call was taken with tensor %d in memory of another one", i);
        free(marks);
    }
}

void keep_copies(tensor_set *set)
{
    for (int i = 0; i < set->count; i++) keep_copy(&set->memory[i]);
}

void forget_all(tensor_set *set)
{
    for (int i = 0; i < set->count; i++) forget(&set->memory[i]);
}
