/*
 * All segments in one launch, where every head of a segment but the last has a pair of blocks and all of them run at the same time:
 * blocks then wait for each other where else one launch would wait for the one before. A pair
 *
 *   finds its segment's map and what that makes of zeros, or of a first segment the state after it;
 *   carries some rows of the head through all maps, from the state after the first segment to those that others start from (join.cuh); and
 *   walks through its segment. The pair of a first segment does so for the last one.
 *
 * First segments' outputs are the work of pairs that are more than that, from the start. If there are none, the pair of a first segment
 * walks through that from the start, to its outputs and the state after it; it has no map to find, and begins with its second part.
 *
 * Where so many pairs are left that heads could have half of one more each, say, a segment more is shared: a pair has it of two heads, finds
 * one's map and then the other's, and later walks through one and then the other. It is shorter than the others.
 *
 * Each goes on where the flags of what it needs are set (fkda_cut), which are zeros before the launch.
 */
#ifndef FKDA_HOPPER_RELAY_CUH
#define FKDA_HOPPER_RELAY_CUH

#include "../block/shared.cuh"
#include "../join/join.cuh"
#include "even_shares.cuh"

namespace fkda
{

/* What the pair that asks is there for. */
struct RelayAssignment {
    Cut cut;
    const fkda_relay &plan;
    int segments;   /* of each sequence */
    int head_index; /* the pair's first head, counted over all sequences; */
    int heads;      /* how many it has; */
    int segment;    /* and the segment of theirs that it finds the maps of */
    int spare;      /* or, if this is not negative, its number among those that are more than are needed */

    static __device__ int pair()
    {
        return static_cast<int>(blockIdx.x) / FKDA_HOPPER_PAIR_CTAS;
    }

    /* Of small numbers. */
    static __device__ int quotient(int x, int y)
    {
        return static_cast<int>((static_cast<float>(x) + 0.5f) * rcp(static_cast<float>(y)));
    }

    __device__ explicit RelayAssignment(const fkda_hopper_fwd_args &all)
        : cut{all.fwd, all.cut}, plan(all.cut.relay), segments(plan.segments), heads(1), spare(-1)
    {
        const Task first = cut.sequence(0);
        if (first.chunks != plan.chunks) segments = min(cut.segments_of(first.length), plan.inner + 2);
        int rest = pair() - all_heads() * of_head();
        if (rest < 0) {
            head_index = quotient(pair(), of_head()), segment = pair() - head_index * of_head();
            return;
        }
        for (int i = 0; i < FKDA_RELAY_SHARED; i++) {
            const int each = plan.shared[i].heads;
            if (rest < plan.shared[i].pairs) {
                head_index = rest * each, heads = min(each, all_heads() - head_index),
                segment = of_head() + i;
                return;
            }
            rest -= plan.shared[i].pairs;
        }
        head_index = spare = rest, segment = 0;
    }

    /* Whether the pair may have something to do before states are joined. */
    static __device__ bool finds_maps(const fkda_hopper_fwd_args &all)
    {
        const fkda_relay &plan = all.cut.relay;
        const int of_head = plan.inner + 1, own = all.fwd.sequences * all.fwd.heads * of_head;
        if (plan.spare_pairs || pair() >= own) return pair() < plan.needed_pairs;
        return pair() != quotient(pair(), of_head) * of_head;
    }

    __device__ int of_head() const /* pairs that have one head, for each head */
    {
        return plan.inner + 1;
    }
    __device__ int all_heads() const /* of all sequences */
    {
        return cut.args.sequences * cut.args.heads;
    }
    __device__ int sequence_of(int index) const
    {
        return cut.args.sequences == 1 ? 0 : index / cut.args.heads;
    }
    __device__ int head(int index) const
    {
        return index - sequence_of(index) * cut.args.heads;
    }
    __device__ fkda_cut_sequence sequence(int index) const
    {
        const int n = sequence_of(index);
        return {n, segments, n * segments, 0};
    }

