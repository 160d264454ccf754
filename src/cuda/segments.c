/* Launches kernels/hopper/segments.cu: sequences cut into segments, which are then forwarded as sequences are. */
#include <stdio.h>

#include "../../kernels/hopper/segments.h"
#include "cuda.h"
#include "hopper.h"

extern const unsigned char fkda_fatbin_hopper_segments[];

enum { MAPS, PLAN, COMPOSE, CHAIN, EXPAND };
static fkda_module segments_module = {
    .image = fkda_fatbin_hopper_segments,
    .names = {"fkda_hopper_maps", "fkda_hopper_plan", "fkda_hopper_join_compose", "fkda_hopper_join_chain",
              "fkda_hopper_join_expand"},
    .shared_bytes = FKDA_HOPPER_SHARED_BYTES,
    .lock = PTHREAD_MUTEX_INITIALIZER,
};

enum {
    CHUNK = FKDA_HOPPER_CHUNK_PAIRED,
    /* Tokens that a segment has at least: shorter ones cost more in joining than they save. */
    SHORTEST_EVER = 128,
    /* Where results must not depend on the batch. Long enough for the workspace to stay under a quarter of the inputs. */
    SHORTEST_ALONE = 1024,
    /* Clocks, fitted to times on an H100 (BENCHMARK_H100.md): a chunk's map and state in the first pass, a step of the join, what more
     * launches there are than one, and what it takes longer if the join's blocks and the second pass's find no free
     * multiprocessor to start on before the pass before is over. */
    CHUNK_MAP = 2200,
    JOIN_STEP = 2000,
    LAUNCHES = 11000,
    GROUPS = 15000, /* what a join in two levels takes besides its steps */
    LATE = 29000,
    PIECE = 12000,         /* a piece's beginning and end */
    IDLE_LAUNCHES = 20000, /* where there is nothing to cut after all */
    WORTH_PERCENT = 95,    /* of the time without cutting: estimates are off by a few percent */
};

/* How sequences are cut, from shapes and the device alone. */
typedef struct division {
    int64_t shortest; /* tokens of a segment, at least; 0: nothing is cut */
    int64_t slots;    /* segments of sequences that are cut, at most */
    int64_t groups;   /* of maps, at most */
} division;

static int64_t rounds(int64_t pieces, int64_t places)
{
    return (pieces + places - 1) / places;
}

static int64_t least(int64_t x, int64_t y)
{
    return x < y ? x : y;
}

/* Clocks for so many pieces of so many chunks in pairs, which divide them if they are fewer. */
static int64_t paired_clocks(int64_t pieces, int64_t chunks, int64_t pairs)
{
    return FKDA_HOPPER_CLOCKS_PAIRED * (pieces <= pairs ? chunks : rounds(pieces * chunks, pairs)) +
           PIECE * rounds(pieces, pairs);
}

/* The same, or in blocks that have a piece each, whatever takes less. */
static int64_t uncut_clocks(int64_t pieces, int64_t chunks, int multiprocessors)
{
    const int64_t halves = chunks * FKDA_HOPPER_CHUNK_PAIRED / FKDA_HOPPER_CHUNK_ALONE;
    const int64_t alone =
        FKDA_HOPPER_CLOCKS_ALONE *
            (pieces <= multiprocessors ? halves : rounds(pieces * halves, multiprocessors)) +
        PIECE * rounds(pieces, multiprocessors);
    return least(alone, paired_clocks(pieces, chunks, fkda_hopper_pairs(multiprocessors)));
}

/* Steps of the join for so many maps of a sequence: in two levels each waits for a group, for the groups, and for a group. */
static int64_t join_steps(int64_t maps)
{
    return maps > FKDA_MAPS_CHAINED ? 2 * FKDA_GROUP_MAPS + rounds(maps, FKDA_GROUP_MAPS) : maps;
}

/* Clocks for so many heads of sequences of so many chunks, cut into so many segments each. */
static int64_t clocks_of(int64_t heads, int64_t chunks, int64_t segments, int multiprocessors)
{
    const int64_t pairs = fkda_hopper_pairs(multiprocessors), pieces = heads * (segments - 1);
    if (segments == 1) return uncut_clocks(heads, chunks, multiprocessors);
    const int64_t each = rounds(chunks, segments);
    const int64_t first =
        ((segments == 2 ? FKDA_HOPPER_CLOCKS_PAIRED : CHUNK_MAP) * each + PIECE) * rounds(pieces, pairs);
    const int64_t joining = segments > 2 ? heads * (FKDA_DIM / FKDA_JOIN_ROWS) : 0;
    const bool late = FKDA_HOPPER_PAIR * pieces + joining > multiprocessors;
    return first + paired_clocks(pieces, each, pairs) + JOIN_STEP * join_steps(segments - 2) + LAUNCHES +
           (late ? LATE : 0) + (segments - 2 > FKDA_MAPS_CHAINED ? GROUPS : 0);
}

