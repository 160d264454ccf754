#include "records.h"

#include <math.h>
#include <stdlib.h>

static const call_tensor counted[FLASH_KDA_CHECKED_TENSORS] = {
    ARG_Q, ARG_K, ARG_V, ARG_G, ARG_BETA, ARG_A_LOG, ARG_DT_BIAS, ARG_INITIAL_STATE, ARG_OUT, ARG_FINAL_STATE,
};

/* The place of an element of states [.., V, K] in states [.., K, V]. */
static int64_t transposed(int64_t i)
{
    const int64_t size = DIM * DIM, inside = i % size;
    return i - inside + inside % DIM * DIM + inside / DIM;
}

/* Adds elements first to first + count - 1 of a tensor. */
static void add_values(flash_kda_nonfinite *record, const flash_kda_tensor *t, const void *values,
                       int64_t first, int64_t count, bool k_first)
{
    for (int64_t i = first; i < first + count; i++) {
        const int64_t at = k_first ? transposed(i) : i;
        const float value = t->dtype == FLASH_KDA_BF16 ? float_from_bf16(((const uint16_t *)values)[i])
                                                       : ((const float *)values)[i];
        if (isfinite(value)) continue;
        record->count++;
        if (record->first < 0 || at < record->first) record->first = at;
    }
}

/* Adds the states from which sequences start, or in which they end. */
static void add_states(flash_kda_nonfinite *record, const call *c, call_tensor which, const void *states)
{
    const problem *p = c->problem;
    const flash_kda_tensor *t = &c->places[which].view;
    const int64_t of_slot = p->heads * DIM * DIM, slots = t->shape[0];
    for (int64_t n = 0; n < p->sequences; n++) {
        const int64_t slot =
            which == ARG_INITIAL_STATE ? problem_initial_slot(p, slots, n) : problem_final_slot(p, slots, n);
        if (slot >= 0) add_values(record, t, states, slot * of_slot, of_slot, c->options.k_first);
    }
}

static flash_kda_nonfinite record_of(const call *c, call_tensor which)
{
    const flash_kda_tensor *t = &c->places[which].view;
    flash_kda_nonfinite record = {0, -1};
    int64_t count = t->ndim ? 1 : 0;
    for (int i = 0; i < t->ndim; i++) count *= t->shape[i];
    if (count == 0) return record;
    void *values = call_read(c, which);
    if (which == ARG_INITIAL_STATE || which == ARG_FINAL_STATE)
        add_states(&record, c, which, values);
    else
        add_values(&record, t, values, 0, count, false);
    free(values);
    return record;
}

void records_of_inputs(const call *c, flash_kda_nonfinite inputs[FLASH_KDA_CHECKED_TENSORS])
{
    for (int i = 0; i < FLASH_KDA_CHECKED_OUT; i++) inputs[i] = record_of(c, counted[i]);
}

void check_records(const call *c, const flash_kda_nonfinite inputs[FLASH_KDA_CHECKED_TENSORS])
{
    flash_kda_nonfinite got[FLASH_KDA_CHECKED_TENSORS];
    call_read_nonfinite(c, got);
    for (int i = 0; i < FLASH_KDA_CHECKED_TENSORS; i++) {
        const flash_kda_nonfinite want = i < FLASH_KDA_CHECKED_OUT ? inputs[i] : record_of(c, counted[i]);
        CHECK(got[i].count == want.count && got[i].first == want.first,
              "nonfinite of %s is %lld, first %lld; it must be %lld, first %lld", argument_names[counted[i]],
              (long long)got[i].count, (long long)got[i].first, (long long)want.count, (long long)want.first);
    }
}
