/* What a piece of a sequence does to the state of one head that enters it: its affine map. Part of head.h,
 * which has the formulas.
 *
 * Algorithm
 *
 * Column j of the map is the state, of one value channel, that the recurrence makes of the j-th unit vector
 * if v is zeros. So the map is a second state beside the piece's own one: it begins as the identity, and
 * every chunk reads and updates it with the same keys, gates and write strengths, and with zeros for values.
 * A chunk is prepared once for both. No number is divided by a decay, so a map is as exact as a state,
 * whatever the gates.
 *
 * Nothing is written into a map but what was read from it. So its fast channels stay as small as their decays
 * make them, while those of a state are refilled by values, beside which an error of 2^-24 of what was
 * forgotten is lost. A map therefore needs the decay of a fast channel itself, where the forward pass with
 * bounded gates takes the decay less 1.
 */
#ifndef FKDA_CPU_MAP_H
#define FKDA_CPU_MAP_H

#include "backward.h"

/* The memory of a worker. The scratch has the piece's own state. */
typedef struct map_scratch {
    scratch s;
    float map[K / STRIP][K][STRIP];
} map_scratch;

/* What a chunk does to columns `first` to `last` - 1 of a state. */
static inline void pass_columns(scratch *s, const tokens *t, strips state, int first, int last)
{
    for (int v = first; v < last; v += STRIP) {
        float(*columns)[STRIP] = state[v / STRIP];
        multiply_state(s->kq, columns, s->read[0], STRIP, CHUNK);
        solve(s, t, v);
        fade_fast_channels(s, columns);
        update_state(s, columns);
    }
}

static void load_identity(strips map)
{
    memset(map, 0, sizeof(float[K / STRIP][K][STRIP]));
    for (int k = 0; k < K; k++) map[k / STRIP][k][k % STRIP] = 1.0f;
}

static bool run_map(const fkda_map_problem *problem, int64_t n, int64_t h, int first, int last, void *memory)
{
    static const uint16_t zeros[V];
    const fkda_problem *p = &problem->fwd;
    map_scratch *m = memory;
    scratch *s = &m->s;
    /* The columns of the state, and those of the map. */
    const int state_first = first < V ? first : V, state_last = last < V ? last : V,
              map_first = first > V ? first - V : 0, map_last = last > V ? last - V : 0;
    const gate_constants gate = gate_of_head(p, h);
    const fkda_sequence sequence = fkda_sequence_at(p, n);
    load_state(p, &p->initial_state, fkda_slot_of(p, &p->initial_state, n), h, state_first, state_last,
               s->state);
    load_identity(m->map);
    load_bias(p, h, s);
    for (int64_t token = sequence.begin; token < sequence.end; token += CHUNK) {
        if (fkda_interrupted(p)) return false;
        tokens t = tokens_at(p, h, &sequence, token);
        if (t.count < CHUNK) t = pad(s, &t);
        prepare(s, p, &t, &gate);
        if (p->gate == FLASH_KDA_GATE_BOUNDED) find_factors(s, &gate);
        pass_columns(s, &t, s->state, state_first, state_last);
        t.v = (rows){zeros, 0};
        pass_columns(s, &t, m->map, map_first, map_last);
    }
    store_state(p, &p->final_state, fkda_slot_of(p, &p->final_state, n), h, state_first, state_last,
                s->state);
    store_state(p, &problem->map, fkda_bwd_slot(&problem->map, n), h, map_first, map_last, m->map);
    return true;
}

#endif