/* Into how many segments so many heads of sequences of so many chunks are cut best. */
static int64_t best_segments(int64_t heads, int64_t chunks, int multiprocessors)
{
    int64_t best = 1, least = clocks_of(heads, chunks, 1, multiprocessors) * WORTH_PERCENT / 100;
    const int64_t most = chunks * CHUNK / SHORTEST_EVER;
    for (int64_t segments = 2; segments <= most && heads * (segments - 2) <= 2 * multiprocessors;
         segments++) {
        const int64_t clocks = clocks_of(heads, chunks, segments, multiprocessors);
        if (clocks < least) best = segments, least = clocks;
    }
    return best;
}

/* All sequences have the same length, or there is one. */
static bool sequences_are_alike(const fkda_problem *p)
{
    return p->sequences == p->batch;
}

/* Tokens of a segment where that pays, or 0. Lengths are not known here, and not cutting must not be better for any: so if
 * sequences of equal length are best cut, segments are as long as those are then. If not, such ones stay whole, and longer
 * ones are cut as if all tokens were of one sequence, if the launches that do nothing for equal ones take less than 3%. */
static int64_t shortest_that_pays(const fkda_problem *p, int multiprocessors)
{
    const int64_t chunks = p->batch * p->tokens / CHUNK, heads = p->sequences * p->heads;
    const int64_t equal = chunks / p->sequences; /* chunks of each, if all are as long */
    const int64_t of_equal = best_segments(heads, equal, multiprocessors);
    if (of_equal > 1) return equal / of_equal * CHUNK;
    if (sequences_are_alike(p) || 100 * IDLE_LAUNCHES > 3 * clocks_of(heads, equal, 1, multiprocessors))
        return 0;
    const int64_t of_one = best_segments(p->heads, chunks, multiprocessors);
    if (of_one == 1) return 0;
    const int64_t shortest = chunks / of_one;
    return (2 * shortest > equal ? shortest : equal / 2 + 1) * CHUNK;
}

/* As long as gives every place of a pass one head of a segment, where the tokens are of one sequence. */
static int64_t shortest_that_fills(const fkda_problem *p, int multiprocessors)
{
    const int64_t chunks = p->batch * p->tokens * p->heads / CHUNK,
                  parts = fkda_hopper_pairs(multiprocessors) + p->heads;
    return rounds(chunks, parts) * CHUNK;
}

static division divide(const fkda_problem *p, int multiprocessors, bool wherever_possible)
{
    division d = {0};
    if (p->sequences == 0 || p->heads == 0) return d;
    d.shortest = p->batch_invariant  ? SHORTEST_ALONE
                 : wherever_possible ? shortest_that_fills(p, multiprocessors)
                                     : shortest_that_pays(p, multiprocessors);
    if (d.shortest == 0) return d;
    if (d.shortest < SHORTEST_EVER) d.shortest = SHORTEST_EVER;
    d.slots = p->batch * p->tokens / d.shortest;
    if (sequences_are_alike(p)) { /* then it is known into how many each is cut */
        const int64_t segments = p->tokens / d.shortest;
        d.slots = segments >= 2 ? p->sequences * segments : 0;
    }
    /* A sequence of n > FKDA_MAPS_CHAINED + 2 segments has ceil((n - 2) / FKDA_GROUP_MAPS) groups: at most n / 6. */
    d.groups = d.slots / 6;
    return d;
}

static bool cuts(const division *d)
{
    return d->slots >= 2; /* a sequence is cut into two segments at least */
}

/* Offsets in the workspace. */
typedef struct memory {
    size_t handoff, counts, inner, later, cut_sequences, states, maps, composed, size;
} memory;

/* Takes the next `bytes`, 64-byte aligned. */
static size_t take(size_t *end, int64_t count, size_t bytes)
{
    const size_t begin = *end;
    *end = (begin + (size_t)count * bytes + 63) / 64 * 64;
    return begin;
}

static memory lay_out_memory(const fkda_problem *p, const division *d, int multiprocessors)
{
    const size_t matrices = (size_t)p->heads * FKDA_DIM * FKDA_DIM * sizeof(float);
    size_t end = 0;
    memory m;
    m.handoff = take(&end, 1, fkda_hopper_handoff_size(multiprocessors));
    m.counts = take(&end, 1, sizeof(fkda_cut_counts));
    m.inner = take(&end, d->slots, sizeof(fkda_segment));
    m.later = take(&end, d->slots + p->sequences, sizeof(fkda_segment));
    m.cut_sequences = take(&end, d->slots / 2, sizeof(fkda_cut_sequence));
    m.states = take(&end, d->slots, matrices);
    m.maps = take(&end, d->slots, matrices);
    m.composed = take(&end, d->groups, matrices);
    m.size = end;
    return m;
}

static size_t workspace_size(const fkda_problem *p, bool wherever_possible)
{
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) return 0;
    const division d = divide(p, multiprocessors, wherever_possible);
    if (cuts(&d)) return lay_out_memory(p, &d, multiprocessors).size;
    return fkda_cuda_hopper_whole_workspace_size(p);
}

