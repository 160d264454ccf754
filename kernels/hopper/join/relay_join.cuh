/*
 * The join phase of a relay: between the map phase and the output phase, CTAs carry rows of a head's state
 * through the maps of its segments, as the kernel fkda_hopper_join does between two passes.
 *
 * The CTAs of the pairs that a head has for itself carry 16 rows each. The recurrence warps multiply; one
 * more warp, the map fetcher, brings the maps. Both CTAs of a pair have the same head, so each fetches half
 * of every map for both.
 *
 * During the join the other roles already prepare the first chunks of the output phase, which lie in the
 * first own slot and the first received slot of each CTA. So the join leaves these two slots alone: maps and
 * rows lie in all other own slots and in the last received slot.
 */
#ifndef FKDA_HOPPER_RELAY_JOIN_CUH
#define FKDA_HOPPER_RELAY_JOIN_CUH

#include "../block/shared.cuh"
#include "carry.cuh"

namespace fkda
{

/* Groups of 16 rows, each carried through all maps by one CTA. */
constexpr int JOIN_ROW_GROUPS = DIM / FKDA_JOIN_ROWS;

/* Finds which rows of which head this CTA carries, and when. The pair of the first segment has more to do
 * before the join than the other pairs, so it is left out if the other pairs suffice. One thread calls the
 * function before the output phase begins, because work inside the output phase would delay its first
 * chunk. */
template <class Assignment>
static __device__ void assign_join_rows(const Assignment &assignment, JoinPhase &join, int rank)
{
    const int left_out = FKDA_HOPPER_PAIR_CTAS * (assignment.pairs_of_head() - 1) >= JOIN_ROW_GROUPS;
    const int row_group = FKDA_HOPPER_PAIR_CTAS * (assignment.segment - left_out) + rank;
    const bool none = assignment.maps() == 0 || assignment.spare >= 0 ||
                      assignment.segment >= assignment.pairs_of_head() || row_group < 0 ||
                      row_group >= JOIN_ROW_GROUPS;
    join.has_rows = !none;
    if (none) return;
    join.head = assignment.head(assignment.head_index);
    join.first_slot = assignment.sequence(assignment.head_index).first_slot + 1;
    join.maps = assignment.maps();
    join.first_row_group = row_group;
    join.row_group_step = FKDA_HOPPER_PAIR_CTAS * (assignment.pairs_of_head() - left_out);
}

/* Where maps and rows are in shared memory: in all own slots but the first one, and in the last slot. */
template <class Block> struct RelayJoinMemory {
    static constexpr int QUARTERS = MAP_QUARTERS_AHEAD, IN_FRONT = QUARTERS - 1;
    struct Front {
        MapQuarter quarter[IN_FRONT];
    };
    struct Back {
        MapQuarter quarter;
        JoinRows rows;
    };
    static_assert(sizeof(Front) <= (Block::OWN_SLOTS - 1) * sizeof(Tokens<Block>) &&
                      sizeof(Back) <= sizeof(Tokens<Block>),
                  "maps and rows fit in these slots");
    Shared<Block> &shared;

    __device__ Back &back() const
    {
        return *reinterpret_cast<Back *>(&shared.tokens[Block::SLOTS - 1]);
    }
    __device__ MapQuarter &quarter(int i) const
    {
        return i < IN_FRONT ? reinterpret_cast<Front *>(&shared.tokens[1])->quarter[i] : back().quarter;
    }
    __device__ JoinRows &rows() const
    {
        return back().rows;
    }
    __device__ Ring<QUARTERS> &ring() const
    {
        return shared.join.ring;
    }

    /* Each CTA of the pair fetches every other quarter, for both CTAs. */
    static __device__ void fetch(MapQuarter *to, const MapQuarter *from, int q, uint64_t *barrier)
    {
        if (q % FKDA_HOPPER_PAIR_CTAS == cluster_rank()) copy_bulk_to_pair(to, from, sizeof *to, barrier);
    }
    static __device__ void release(uint64_t *barrier)
    {
        arrive_in_both(barrier);
    }
    static __device__ void arrive_in_both(uint64_t *barrier)
    {
        mbarrier_arrive_warp(barrier);
        mbarrier_arrive_warp_in_other_cta(barrier);
    }
};

template <class Block> struct RelayJoin {
    using Memory = RelayJoinMemory<Block>;
    Shared<Block> &shared;
    RowCarrier<Memory> carrier;
    int first_slot, maps;

    __device__ RelayJoin(const fkda_hopper_fwd_args &all, Shared<Block> &s)
        : shared(s), carrier(all.fwd, all.cut, Memory{s}), first_slot(s.join.first_slot), maps(s.join.maps)
    {
        carrier.head = s.join.head;
    }

    __device__ int *flags(int slot, int which) const
    {
        return Cut{carrier.args, carrier.cut}.flags(carrier.head, slot, which);
    }

    /* Run by the map fetcher. */
    __device__ void fetch_maps()
    {
        if (!shared.join.has_rows) return;
        mbarrier_wait(&shared.join.room_for_maps, 0);
#pragma unroll 1
        for (int group = shared.join.first_row_group; group < JOIN_ROW_GROUPS;
             group += shared.join.row_group_step)
            carrier.fetch(carrier.path_through(first_slot, maps), [&](int slot) {
                await_flag(flags(slot, FKDA_FLAG_MAP) + threadIdx.x % (DIM / 16));
                fence_async_proxy_of_all_memory();
            });
    }

    /* Run by the recurrence. */
    __device__ void carry_rows()
    {
        int cta, thread; /* read again: otherwise the recurrence would keep what is made from them */
        read_indices(cta, thread);
        const int warp = thread / 32, lane = thread % 32;
        static_assert(FKDA_MAPS_CHAINED < 32, "each lane waits for one state");
        Memory::arrive_in_both(&shared.join.room_for_maps);
        carrier.sync(); /* rows overwrite the slot where the last chunk of an earlier work item may be */
#pragma unroll 1
        for (int group = shared.join.first_row_group; group < JOIN_ROW_GROUPS;
             group += shared.join.row_group_step) {
            carrier.row = group * FKDA_JOIN_ROWS;
            await_flag(flags(first_slot + min(lane, maps), FKDA_FLAG_STATE) + group);
            carrier.carry_from(first_slot, carrier.path_through(first_slot, maps));
            carrier.sync(); /* all warps have stored their columns of the rows */
            for (int i = warp; i < maps; i += carrier.WARPS)
                set_flag(flags(first_slot + 1 + i, FKDA_FLAG_JOINED) + group);
        }
        fence_async_proxy(); /* copies of tokens overwrite the rows */
        Memory::arrive_in_both(&shared.join.room_for_tokens);
    }
};

} // namespace fkda

#endif
