/* Lays out the workspace: every area begins at a multiple of 64 bytes. */
#include "workspace.h"

enum { ALIGNMENT = 64 };

static size_t align(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Takes the next `count` elements of `bytes` each, and returns where they begin. */
static size_t take(size_t *end, int64_t count, size_t bytes)
{
    const size_t begin = *end;
    *end = align(begin + (size_t)count * bytes);
    return begin;
}

int64_t fkda_hopper_handoff_flags(int sms)
{
    return (int64_t)align((size_t)sms * FKDA_HANDOFF_FLAGS * sizeof(int)) / (int64_t)sizeof(int);
}

static size_t handoff_flag_bytes(int sms)
{
    return (size_t)fkda_hopper_handoff_flags(sms) * sizeof(int);
}

static size_t handoff_bytes(int sms)
{
    return handoff_flag_bytes(sms) + (size_t)sms * FKDA_DIM * FKDA_DIM * sizeof(float);
}

fkda_handoff fkda_hopper_handoff(void *memory, int sms)
{
    return (fkda_handoff){.flags = memory, .states = (float *)((char *)memory + handoff_flag_bytes(sms))};
}

/* How many PieceStates there are: one for each CTA pair, if checkpoints may lie inside a pair's chunks. */
static int64_t count_piece_states(const fkda_shape *shape, const fkda_hopper_plan *plan)
{
    return shape->features & FKDA_CHECKPOINTS ? fkda_hopper_pairs(plan->sms) : 0;
}

fkda_hopper_memory fkda_hopper_lay_out_whole(const fkda_shape *shape, const fkda_hopper_plan *plan)
{
    size_t end = 0;
    fkda_hopper_memory m = {0};
    m.handoff = take(&end, plan->whole.divides ? 1 : 0, handoff_bytes(plan->sms));
    if (plan->whole.chunk == FKDA_HOPPER_CHUNK_PAIR)
        m.piece_states = take(&end, count_piece_states(shape, plan), FKDA_PIECE_STATE_FLOATS * sizeof(float));
    m.bytes = end;
    return m;
}

fkda_hopper_memory fkda_hopper_lay_out(const fkda_shape *shape, const fkda_hopper_plan *plan)
{
    const size_t matrices = (size_t)shape->heads * FKDA_DIM * FKDA_DIM * sizeof(float);
    const bool mixed = plan->strategy == FKDA_HOPPER_MIXED;
    size_t end = 0;
    fkda_hopper_memory m = {0};
    if (mixed || plan->strategy == FKDA_HOPPER_RELAY)
        m.relay_flags = plan->slots * shape->heads * FKDA_SLOT_FLAGS;
    if (mixed) m.mixed_handoff_flags = (int64_t)plan->sms * FKDA_HANDOFF_FLAGS;
    /* The handoff area must stay first: if the driver refuses a mixed launch, run_whole() in launch.c runs
     * instead, and its handoff area is at the workspace's beginning. */
    m.handoff = take(&end, 1, handoff_bytes(plan->sms));
    m.flags = take(&end, m.relay_flags + m.mixed_handoff_flags, sizeof(int));
    m.counts = take(&end, 1, sizeof(fkda_list_counts));
    m.inner = take(&end, plan->slots, sizeof(fkda_segment));
    m.later = take(&end, plan->slots + shape->sequences, sizeof(fkda_segment));
    m.cut_sequences = take(&end, plan->slots / 2, sizeof(fkda_cut_sequence));
    m.states = take(&end, plan->slots, matrices);
    m.maps = take(&end, plan->slots, matrices);
    m.composed = take(&end, plan->groups, matrices);
    m.piece_states = take(&end, count_piece_states(shape, plan), FKDA_PIECE_STATE_FLOATS * sizeof(float));
    m.bytes = end;
    return m;
}

fkda_cut fkda_hopper_cut(const fkda_problem *problem, const fkda_hopper_plan *plan)
{
    char *base = problem->workspace;
    const fkda_hopper_memory *m = &plan->memory;
    const fkda_shape *shape = &problem->shape;
    const bool equal = fkda_equal_lengths(shape);
    return (fkda_cut){
        .counts = (fkda_list_counts *)(base + m->counts),
        .inner = (fkda_segment *)(base + m->inner),
        .later = (fkda_segment *)(base + m->later),
        .cut_sequences = (fkda_cut_sequence *)(base + m->cut_sequences),
        .states = (float *)(base + m->states),
        .maps = (float *)(base + m->maps),
        .composed = (float *)(base + m->composed),
        .flags = (int *)(base + m->flags),
        .shortest = (int)plan->shortest,
        .in_steps = shape->batch_invariant,
        .slots = (int)plan->slots,
        .groups = (int)plan->groups,
        .equal_lengths = equal,
        .segments = equal && !shape->has_cu_seqlens ? (int)(plan->slots / shape->sequences) : 0,
        .relay = plan->relay,
    };
}
