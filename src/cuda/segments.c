/* Launches kernels/hopper/segments.cu: sequences cut into segments, which are then forwarded as sequences are. */
#include <stdio.h>

#include "../../kernels/hopper/segments.h"
#include "cuda.h"
#include "hopper.h"

extern const unsigned char fkda_fatbin_hopper_segments[];

enum { MAPS_128, MAPS_64, PLAN, COMPOSE, CHAIN, EXPAND };
static fkda_module segments_module = {
    .image = fkda_fatbin_hopper_segments,
    .names = {"fkda_hopper_maps_128", "fkda_hopper_maps_64", "fkda_hopper_plan", "fkda_hopper_join_compose",
              "fkda_hopper_join_chain", "fkda_hopper_join_expand"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum {
    CHUNK = 16, /* tokens */
    /* Tokens that a segment has at least: by estimate, shorter ones cost more in joining than they save. */
    SHORTEST_EVER = 64,
    /* Where results must not depend on the batch. Long enough for the workspace to stay under a quarter of the inputs. */
    SHORTEST_ALONE = 1024,
};

/* How sequences are cut, from shapes and the device alone. */
typedef struct division {
    int64_t shortest; /* tokens of a segment, at least */
    int64_t slots;    /* segments of sequences that are cut, at most */
    int64_t groups;   /* of maps, at most */
} division;

/* As long as lets every multiprocessor have one head of a segment in the second pass, where the tokens are of one sequence, whose
 * first segment is left out there. */
static division divide(const fkda_problem *p, int multiprocessors)
{
    const int64_t tokens = p->batch * p->tokens, chunks = tokens * p->heads / CHUNK,
                  parts = multiprocessors + p->heads;
    division d = {.shortest = (chunks + parts - 1) / parts * CHUNK};
    if (d.shortest < SHORTEST_EVER) d.shortest = SHORTEST_EVER;
    if (p->batch_invariant) d.shortest = SHORTEST_ALONE;
    d.slots = tokens / d.shortest;
    /* A sequence of n > FKDA_MAPS_CHAINED + 2 segments has ceil((n - 2) / FKDA_GROUP_MAPS) groups: at most n / 8. */
    d.groups = d.slots / 8;
    return d;
}

static bool cuts(const division *d)
{
    return d->slots >= 2; /* a sequence is cut into two segments at least */
}

/* Offsets in the workspace. */
typedef struct memory {
    size_t counts, lists[2], cut_sequences, states, maps, composed, size;
} memory;

/* Takes the next `bytes`, 64-byte aligned. */
static size_t take(size_t *end, int64_t count, size_t bytes)
{
    const size_t begin = *end;
    *end = (begin + (size_t)count * bytes + 63) / 64 * 64;
    return begin;
}

static memory lay_out_memory(const fkda_problem *p, const division *d)
{
    const size_t matrices = (size_t)p->heads * FKDA_DIM * FKDA_DIM * sizeof(float);
    size_t end = 0;
    memory m;
    m.counts = take(&end, 1, sizeof(fkda_cut_counts));
    m.lists[0] = take(&end, 2 * d->slots, sizeof(fkda_segment));
    m.lists[1] = take(&end, d->slots + p->sequences, sizeof(fkda_segment));
    m.cut_sequences = take(&end, d->slots / 2, sizeof(fkda_cut_sequence));
    m.states = take(&end, d->slots, matrices);
    m.maps = take(&end, d->slots, matrices);
    m.composed = take(&end, d->groups, matrices);
    m.size = end;
    return m;
}

size_t fkda_cuda_segments_workspace_size(const fkda_problem *p)
{
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) return 0;
    const division d = divide(p, multiprocessors);
    return cuts(&d) ? lay_out_memory(p, &d).size : fkda_cuda_hopper_workspace_size(p);
}

static fkda_cut find_memory(const fkda_problem *p, const division *d)
{
    const memory m = lay_out_memory(p, d);
    char *base = p->workspace;
    return (fkda_cut){
        .counts = (fkda_cut_counts *)(base + m.counts),
        .lists = {(fkda_segment *)(base + m.lists[0]), (fkda_segment *)(base + m.lists[1])},
        .cut_sequences = (fkda_cut_sequence *)(base + m.cut_sequences),
        .states = (float *)(base + m.states),
        .maps = (float *)(base + m.maps),
        .composed = (float *)(base + m.composed),
        .shortest = (int)d->shortest,
        .slots = (int)d->slots,
    };
}

static fkda_hopper_layout lay_out_first_pass(const fkda_problem *p, const division *d, int multiprocessors)
{
    return fkda_hopper_lay_out((2 * d->slots - 3) * p->heads, multiprocessors);
}

static fkda_hopper_layout lay_out_second_pass(const fkda_problem *p, const division *d, int multiprocessors)
{
    return fkda_hopper_lay_out((d->slots + p->sequences) * p->heads, multiprocessors);
}

static flash_kda_status join(const fkda_driver *driver, const fkda_problem *p, const division *d,
                             fkda_hopper_fwd_args *args, int multiprocessors)
{
    const CUfunction *kernels = segments_module.functions[p->device.index];
    const bool in_groups = d->slots > FKDA_MAPS_CHAINED + 2;
    for (int step = COMPOSE; step <= EXPAND; step++) {
        if (step != CHAIN && !in_groups) continue;
        flash_kda_status status =
            fkda_hopper_launch(driver, p, args, kernels[step], multiprocessors, FKDA_JOIN_THREADS);
        if (status != FLASH_KDA_OK) return status;
    }
    return FLASH_KDA_OK;
}

static flash_kda_status run(const fkda_driver *driver, const fkda_problem *p, const division *d,
                            int multiprocessors)
{
    fkda_hopper_fwd_args args;
    const fkda_hopper_layout first = lay_out_first_pass(p, d, multiprocessors),
                             second = lay_out_second_pass(p, d, multiprocessors);
    flash_kda_status status = fkda_hopper_arguments(driver, p, &args);
    if (status != FLASH_KDA_OK) return status;
    args.cut = find_memory(p, d);
    status = fkda_hopper_launch(driver, p, &args, segments_module.functions[p->device.index][PLAN], 1,
                                FKDA_PLAN_THREADS);
    args.fwd.counter = &args.cut.counts->drawn[0];
    if (status == FLASH_KDA_OK) status = fkda_hopper_launch_rows(driver, p, &args, &segments_module, &first);
    if (status == FLASH_KDA_OK) status = join(driver, p, d, &args, multiprocessors);
    args.fwd.counter = &args.cut.counts->drawn[1];
    if (status == FLASH_KDA_OK)
        status = fkda_hopper_launch_rows(driver, p, &args, &fkda_hopper_fwd_module, &second);
    return status;
}

flash_kda_status fkda_cuda_segments_fwd(const fkda_problem *p)
{
    int multiprocessors;
    const fkda_driver *driver;
    flash_kda_status status = fkda_cuda_multiprocessors(p->device.index, &multiprocessors);
    if (status != FLASH_KDA_OK) return status;
    const division d = divide(p, multiprocessors);
    if (!cuts(&d)) return fkda_cuda_hopper_fwd(p);
    status = fkda_enter_device(p->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_load_module(driver, &segments_module, p->device.index);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, &fkda_hopper_fwd_module, p->device.index);
    if (status == FLASH_KDA_OK) status = run(driver, p, &d, multiprocessors);
    fkda_leave_device(driver);
    return status;
}

void fkda_cuda_segments_explain(const fkda_problem *p, char *text, size_t size)
{
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) {
        snprintf(text, size, "%s", flash_kda_last_error());
        return;
    }
    const division d = divide(p, multiprocessors);
    if (!cuts(&d)) {
        fkda_cuda_hopper_explain(p, text, size);
        return;
    }
    const fkda_hopper_layout first = lay_out_first_pass(p, &d, multiprocessors),
                             second = lay_out_second_pass(p, &d, multiprocessors);
    const long long shortest = d.shortest, slots = d.slots;
    snprintf(
        text, size,
        "Sequences of %lld tokens or more are cut into segments of %lld or more%s: %lld at most.\n"
        "The first pass finds the first segments' outputs and the others' maps: %d rows of V a block, %d "
        "blocks. Maps are joined%s. The second pass finds the other outputs: %d rows a block, %d blocks.",
        2 * shortest, shortest, p->batch_invariant ? ", whatever the batch" : "", slots, first.rows,
        first.blocks, d.slots > FKDA_MAPS_CHAINED + 2 ? ", in two levels where they are many" : "",
        second.rows, second.blocks);
}