    /* Whether the pair of a first segment leaves its outputs to another one. */
    __device__ bool spares_compute_first() const
    {
        return plan.spare_pairs > 0 && segments > 1;
    }

    __device__ int maps() const /* of a head */
    {
        return max(segments - 2, 0);
    }

    __device__ int spare_pairs() const
    {
        return plan.spare_pairs;
    }

    __device__ fkda_segment segment_of(const fkda_cut_sequence &c, int i) const
    {
        return segments > 1 ? cut.segment(c, i) : cut.whole(c.sequence);
    }
};

/* The rows of a head are carried in JOIN_ROW_GROUPS, by a block each: those of the pairs that have this head alone in turn, without the one that has
 * the first segment, and is late, where there are enough others. Called ahead, since what is computed first takes time. */
constexpr int JOIN_ROW_GROUPS = DIM / FKDA_JOIN_ROWS;
template <class Assignment>
static __device__ void assign_join_rows(const Assignment &assignment, JoinPhase<true> &join, int rank)
{
    const int left_out = FKDA_HOPPER_PAIR_CTAS * (assignment.of_head() - 1) >= JOIN_ROW_GROUPS;
    const int part = FKDA_HOPPER_PAIR_CTAS * (assignment.segment - left_out) + rank;
    const bool none = assignment.maps() == 0 || assignment.spare >= 0 ||
                      assignment.segment >= assignment.of_head() || part < 0 || part >= JOIN_ROW_GROUPS;
    join.begins = none ? JoinPhase<true>::NEVER
                  : assignment.spares_compute_first() || assignment.segment > 0
                      ? JoinPhase<true>::BEFORE_FIRST_ITEM
                      : JoinPhase<true>::AFTER_FIRST_ITEM;
    if (none) return;
    join.head = assignment.head(assignment.head_index),
    join.first_slot = assignment.sequence(assignment.head_index).first_slot + 1,
    join.maps = assignment.maps();
    join.part = part, join.step = FKDA_HOPPER_PAIR_CTAS * (assignment.of_head() - left_out);
}

template <class Block, class Assignment> struct RelaySource : WorkItemMaker<Block> {
    Assignment assignment;
    int head_index,
        next_segment; /* the next_segment item: a head, and which of its segments; past the last: none */
    bool joins;

    __device__ RelaySource(const fkda_hopper_fwd_args &all, int rank_in_pair, int)
        : WorkItemMaker<Block>(all, rank_in_pair), assignment(all), head_index(assignment.head_index),
          joins(false)
    {
        if constexpr (Block::JOINS)
            joins =
                reinterpret_cast<const Shared<Block> *>(cta_memory())->join.begins != JoinPhase<true>::NEVER;
        next_segment = first_segment();
    }

    __device__ int first_segment() const
    {
        const int none = assignment.segments;
        if (assignment.spare >= 0)
            return Block::OUTPUTS && assignment.spares_compute_first() && head_index < assignment.all_heads()
                       ? 0
                       : none;
        if (assignment.segment > 0)
            return assignment.segment < assignment.segments - 1 ? assignment.segment : none;
        if (Block::OUTPUTS) return assignment.spares_compute_first() ? assignment.segments - 1 : 0;
        return assignment.spares_compute_first() ? 0 : none;
    }

    /* A first segment's walk is followed by another such one, or by the last segment's. A segment that is shared is followed by the same
     * one of the next_segment head. */
    __device__ void advance()
    {
        const bool first = next_segment == 0;
        if (!first && ++head_index < assignment.head_index + assignment.heads) return;
        next_segment = assignment.segments;
        if (!Block::OUTPUTS || !first) return;
        if (assignment.spare < 0)
            next_segment = assignment.segments > 1 ? assignment.segments - 1 : 1;
        else if ((head_index += assignment.spare_pairs()) < assignment.all_heads())
            next_segment = 0;
    }

    __device__ WorkItem next()
    {
        const int i = next_segment, head = assignment.head(head_index);
        if (i >= assignment.segments) return WorkItemMaker<Block>::none();
        const fkda_cut_sequence c = assignment.sequence(head_index);
        const fkda_segment s = assignment.segment_of(c, i);
        WorkItem item = this->item_of(s, head);
        advance();
        if (!Block::OUTPUTS) {
            item.flags = this->rank == 0 ? assignment.cut.flags(head, s.slot, FKDA_FLAG_MAP)
                                         : assignment.cut.flags(head, s.slot + 1, FKDA_FLAG_STATE);
            item.attributes |= next_segment < assignment.segments ? SIGNALS_FINAL | NOT_LAST : SIGNALS_FINAL;
            return item;
        }
        if (i == 0) {
            if (assignment.segments == 1) return item;
            if (assignment
                    .spares_compute_first()) { /* the state after it comes from the first part of the pair of the segment */
                item.final = nullptr;
                return item;
            }
            item.flags = assignment.cut.flags(head, s.slot + 1, FKDA_FLAG_STATE) + item.first_row / 16;
            item.attributes |= SIGNALS_FINAL;
            return item;
        }
        item.flags = assignment.cut.flags(head, s.slot, i == 1 ? FKDA_FLAG_STATE : FKDA_FLAG_JOINED) +
                     item.first_row / 16;
        item.attributes |= AWAITS_INITIAL;
        if (this->joins) item.attributes |= AFTER_JOIN;
        return item;
    }
};

/* For the join: all of the block's own slots but the first, and the last slot. */
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
                  "that is where they are");
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

    /* The blocks of a pair need the same maps: each brings every other quarter, to both. */
    static __device__ void bring(MapQuarter *to, const MapQuarter *from, int q, uint64_t *barrier)
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

