/* Launches kernels/hopper/segments.cu: sequences cut into segments, which are then forwarded as sequences are. */
#include <stdio.h>
#include <string.h>

#include "../../kernels/hopper/segments.h"
#include "cuda.h"
#include "division.h"

extern const unsigned char fkda_fatbin_hopper_segments[];

enum { MAPS, PLAN, COMPOSE, CHAIN, EXPAND, AT_ONCE, MIXTURE };
static fkda_module segments_module = {
    .image = fkda_fatbin_hopper_segments,
    .names = {"fkda_hopper_maps", "fkda_hopper_list", "fkda_hopper_join_compose", "fkda_hopper_join_chain",
              "fkda_hopper_join_expand", "fkda_hopper_relay", "fkda_hopper_mixed"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum { CHUNK = FKDA_HOPPER_CHUNK_PAIR };

static bool cuts(const division *d)
{
    return d->slots >= 2; /* a sequence is cut into two segments at least */
}

/* Offsets in the workspace. */
typedef struct memory {
    size_t handoff, flags, counts, inner, later, cut_sequences, states, maps, composed, size;
} memory;

/* Takes the next `bytes`, 64-byte aligned. */
static size_t take(size_t *end, int64_t count, size_t bytes)
{
    const size_t begin = *end;
    *end = (begin + (size_t)count * bytes + 63) / 64 * 64;
    return begin;
}

/* Where all segments are done in one launch, which needs a flag for each that starts from what others find. */
static int64_t flag_count(const fkda_problem *p, const division *d)
{
    return d->at_once.pairs || d->mixture.pairs ? d->slots * p->heads * FKDA_SLOT_FLAGS : 0;
}

/* And those of the borders between the workers that have the rest of a mixture, which follow. */
static int64_t border_flag_count(const division *d, int multiprocessors)
{
    return d->mixture.pairs ? (int64_t)multiprocessors * FKDA_HANDOFF_FLAGS : 0;
}

static memory lay_out_memory(const fkda_problem *p, const division *d, int multiprocessors)
{
    const size_t matrices = (size_t)p->heads * FKDA_DIM * FKDA_DIM * sizeof(float);
    size_t end = 0;
    memory m;
    m.handoff = take(&end, 1, fkda_hopper_handoff_size(multiprocessors));
    m.flags = take(&end, flag_count(p, d) + border_flag_count(d, multiprocessors), sizeof(int));
    m.counts = take(&end, 1, sizeof(fkda_list_counts));
    m.inner = take(&end, d->slots, sizeof(fkda_segment));
    m.later = take(&end, d->slots + p->sequences, sizeof(fkda_segment));
    m.cut_sequences = take(&end, d->slots / 2, sizeof(fkda_cut_sequence));
    m.states = take(&end, d->slots, matrices);
    m.maps = take(&end, d->slots, matrices);
    m.composed = take(&end, d->groups, matrices);
    m.size = end;
    return m;
}

static size_t workspace_size(const fkda_problem *p, cutting where)
{
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) return 0;
    const division d = fkda_divide(p, multiprocessors, where);
    if (cuts(&d)) return lay_out_memory(p, &d, multiprocessors).size;
    return fkda_cuda_hopper_whole_workspace_size(p);
}

static fkda_cut find_memory(const fkda_problem *p, const division *d, const memory *m)
{
    char *base = p->workspace;
    return (fkda_cut){
        .counts = (fkda_list_counts *)(base + m->counts),
        .inner = (fkda_segment *)(base + m->inner),
        .later = (fkda_segment *)(base + m->later),
        .cut_sequences = (fkda_cut_sequence *)(base + m->cut_sequences),
        .states = (float *)(base + m->states),
        .maps = (float *)(base + m->maps),
        .composed = (float *)(base + m->composed),
        .flags = (int *)(base + m->flags),
        .shortest = (int)d->shortest,
        .slots = (int)d->slots,
        .equal_lengths = fkda_sequences_are_alike(p),
        .segments = fkda_sequences_are_alike(p) && !p->cu_seqlens ? (int)(d->slots / p->sequences) : 0,
    };
}

/* Heads of what the launches work through, at most. */
typedef struct pieces {
    int64_t first, inner, later;
} pieces;

static pieces count_pieces(const fkda_problem *p, const division *d)
{
    const int64_t cut = fkda_sequences_are_alike(p) ? p->sequences : least(p->sequences, d->slots / 2);
    return (pieces){
        .first = cut * p->heads,
        .inner = (d->slots - (fkda_sequences_are_alike(p) ? 2 * cut : 2)) * p->heads,
        .later = (d->slots + p->sequences - (fkda_sequences_are_alike(p) ? 2 * cut : 2)) * p->heads,
    };
}

/* Each step of the join, with a block for each of its items if there are no more than multiprocessors. */
static flash_kda_status join(const fkda_driver *driver, const fkda_problem *p, const division *d,
                             fkda_hopper_fwd_args *args, int64_t cut_heads, int multiprocessors)
{
    const CUfunction *kernels = segments_module.functions[p->device.index];
    const bool in_groups = d->slots > FKDA_MAPS_CHAINED + 2;
    const int64_t parts = FKDA_DIM / FKDA_JOIN_ROWS, grouped = d->groups * p->heads * parts;
    const int64_t items[] = {[COMPOSE] = 2 * grouped, [CHAIN] = cut_heads * parts, [EXPAND] = grouped};
    for (int step = COMPOSE; step <= EXPAND; step++) {
        if (step != CHAIN && !in_groups) continue;
        flash_kda_status status =
            fkda_hopper_launch(driver, p, args, kernels[step], (int)least(items[step], multiprocessors),
                               FKDA_JOIN_CTA_THREADS, true);
        if (status != FLASH_KDA_OK) return status;
    }
    return FLASH_KDA_OK;
}

/* One launch for all. False if the driver does not let it, say since the process may use only a part of the device. */
static bool run_at_once(const fkda_driver *driver, const fkda_problem *p, const division *d,
                        const fkda_hopper_fwd_args *several)
{
    fkda_hopper_fwd_args args = *several;
    const at_once *plan = &d->at_once;
    args.cut.relay = plan->plan;
    return driver->cuMemsetD32Async((CUdeviceptr)args.cut.flags, 0, (size_t)flag_count(p, d), p->stream) ==
               0 &&
           fkda_hopper_launch_together(driver, p, &args, segments_module.functions[p->device.index][AT_ONCE],
                                       FKDA_HOPPER_PAIR_CTAS * (int)plan->pairs);
}

/* One launch for sequences of different lengths. False as above. */
static bool run_mixture(const fkda_driver *driver, const fkda_problem *p, const division *d, const memory *m,
                        const fkda_hopper_fwd_args *several, int multiprocessors)
{
    fkda_hopper_mixed_args args = {.pair = *several, .mixed = d->mixture};
    const int64_t flags = flag_count(p, d);
    args.pair.handoff = fkda_hopper_handoff((char *)p->workspace + m->handoff, multiprocessors);
    args.pair.handoff.flags = args.pair.cut.flags + flags;
    if (fkda_hopper_arguments(driver, p, &args.solo, FKDA_HOPPER_CHUNK_SOLO) != FLASH_KDA_OK) return false;
    args.solo.cut = args.pair.cut, args.solo.handoff = args.pair.handoff;
    return driver->cuMemsetD32Async((CUdeviceptr)args.pair.cut.flags, 0,
                                    (size_t)(flags + border_flag_count(d, multiprocessors)),
                                    p->stream) == 0 &&
           fkda_hopper_launch_together(driver, p, &args, segments_module.functions[p->device.index][MIXTURE],
                                       FKDA_HOPPER_PAIR_CTAS * d->mixture.pairs);
}

/* All but the first may start early: the maps run beside the first segments, and the others have their code and inputs when what they
 * wait for is over. Each is over only after the one before, so that what an earlier one left is there too. */
static flash_kda_status run(const fkda_driver *driver, const fkda_problem *p, const division *d,
                            int multiprocessors)
{
    fkda_hopper_fwd_args args;
    const CUfunction *kernels = segments_module.functions[p->device.index];
    const pieces count = count_pieces(p, d);
    const memory m = lay_out_memory(p, d, multiprocessors);
    flash_kda_status status = fkda_hopper_arguments(driver, p, &args, CHUNK);
    if (status != FLASH_KDA_OK) return status;
    args.cut = find_memory(p, d, &m);
    if (d->at_once.pairs && run_at_once(driver, p, d, &args)) return FLASH_KDA_OK;
    if (d->mixture.pairs)
        return run_mixture(driver, p, d, &m, &args, multiprocessors) ? FLASH_KDA_OK
                                                                     : fkda_cuda_hopper_whole_fwd(p);
    if (!args.cut.equal_lengths)
        status = fkda_hopper_launch(driver, p, &args, kernels[PLAN], 1, FKDA_LIST_THREADS, false);
    args.work = FKDA_FIRST_SEGMENTS;
    if (status == FLASH_KDA_OK)
        status = fkda_hopper_launch_fwd(driver, p, &args, CHUNK, count.first, multiprocessors, false);
    args.work = FKDA_INNER_SEGMENTS;
    if (status == FLASH_KDA_OK && count.inner)
        status = fkda_hopper_launch(driver, p, &args, kernels[MAPS],
                                    FKDA_HOPPER_PAIR_CTAS *
                                        (int)least(count.inner, fkda_hopper_pairs(multiprocessors)),
                                    FKDA_HOPPER_THREADS, true);
    if (status == FLASH_KDA_OK && count.inner)
        status = join(driver, p, d, &args, count.first, multiprocessors);
    args.work = FKDA_LATER_SEGMENTS;
    if (!p->batch_invariant)
        args.handoff = fkda_hopper_handoff((char *)p->workspace + m.handoff, multiprocessors);
    if (status == FLASH_KDA_OK)
        status = fkda_hopper_launch_fwd(driver, p, &args, CHUNK, count.later, multiprocessors, true);
    return status;
}

static flash_kda_status forward(const fkda_problem *p, cutting where)
{
    int multiprocessors;
    const fkda_driver *driver;
    flash_kda_status status = fkda_cuda_multiprocessors(p->device.index, &multiprocessors);
    if (status != FLASH_KDA_OK) return status;
    const division d = fkda_divide(p, multiprocessors, where);
    if (!cuts(&d)) return fkda_cuda_hopper_whole_fwd(p);
    status = fkda_enter_device(p->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_load_module(driver, &fkda_hopper_fwd_module, p->device.index);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, &segments_module, p->device.index);
    if (status == FLASH_KDA_OK) status = run(driver, p, &d, multiprocessors);
    fkda_leave_device(driver);
    return status;
}

static void explain_sharing(const fkda_relay *plan, char *text, size_t size)
{
    const int one = plan->shared[0].heads, other = plan->shared[1].heads;
    if (other)
        snprintf(text, size,
                 " The last two inner ones are shorter: pairs have those of %d and of %d heads, one after "
                 "the other.",
                 one, other);
    else if (one)
        snprintf(text, size,
                 " The last inner one is shorter: pairs have those of %d heads, one after the other.", one);
}

static void explain(const fkda_problem *p, cutting where, char *text, size_t size)
{
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) {
        snprintf(text, size, "%s", flash_kda_last_error());
        return;
    }
    const division d = fkda_divide(p, multiprocessors, where);
    if (!cuts(&d)) {
        fkda_cuda_hopper_whole_explain(p, text, size);
        return;
    }
    const long long shortest = d.shortest, slots = d.slots, pairs = fkda_hopper_pairs(multiprocessors);
    if (d.mixture.pairs) {
        snprintf(
            text, size,
            "One launch, on %lld pairs of multiprocessors, finds out which sequences have %lld tokens or "
            "more: "
            "each head of these has a pair or more, and is cut into as many segments as these and one more, "
            "if they are two. What pairs are left share out the other sequences evenly.",
            pairs, shortest);
        return;
    }
    if (d.at_once.pairs) {
        snprintf(text, size,
                 "Each sequence is cut into %lld segments, and one launch does it all, on %lld pairs of "
                 "multiprocessors: segments' maps, then the states that segments start from, then outputs.",
                 slots / (long long)p->sequences, (long long)d.at_once.pairs);
        explain_sharing(&d.at_once.plan, text + strlen(text), size - strlen(text));
        return;
    }
    snprintf(text, size,
             "Sequences of %lld tokens or more are cut into segments of %lld or more%s: %lld at most.\n"
             "The first pass finds the first segments' outputs and, beside them, the others' maps, on %lld "
             "pairs of "
             "multiprocessors. Maps are joined%s. The second pass finds the other outputs.",
             2 * shortest, shortest, p->batch_invariant ? ", whatever the batch" : "", slots, pairs,
             d.slots > FKDA_MAPS_CHAINED + 2 ? ", in two levels where they are many" : "");
}

static cutting where_to_cut(const fkda_problem *p)
{
    return p->cut == FLASH_KDA_CUT_ALWAYS  ? WHEREVER_POSSIBLE
           : p->cut == FLASH_KDA_CUT_MIXED ? IN_MIXTURES
                                           : WHERE_IT_PAYS;
}

size_t fkda_cuda_hopper_workspace_size(const fkda_problem *p)
{
    return p->cut == FLASH_KDA_CUT_NEVER ? fkda_cuda_hopper_whole_workspace_size(p)
                                         : workspace_size(p, where_to_cut(p));
}

flash_kda_status fkda_cuda_hopper_fwd(const fkda_problem *p)
{
    return p->cut == FLASH_KDA_CUT_NEVER ? fkda_cuda_hopper_whole_fwd(p) : forward(p, where_to_cut(p));
}

void fkda_cuda_hopper_explain(const fkda_problem *p, char *text, size_t size)
{
    if (p->cut == FLASH_KDA_CUT_NEVER)
        fkda_cuda_hopper_whole_explain(p, text, size);
    else
        explain(p, where_to_cut(p), text, size);
}
