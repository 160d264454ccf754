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
    int tensors;
    fkda_stretch stretches[FLASH_KDA_CHECKED_TENSORS];
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

static bool count_piece(void *context, int64_t index, int worker)
{
    (void)worker;
    job *j = context;
    int t = 0;
    if (fkda_interrupted(j->problem)) return false;
    while (index >= j->first_piece[t + 1]) t++;
    const fkda_stretch *s = &j->stretches[t];
    const int64_t begin = (index - j->first_piece[t]) * PIECE,
                  count = fkda_clamp(s->elements - begin, 0, PIECE);
    const flash_kda_nonfinite found = s->is_bf16 ? count_bf16((const uint16_t *)s->data + begin, count)
                                                 : count_f32((const uint32_t *)s->data + begin, count);
    if (found.count) add(&j->found[t], found.count, begin + found.first);
    return true;
}

flash_kda_status fkda_cpu_count_nonfinite(const fkda_problem *p, fkda_counted counted)
{
    job j = {.problem = p};
    j.tensors = fkda_counted_stretches(p, counted, j.stretches);
    for (int t = 0; t < j.tensors; t++) {
        j.first_piece[t + 1] = j.first_piece[t] + (j.stretches[t].elements + PIECE - 1) / PIECE;
        j.found[t].first = NONE;
    }
    const int64_t pieces = j.first_piece[j.tensors], useful = pieces / MIN_PIECES_PER_THREAD;
    const int threads = useful < p->shape.threads ? (int)useful : p->shape.threads;
    if (!fkda_parallel_for(threads, pieces, count_piece, &j)) return fkda_interruption();
    for (int t = 0; t < j.tensors; t++) *j.stretches[t].record = j.found[t];
    return FLASH_KDA_OK;
}
