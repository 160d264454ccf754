/* Checks the numbers in cu_seqlens, state_indices and the tensors of checkpoints, for a call on the CPU. On a
 * GPU the host cannot look at them without waiting, and the kernels leave out what is not allowed. */
#include <stdio.h>

#include "check_tensor.h"
#include "checkpoints.h"

static flash_kda_status check_cu_seqlens(const fkda_problem *p)
{
    int64_t last = fkda_border(p, 0);
    if (last != 0) return INVALID("cu_seqlens[0] is %lld; it must be 0", (long long)last);
    for (int64_t n = 1; n <= p->shape.sequences; n++) {
        const int64_t border = fkda_border(p, n);
        if (border < last)
            return INVALID("cu_seqlens[%lld] is %lld after %lld; it must not decrease", (long long)n,
                           (long long)border, (long long)last);
        last = border;
    }
    if (last != p->shape.tokens)
        return INVALID("cu_seqlens ends with %lld; its last entry must be T = %lld", (long long)last,
                       (long long)p->shape.tokens);
    return FLASH_KDA_OK;
}

static flash_kda_status check_slots(const fkda_problem *p, const fkda_state_view *states, const char *name)
{
    if (!states->data) return FLASH_KDA_OK;
    for (int64_t n = 0; n < p->shape.sequences; n++) {
        const int64_t slot = fkda_index_at(&p->state_indices, n);
        if (slot >= states->slots)
            return INVALID("state_indices[%lld] is %lld; %s has %lld slots, so it must be less", (long long)n,
                           (long long)slot, name, (long long)states->slots);
    }
    return FLASH_KDA_OK;
}

/* The name of entry i of checkpoint_offsets: "checkpoint_offsets[3, 1]". */
static const char *entry_text(const fkda_checkpoints *c, const char *tensor, int64_t i, char text[64])
{
    if (c->columns == 1)
        snprintf(text, 64, "%s[%lld]", tensor, (long long)i);
    else
        snprintf(text, 64, "%s[%lld, %lld]", tensor, (long long)(i / c->columns),
                 (long long)(i % c->columns));
    return text;
}

static flash_kda_status check_row(const fkda_checkpoints *c, int64_t row, const char *entry)
{
    if (row >= 0 && row < c->states.slots) return FLASH_KDA_OK;
    return INVALID("%s leads to row %lld; checkpoint_states has %lld rows", entry, (long long)row,
                   (long long)c->states.slots);
}

static flash_kda_status check_offsets(const fkda_problem *p)
{
    const fkda_checkpoints *c = &p->checkpoints;
    char entry[64];
    for (int64_t n = 0; n < p->shape.sequences; n++) {
        const fkda_sequence sequence = fkda_sequence_at(p, n);
        const int64_t length = sequence.end - sequence.begin;
        for (int64_t i = n * c->columns; i < (n + 1) * c->columns; i++) {
            const int64_t offset = fkda_index_at(&c->offsets, i);
            if (offset <= 0) continue;
            if (offset % FKDA_CHECKPOINT_UNIT || offset > length)
                return INVALID(
                    "%s is %lld; it must be a multiple of %d and at most the sequence's %lld tokens",
                    entry_text(c, "checkpoint_offsets", i, entry), (long long)offset, FKDA_CHECKPOINT_UNIT,
                    (long long)length);
            const char *from = c->indices.data ? "checkpoint_indices" : "checkpoint_offsets";
            TRY(check_row(c, c->indices.data ? fkda_index_at(&c->indices, i) : i,
                          entry_text(c, from, i, entry)));
        }
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_every(const fkda_problem *p)
{
    const fkda_checkpoints *c = &p->checkpoints;
    char entry[64];
    int64_t next = 0;
    for (int64_t n = 0; n < p->shape.sequences; n++) {
        const fkda_sequence sequence = fkda_sequence_at(p, n);
        const int64_t rows = (sequence.end - sequence.begin) / c->every,
                      first = c->starts.data ? fkda_index_at(&c->starts, n) : next;
        next = first + rows;
        if (!rows) continue;
        if (c->starts.data)
            snprintf(entry, sizeof entry, "checkpoint_starts[%lld]", (long long)n);
        else
            snprintf(entry, sizeof entry, "checkpoint_every = %lld", (long long)c->every);
        TRY(check_row(c, first, entry));
        TRY(check_row(c, next - 1, entry));
    }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_indices(const fkda_problem *p)
{
    if (p->cu_seqlens) TRY(check_cu_seqlens(p));
    if (p->state_indices.data) TRY(check_slots(p, &p->initial_state, "initial_state"));
    if (p->state_indices.data) TRY(check_slots(p, &p->final_state, "final_state"));
    if (!p->checkpoints.wanted) return FLASH_KDA_OK;
    return p->checkpoints.every ? check_every(p) : check_offsets(p);
}
