/* The tensors that the option "nonfinite" looks at, as stretches of memory. */
#include "nonfinite.h"

int fkda_counted_stretches(const fkda_problem *p, fkda_counted counted,
                           fkda_stretch stretches[FLASH_KDA_CHECKED_TENSORS])
{
    enum { INPUTS = FLASH_KDA_CHECKED_OUT, OUTPUTS = FLASH_KDA_CHECKED_TENSORS - INPUTS };
    const fkda_shape *s = &p->shape;
    const int64_t rows = s->batch * s->tokens * s->heads, states = s->sequences * s->heads;
    const fkda_stretch all[FLASH_KDA_CHECKED_TENSORS] = {
        [FLASH_KDA_CHECKED_Q] = {p->q.data, rows * FKDA_DIM, true, NULL},
        [FLASH_KDA_CHECKED_K] = {p->k.data, rows * FKDA_DIM, true, NULL},
        [FLASH_KDA_CHECKED_V] = {p->v.data, rows * FKDA_DIM, true, NULL},
        [FLASH_KDA_CHECKED_G] = {p->g.data, rows * FKDA_DIM, true, NULL},
        [FLASH_KDA_CHECKED_BETA] = {p->beta.data, rows, true, NULL},
        [FLASH_KDA_CHECKED_A_LOG] = {p->A_log, s->heads, false, NULL},
        [FLASH_KDA_CHECKED_DT_BIAS] = {p->dt_bias, s->heads * FKDA_DIM, false, NULL},
        [FLASH_KDA_CHECKED_INITIAL_STATE] = {p->initial_state.data, states * FKDA_DIM * FKDA_DIM,
                                             p->initial_state.dtype == FLASH_KDA_BF16, NULL},
        [FLASH_KDA_CHECKED_OUT] = {p->out.data, rows * FKDA_DIM, true, NULL},
        [FLASH_KDA_CHECKED_FINAL_STATE] = {p->final_state.data, states * FKDA_DIM * FKDA_DIM,
                                           p->final_state.dtype == FLASH_KDA_BF16, NULL},
    };
    const int first = counted == FKDA_INPUTS ? 0 : INPUTS, count = counted == FKDA_INPUTS ? INPUTS : OUTPUTS;
    for (int i = 0; i < count; i++) {
        stretches[i] = all[first + i];
        stretches[i].record = &p->nonfinite[first + i];
        if (!stretches[i].data) stretches[i].elements = 0;
    }
    return count;
}
