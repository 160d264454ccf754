/*
 * The join: from M and B of each segment, which the map pass left in the workspace, to the states that
 * segments start from.
 *
 * With S_i^T the state before segment i of a sequence, as rows of V, M_i the segment's map and B_i the state
 * that the segment makes of zeros,
 *
 *     S_(i+1)^T = S_i^T M_i + B_i
 *
 * The slot of segment i + 1 holds B_i before the join and S_(i+1) after it. S_1, the state after the first
 * segment, is there from the start.
 *
 * Algorithm. Rows of a state are independent, so a CTA carries FKDA_JOIN_ROWS rows through all maps of a
 * sequence, one map after the other (step CHAIN). If a sequence has more than FKDA_MAPS_CHAINED maps, its
 * join has three steps, each of which is a launch: COMPOSE multiplies the maps of each group of
 * FKDA_GROUP_MAPS to one map and one state, all groups in parallel; CHAIN carries states from group to group;
 * and EXPAND carries states through the maps of each group, again in parallel.
 *
 * Optimizations. The code is kept small, because each launch has to fetch it from memory first.
 *
 * All warps read by themselves what a sequence's maps are. If lists or cu_seqlens change meanwhile, warps
 * wait for each other in vain. The warp that fetches maps gives up then: at its end it waits until all that
 * it has fetched is read and all other warps have ended.
 */
#ifndef FKDA_HOPPER_JOIN_CUH
#define FKDA_HOPPER_JOIN_CUH

#include "carry.cuh"

namespace fkda
{

/* Where the kernel fkda_hopper_join has maps and rows: in all of its shared memory. A relay has another such
 * struct (relay_join.cuh). */
struct JoinMemory {
    static constexpr int QUARTERS = 8;
    struct Shared {
        __align__(1024) MapQuarter quarter[QUARTERS];
        JoinRows rows;
        Ring<QUARTERS> ring;
        uint64_t others_done; /* all warps that compute have ended */
    };
    static_assert(sizeof(Shared) <= FKDA_HOPPER_SHARED_BYTES, "an SM has no more shared memory");
    Shared &shared;

    __device__ MapQuarter &quarter(int i) const
    {
        return shared.quarter[i];
    }
    __device__ JoinRows &rows() const
    {
        return shared.rows;
    }
    __device__ Ring<QUARTERS> &ring() const
    {
        return shared.ring;
    }

    /* Copies a quarter, whose bytes are already announced to `barrier`. */
    static __device__ void fetch(MapQuarter *to, const MapQuarter *from, int, uint64_t *barrier)
    {
        copy_bulk(to, from, sizeof *to, barrier);
    }
    /* This warp has read the quarter. */
    static __device__ void release(uint64_t *barrier)
    {
        mbarrier_arrive_warp(barrier);
    }
};

/* The paths of the three steps. */
struct JoinCarrier : RowCarrier<JoinMemory> {
    using RowCarrier<JoinMemory>::RowCarrier;

    /* The first and the last map of a map group. */
    __device__ void find_map_group(const fkda_cut_sequence &c, int map_group, int &first, int &last) const
    {
        first = c.first_slot + 1 + map_group * FKDA_GROUP_MAPS;
        last = min(first + FKDA_GROUP_MAPS, c.first_slot + c.segments - 1) - 1;
    }

    /* COMPOSE: through the maps of a group but the first one, from rows of the first map or, for the group's
     * state, from the state after the first map. */
    __device__ Path path_of_composing(const fkda_cut_sequence &c, int map_group, bool state) const
    {
        int first, last;
        find_map_group(c, map_group, first, last);
        return {cut.maps, first + 1, last - first, first + 2, 1, last + 1, state, false};
    }

    /* CHAIN: through all maps of a sequence or, if there are `groups` map groups, through their composed
     * maps. */
    __device__ Path path_of_chain(const fkda_cut_sequence &c, int groups) const
    {
        const int maps = c.segments - 2, last = c.first_slot + c.segments - 1;
        return groups ? Path{cut.composed,    c.first_group, groups, c.first_slot + 1 + FKDA_GROUP_MAPS,
                             FKDA_GROUP_MAPS, last,          true,   true}
                      : Path{cut.maps, c.first_slot + 1, maps, c.first_slot + 2, 1, last, true, true};
    }

    /* EXPAND: through the maps of a group but the last one; the state after the group is there already. */
    __device__ Path path_of_expanding(const fkda_cut_sequence &c, int map_group) const
    {
        int first, last;
        find_map_group(c, map_group, first, last);
        return path_through(first, last - first);
    }
};

/* Backwards, through all maps of a sequence, of which there are at most FKDA_MAPS_CHAINED: from the gradient
 * behind the last segment but one to those behind all earlier segments. Slot i has the gradient behind
 * segment i, and before the join what segment i + 1 makes of zeros. */
struct BackCarrier : RowCarrier<JoinMemory, true> {
    using RowCarrier<JoinMemory, true>::RowCarrier;

