/* Checks the numbers in cu_seqlens, state_indices and the tensors of checkpoints, for a call on the CPU. On a
 * GPU the host cannot look at them without waiting, and the kernels leave out what is not allowed. */
#include <stdio.h>

#include "check_shared.h"
#include "checkpoints.h"

flash_kda_status fkda_check_borders(const fkda_index_view *cu_seqlens, int64_t sequences, int64_t tokens,
                                    const char *name_of_tokens, int64_t longest)
{
    int64_t last = fkda_index_at(cu_seqlens, 0);
    if (last != 0) return INVALID("cu_seqlens[0] is %lld; it must be 0", (long long)last);
    for (int64_t n = 1; n <= sequences; n++) {
        const int64_t border = fkda_index_at(cu_seqlens, n);
        if (border < last)
            return INVALID("cu_seqlens[%lld] is %lld after %lld; it must not decrease", (long long)n,
                           (long long)border, (long long)last);
        if (border - last > longest)
            return INVALID("cu_seqlens[%lld] is %lld after %lld; a sequence must have at most %lld tokens",
                           (long long)n, (long long)border, (long long)last, (long long)longest);
        last = border;
    }
    if (last != tokens)
        return INVALID("cu_seqlens ends with %lld; its last entry must be %s = %lld", (long long)last,
                       name_of_tokens, (long long)tokens);
    return FLASH_KDA_OK;
}

static flash_kda_status check_slots(const fkda_problem *p, const fkda_state_view *states, const char *name)
{
    if (!states->data) return FLASH_KDA_OK;
    for (int64_t n = 0; n < p->shape.sequences; n++) {
        const int64_t slot = fkda_index_at(&p->state_indices, n);
        if (slot >= p->first_slot && slot >= states->slots)
            return INVALID("state_indices[%lld] is %lld; it must be less than %lld, the slots of %s",
                           (long long)n, (long long)slot, (long long)states->slots, name);
    }
    return FLASH_KDA_OK;
}

/* The name of entry i of a tensor with one element for each offset: "checkpoint_offsets[3, 1]". */
static const char *entry_text(const fkda_checkpoints *c, const char *tensor, int64_t i, char text[96])
{
    if (c->columns == 1)
        snprintf(text, 96, "%s[%lld]", tensor, (long long)i);
    else
        snprintf(text, 96, "%s[%lld, %lld]", tensor, (long long)(i / c->columns),
                 (long long)(i % c->columns));
    return text;
}

/* The row of offset i, which asks for a checkpoint. */
static flash_kda_status check_row(const fkda_checkpoints *c, int64_t i)
{
    const int64_t row = c->indices.data ? fkda_index_at(&c->indices, i) : i, rows = c->states.slots;
    char entry[96];
    if (row >= 0 && row < rows) return FLASH_KDA_OK;
    if (c->indices.data)
        return INVALID("%s is %lld; it must be at least 0 and less than %lld, the rows of checkpoint_states",
                       entry_text(c, "checkpoint_indices", i, entry), (long long)row, (long long)rows);
    return INVALID("checkpoint_states has %lld rows; it must have row %lld for %s", (long long)rows,
                   (long long)row, entry_text(c, "checkpoint_offsets", i, entry));
}

static flash_kda_status check_offsets(const fkda_problem *p)
{
    const fkda_checkpoints *c = &p->checkpoints;
    char entry[96];
    for (int64_t n = 0; n < p->shape.sequences; n++) {
        const fkda_sequence sequence = fkda_sequence_at(p, n);
        const int64_t length = sequence.end - sequence.begin;
        for (int64_t i = n * c->columns; i < (n + 1) * c->columns; i++) {
            const int64_t offset = fkda_index_at(&c->offsets, i);
            if (offset <= 0) continue;
            if (offset % FKDA_CHECKPOINT_UNIT || offset > length)
                return INVALID("%s is %lld; it must be a multiple of %d and at most %lld, the tokens of "
                               "sequence %lld",
                               entry_text(c, "checkpoint_offsets", i, entry), (long long)offset,
                               FKDA_CHECKPOINT_UNIT, (long long)length, (long long)n);
            TRY(check_row(c, i));
        }
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_every(const fkda_problem *p)
{
    const fkda_checkpoints *c = &p->checkpoints;
    int64_t all = 0; /* checkpoints */
    for (int64_t n = 0; n < p->shape.sequences; n++) {
        const fkda_sequence sequence = fkda_sequence_at(p, n);
        const int64_t count = (sequence.end - sequence.begin) / c->every;
        all += count;
        if (!count || !c->starts.data) continue;
        const int64_t first = fkda_index_at(&c->starts, n), last = c->states.slots - count;
        if (first < 0 || first > last)
            return INVALID("checkpoint_starts[%lld] is %lld; it must leave room for %lld checkpoints among "
                           "the %lld rows of checkpoint_states",
                           (long long)n, (long long)first, (long long)count, (long long)c->states.slots);
    }
    if (!c->starts.data && all > c->states.slots)
        return INVALID("checkpoint_states has %lld rows; it must have at least %lld for all checkpoints of "
                       "checkpoint_every = %lld",
                       (long long)c->states.slots, (long long)all, (long long)c->every);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_indices(const fkda_problem *p)
{
    const fkda_index_view cu_seqlens = {p->cu_seqlens, p->cu_seqlens_is_i32};
    if (p->cu_seqlens)
        TRY(fkda_check_borders(&cu_seqlens, p->shape.sequences, p->shape.tokens, "T", INT64_MAX));
    if (p->state_indices.data) TRY(check_slots(p, &p->initial_state, "initial_state"));
    if (p->state_indices.data) TRY(check_slots(p, &p->final_state, "final_state"));
    if (!p->checkpoints.wanted) return FLASH_KDA_OK;
    return p->checkpoints.every ? check_every(p) : check_offsets(p);
}
