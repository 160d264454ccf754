/* Counts values that are not finite, in the memory of the CPU. Tensors are divided into pieces, which threads
 * take as they take heads in the forward pass. */
#include "../nonfinite.h"

#include "../errors.h"
#include "cpu.h"

/* Elements of a piece. A thread looks at a piece in about 10 us, so that an interrupted call ends soon. */
enum { PIECE = 1 << 16 };

/* A thread that is started for fewer pieces would take longer to start than to work. */
enum { MIN_PIECES_PER_THREAD = 8 };

static const int64_t NONE = -1;

typedef struct job {
    const fkda_problem *problem;
    int count; /* of tensors */
    fkda_counted_tensor tensors[FLASH_KDA_CHECKED_TENSORS];
    int64_t first_piece[FLASH_KDA_CHECKED_TENSORS + 1];   /* of each tensor, and of one behind the last */
    flash_kda_nonfinite found[FLASH_KDA_CHECKED_TENSORS]; /* atomic, since threads share a tensor */
} job;

/* A value is NaN or an infinity if all bits of its exponent are set. Comparing bits raises no floating-point
 * exception, as comparing a signalling NaN would. */
static bool bf16_is_nonfinite(uint16_t bits)
{
    return (bits & 0x7f80) == 0x7f80;
}

static bool f32_is_nonfinite(uint32_t bits)
{
    return (bits & 0x7f800000) == 0x7f800000;
}

/* COUNT_IN(is_nonfinite, values, count): both loops of a piece. The first one, without a branch, becomes
 * vector instructions; the second one runs in pieces that have such a value. */
#define COUNT_IN(is_nonfinite, values, count)                                                                \
    do {                                                                                                     \
        uint32_t n = 0;                                                                                      \
        int64_t first = 0;                                                                                   \
        for (int64_t i = 0; i < (count); i++) n += is_nonfinite((values)[i]);                                \
        if (!n) return (flash_kda_nonfinite){0, NONE};                                                       \
        while (!is_nonfinite((values)[first])) first++;                                                      \
        return (flash_kda_nonfinite){n, first};                                                              \
    } while (0)

static flash_kda_nonfinite count_bf16(const uint16_t *values, int64_t count)
{
    COUNT_IN(bf16_is_nonfinite, values, count);
}

static flash_kda_nonfinite count_f32(const uint32_t *values, int64_t count)
{
    COUNT_IN(f32_is_nonfinite, values, count);
}

static void add(flash_kda_nonfinite *to, int64_t count, int64_t first)
{
    __atomic_fetch_add(&to->count, count, __ATOMIC_RELAXED);
    int64_t before = __atomic_load_n(&to->first, __ATOMIC_RELAXED);
    while ((before == NONE || first < before) &&
           !__atomic_compare_exchange_n(&to->first, &before, first, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        continue;
}

/* Where a run begins, in elements behind the data, and the index of its first element. */
typedef struct run {
    int64_t offset, index; /* index NONE: no such memory belongs to the call */
} run;

static run find_run(const fkda_problem *p, const fkda_counted_tensor *t, int64_t r)
{
    if (t->pool) {
        const int64_t slot = fkda_slot_of(p, t->pool, r);
        if (slot == FKDA_NO_SLOT) return (run){0, NONE};
        return (run){fkda_state_offset(t->pool, slot, 0), slot * t->run};
    }
    const int64_t k = r % t->sizes[1], j = r / t->sizes[1] % t->sizes[0], i = r / t->sizes[1] / t->sizes[0];
    return (run){i * t->strides[0] + j * t->strides[1] + k * t->strides[2], r * t->run};
}

/* Counts `count` neighbours from an element of a tensor on. */
static flash_kda_nonfinite count_neighbours(const fkda_counted_tensor *t, int64_t offset, int64_t count)
{
    return t->is_bf16 ? count_bf16((const uint16_t *)t->data + offset, count)
                      : count_f32((const uint32_t *)t->data + offset, count);
}

static bool count_piece(void *context, int64_t index, int worker)
{
    (void)worker;
    job *j = context;
    int n = 0;
    if (fkda_interrupted(j->problem)) return false;
    while (index >= j->first_piece[n + 1]) n++;
    const fkda_counted_tensor *t = &j->tensors[n];
    int64_t at = (index - j->first_piece[n]) * PIECE;
    const int64_t end = fkda_clamp(at + PIECE, 0, t->elements);
    while (at < end) {
        const int64_t inside = at % t->run, left = t->run - inside, count = left < end - at ? left : end - at;
        const run r = find_run(j->problem, t, at / t->run);
        at += count;
        if (r.index == NONE) continue;
        const flash_kda_nonfinite found = count_neighbours(t, r.offset + inside, count);
        if (found.count) add(&j->found[n], found.count, r.index + inside + found.first);
    }
    return true;
}

flash_kda_status fkda_cpu_count_nonfinite(const fkda_problem *p, fkda_counted counted)
{
    job j = {.problem = p};
    j.count = fkda_counted_tensors(p, counted, j.tensors);
    for (int t = 0; t < j.count; t++) {
        j.first_piece[t + 1] = j.first_piece[t] + (j.tensors[t].elements + PIECE - 1) / PIECE;
        j.found[t].first = NONE;
    }
    const int64_t pieces = j.first_piece[j.count], useful = pieces / MIN_PIECES_PER_THREAD;
    const int threads = useful < p->shape.threads ? (int)useful : p->shape.threads;
    if (!fkda_parallel_for(threads, pieces, count_piece, &j)) return fkda_interruption();
    for (int t = 0; t < j.count; t++) *j.tensors[t].record = j.found[t];
    return FLASH_KDA_OK;
}