/* A block's part in the join. */
template <class Block> struct RelayJoin {
    using Memory = RelayJoinMemory<Block>;
    Shared<Block> &shared;
    Join<Memory> join;
    int first_slot, maps;

    __device__ RelayJoin(const fkda_hopper_fwd_args &all, Shared<Block> &s)
        : shared(s), join(all.fwd, all.cut, Memory{s}), first_slot(s.join.first_slot), maps(s.join.maps)
    {
        join.head = s.join.head;
    }

    __device__ int *flags(int slot, int kind) const
    {
        return Cut{join.args, join.cut}.flags(join.head, slot, kind);
    }

    /* By one warp. */
    __device__ void bring_maps()
    {
        if (shared.join.begins == JoinPhase<true>::NEVER) return;
        mbarrier_wait(&shared.join.room_for_maps, 0);
#pragma unroll 1
        for (int part = shared.join.part; part < JOIN_ROW_GROUPS; part += shared.join.step)
            join.bring(join.path_through(first_slot, maps), [&](int slot) {
                await_flag(flags(slot, FKDA_FLAG_MAP) + threadIdx.x % (DIM / 16));
                fence_async_proxy_of_all_memory();
            });
    }

    /* By the recurrence's. */
    __device__ void carry_rows()
    {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        static_assert(FKDA_MAPS_CHAINED < 32, "a lane for each state");
        Memory::arrive_in_both(&shared.join.room_for_maps);
        join.sync(); /* rows go where the last chunk of a item before may be */
#pragma unroll 1
        for (int part = shared.join.part; part < JOIN_ROW_GROUPS; part += shared.join.step) {
            join.row = part * FKDA_JOIN_ROWS;
            await_flag(flags(first_slot + min(lane, maps), FKDA_FLAG_STATE) + part);
            join.carry_from(first_slot, join.path_through(first_slot, maps));
            join.sync(); /* all rows are there */
            for (int i = warp; i < maps; i += join.WARPS)
                set_flag(flags(first_slot + 1 + i, FKDA_FLAG_JOINED) + part);
        }
        fence_async_proxy(); /* later copies overwrite the rows */
        Memory::arrive_in_both(&shared.join.room_for_tokens);
    }
};

} // namespace fkda

#endif