static fkda_cut find_memory(const fkda_problem *p, const division *d, const memory *m)
{
    char *base = p->workspace;
    return (fkda_cut){
        .counts = (fkda_cut_counts *)(base + m->counts),
        .inner = (fkda_segment *)(base + m->inner),
        .later = (fkda_segment *)(base + m->later),
        .cut_sequences = (fkda_cut_sequence *)(base + m->cut_sequences),
        .states = (float *)(base + m->states),
        .maps = (float *)(base + m->maps),
        .composed = (float *)(base + m->composed),
        .shortest = (int)d->shortest,
        .slots = (int)d->slots,
        .alike = sequences_are_alike(p),
        .segments = sequences_are_alike(p) && !p->cu_seqlens ? (int)(d->slots / p->sequences) : 0,
    };
}

/* Heads of what the launches work through, at most. */
typedef struct pieces {
    int64_t first, inner, later;
} pieces;

static pieces count_pieces(const fkda_problem *p, const division *d)
{
    const int64_t cut = sequences_are_alike(p) ? p->sequences : least(p->sequences, d->slots / 2);
    return (pieces){
        .first = cut * p->heads,
        .inner = (d->slots - (sequences_are_alike(p) ? 2 * cut : 2)) * p->heads,
        .later = (d->slots + p->sequences - (sequences_are_alike(p) ? 2 * cut : 2)) * p->heads,
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
                               FKDA_JOIN_THREADS, true);
        if (status != FLASH_KDA_OK) return status;
    }
    return FLASH_KDA_OK;
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
    if (!args.cut.alike)
        status = fkda_hopper_launch(driver, p, &args, kernels[PLAN], 1, FKDA_PLAN_THREADS, false);
    args.work = FKDA_FIRST_SEGMENTS;
    if (status == FLASH_KDA_OK)
        status = fkda_hopper_launch_fwd(driver, p, &args, CHUNK, count.first, multiprocessors, false);
    args.work = FKDA_INNER_SEGMENTS;
    if (status == FLASH_KDA_OK && count.inner)
        status =
            fkda_hopper_launch(driver, p, &args, kernels[MAPS],
                               FKDA_HOPPER_PAIR * (int)least(count.inner, fkda_hopper_pairs(multiprocessors)),
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

static flash_kda_status forward(const fkda_problem *p, bool wherever_possible)
{
    int multiprocessors;
    const fkda_driver *driver;
    flash_kda_status status = fkda_cuda_multiprocessors(p->device.index, &multiprocessors);
    if (status != FLASH_KDA_OK) return status;
    const division d = divide(p, multiprocessors, wherever_possible);
    if (!cuts(&d)) return fkda_cuda_hopper_whole_fwd(p);
    status = fkda_enter_device(p->device.index, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_load_module(driver, &fkda_hopper_fwd_module, p->device.index);
    if (status == FLASH_KDA_OK) status = fkda_load_module(driver, &segments_module, p->device.index);
    if (status == FLASH_KDA_OK) status = run(driver, p, &d, multiprocessors);
    fkda_leave_device(driver);
    return status;
}

static void explain(const fkda_problem *p, bool wherever_possible, char *text, size_t size)
{
    int multiprocessors;
    if (fkda_cuda_multiprocessors(p->device.index, &multiprocessors) != FLASH_KDA_OK) {
        snprintf(text, size, "%s", flash_kda_last_error());
        return;
    }
    const division d = divide(p, multiprocessors, wherever_possible);
    if (!cuts(&d)) {
        fkda_cuda_hopper_whole_explain(p, text, size);
        return;
    }
    const long long shortest = d.shortest, slots = d.slots, pairs = fkda_hopper_pairs(multiprocessors);
    snprintf(text, size,
             "Sequences of %lld tokens or more are cut into segments of %lld or more%s: %lld at most.\n"
             "The first pass finds the first segments' outputs and, beside them, the others' maps, on %lld "
             "pairs of "
             "multiprocessors. Maps are joined%s. The second pass finds the other outputs.",
             2 * shortest, shortest, p->batch_invariant ? ", whatever the batch" : "", slots, pairs,
             d.slots > FKDA_MAPS_CHAINED + 2 ? ", in two levels where they are many" : "");
}

size_t fkda_cuda_hopper_workspace_size(const fkda_problem *p)
{
    return workspace_size(p, false);
}

flash_kda_status fkda_cuda_hopper_fwd(const fkda_problem *p)
{
    return forward(p, false);
}

void fkda_cuda_hopper_explain(const fkda_problem *p, char *text, size_t size)
{
    explain(p, false, text, size);
}

size_t fkda_cuda_hopper_segments_workspace_size(const fkda_problem *p)
{
    return workspace_size(p, true);
}

flash_kda_status fkda_cuda_hopper_segments_fwd(const fkda_problem *p)
{
    return forward(p, true);
}

void fkda_cuda_hopper_segments_explain(const fkda_problem *p, char *text, size_t size)
{
    explain(p, true, text, size);
}
