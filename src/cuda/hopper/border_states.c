#include "border_states.h"

#include "../../../kernels/hopper/bwd/chunks/chunk_args.h"
#include "costs.h"
#include "stretches.h"

enum { STATE_FLOATS = FKDA_DIM * FKDA_DIM };

fkda_border_states fkda_border_states_in(void *memory, const fkda_shape *s, int64_t every)
{
    return (fkda_border_states){.rows = {.data = memory,
                                         .slots = s->sequences * (s->tokens / every),
                                         .slot_stride = s->heads * STATE_FLOATS,
                                         .head_stride = STATE_FLOATS,
                                         .heads = s->heads,
                                         .dtype = FLASH_KDA_F32},
                                .every = every,
                                .of_sequence = s->tokens / every};
}

fkda_state_view fkda_border_state(const fkda_border_states *states, int64_t offset)
{
    fkda_state_view found = states->rows;
    found.data = (float *)found.data + (offset / states->every - 1) * found.slot_stride;
    found.slots /= states->of_sequence;
    found.slot_stride *= states->of_sequence;
    return found;
}

fkda_problem fkda_with_border_states(const fkda_problem *problem, const fkda_border_states *states)
{
    fkda_problem p = *problem;
    p.shape.features |= FKDA_CHECKPOINTS;
    p.checkpoints = (fkda_checkpoints){.wanted = true, .states = states->rows, .every = states->every};
    return p;
}

int64_t fkda_hopper_saved_interval(const fkda_shape *s)
{
    enum {
        SHORTEST = 512,
        CTAS = 2 * 132, /* of the kernel for chunks, at the same time on an H100 or H200 */
        CHUNK = FKDA_HOPPER_BWD_CHUNK,
        /* Bytes of a token: of both its images in each value head, and half of those of a row in bf16. */
        IMAGES = 2 * FKDA_HOPPER_BORDER_IMAGE / CHUNK,
        HALF_A_ROW = FKDA_DIM,
    };
    if (!fkda_can_be_stretched(s) || s->features & FKDA_CHECKPOINTS) return 0;
    /* The images of T / count tokens take less than half of the bytes of the inputs of T tokens. */
    const int64_t m = s->heads / s->qk_heads, count = IMAGES * m / (HALF_A_ROW * 2 * (m + 1)) + 1;
    const fkda_stretches stretches = fkda_fill_gpu(s, fkda_make_stretches(s, count, CHUNK), CTAS);
    const int64_t interval = fkda_most(stretches.tokens, SHORTEST);
    return interval <= s->tokens ? interval : 0;
}

size_t fkda_hopper_saved_bytes(const fkda_shape *s)
{
    const int64_t interval = fkda_hopper_saved_interval(s);
    const int64_t states = interval ? s->sequences * (s->tokens / interval) * s->heads : 0;
    return (size_t)states * STATE_FLOATS * sizeof(float);
}
