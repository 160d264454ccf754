/* The checks of tensors that share memory. */
#include <stdlib.h>

#include "check_tensor.h"

/* Adds a dimension with a larger step than those before it, at the place of the largest. */
static void add_level(fkda_extent *e, int64_t step, int64_t count)
{
    if (step <= e->width && e->levels == 0) { /* The next stretch begins in or right behind the last one. */
        e->width += step * (count - 1);
        return;
    }
    if (e->levels && step == e->step[0] * e->count[0]) { /* The dimension continues the one before it. */
        e->count[0] *= count;
        return;
    }
    for (int i = e->levels++; i > 0; i--) e->step[i] = e->step[i - 1], e->count[i] = e->count[i - 1];
    e->step[0] = step;
    e->count[0] = count;
}

fkda_extent fkda_extent_of(const char *name, const flash_kda_tensor *t)
{
    fkda_extent e = {.name = name};
    if (!t->data || fkda_is_empty(t)) return e; /* the other fields of an absent tensor mean nothing */
    const int64_t size = (int64_t)fkda_dtype_size(t->dtype);
    if (fkda_is_contiguous(t)) { /* the common case, in less time */
        int64_t bytes = size;
        for (int i = 0; i < t->ndim; i++) bytes *= t->shape[i];
        e.begin = (uintptr_t)t->data;
        e.bytes = (size_t)bytes;
        e.width = bytes;
        return e;
    }
    int64_t before = 0, reach = 0; /* bytes in front of the first element, and to the last one in memory */
    bool done[4] = {false};
    e.width = size;
    for (int round = 0; round < t->ndim; round++) {
        int next = -1; /* the dimension with the smallest step that is left */
        for (int i = 0; i < t->ndim; i++)
            if (!done[i] && t->shape[i] > 1 && t->stride[i] != 0 &&
                (next < 0 || llabs(t->stride[i]) < llabs(t->stride[next])))
                next = i;
        if (next < 0) break;
        done[next] = true;
        const int64_t step = llabs(t->stride[next]) * size, over = step * (t->shape[next] - 1);
        if (t->stride[next] < 0) before += over;
        reach += over;
        add_level(&e, step, t->shape[next]);
    }
    e.begin = (uintptr_t)t->data - (uintptr_t)before;
    e.bytes = (size_t)(reach + size);
    return e;
}

/* The bytes between the first and the last one of what a level repeats. */
static int64_t inner_bytes(const fkda_extent *e, int level)
{
    int64_t bytes = e->width;
    for (int i = level + 1; i < e->levels; i++) bytes += e->step[i] * (e->count[i] - 1);
    return bytes;
}

/* Whether b, which begins `apart` bytes after a, shares memory with a. Only the levels from `level` on count.
 * Tensors whose steps differ count as sharing what lies between their ends. */
static bool levels_overlap(const fkda_extent *a, const fkda_extent *b, int level, int64_t apart)
{
    const int64_t all_of_a = inner_bytes(a, level - 1), all_of_b = inner_bytes(b, level - 1);
    if (apart >= all_of_a || apart <= -all_of_b) return false;
    if (level >= a->levels || level >= b->levels || a->step[level] != b->step[level]) return true;
    const int64_t step = a->step[level], inner_a = inner_bytes(a, level), inner_b = inner_bytes(b, level);
    if (inner_a > step || inner_b > step) return true;
    /* Repetition i of a can only meet the repetitions of b that begin less than a step away from it. */
    for (int64_t between = apart / step - 1; between <= apart / step + 1; between++) {
        if (between > a->count[level] - 1 || between < -(b->count[level] - 1)) continue;
        if (levels_overlap(a, b, level + 1, apart - between * step)) return true;
    }
    return false;
}

static bool overlap(const fkda_extent *a, const fkda_extent *b)
{
    /* Differences cannot wrap, and ends of stretches could: workspace_size may be any number. */
    const fkda_extent *low = a->begin < b->begin ? a : b, *high = low == a ? b : a;
    const uint64_t apart = high->begin - low->begin;
    if (!a->bytes || !b->bytes || apart >= low->bytes) return false;
    if (!a->levels || !b->levels) return true;
    return levels_overlap(low, high, 0, (int64_t)apart);
}

fkda_extent fkda_memory_extent(const char *name, const void *memory, size_t bytes)
{
    return (fkda_extent){.name = name, .begin = (uintptr_t)memory, .bytes = memory ? bytes : 0};
}

flash_kda_status fkda_check_own_memory(const fkda_extent *written, const fkda_extent *others, int count)
{
    for (int i = 0; i < count; i++)
        if (overlap(written, &others[i]))
            return INVALID("%s overlaps %s; it must have memory of its own", written->name, others[i].name);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_overlap(const flash_kda_fwd_params *p)
{
    enum { INITIAL = 13, FINAL, OUT, NONFINITE, CHECKPOINTS, WORKSPACE, SAVED, COUNT };
    fkda_extent all[COUNT] = {
        fkda_extent_of("q", &p->q),
        fkda_extent_of("k", &p->k),
        fkda_extent_of("v", &p->v),
        fkda_extent_of("g", &p->g),
        fkda_extent_of("beta", &p->beta),
        fkda_extent_of("A_log", &p->A_log),
        fkda_extent_of("dt_bias", &p->dt_bias),
        fkda_extent_of("cu_seqlens", &p->cu_seqlens),
        fkda_extent_of("state_indices", &p->state_indices),
        fkda_extent_of("has_initial_state", &p->has_initial_state),
        fkda_extent_of("checkpoint_offsets", &p->checkpoint_offsets),
        fkda_extent_of("checkpoint_indices", &p->checkpoint_indices),
        fkda_extent_of("checkpoint_starts", &p->checkpoint_starts),
        [INITIAL] = fkda_extent_of("initial_state", &p->initial_state),
        [FINAL] = fkda_extent_of("final_state", &p->final_state),
        [OUT] = fkda_extent_of("out", &p->out),
        [NONFINITE] = fkda_extent_of("nonfinite", &p->nonfinite),
        [CHECKPOINTS] = fkda_extent_of("checkpoint_states", &p->checkpoint_states),
        [WORKSPACE] = fkda_memory_extent("workspace", p->workspace, p->workspace_size),
        [SAVED] = fkda_memory_extent("saved", p->saved, p->saved_size),
    };
    const bool same_slots = p->initial_state.shape[0] < 2 || p->final_state.shape[0] < 2 ||
                            p->initial_state.stride[0] == p->final_state.stride[0];
    TRY(fkda_check_own_memory(&all[FINAL], all, INITIAL));
    const bool in_place = all[FINAL].begin == all[INITIAL].begin && same_slots;
    if (overlap(&all[FINAL], &all[INITIAL]) && !in_place)
        return INVALID("final_state overlaps initial_state in part; they must be apart, or the same memory "
                       "with the same strides");
    for (int w = OUT; w < COUNT; w++) TRY(fkda_check_own_memory(&all[w], all, w));
    return FLASH_KDA_OK;
}