    __device__ Path path_of_chain(const fkda_cut_sequence &c) const
    {
        const int last = c.first_slot + c.segments - 2; /* inner segment */
        return {cut.maps, last, c.segments - 2, last - 1, -1, c.first_slot, true, true};
    }
};

/* ---- The kernel ---------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void begin_join(JoinMemory::Shared &shared, int warps)
{
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (uint64_t &barrier : shared.ring.full) mbarrier_init(&barrier, 1);
        for (uint64_t &barrier : shared.ring.empty) mbarrier_init_for_warps(&barrier, warps);
        mbarrier_init_for_warps(&shared.others_done, warps);
        fence_mbarrier_init();
    }
    __syncthreads();
    wait_for_previous_kernel();
}

template <class Carrier>
static __device__ __forceinline__ void end_join(JoinMemory::Shared &shared, Carrier &work, bool fetches)
{
    if (!fetches) {
        mbarrier_arrive_warp(&shared.others_done);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < JoinMemory::QUARTERS; i++, work.slot.advance(1))
        mbarrier_wait_or_give_up(&shared.ring.empty[work.slot.index], work.slot.parity ^ 1);
    mbarrier_wait_or_give_up(&shared.others_done, 0);
}

/* Gradients with respect to states, backwards through all cut sequences. */
static __device__ __forceinline__ void join_back(const fkda_fwd_args &args, const fkda_cut &cut)
{
    JoinMemory::Shared &shared = *reinterpret_cast<JoinMemory::Shared *>(cta_memory());
    BackCarrier work(args, cut, JoinMemory{shared});
    const Cut rules = {args, cut};
    const bool fetches = threadIdx.x >= FKDA_JOIN_THREADS;
    constexpr unsigned ROW_GROUPS = DIM / FKDA_JOIN_ROWS;
    begin_join(shared, work.WARPS);
    const unsigned heads = static_cast<unsigned>(args.heads), of_each = heads * ROW_GROUPS,
                   items = static_cast<unsigned>(Cut::of_first_lane(rules.cut_sequences())) * of_each;
    for (unsigned item = blockIdx.x; item < items; item += gridDim.x) {
        const unsigned c = item / of_each, within = item % of_each;
        const fkda_cut_sequence sequence = Cut::of_first_lane(rules.cut_sequence(static_cast<int>(c)));
        work.head = static_cast<int>(within / ROW_GROUPS);
        work.row = static_cast<int>(within % ROW_GROUPS) * FKDA_JOIN_ROWS;
        const auto path = work.path_of_chain(sequence);
        if (fetches)
            work.fetch(path, [](int) {});
        else
            work.carry_from(path.first_map, path);
    }
    end_join(shared, work, fetches);
}

/* One step (FKDA_JOIN_COMPOSE, ...) for all cut sequences. A work item is 16 rows of one head's state or map;
 * CTA i has the work items i, i + gridDim.x, ... */
static __device__ __forceinline__ void join(const fkda_fwd_args &args, const fkda_cut &cut, int step)
{
    JoinMemory::Shared &shared = *reinterpret_cast<JoinMemory::Shared *>(cta_memory());
    JoinCarrier work(args, cut, JoinMemory{shared});
    const Cut rules = {args, cut};
    const bool fetches = threadIdx.x >= FKDA_JOIN_THREADS;
    const bool composes = step == FKDA_JOIN_COMPOSE, chains = step == FKDA_JOIN_CHAIN;
    constexpr unsigned ROW_GROUPS = DIM / FKDA_JOIN_ROWS;
    const unsigned row_groups =
        composes ? 2 * ROW_GROUPS : ROW_GROUPS; /* of a map and a state, or of a state */

    begin_join(shared, work.WARPS);

    /* ---- Work items ---- */
    const int count = Cut::of_first_lane(rules.cut_sequences());
    const unsigned heads = static_cast<unsigned>(args.heads);
    unsigned before = 0; /* work items of the sequences before c */
    for (unsigned c = 0, item = blockIdx.x; c < static_cast<unsigned>(count); c++) {
        const fkda_cut_sequence sequence = Cut::of_first_lane(rules.cut_sequence(static_cast<int>(c)));
        const int groups = rules.groups_of(sequence.segments);
        const unsigned items = static_cast<unsigned>(chains ? 1 : groups) * heads * row_groups;
        for (; item < before + items; item += gridDim.x) {
            const unsigned within = item - before, row_group = within % row_groups;
            const int map_group = static_cast<int>(within / row_groups / heads);
            const bool state = row_group >= ROW_GROUPS; /* COMPOSE: of the group's state, not of its map */
            work.head = static_cast<int>(within / row_groups) - map_group * args.heads;
            work.row = static_cast<int>(row_group % ROW_GROUPS) * FKDA_JOIN_ROWS;
            const auto path = composes ? work.path_of_composing(sequence, map_group, state)
                              : chains ? work.path_of_chain(sequence, groups)
                                       : work.path_of_expanding(sequence, map_group);
            if (fetches) {
                work.fetch(path, [](int) {});
                continue;
            }
            JoinCarrier::Rows x;
            if (composes && !state)
                work.load_map(x, work.place(cut.maps, path.first_map - 1));
            else
                work.load(x, work.place(cut.states, chains ? sequence.first_slot + 1 : path.first_map));
            work.carry(x, path);
            if (composes && state) work.store(work.place(cut.states, path.last_slot), x);
            if (composes && !state)
                work.store_map(work.place(cut.composed, sequence.first_group + map_group), x);
        }
        before += items;
    }

    end_join(shared, work, fetches);
}

} // namespace fkda

#endif
