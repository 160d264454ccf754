/* Checks the numbers in cu_seqlens, state_indices, num_accepted_tokens, parents and accepted, for a call of
 * decode or apply on the CPU. On a GPU the host cannot look at them without waiting, and the kernels hold
 * them inside of their ranges. */
#include "check_decode.h"
#include "check_shared.h"

/* That a tensor has a column for each token of every sequence. */
static flash_kda_status check_columns(const fkda_decode_problem *p, int64_t columns, const char *name,
                                      const char *letter)
{
    for (int64_t n = 0; n < p->sequences; n++) {
        const fkda_sequence sequence = fkda_decode_sequence_at(p, n);
        const int64_t length = sequence.end - sequence.begin;
        if (length > columns)
            return INVALID("%s has %s = %lld and sequence %lld has %lld tokens; %s must be at least the "
                           "longest sequence",
                           name, letter, (long long)columns, (long long)n, (long long)length, letter);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_slot(const fkda_index_view *indices, int64_t n, int64_t columns, int64_t column,
                                   int64_t first_slot, const fkda_state_view *state)
{
    const int64_t slot = fkda_index_at(indices, n * columns + column);
    if (slot < first_slot || slot < state->slots) return FLASH_KDA_OK;
    return INVALID("state_indices[%lld, %lld] is %lld; it must be less than %lld, the slots of state",
                   (long long)n, (long long)column, (long long)slot, (long long)state->slots);
}

/* state_indices [N] */
static flash_kda_status check_slots(const fkda_index_view *indices, int64_t sequences, int64_t first_slot,
                                    const fkda_state_view *state)
{
    for (int64_t n = 0; n < sequences; n++) {
        const int64_t slot = fkda_index_at(indices, n);
        if (slot >= first_slot && slot >= state->slots)
            return INVALID("state_indices[%lld] is %lld; it must be less than %lld, the slots of state",
                           (long long)n, (long long)slot, (long long)state->slots);
    }
    return FLASH_KDA_OK;
}

/* That a slot of written_indices lies in written_states. */
static flash_kda_status check_written_slot(const fkda_decode_problem *p, int64_t n, int64_t i)
{
    const int64_t slot = fkda_index_at(&p->written_indices, n * p->written_columns + i);
    if (slot < p->written.slots) return FLASH_KDA_OK;
    if (p->write_states == FLASH_KDA_WRITE_EACH)
        return INVALID(
            "written_indices[%lld, %lld] is %lld; it must be less than %lld, the slots of written_states",
            (long long)n, (long long)i, (long long)slot, (long long)p->written.slots);
    return INVALID("written_indices[%lld] is %lld; it must be less than %lld, the slots of written_states",
                   (long long)n, (long long)slot, (long long)p->written.slots);
}

static flash_kda_status check_written_slots(const fkda_decode_problem *p)
{
    const bool each = p->write_states == FLASH_KDA_WRITE_EACH;
    for (int64_t n = 0; n < p->sequences; n++) {
        const fkda_sequence sequence = fkda_decode_sequence_at(p, n);
        const int64_t count = each ? sequence.end - sequence.begin : 1;
        for (int64_t i = 0; i < count; i++) TRY(check_written_slot(p, n, i));
    }
    return FLASH_KDA_OK;
}

/* state_indices [N, S]: the slot that a sequence starts from, and one for each token. */
static flash_kda_status check_each_slot(const fkda_decode_problem *p)
{
    for (int64_t n = 0; n < p->sequences; n++) {
        const fkda_sequence sequence = fkda_decode_sequence_at(p, n);
        int64_t start = 1;
        if (p->num_accepted_tokens.data) start = fkda_index_at(&p->num_accepted_tokens, n);
        if (start < 1 || start > p->slot_columns)
            return INVALID("num_accepted_tokens[%lld] is %lld; it must be in [1, S] = [1, %lld]",
                           (long long)n, (long long)start, (long long)p->slot_columns);
        TRY(check_slot(&p->state_indices, n, p->slot_columns, start - 1, p->first_slot, &p->state));
        for (int64_t i = 0; i < sequence.end - sequence.begin; i++)
            TRY(check_slot(&p->state_indices, n, p->slot_columns, i, p->first_slot, &p->state));
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_parents(const fkda_decode_problem *p)
{
    for (int64_t n = 0; n < p->sequences; n++) {
        const fkda_sequence sequence = fkda_decode_sequence_at(p, n);
        for (int64_t i = 0; i < sequence.end - sequence.begin; i++) {
            const int64_t parent = fkda_index_at(&p->parents, n * p->parent_columns + i);
            if (parent >= i)
                return INVALID("parents[%lld, %lld] is %lld; it must be less than %lld, or negative for the "
                               "state that the sequence starts from",
                               (long long)n, (long long)i, (long long)parent, (long long)i);
        }
    }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_decode_indices(const fkda_decode_problem *p)
{
    const bool each = p->write_states == FLASH_KDA_WRITE_EACH,
               has_written_indices = p->has_written_states && p->written_indices.data;
    if (p->cu_seqlens.data) {
        TRY(fkda_check_borders(&p->cu_seqlens, p->sequences, p->tokens, "total",
                               FLASH_KDA_MAX_DECODE_TOKENS));
        if (p->records) TRY(check_columns(p, p->record_columns, "records", "R"));
        if (p->parents.data) TRY(check_columns(p, p->parent_columns, "parents", "P"));
        if (each && !p->has_written_states) TRY(check_columns(p, p->slot_columns, "state_indices", "S"));
        if (each && has_written_indices) TRY(check_columns(p, p->written_columns, "written_indices", "W"));
    }
    if (p->parents.data) TRY(check_parents(p));
    if (has_written_indices) TRY(check_written_slots(p));
    if (each && !p->has_written_states) return check_each_slot(p);
    if (p->past_records) {
        const fkda_apply_problem past = fkda_past_of(p);
        return fkda_check_apply_indices(&past);
    }
    return p->state_indices.data ? check_slots(&p->state_indices, p->sequences, p->first_slot, &p->state)
                                 : FLASH_KDA_OK;
}

static flash_kda_status check_accepted(const fkda_apply_problem *p, int64_t n, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        const int64_t token = fkda_index_at(&p->accepted, n * p->accepted_columns + i);
        if (token < 0 || token >= p->record_columns)
            return INVALID("accepted[%lld, %lld] is %lld; it must be in [0, R) = [0, %lld)", (long long)n,
                           (long long)i, (long long)token, (long long)p->record_columns);
    }
    return FLASH_KDA_OK;
}

flash_kda_status fkda_check_apply_indices(const fkda_apply_problem *p)
{
    int64_t most = p->record_columns;
    if (p->accepted.data && most > p->accepted_columns) most = p->accepted_columns;
    if (most > FLASH_KDA_MAX_DECODE_TOKENS) most = FLASH_KDA_MAX_DECODE_TOKENS;
    for (int64_t n = 0; n < p->sequences; n++) {
        const int64_t count = fkda_index_at(&p->num_accepted_tokens, n);
        if (count < 0 || count > most)
            return INVALID("num_accepted_tokens[%lld] is %lld; it must be in [0, %lld], where the last is "
                           "the least of %s and 16",
                           (long long)n, (long long)count, (long long)most, p->accepted.data ? "R, A" : "R");
        if (p->accepted.data) TRY(check_accepted(p, n, count));
    }
    return p->state_indices.data ? check_slots(&p->state_indices, p->sequences, p->first_slot, &p->state)
                                 : FLASH_KDA_OK;
}
